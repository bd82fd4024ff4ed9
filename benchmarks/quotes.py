"""What README.md and docs/ quote from the code and from stored runs: `python -m benchmarks.quotes`.

Between `<!-- quote: NAME -->` and `<!-- end -->` stands what `QUOTES[NAME]` makes, and nobody edits
it; docs/index.html and docs/figures/ are the report of the newest run. After a change of a
backend's limits or of a run in benchmarks/results/, the command rewrites all of it (`make docs`); a
test holds them equal.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks import curves, page, record, runner
from benchmarks.workloads.decode import OWN_VALUES
from benchmarks.workloads.model import DYNAMIC, MODELS, STATIC
from resformer_kernels.bench.tables import duration, rate_and_share
from resformer_kernels.bench.timing import OURS
from resformer_kernels.cli.matrix import Matrix, matrices, summary, whole
from resformer_kernels.cli.support import answers

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs"
_FOLDERS = ("mix", "kvcache", "scan", "reservoir", "integrations/transformers")
DOCUMENTS = (
    *("README.md", "docs/figures.md", "docs/support.md"),
    *(f"resformer_kernels/{folder}/README.md" for folder in _FOLDERS),
)
_PART = re.compile(r"(<!-- quote: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

_SHAPES = 4
"""Of attention, how many the README shows of each machine."""
_PASSES = [(way, dtype) for way in ("forward", "backward") for dtype in ("bfloat16", "float32")]
_SHORT = (
    r"decode (B1 Hq32 Hkv8 T8192 D128|B8 Hq16 Hkv8 T1024 D64), .* a layer, ",
    r"decode B1 Hq\d+ Hkv8 T8192 D64, .* one V",
    r"decode in transformers Llama B1 T8192, ",
    r"reservoir_scan .*(B1 T16384|B32) .* float32",
    r"linear_scan forward (B4 T16384|B1 T8192) N1024 gates by step float32",
)
"""The cases other than attention that the README shows: of those that are stored, what matches."""

Run = dict[str, Any]
"""A stored run as JSON, of a CPU or a device: only "machine", "started" and "timings" are read."""


@cache
def _support() -> tuple[Matrix, ...]:
    return tuple(matrices(answers()))


def runs() -> dict[str, Run]:
    """Every stored run by its file's name."""
    found = sorted(record.RESULTS.glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in found}


def described(run: Run) -> str:
    """Where and when a run was measured, in a line."""
    machine = run["machine"]
    where = machine.get("device") or f"{machine['processor']}, {machine['threads']} threads"
    path = f", {machine['native path']}" if "native path" in machine else ""
    return f"{where}{path}, torch {machine['torch']}, {run['started'][:10]}"


def medians(timing: Any) -> dict[str, float]:
    """Seconds by contestant; a device's run stores samples alone."""
    stored: dict[str, float] | None = timing.get("medians_s")
    if stored is not None:
        return stored
    return {name: statistics.median(found) for name, found in timing.get("timings", {}).items()}


def fastest_peer(timing: Any) -> str | None:
    """Whichever of the others took the least time; None where there is no other."""
    others = {name: seconds for name, seconds in medians(timing).items() if name != OURS}
    return min(others, key=lambda name: others[name], default=None)


