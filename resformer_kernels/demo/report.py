"""The report: Markdown with its plots beside it, from whatever the record holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resformer_kernels.bench.tables import duration, rate_and_share
from resformer_kernels.cli.verify import worst
from resformer_kernels.demo import plots
from resformer_kernels.demo.record import FILE, Record
from resformer_kernels.demo.writing import DRAWS
from resformer_kernels.testing.verification import Verdict

REPORT = "report.md"
RANKS_NOTHING = (
    "Minutes of training rank nothing: at this size and length the order of the models is not "
    "evidence for or against any of them. The paper's comparisons train 82M parameters and more "
    "on billions of tokens."
)


def write_report(record: Record, folder: Path) -> Path:
    """Write report.md, its plots and results.json into `folder`; the path of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = _head(record)
    for section in (_verification, _speed, _training, _generation, _reproduction):
        lines += section(record, folder)
    path = folder / REPORT
    path.write_text("\n".join(lines).rstrip() + "\n")
    record.save(folder)
    return path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; every column after the first is right-aligned."""
    rule = ["---", *("---:" for _ in header[1:])]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def _head(record: Record) -> list[str]:
    machine = record.machine
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    lines = [
        "# Value-residual attention on this machine",
        "",
        f"{record.started:%d %B %Y, %H:%M}. {machine['processor']}, {threads}, "
        f"kernels on the `{machine['native path']}` path, torch {machine['torch']}, Python "
        f"{machine['python']}, resformer-kernels {machine['resformer-kernels']} (commit "
        f"{machine['commit']}). {record.elapsed / 60:.1f} of {record.minutes:g} minutes.",
        "",
    ]
    if record.interrupted_in is not None:
        lines += [
            f"> **Interrupted during {record.interrupted_in}.** What follows was measured before "
            "that; the rest is missing, not zero.",
            "",
        ]
    lines += [f"- {line}" for line in summary(record)]
    return [*lines, ""]


def summary(record: Record) -> list[str]:
    """The findings, a sentence each."""
    found = []
    if record.verdicts:
        verdict = (
            f"{len(record.failed)} over budget" if record.failed else "all within their budgets"
        )
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
    if record.runs and record.runs[0].latest_bits is not None:
        figures = ", ".join(
            f"{run.name} {run.latest_bits:.3f}" for run in record.runs if run.latest_bits
        )
        found.append(
            f"**Models:** held-out bits per byte after {record.runs[0].steps} steps: {figures}. "
            "Minutes of training rank nothing."
        )
    timed = [writing for writing in record.writings if writing.seconds]
    if timed:
        figures = ", ".join(
            f"{w.name} {w.tokens_per_second:,.0f} tokens a second from {w.cache_bytes:,} bytes"
            for w in timed
        )
        found.append(f"**Cache:** {figures}.")
    return found or ["Nothing was measured."]


def _verification(record: Record, folder: Path) -> list[str]:
    lines = ["## The kernels against float64", ""]
    if not record.verdicts:
        return [*lines, "Not reached.", ""]
    plots.plot_errors(record.verdicts, folder / "errors.png")
    lines += [
        "Forward and backward of every op, with outputs and scratch memory poisoned with NaN "
        "first. The budget of a tensor is twice the error of plain PyTorch in the same precision, "
        "plus one rounding of the terms that it sums; errors are Frobenius norms. "
        f"{record.cases_checked} of {record.cases_planned} cases were run.",
        "",
        "![Errors as a share of their budgets](errors.png)",
        "",
        *_verdict_rows(record.verdicts),
        "",
        "Error / budget of the worst case of each tensor.",
        "",
    ]
    return lines


def _verdict_rows(verdicts: Sequence[Verdict]) -> list[str]:
    dtypes = list(dict.fromkeys(v.dtype for v in verdicts))
    rows: dict[str, dict[str, str]] = {}
    for v in worst(verdicts):
        share = f"{v.share:.0%}" if v.ok else f"**{v.share:.0%}, OVER**"
        cell = f"{v.error:.1e} / {v.budget:.1e}, {share}"
        rows.setdefault(f"`{v.op}` {v.tensor.split('[')[0]}", {})[v.dtype] = cell
    return markdown_table(
        ("op, tensor", *dtypes),
        [(name, *(rows[name].get(dtype, "") for dtype in dtypes)) for name in sorted(rows)],
    )


def _speed(record: Record, folder: Path) -> list[str]:
    lines = ["## Speed", ""]
    if not record.results:
        return [*lines, "Not reached.", ""]
    plots.plot_speed(record.results, record.gemm, folder / "speed.png")
    gemm = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in record.gemm.items())
    rows = []
    for result in record.results:
        rate, share = rate_and_share(result, record.gemm, None)
        rows.append(
            (
                result.name,
                duration(result.ours.median),
                duration(result.timings[result.peer].median),
                f"**{result.ratio:.2f}x**",
                rate,
                share,
                result.peer,
            )
        )
    return [
        *lines,
        "V' = λ_v V + λ_first V₁ with learnable scalars, then causal attention; the mix is inside "
        "both timings, and its gradients too. Medians of "
        f"{len(record.results[0].ours.samples)} alternating samples in one process; the peer is "
        "`scaled_dot_product_attention` in whichever of two layouts is faster for it. "
        f"{len(record.results)} of {record.benchmarks_planned} planned cases fitted the time. "
        f"GEMM measured in the same run: {gemm}.",
        "",
        "![GFLOP/s of both](speed.png)",
        "",
        *markdown_table(
            ("case", "ours", "peer", "ratio", "our rate", "ceiling", "fastest peer"), rows
        ),
        "",
    ]


def _training(record: Record, folder: Path) -> list[str]:
    lines = ["## Three small models", ""]
    trained = [run for run in record.runs if run.steps]
    if not trained:
        return [*lines, "Not reached.", ""]
    plots.plot_learning(trained, record.plan, folder / "learning.png")
    plots.plot_cost(trained, folder / "cost.png")
    plan, corpus = record.plan, record.corpus
    rows = []
    for run in trained:
        bits = "none yet" if run.latest_bits is None else f"{run.latest_bits:.3f}"
        if run.final_bits is not None and run.final_error is not None:
            bits += f" ± {run.final_error:.3f}"
        rows.append(
            (
                run.name,
                f"{run.parameters:,}",
                str(run.steps),
                f"**{bits}**",
                duration(run.median_step or 0.0),
                f"{run.activation_bytes / 2**20:.1f} MiB",
            )
        )
    windows = trained[0].final_windows
    basis = (
        f"The held-out figure is the mean over {windows} windows of {plan.seqlen} bytes, the same "
        "for every model; ± is its standard error from the choice of windows alone."
        if windows
        else "Training was cut off: the held-out figure is the last point of the curve."
    )
    return [
        *lines,
        f"Byte-level decoders of {plan.num_layers} layers, {plan.dim} channels and "
        f"{plan.num_heads} heads, trained side by side in float32: a step of each in turn, on the "
        f"same batches of {plan.batch} × {plan.seqlen} bytes, at the same learning rates. "
        "ResFormer mixes the first layer's values in with two learned scalars a layer; SVFormer "
        "attends over them alone, and the parameters that this saves went into a wider MLP.",
        "",
        f"Text: {corpus.source}; {len(corpus.train) / 1e6:.1f} MB in {corpus.train_documents} "
        f"documents to train on, {len(corpus.held_out) / 1e6:.1f} MB in "
        f"{corpus.held_out_documents} held out ({corpus.split}).",
        "",
        *markdown_table(
            (
                "model",
                "parameters",
                "steps",
                "held-out bits per byte",
                "step time",
                "activation memory",
            ),
            rows,
        ),
        "",
        f"{basis} Step time is the median. Activation memory is what autograd saves for backward "
        "in one step, each storage once, parameters apart.",
        "",
        f"**{RANKS_NOTHING}**",
        "",
        "![Held-out bits per byte](learning.png)",
        "",
        "![Step time and activation memory](cost.png)",
        "",
    ]


def _generation(record: Record, folder: Path) -> list[str]:
    del folder
    lines = ["## Text from the cache", ""]
    timed = [writing for writing in record.writings if writing.seconds]
    if not timed:
        return [*lines, "Not reached.", ""]
    first, shown = timed[0], timed[-1]
    rows = [
        (writing.name, f"{writing.tokens_per_second:,.0f}", f"{writing.cache_bytes:,}")
        for writing in timed
    ]
    quoted = (shown.prompt + "[…]" + shown.text).splitlines()
    return [
        *lines,
        f"Each model continued {first.prompt_length} bytes of held-out text by {first.new_tokens}, "
        "one at a time, from a `SharedValueCache`: the SVFormer's holds the values of its first "
        f"layer alone. Tokens a second are those of the median of {len(first.seconds)} alternating "
        "greedy generations, the prompt included; bytes are those of keys and values of one "
        f"sequence of {record.plan.seqlen} tokens in float32.",
        "",
        *markdown_table(("model", "tokens a second", "cache, bytes"), rows),
        "",
        f"The {shown.name}, after `[…]`, drawn at temperature {DRAWS['temperature']} from the "
        f"likeliest {DRAWS['top_p']:.0%}; it has trained for minutes:",
        "",
        *(f"    {line}" for line in quoted),
        "",
    ]


def _reproduction(record: Record, folder: Path) -> list[str]:
    del folder
    return [
        "## Again",
        "",
        f"`{record.command}`. Every figure, samples included, is in [{FILE}]({FILE}).",
        "",
    ]
