"""The report: Markdown with its plots beside it, from whatever the record holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from resformer_kernels.bench.tables import duration, markdown, speed_table, summary_table, table
from resformer_kernels.demo import plots
from resformer_kernels.demo.record import FILE, Record
from resformer_kernels.demo.training import ModelRun
from resformer_kernels.demo.writing import DRAWS, Writing

REPORT = "report.md"
RANKS_NOTHING = (
    "Minutes of training rank nothing: at this size and length the order of the models is not "
    "evidence for or against any of them. The paper's comparisons train 82M parameters and more "
    "on billions of tokens."
)


def write_report(record: Record, folder: Path) -> Path:
    """Write report.md, its plots and results.json into `folder`; the path of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [_head(record)]
    for title, found, section in (
        ("The kernels against float64", record.verdicts, _verification),
        ("Speed", record.results, _speed),
        ("Three small models", _trained(record), _training),
        ("Text from the cache", record.timed_writings, _generation),
    ):
        text += [f"## {title}", section(record, folder) if found else "Not reached."]
    text += [
        "## Again",
        f"`{record.command}`. Every figure, samples included, is in [{FILE}]({FILE}).\n",
    ]
    path = folder / REPORT
    path.write_text("\n\n".join(text))
    record.save(folder)
    return path


def model_table(runs: Sequence[ModelRun]) -> Table:
    """Size, held-out bits and cost of each model."""
    headings = (
        *("model", "parameters", "steps", "held-out bits per byte", "step time"),
        "activation memory",
    )
    rows = [
        (
            run.name,
            f"{run.parameters:,}",
            str(run.steps),
            f"[bold]{_bits(run)}[/]",
            duration(run.median_step),
            f"{run.activation_bytes / 2**20:.1f} MiB",
        )
        for run in runs
    ]
    return table(headings, rows, right=headings[1:])


def _bits(run: ModelRun) -> str:
    error = "" if run.final_error is None else f" ± {run.final_error:.3f}"
    return f"{run.latest_bits:.3f}{error}"


def cache_table(writings: Sequence[Writing]) -> Table:
    """Speed of generation and size of the cache of one sequence."""
    headings = ("model", "tokens a second", "cache, bytes")
    rows = [(w.name, f"{w.tokens_per_second:,.0f}", f"{w.cache_bytes:,}") for w in writings]
    return table(headings, rows, right=headings[1:])


def summary(record: Record) -> list[str]:
    """The findings, a sentence each."""
    found = []
    if record.verdicts:
        failed = len(record.failed)
        verdict = f"{failed} over budget" if failed else "all within their budgets"
        found.append(
            f"**Correct:** {len(record.verdicts)} tensors of {record.cases_checked} cases against "
            f"float64, {verdict}."
        )
    if record.results:
        ratios = [result.ratio for result in record.results]
        found.append(
            f"**Speed:** {min(ratios):.2f} to {max(ratios):.2f} times torch's SDPA with the mix in "
            f"front of it, over {len(ratios)} cases."
        )
    if trained := _trained(record):
        bits = ", ".join(f"{run.name} {run.latest_bits:.3f}" for run in trained)
        found.append(
            f"**Models:** held-out bits per byte after {trained[0].steps} steps: {bits}. "
            "Minutes of training rank nothing."
        )
    if record.timed_writings:
        figures = ", ".join(
            f"{w.name} {w.tokens_per_second:,.0f} tokens a second from {w.cache_bytes:,} bytes"
            for w in record.timed_writings
        )
        found.append(f"**Cache:** {figures}.")
    return found or ["Nothing was measured."]


def _head(record: Record) -> str:
    machine = record.machine
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    interrupted = (
        f"> **Interrupted during {record.interrupted_in}.** What follows was measured before "
        "that; the rest is missing, not zero.\n\n"
    )
    return (
        "# Value-residual attention on this machine\n\n"
        f"{record.started:%d %B %Y, %H:%M}. {machine['processor']}, {threads}, "
        f"kernels on the `{machine['native path']}` path, torch {machine['torch']}, Python "
        f"{machine['python']}, resformer-kernels {machine['resformer-kernels']} (commit "
        f"{machine['commit']}). {record.elapsed / 60:.1f} of {record.minutes:g} minutes.\n\n"
        + (interrupted if record.interrupted_in is not None else "")
        + "\n".join(f"- {line}" for line in summary(record))
    )


