"""The table of families, in Markdown."""

from __future__ import annotations

import collections
from typing import Any

from tests.families.check import REFUSED, UNBUILT, WORST_FIRST


def worst(results: list[dict[str, Any]]) -> str:
    """The status of a family: its classes' worst, of those that can be built."""
    found = {result["status"] for result in results}
    return next(status for status in WORST_FIRST if status in found)


def unserved(results: list[dict[str, Any]]) -> bool:
    """Whether a class that sdpa serves is refused."""
    return any(x["status"] == REFUSED and x["sdpa"] == "served" for x in results)


def _row(family: str, results: list[dict[str, Any]]) -> str:
    models = [x for x in results if x["status"] != UNBUILT] or results
    callers = sorted({name for x in models for name in x["callers"]})
    sdpa = sorted({x["sdpa"] for x in models if x["sdpa"]})
    checks = list(dict.fromkeys(name for x in models for name in x["checks"]))
    remarks = [f"{x['model']}: {x['detail']}" for x in results if x["detail"]]
    remarks += [f"{x['model']}: not run: {text}" for x in models for text in x["not_run"]]
    cells = [
        family,
        ", ".join(x["model"] for x in models),
        worst(results),
        ", ".join(sdpa),
        ", ".join(checks),
        f"{max(x['error'] for x in models):.0e}",
        ", ".join(callers),
        "<br>".join(remarks),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Counts, and a row for every family."""
    counts = collections.Counter(worst(results) for results in found.values())
    counted = ", ".join(f"{counts[x]} {x}" for x in WORST_FIRST if counts[x])
    head = ["family", "models", "resformer", "sdpa", "checks", "difference", "attention", "remarks"]
    refused = [family for family, results in found.items() if unserved(results)]
    lines = [
        '# attn_implementation="resformer" in the families of transformers',
        "",
        f"{len(found)} families: {counted}.",
        f"Refused though sdpa serves them: {len(refused)} ({', '.join(refused) or 'none'}).",
        "",
        "| " + " | ".join(head) + " |",
        "| " + " | ".join("---" for _ in head) + " |",
    ]
    lines += [_row(family, found[family]) for family in sorted(found)]
    return "\n".join(lines) + "\n"
