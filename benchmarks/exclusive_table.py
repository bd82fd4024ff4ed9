"""The table of stored runs of `bench --suite exclusive`, which attention's README quotes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.workloads.common import COMPILED
from benchmarks.workloads.epilogue import PASSES
from resformer_kernels.bench.attention import SDPA
from resformer_kernels.bench.tables import duration, markdown_rows
from resformer_kernels.bench.timing import OURS, PLAIN

RESULTS = Path(__file__).resolve().parent / "results" / "exclusive"
HEADINGS = ("one call", "more than plain", "separate passes", "SDPA and passes", COMPILED)


def table(run: Any) -> str:
    """A row for each case: our time, and each other's as a multiple of it."""
    rows = []
    for timing in run["timings"]:
        medians = timing["medians_s"]
        ours = medians[OURS]
        others = (medians[PASSES], min(medians[name] for name in SDPA), medians[COMPILED])
        multiples = (f"{other / ours:.2f}x" for other in others)
        more = f"{100 * (ours / medians[PLAIN] - 1):+.0f}%"
        rows.append((timing["name"], duration(ours), more, *multiples))
    machine = run["machine"]
    about = f"{machine['processor']}, {machine['native path']}, {run['started'][:10]}"
    return markdown_rows((about, *HEADINGS), rows)


def stored() -> str:
    """The tables of every stored run."""
    runs = (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    return "\n\n".join(table(run) for run in runs)
