"""Memory that a training step saves between its forward and its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_activation_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves during `forward()`.

    Each storage counts once, however many operations save it; the model's parameters and
    buffers do not count.
    """
    owned = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    # References to the storages prevent the reuse of a freed one's address.
    saved: dict[int, torch.UntypedStorage] = {}

    def save(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        forward()
    return sum(storage.nbytes() for storage in saved.values())
