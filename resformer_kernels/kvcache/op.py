"""The schema and the fake of `attention_with_kvcache`; torch alone is needed.

One schema, two namespaces: `resformer`, whose implementation C++ supplies, and `resformer_triton`,
whose launcher is imported, and Triton with it, when an op is first called.

The caches and their scales are written in place, and only there: at the positions of appended
tokens. What was not asked for comes back with no elements.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.op import vmap_error

ATTEND = "attention_with_kvcache"
NATIVE, TRITON = "resformer", "resformer_triton"
VMAP_ERROR = vmap_error(ATTEND)

_SCHEMA = (
    f"{ATTEND}(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    "Tensor cache_seqlens, Tensor? block_table, Tensor? key_mask, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
    "int window_left, int window_right, float scale, float softcap, Tensor? sinks, "
    "int num_splits, bool return_lse) -> (Tensor out, Tensor lse)"
)


def _fake(q: Tensor, _k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return_lse: bool = rest[-1]
    batch, length, heads, _ = q.shape
    lse_shape = (batch, heads, length) if return_lse else (0,)
    return (
        q.new_empty((batch, length, heads, v_cache.shape[-1])),
        q.new_empty(lse_shape, dtype=torch.float32),
    )


def _no_vmap(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise RuntimeError(VMAP_ERROR)


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from resformer_kernels.kvcache.triton import launch as triton_launch

    return triton_launch.attend(*arguments)


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(_SCHEMA)
    torch.library.register_fake(f"{namespace}::{ATTEND}", _fake, lib=library)
    library.impl(ATTEND, _no_vmap, "FuncTorchBatched")
    return library


# Libraries unregister what they hold when they are collected.
_libraries = {namespace: _define(namespace) for namespace in (NATIVE, TRITON)}
# CPU tensors are for Triton's interpreter.
for _key in ("CUDA", "CPU"):
    _libraries[TRITON].impl(ATTEND, _triton, _key)
