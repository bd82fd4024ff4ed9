"""Write what README.md and docs/ quote from the code and from stored runs.

`python -m benchmarks.quotes` (`make docs`) replaces the text between `<!-- quote: NAME -->` and
`<!-- end -->` by what `QUOTES[NAME]` returns; nobody edits that text by hand. docs/index.html and
docs/figures/ are the report of the newest run. Run it after a change of a backend's limits or of a
run in benchmarks/results/: a test compares the files with what it would write.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks import curves, exclusive_table, page, record, runner, scaling, serving_table
from benchmarks.report import ceilings
from benchmarks.workloads.decode import OWN_VALUES, TIME_FIRST
from benchmarks.workloads.model import DYNAMIC, MODELS, STATIC
from build_support import cuda
from resformer_kernels._core import extension
from resformer_kernels._triton import arch
from resformer_kernels.bench.tables import duration, markdown_rows, rate_and_share
from resformer_kernels.bench.timing import OURS, PLAIN
from resformer_kernels.cli.matrix import Matrix, matrices, summary, whole
from resformer_kernels.cli.support import answers

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs"
_FOLDERS = (
    *("attention", "mix", "kvcache", "scan", "reservoir", "distributed"),
    "integrations/transformers",
)
DOCUMENTS = (
    *("README.md", "docs/figures.md", "docs/serving.md", "docs/support.md"),
    *(f"resformer_kernels/{folder}/README.md" for folder in _FOLDERS),
)
_PART = re.compile(r"(<!-- quote: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

_SHAPES = 2
"""Shapes of attention that the README shows for each machine."""
_PASSES = [(way, dtype) for way in ("forward", "backward") for dtype in ("bfloat16", "float32")]
_ATTENTION = re.compile(r"attention (?:for|back)ward (.+) (?:bfloat16|float32)$")
_SHORT = (
    r"decode B1 Hq32 Hkv8 T8192 D128, .* a layer, [bf]",
    r"decode B1 Hq8 Hkv8 T8192 D64, .* one V",
    r"reservoir_scan dense B1 T16384 .* float32",
    r"linear_scan forward B4 T16384 N1024 gates by step float32",
)
"""Patterns of the stored cases other than attention that the README shows."""

Run = dict[str, Any]
"""A stored run of a CPU or a device as JSON: only "machine", "started" and "timings" are read."""


@cache
def _support() -> tuple[Matrix, ...]:
    return tuple(matrices(answers()))


_GPUS = {
    80: "A100",
    86: "RTX 30, A10, A40",
    89: "RTX 40, L4, L40S",
    90: "H100, H200",
    100: "B200; B300 from Triton 3.9 on",
    120: "RTX 50, RTX PRO Blackwell",
    942: "MI300, MI325",
    950: "MI350, MI355",
}
"""Products of each architecture that the Triton kernels are compiled for."""


def gpu_table() -> str:
    """What each GPU is served by, and whether a stored run shows it."""
    rows = []
    for number, about in arch.ARCHITECTURES.items():
        capability = divmod(number, 10)
        amd = arch.is_amd(capability)
        built = cuda.holds(cuda.ARCHITECTURES)
        serving = [name for name in built if extension.runs_on(name, capability)]
        rows.append(
            (
                f"{_GPUS[number]} ({arch.label(number)})",
                'by name: `backend="triton"`, without `reservoir_scan`' if amd else "`auto`",
                "none" if amd else "PTX" if serving[0].endswith(cuda.PTX) else "machine code",
                "run" if about.name in arch.RAN else "compiled, never run",
            )
        )
    return markdown_rows(("GPU", "Triton kernels", "CUDA library", "state"), rows)


def runs() -> dict[str, Run]:
    """Every stored run by its file's name."""
    paths = sorted(record.RESULTS.glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def described(run: Run) -> str:
    """Where and when a run was measured, in one line."""
    machine = run["machine"]
    where = machine.get("device") or f"{machine['processor']}, {machine['threads']} threads"
    path = f", {machine['native path']}" if "native path" in machine else ""
    path += ", AMX" if "amx_bf16" in machine.get("features", "") else ""
    return f"{where}{path}, torch {machine['torch']}, {run['started'][:10]}"


def medians(timing: Any) -> dict[str, float]:
    """Seconds by contestant; a device's run stores samples alone."""
    if "medians_s" in timing:
        return dict(timing["medians_s"])
    return {name: statistics.median(found) for name, found in timing.get("timings", {}).items()}


def fastest_peer(found: dict[str, float]) -> str | None:
    """The contestant other than ours with the least seconds; None where there is no other. One
    that was timed in our layout alone, and not in its own, does not count."""

    def in_its_own(name: str) -> bool:
        bare = name.removesuffix(TIME_FIRST)
        return bare == name or bare in found or f"{bare} (B,H,T,D)" in found

    peers = (name for name in found if name not in (OURS, PLAIN) and in_its_own(name))
    return min(peers, key=lambda name: found[name], default=None)


def _by_run(headings: Iterable[str], rows: Callable[[Run], list[tuple[str, ...]]]) -> str:
    """A table for each run that has rows, with the run in the first heading."""
    found = [(run, rows(run)) for run in runs().values()]
    return "\n\n".join(markdown_rows((described(run), *headings), of) for run, of in found if of)


def attention_tables() -> str:
    """A table for each machine: how many times faster than the fastest peer, and our rate."""

    def rows(run: Run) -> list[tuple[str, ...]]:
        found = {t["name"]: t for t in run["timings"] if "window" not in t["name"]}
        shapes = dict.fromkeys(match[1] for name in found if (match := _ATTENTION.match(name)))
        return [
            (shape, *(_cell(found.get(f"attention {p[0]} {shape} {p[1]}")) for p in _PASSES))
            for shape in list(shapes)[:_SHAPES]
        ]

    return _by_run([", ".join(p) for p in _PASSES], rows)


def _cell(timing: Any) -> str:
    found = medians(timing or {})
    peer = fastest_peer(found)
    if peer is None or OURS not in found:
        return ""
    ours = found[OURS]
    return f"{found[peer] / ours:.2f}x, {timing['flops'] / ours / 1e9:.0f} GFLOP/s"


def other_table() -> str:
    """Decoding, scans and reservoirs: the cases of `_SHORT`, with a column for each run."""
    every = [(described(run), dict(_short_cells(run))) for run in runs().values()]
    columns = [(heading, cells) for heading, cells in every if cells]
    names = dict.fromkeys(name for _, cells in columns for name in cells)
    rows = ((name, *(cells.get(name, "") for _, cells in columns)) for name in names)
    return markdown_rows(("case", *(heading for heading, _ in columns)), rows)


def _short_cells(run: Run) -> Iterator[tuple[str, str]]:
    """Our time in each case of `_SHORT`, and how many times as long the fastest peer takes."""
    for timing in run["timings"]:
        found, name = medians(timing), timing["name"]
        if not any(re.match(pattern, name) for pattern in _SHORT):
            continue
        peer = fastest_peer(found)
        if OURS not in found:
            yield name, "failed"
        elif peer is None:
            yield name, duration(found[OURS])
        else:
            yield name, f"{duration(found[OURS])}, {found[peer] / found[OURS]:.2f}x {peer}"


def model_table() -> str:
    """Decoding with whole models of transformers, every contestant, a table for each run."""
    shown = {
        OURS: "resformer, `ResFormerCache`",
        STATIC: "sdpa, `StaticCache`",
        DYNAMIC: "sdpa, `DynamicCache`",
        OWN_VALUES: "Llama, resformer",
    }

    def rows(run: Run) -> list[tuple[str, ...]]:
        found = {t["name"]: medians(t) for t in run["timings"] if t["name"].startswith(MODELS)}
        return [
            (name.removeprefix(MODELS).strip(), *(duration(m[w]) if w in m else "" for w in shown))
            for name, m in found.items()
        ]

    return _by_run(shown.values(), rows)


def suite_table(suite: str) -> str:
    """Every case of a suite in the newest run, without points of curves and whole models."""
    run = newest()
    left_out = {case.name for case in curves.every()}
    rows = [
        (
            result.name,
            duration(result.ours.median),
            *rate_and_share(result, *ceilings(run)),
            f"{result.peer}, {duration(result.timings[result.peer].median)}",
            f"{result.ratio:.2f}x",
        )
        for result in run.results
        if result.group.split()[0] == suite and not result.name.startswith(MODELS)
        if result.name not in left_out
    ]
    about = described({"machine": run.machine, "started": run.started})
    return markdown_rows((about, "ours", "rate", "of the ceiling", "fastest peer", ""), rows)


def _case_table(timings: Iterable[Any]) -> str:
    return markdown_rows(("case", "ours", "fastest peer", "times faster"), map(_row, timings))


def _row(timing: Any) -> tuple[str, ...]:
    found, name = medians(timing), timing["name"]
    if OURS not in found:
        return name, "failed", "", ""
    ours, peer = found[OURS], fastest_peer(found)
    if peer is None:
        return name, duration(ours), "none here", ""
    beside = f"{peer}, {duration(found[peer])}"
    return name, duration(ours), beside, f"{found[peer] / ours:.2f}x"


def every_case() -> str:
    """Every case of every stored run."""
    return "\n\n".join(_section(name, run) for name, run in runs().items() if run["timings"])


def _section(name: str, run: Run) -> str:
    commit = run["machine"].get("commit", "unknown")
    about = f"{described(run)}, at commit {commit}; `benchmarks/results/{name}.json`."
    parts = [f"## {name}", about, _case_table(run["timings"])]
    lines: dict[str, list[str]] = {}
    for point in run.get("peak_memory", []):
        size = f"{point['bytes'] / 2**20:.1f} MiB at T={point['length']}"
        lines.setdefault(f"{point.get('contestant', OURS)}, {point['dtype']}", []).append(size)
    if lines:
        parts.append("Peak memory of forward and backward of attention, beyond the inputs:")
        parts.append("\n".join(f"- {who}: {', '.join(sizes)}" for who, sizes in lines.items()))
    return "\n\n".join(parts)


QUOTES: dict[str, Callable[[], str]] = {
    "attention": attention_tables,
    "others": other_table,
    **{suite: partial(suite_table, suite) for suite in ("mix", "decode", "scan", "reservoir")},
    "models": model_table,
    "every-case": every_case,
    "gpus": gpu_table,
    "exclusive": exclusive_table.stored,
    "serving": serving_table.stored,
    "ring": scaling.table,
    "ring-hides": scaling.thresholds,
    "sharded": scaling.sharded_table,
    "support": lambda: summary(_support()),
    "support-by-form": lambda: whole(_support()),
}


def rewritten(text: str) -> str:
    """`text` with every quote up to date. KeyError for the name of an unknown quote."""
    return _PART.sub(lambda part: f"{part[1]}{QUOTES[part[2]]()}\n{part[3]}", text)


@cache
def newest() -> runner.Run:
    """The newest stored run of a CPU."""
    stored = (record.from_json(run) for run in runs().values() if "format" in run)
    return max(stored, key=lambda run: run.started)


def report() -> dict[Path, str | None]:
    """The files that docs/ should hold of the newest run; None for a figure that nothing draws."""
    drawn = page.files([newest()])
    left: dict[Path, str | None] = dict.fromkeys((REPORT / page.FIGURES).glob("*.svg"))
    return left | {REPORT / name: text for name, text in drawn.items()}


def stale() -> Iterator[tuple[Path, str | None]]:
    """The files that are out of date, each with its correct text."""
    documents = {ROOT / name: rewritten((ROOT / name).read_text()) for name in DOCUMENTS}
    for path, text in (documents | report()).items():
        if not path.exists() or path.read_text() != text:
            yield path, text


def main() -> int:
    """Rewrite the stale files; with --check, only name them, and exit with 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quotes", description=__doc__)
    parser.add_argument("--check", action="store_true", help="name stale files and exit with 1")
    check = parser.parse_args().check
    found = list(stale())
    for path, text in found:
        done = "stale" if check else "removed" if text is None else "rewritten"
        print(f"{done}: {path.relative_to(ROOT)}")
        if check:
            continue
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
