"""Parameters of a distributed module, as this rank uses them beside plain tensors."""

from __future__ import annotations

from torch import Tensor

from resformer_kernels._core.dtensors import is_dtensor


def local_parameter(parameter: Tensor, beside: Tensor, *, whole: bool = False) -> Tensor:
    """A parameter as an operation needs it whose other operand is `beside`.

    Tensor parallelism makes parameters DTensors, while activations are plain tensors that hold
    this rank's heads. There the result is this rank's part of the parameter, a plain tensor. Its
    gradient comes back right: what a rank computes from a replicated parameter is due to its own
    heads, so that the gradient is summed over the ranks, in backward; that of a sharded one is its
    shard's. Everywhere else the result is the parameter.

    Args:
        parameter: any parameter.
        beside: the other operand.
        whole: every rank computes the same from the parameter, as from the residual stream, and so
            has the whole gradient, which is not summed.
    """
    if not is_dtensor(type(parameter)) or is_dtensor(type(beside)):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    placements = parameter.placements
    if whole:
        return parameter.to_local(grad_placements=placements)
    # The redistribution has work in backward alone, where it sums: an optimizer then finds a
    # gradient that is placed like its parameter, and backward may be called again before a step.
    found = tuple(Partial() if place.is_replicate() else place for place in placements)
    return parameter.redistribute(placements=placements).to_local(grad_placements=found)