def _verification(record: Record, folder: Path) -> str:
    plots.plot_errors(record.verdicts, folder / "errors.png")
    return (
        "Forward and backward of every op, with outputs and scratch memory poisoned with NaN "
        "first. The budget of a tensor is twice the error of plain PyTorch in the same precision, "
        "plus one rounding of the terms that it sums; errors are Frobenius norms. "
        f"{record.cases_checked} of {record.cases_planned} cases were run.\n\n"
        "![Errors as a share of their budgets](errors.png)\n\n"
        f"{markdown(summary_table(record.verdicts))}\n\n"
        "Error / budget of the worst case of each tensor."
    )


def _speed(record: Record, folder: Path) -> str:
    plots.plot_speed(record.results, record.gemm, folder / "speed.png")
    gemm = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in record.gemm.items())
    return (
        "V' = λ_v V + λ_first V₁ with learnable scalars, then causal attention; the mix is inside "
        "both timings, and its gradients too. Medians of "
        f"{len(record.results[0].ours.samples)} alternating samples in one process; the peer is "
        "`scaled_dot_product_attention` in whichever of two layouts is faster for it. "
        f"{len(record.results)} of {record.benchmarks_planned} planned cases fitted the time. "
        f"GEMM measured in the same run: {gemm}.\n\n"
        "![GFLOP/s of both](speed.png)\n\n"
        + markdown(speed_table(record.results, record.gemm), bold=("ratio",))
    )


def _trained(record: Record) -> list[ModelRun]:
    return [run for run in record.runs if run.steps]


def _training(record: Record, folder: Path) -> str:
    trained, plan, corpus = _trained(record), record.plan, record.corpus
    plots.plot_learning(trained, plan, folder / "learning.png")
    plots.plot_cost(trained, folder / "cost.png")
    windows = trained[0].final_windows
    basis = (
        f"The held-out figure is the mean over {windows} windows of {plan.seqlen} bytes, the same "
        "for every model; ± is its standard error from the choice of windows alone."
        if windows
        else "Training was cut off: the held-out figure is the last point of the curve."
    )
    return (
        f"Byte-level decoders of {plan.num_layers} layers, {plan.dim} channels and "
        f"{plan.num_heads} heads, trained side by side in float32: a step of each in turn, on the "
        f"same batches of {plan.batch} × {plan.seqlen} bytes, at the same learning rates. "
        "ResFormer mixes the first layer's values in with two learned scalars a layer; SVFormer "
        "attends over them alone, and the parameters that this saves went into a wider MLP.\n\n"
        f"Text: {corpus.source}; {len(corpus.train) / 1e6:.1f} MB in {corpus.train_documents} "
        f"documents to train on, {len(corpus.held_out) / 1e6:.1f} MB in "
        f"{corpus.held_out_documents} held out ({corpus.split}).\n\n"
        f"{markdown(model_table(trained))}\n\n"
        f"{basis} Step time is the median. Activation memory is what autograd saves for backward "
        "in one step, each storage once, parameters apart.\n\n"
        f"**{RANKS_NOTHING}**\n\n"
        "![Held-out bits per byte](learning.png)\n\n"
        "![Step time and activation memory](cost.png)"
    )


def _generation(record: Record, folder: Path) -> str:
    del folder
    first, shown = record.timed_writings[0], record.timed_writings[-1]
    quoted = "\n".join(f"    {x}" for x in f"{shown.prompt}[…]{shown.text}".splitlines())
    return (
        f"Each model continued {first.prompt_length} bytes of held-out text by {first.new_tokens}, "
        "one at a time, from a `SharedValueCache`: the SVFormer's holds the values of its first "
        f"layer alone. Tokens a second are those of the median of {len(first.seconds)} alternating "
        "greedy generations, the prompt included; bytes are those of keys and values of one "
        f"sequence of {record.plan.seqlen} tokens in float32.\n\n"
        f"{markdown(cache_table(record.timed_writings))}\n\n"
        f"The {shown.name}, after `[…]`, drawn at temperature {DRAWS['temperature']} from the "
        f"likeliest {DRAWS['top_p']:.0%}; it has trained for minutes:\n\n{quoted}"
    )
