"""Schemas and fakes of the scan; torch alone is needed.

One schema, two namespaces: `resformer`, whose implementations C++ supplies, and `resformer_triton`,
whose launcher is imported, and Triton with it, when an op is first called.

The gradient of an output that nobody used is None. Of the states the backward reads what they hold
only where the gradient of the gates is wanted; else any tensor of their shape and dtype will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.old import vmap_error

SCAN = "linear_scan"

NATIVE, TRITON = "resformer", "resformer_triton"

WANTS_TOKENS, WANTS_GATES, WANTS_INITIAL = 1, 2, 4
"""The bits of `grad_mask`."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which tokens of `dtype` are accumulated, and their final state is returned."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _forward_fake(
    _gates: Tensor,
    tokens: Tensor,
    _initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    _reverse: bool,
) -> tuple[Tensor, Tensor]:
    sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = tokens.new_empty((sequences, tokens.shape[-1]), dtype=state_dtype(tokens.dtype))
    return tokens.new_empty(tokens.shape), final


def _backward_fake(
    _grad_states: Tensor | None,
    _grad_final: Tensor | None,
    gates: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    _cu_seqlens: Tensor | None,
    _reverse: bool,
    grad_mask: int,
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = (states, gates, states if initial_state is None else initial_state)
    found = [
        leaf.new_empty(leaf.shape if grad_mask >> bit & 1 else (0,))
        for bit, leaf in enumerate(leaves)
    ]
    return found[0], found[1], found[2]


_OPS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (
        "forward",
        "(Tensor gates, Tensor tokens, Tensor? initial_state, Tensor? cu_seqlens, bool reverse) "
        "-> (Tensor states, Tensor final_state)",
        _forward_fake,
    ),
    (
        "backward",
        "(Tensor? grad_states, Tensor? grad_final, Tensor gates, Tensor states, "
        "Tensor? initial_state, Tensor? cu_seqlens, bool reverse, int grad_mask) "
        "-> (Tensor dtokens, Tensor dgates, Tensor dinitial_state)",
        _backward_fake,
    ),
)


def _no_vmap(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise RuntimeError(vmap_error(SCAN))


def define(namespace: str) -> torch.library.Library:
    """The ops in a namespace: schemas, fakes and what they say under vmap. They go when the library
    does."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for part, signature, fake in _OPS:
        name = f"{SCAN}_{part}"
        library.define(name + signature)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        library.impl(name, _no_vmap, "FuncTorchBatched")
    return library


def _by_triton(part: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        import resformer_kernels.scan.triton.launch as launchers

        return getattr(launchers, part)(*arguments)

    return launch


_libraries = {namespace: define(namespace) for namespace in (NATIVE, TRITON)}
for _part, *_ in _OPS:
    # CPU tensors are for Triton's interpreter.
    for _key in ("CUDA", "CPU"):
        _libraries[TRITON].impl(f"{SCAN}_{_part}", _by_triton(_part), _key)
