"""Layers that share the first layer's values: checkpointing, autocast, compilation, FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resformer_kernels.compat import scaled_dot_product_attention
from resformer_kernels.compat.flash_attn import flash_attn_func

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


class Layer(nn.Module):
    """Attention with a learned mix that takes and returns the first layer's values."""

    def __init__(self, heads: int, dim: int, drop_in: str) -> None:
        super().__init__()
        self.heads, self.drop_in = heads, drop_in
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lambdas = nn.Parameter(torch.tensor([0.6, 0.4]))

    def forward(self, x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        # In the layout of the drop-in: (B, T, 3, H, D), then heads before time for SDPA.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.drop_in == "sdpa":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        lambdas: dict[str, Any] = {"lambda_v": self.lambdas[0], "lambda_first": self.lambdas[1]}
        mix: dict[str, Any] = {} if v_first is None else {"v_first": v_first, **lambdas}
        if self.drop_in == "sdpa":
            out = scaled_dot_product_attention(q, k, v, is_causal=True, **mix).transpose(1, 2)
        else:
            out = flash_attn_func(q, k, v, causal=True, **mix)
        return x + out.flatten(-2), v if v_first is None else v_first


class Stack(nn.Module):
    def __init__(self, drop_in: str, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(2, 16, drop_in) for _ in range(3))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        v_first = None
        for layer in self.layers:
            if self.checkpointed:
                x, v_first = checkpoint(layer, x, v_first, use_reentrant=False)
            else:
                x, v_first = layer(x, v_first)
        return x


def batch(length: int = 12) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(length))


def gradients(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(x).float().square().sum()
    return {"loss": loss.detach(), **backward(model, loss)}


def backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


both = pytest.mark.parametrize("drop_in", ["sdpa", "flash"])


@both
def test_checkpointing_keeps_the_gradient_of_the_first_values(drop_in: str) -> None:
    expected, found = (gradients(Stack(drop_in, recompute), batch()) for recompute in (False, True))
    assert_same(found, expected)
    # Every layer contributes to the gradient of the first value projection, unless detached.
    model = Stack(drop_in)
    original = Layer.forward

    def detached(self: Layer, x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        return original(self, x, v_first if v_first is None else v_first.detach())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "forward", detached)
        without = gradients(model, batch())
    assert not torch.allclose(without["layers.0.qkv.weight"], expected["layers.0.qkv.weight"])


@both
def test_checkpointing_under_autocast(drop_in: str) -> None:
    expected, found = (
        gradients(Stack(drop_in, recompute), batch(), dtype=torch.bfloat16)
        for recompute in (False, True)
    )
    assert_same(found, expected)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


@both
def test_checkpointed_layers_compile_whole(drop_in: str) -> None:
    torch.compiler.reset()
    model = Stack(drop_in, checkpointed=True)
    # Not dynamic=True: torch 2.13 then turns float defaults of any function into graph inputs, and
    # fails (lift_tracked_freevar_to_input) where two checkpointed regions share one.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (12, 20):
        expected = gradients(Stack(drop_in), batch(length))
        loss = compiled(batch(length)).square().sum()
        assert_same({"loss": loss.detach(), **backward(model, loss)}, expected)


@pytest.mark.usefixtures("one_process")
# A layer returns its values as a view of its projection; nothing writes to them.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@both
def test_fully_sharded_layers(drop_in: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    expected = gradients(Stack(drop_in), batch())
    model = Stack(drop_in, checkpointed=True)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = gradients(model, batch())
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}
    assert_same(whole, expected)
