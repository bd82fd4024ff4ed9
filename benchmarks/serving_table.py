"""The table of a run of `serving.py`, which prints it, and which docs/serving.md quotes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from resformer_kernels.bench.tables import duration, markdown_rows

RESULTS = Path(__file__).resolve().parent / "results" / "serving"
LLAMA, STOCK, OURS = "Llama, vLLM's kernel", "SVFormer, vLLM's kernel", "SVFormer, ours"
CONTESTANTS = (LLAMA, STOCK, OURS)


def table(run: Any) -> str:
    """A row for each case, the median step of each contestant, and the largest batches."""
    rows = []
    for case, seconds in run["seconds"].items():
        medians = {name: statistics.median(seconds[name]) for name in CONTESTANTS}
        cells = (duration(median) for median in medians.values())
        ratio = f"{medians[LLAMA] / medians[OURS]:.2f}x"
        rows.append((f"{case}, {run['layers']} layers", *cells, ratio))
    largest = run["largest"]
    llama, svformer = largest["LlamaForCausalLM"], largest["SVFormerLlamaForCausalLM"]
    batches = (str(llama), str(svformer), str(svformer), f"{svformer / llama:.2f}x")
    rows.append((f"largest batch of T1024 in {run['memory']} MiB", *batches))
    return markdown_rows((f"{run['machine']}, {run['date']}", *CONTESTANTS, "ours to Llama"), rows)


def stored() -> str:
    """The tables of every stored run."""
    runs = (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    return "\n\n".join(table(run) for run in runs)
