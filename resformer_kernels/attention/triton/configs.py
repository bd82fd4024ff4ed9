"""Tile sizes of the Triton kernels, and where V' is mixed: `configs.json`, read once.

{architecture: {direction: {precision: {head_dim: {mask: [rows, keys, warps, stages]}}}}}

The head_dim is the largest that a row serves, "full" the mask of a row that lacks its own. The keys
of "forward" hold for "forward_inline" too: sums in another order would be other bits. Nothing is
tuned at run time; `resformer-kernels tune` writes the table on a GPU.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resformer_kernels._triton.arch import architecture

TABLE = Path(__file__).with_name("configs.json")
VARIABLE = "RESFORMER_MIX"


class Config(NamedTuple):
    """Rows and keys of a tile, warps of a program, and stages of its loop's pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


@functools.cache
def table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def choose(
    capability: tuple[int, int], direction: str, dtype: torch.dtype, head_dim: int, mask: str
) -> Config:
    """The configuration of a kernel.

    direction is "forward", "forward_inline" (V' is mixed in its loop), "keys" (dK and dV'),
    "queries" (dQ) or "bias" (its gradient); mask is "full", "causal", "window" or "transformed"
    (scores with a bias or a softcap).
    """
    precision = "float32" if dtype is torch.float32 else "half"
    by_dim = table()[architecture(capability).name][direction][precision]
    bucket = min(int(dim) for dim in by_dim if int(dim) >= head_dim)
    by_mask = by_dim[str(bucket)]
    config = Config(*by_mask.get(mask, by_mask["full"]))
    if direction == "forward_inline":
        keys = choose(capability, "forward", dtype, head_dim, mask).keys
        config = config._replace(keys=keys)
    return config


def mixes_inline(capability: tuple[int, int], head_dim: int, rows: int) -> bool:
    """Whether forward mixes V' in its loop: for so few rows a KV head that little is mixed again.

    RESFORMER_MIX=inline|prologue decides instead. RuntimeError for another value of it.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in ("inline", "prologue"):
            raise RuntimeError(f"{VARIABLE} must be 'inline' or 'prologue', got {forced!r}")
        return forced == "inline"
    by_dim: dict[str, int] = table()[architecture(capability).name]["inline_rows"]
    bucket = min(int(dim) for dim in by_dim if int(dim) >= head_dim)
    return rows <= by_dim[str(bucket)]
