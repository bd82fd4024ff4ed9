"""Schemas and fakes of the reservoir's ops; torch alone is needed.

One schema, two namespaces: `resformer`, whose implementations C++ supplies, and `resformer_triton`,
whose launcher is imported, and Triton with it, when an op is first called.

`forward` and `adjoint` are compiled: they are the two recurrences. `backward` and `reduced` are
made of those of their namespace, in Python, over stretches of time; being ops, they are opaque to
torch.compile.
A weight travels as its values, with `columns` for a permutation, and `rows` and `columns` for CSR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.old import vmap_error

NAME = "reservoir_scan"
NATIVE, TRITON = "resformer", "resformer_triton"
VMAP_ERROR = vmap_error(NAME).replace("(B, T, H, D)", "(B, T, inputs)")

_WEIGHT = "Tensor weight, Tensor? rows, Tensor? columns"
_CALL = (
    f"Tensor inputs, {_WEIGHT}, Tensor? input_weight, Tensor leak, Tensor? bias, "
    "Tensor? initial_state, Tensor? cu_seqlens, int activation, int mode, float tolerance"
)
INFO_SIZE = 5


def _units(weight: Tensor, rows: Tensor | None) -> Any:
    if rows is not None:
        return rows.shape[0] - 1
    return weight.shape[0] * weight.shape[1] if weight.dim() == 3 else weight.shape[0]


def _sequences(inputs: Tensor, cu_seqlens: Tensor | None) -> Any:
    return inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _info(like: Tensor) -> Tensor:
    return like.new_empty((INFO_SIZE,), dtype=torch.float64)


def _forward_fake(
    inputs: Tensor, weight: Tensor, rows: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = rest[5]
    units = _units(weight, rows)
    states = inputs.new_empty((*inputs.shape[:-1], units))
    return states, inputs.new_empty((_sequences(inputs, cu_seqlens), units)), _info(inputs)


def _adjoint_fake(grad: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), _info(grad)


def _backward_fake(
    _grad_states: Tensor | None,
    _grad_final: Tensor | None,
    inputs: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    _columns: Tensor | None,
    input_weight: Tensor | None,
    leak: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    del rows
    grad_mask = rest[-1]
    leaves = (inputs, weight, input_weight, leak, bias, initial_state)
    return tuple(
        inputs.new_empty((0,))
        if leaf is None or not grad_mask >> bit & 1
        else leaf.new_empty(leaf.shape)
        for bit, leaf in enumerate(leaves)
    )


def _reduced_fake(
    inputs: Tensor, weight: Tensor, rows: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cu_seqlens, targets, reduce = rest[5], rest[-2], rest[-1]
    units, sequences = _units(weight, rows), _sequences(inputs, cu_seqlens)
    final = inputs.new_empty((sequences, units))
    if reduce != "gram":
        return inputs.new_empty((sequences, units)), inputs.new_empty((0,)), final, _info(inputs)
    outputs = 0 if targets is None else targets.shape[-1]
    gram = inputs.new_empty((units, units), dtype=torch.float64)
    return gram, gram.new_empty((units, outputs)), final, _info(inputs)


FORWARD, ADJOINT = f"{NAME}_forward", f"{NAME}_adjoint"
BACKWARD, REDUCED = f"{NAME}_backward", f"{NAME}_reduced"

_OPS: tuple[tuple[str, str, Any], ...] = (
    (FORWARD, f"({_CALL}) -> (Tensor states, Tensor final_state, Tensor info)", _forward_fake),
    (
        ADJOINT,
        f"(Tensor grad, Tensor slope, {_WEIGHT}, Tensor leak, Tensor? cu_seqlens, int mode, "
        "float tolerance) -> (Tensor adjoint, Tensor info)",
        _adjoint_fake,
    ),
    (
        BACKWARD,
        f"(Tensor? grad_states, Tensor? grad_final, {_CALL}, Tensor states, int grad_mask) -> "
        "(Tensor dinputs, Tensor dweight, Tensor dinput_weight, Tensor dleak, Tensor dbias, "
        "Tensor dinitial_state)",
        _backward_fake,
    ),
    (
        REDUCED,
        f"({_CALL}, Tensor? targets, str reduce) -> "
        "(Tensor first, Tensor second, Tensor final_state, Tensor info)",
        _reduced_fake,
    ),
)


def _no_vmap(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise RuntimeError(VMAP_ERROR)


def _composed(namespace: str) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """What is made of the recurrences of `namespace`."""

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        from resformer_kernels.reservoir import gradients

        return gradients.backward(namespace, *arguments)

    def reduced(*arguments: Any) -> tuple[Tensor, ...]:
        from resformer_kernels.reservoir import stretches

        return stretches.reduced(namespace, *arguments)

    return {BACKWARD: backward, REDUCED: reduced}


def define(namespace: str) -> torch.library.Library:
    """The ops in a namespace: schemas, fakes, what they say under vmap, and those that are made of
    others. They go when the library does."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, signature, fake in _OPS:
        library.define(name + signature)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        library.impl(name, _no_vmap, "FuncTorchBatched")
    for name, composed in _composed(namespace).items():
        for key in ("CPU", "CUDA"):
            library.impl(name, composed, key)
    return library


def _by_triton(part: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        import resformer_kernels.reservoir.triton.launch as launchers

        return getattr(launchers, part)(*arguments)

    return launch


_libraries = {namespace: define(namespace) for namespace in (NATIVE, TRITON)}
for _name, _part in ((FORWARD, "forward"), (ADJOINT, "adjoint")):
    # CPU tensors are for Triton's interpreter.
    for _key in ("CUDA", "CPU"):
        _libraries[TRITON].impl(_name, _by_triton(_part), _key)