def attention_tables() -> str:
    """A table for each machine: how many times faster than the fastest peer, and our rate."""
    parts = []
    for run in runs().values():
        found = {timing["name"]: timing for timing in run["timings"]}
        shapes = dict.fromkeys(
            match[1] for name in found if (match := _attention(name)) and "window" not in name
        )
        if not shapes:
            continue
        shown = list(shapes)[:_SHAPES]
        lines = [
            f"| {described(run)} | {' | '.join(', '.join(p) for p in _PASSES)} |",
            f"| --- |{' --- |' * len(_PASSES)}",
        ]
        for shape in shown:
            names = [f"attention {way} {shape} {dtype}" for way, dtype in _PASSES]
            lines.append(f"| {shape} | {' | '.join(_cell(found.get(n)) for n in names)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _attention(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"attention (?:for|back)ward (.+) (?:bfloat16|float32)", name)


def _cell(timing: Any) -> str:
    peer = None if timing is None else fastest_peer(timing)
    if peer is None or OURS not in medians(timing):
        return ""
    ours = medians(timing)[OURS]
    return f"{medians(timing)[peer] / ours:.2f}x, {timing['flops'] / ours / 1e9:.0f} GFLOP/s"


def other_table() -> str:
    """Decoding, scans and reservoirs, the cases of `_SHORT`."""
    rows = [
        _row(timing)
        for run in runs().values()
        for timing in run["timings"]
        if any(re.match(pattern, timing["name"]) for pattern in _SHORT)
    ]
    return "\n".join([*_HEADING, *rows])


def model_table() -> str:
    """Decoding with whole models of transformers, every contestant, a table for each run."""
    shown = (OURS, STATIC, DYNAMIC, OWN_VALUES)
    parts = []
    for run in runs().values():
        found = [t for t in run["timings"] if t["name"].startswith(MODELS)]
        if not found:
            continue
        lines = [
            f"| {described(run)} | resformer, `ResFormerCache` | sdpa, `StaticCache` | "
            "sdpa, `DynamicCache` | Llama, resformer |",
            f"| --- |{' --- |' * len(shown)}",
        ]
        for timing in found:
            times = (medians(timing).get(name) for name in shown)
            cells = " | ".join("" if time is None else duration(time) for time in times)
            lines.append(f"| {timing['name'].removeprefix(MODELS).strip()} | {cells} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def suite_table(suite: str) -> str:
    """Of the newest run, every case of a suite but the points of curves and whole models."""
    run = newest()
    drawn = {case.name for case in curves.every()}
    heading = (
        f"| {described(record.as_json(run))} | ours | rate | of the ceiling | fastest peer | |"
    )
    lines = [heading, "| --- | --- | --- | --- | --- | --- |"]
    for result in run.results:
        if result.group.split()[0] != suite or result.name in drawn or MODELS in result.name:
            continue
        rate, share = rate_and_share(
            result, run.gemm, run.bandwidth.get("copy"), run.bandwidth.get("read")
        )
        peer = f"{result.peer}, {duration(result.timings[result.peer].median)}"
        ours = duration(result.ours.median)
        lines.append(
            f"| {result.name} | {ours} | {rate} | {share} | {peer} | {result.ratio:.2f}x |"
        )
    return "\n".join(lines)


_HEADING = ("| case | ours | fastest peer | times faster |", "| --- | --- | --- | --- |")


def _row(timing: Any) -> str:
    found, peer, name = medians(timing), fastest_peer(timing), timing["name"]
    if OURS not in found:
        return f"| {name} | failed | | |"
    ours = found[OURS]
    if peer is None:
        return f"| {name} | {duration(ours)} | none here | |"
    theirs = found[peer]
    return f"| {name} | {duration(ours)} | {peer}, {duration(theirs)} | {theirs / ours:.2f}x |"


def every_case() -> str:
    """Every case of every stored run."""
    return "\n\n".join(_section(name, run) for name, run in runs().items() if run["timings"])


def _section(name: str, run: Run) -> str:
    commit = run["machine"].get("commit", "unknown")
    about = f"{described(run)}, at commit {commit}; `benchmarks/results/{name}.json`."
    memory = _memory(run.get("peak_memory", []))
    return "\n".join([f"## {name}", "", about, "", *_HEADING, *map(_row, run["timings"]), *memory])


def _memory(points: Sequence[Any]) -> list[str]:
    """A line for each dtype and contestant of the peak over the length."""
    lines: dict[str, list[str]] = {}
    for point in points:
        who = f"{point.get('contestant', OURS)}, {point['dtype']}"
        size = f"{point['bytes'] / 2**20:.1f} MiB at T={point['length']}"
        lines.setdefault(who, []).append(size)
    if not lines:
        return []
    said = [f"- {who}: {', '.join(sizes)}" for who, sizes in lines.items()]
    return ["", "Peak memory of forward and backward of attention, beyond the inputs:", "", *said]


QUOTES: dict[str, Callable[[], str]] = {
    "attention": attention_tables,
    "others": other_table,
    **{suite: partial(suite_table, suite) for suite in ("mix", "decode", "scan", "reservoir")},
    "models": model_table,
    "every-case": every_case,
    "support": lambda: summary(_support()),
    "support-by-form": lambda: whole(_support()),
}


def rewritten(text: str) -> str:
    """`text` with every quote as it should be. KeyError for one that nobody makes."""
    return _PART.sub(lambda part: f"{part[1]}{QUOTES[part[2]]()}\n{part[3]}", text)


@cache
def newest() -> runner.Run:
    """The newest stored run of a CPU."""
    stored = (record.from_json(run) for run in runs().values() if "format" in run)
    return max(stored, key=lambda run: run.started)


def report() -> dict[Path, str | None]:
    """What docs/ should hold of the newest run; None for a figure that nothing draws."""
    drawn = page.files([newest()])
    left: dict[Path, str | None] = dict.fromkeys((REPORT / page.FIGURES).glob("*.svg"))
    return left | {REPORT / name: text for name, text in drawn.items()}


def stale() -> Iterator[tuple[Path, str | None]]:
    """The files that say something else than they should, and what they should say."""
    documents = {ROOT / name: rewritten((ROOT / name).read_text()) for name in DOCUMENTS}
    for path, text in (documents | report()).items():
        if not path.exists() or path.read_text() != text:
            yield path, text


def main() -> int:
    """Rewrite what is stale; with --check, only say so, and exit with 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quotes", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where a file would")
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
