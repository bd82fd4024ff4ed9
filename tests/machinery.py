"""Tests of an op under PyTorch's machinery, for the test modules that import them.

Such a module has the fixtures `function`, which calls the op, and `make`, which makes its arguments
for a number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


def gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of function(*inputs), then the gradients of the inputs that want one."""
    leaves = [x for x in inputs if x.requires_grad]
    result = function(*inputs)
    outputs = (result,) if isinstance(result, Tensor) else result
    loss = torch.stack([x.square().sum() for x in outputs]).sum()
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, leaves)]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Equal tensors, to rounding."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def check_compiles_whole(
    function: Callable[..., Any], make: Callable[..., Any], lengths: tuple[int, ...]
) -> None:
    """One graph without breaks serves all lengths, forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in lengths:
            inputs = make(length)
            same(gradients(compiled, inputs), gradients(function, inputs))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch has that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes of distinct storage that autograd saves during function()."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(sizes.values())


def test_checkpointing(function: Any, make: Any) -> None:
    inputs = make()

    def checkpointed(*leaves: Tensor) -> Any:
        return checkpoint(function, *leaves, use_reentrant=False)

    same(gradients(checkpointed, inputs), gradients(function, inputs))


def test_gradients_are_not_differentiable_again(function: Any, make: Any) -> None:
    inputs = make()
    result = function(*inputs)
    out = result if isinstance(result, Tensor) else result[0]
    leaves = [x for x in inputs if x.requires_grad]
    # The gradient of a plain sum is a constant: it depends on the saved leaves alone.
    for loss in (out.square().sum(), out.sum()):
        found = torch.autograd.grad(loss, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="does not support double backward"):
            found[-1].sum().backward()


def test_vmap_says_no(function: Any, make: Any) -> None:
    inputs = tuple(x.detach()[None] for x in make())
    with pytest.raises(RuntimeError, match=r"does not support torch.func.vmap"):
        torch.func.vmap(function)(*inputs)


def test_forward_mode_says_no(function: Any, make: Any) -> None:
    first, *rest = (x.detach() for x in make())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            function(dual, *rest)
