"""The attention layer against SDPA, and the values it takes and returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resformer_kernels.nn import (
    DenseMix,
    FirstValues,
    OwnValues,
    RotaryEmbedding,
    ValueMix,
    ValueResidualAttention,
    apply_rotary,
)

DIM, HEADS, KV_HEADS, LENGTH = 32, 4, 2, 9


def layer(v_mix: ValueMix | None = None, **options: object) -> ValueResidualAttention:
    torch.manual_seed(0)
    return ValueResidualAttention(DIM, HEADS, KV_HEADS, v_mix=v_mix, **options)  # type: ignore[arg-type]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, LENGTH, DIM, generator=generator)
    return x, torch.randn(2, LENGTH, KV_HEADS, DIM // HEADS, generator=generator)


def by_sdpa(
    module: ValueResidualAttention,
    x: Tensor,
    mixed: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    def rotated(projection: torch.nn.Module) -> Tensor:
        heads = projection(x).unflatten(-1, (-1, DIM // HEADS))
        if module.qk_norm:
            heads = F.rms_norm(heads, heads.shape[-1:])
        return heads if rotary is None else apply_rotary(heads, *rotary)

    q, k = rotated(module.q_proj), rotated(module.k_proj) if keys is None else keys
    q, k, mixed = (t.transpose(1, 2) for t in (q, k, mixed))
    out = F.scaled_dot_product_attention(q, k, mixed, is_causal=True, enable_gqa=True)
    return module.o_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_exclusive_outputs_and_gates(gate: str) -> None:
    module = layer(OwnValues(), exclusive="learned", gate=gate)
    assert module.epilogue is not None
    x, _ = inputs()
    plain = layer(OwnValues())
    plain.load_state_dict(module.state_dict(), strict=False)
    with torch.no_grad():
        module.o_proj.weight.copy_(torch.eye(DIM))
        plain.o_proj.weight.copy_(torch.eye(DIM))
        y, own = plain(x)
        # alpha starts at 0: the gate alone.
        factor = torch.sigmoid(module.epilogue.gate_proj(x)).unflatten(2, (HEADS, -1))
        heads = y.unflatten(2, (HEADS, -1))
        torch.testing.assert_close(module(x)[0], (factor * heads).flatten(2))
        module.epilogue.alpha.copy_(torch.randn(HEADS, 1))
    unit = F.normalize(own.repeat_interleave(HEADS // KV_HEADS, dim=2), dim=-1)
    along = (heads * unit).sum(-1, keepdim=True) * unit
    expected = factor * (heads - torch.tanh(module.epilogue.alpha) * along)
    out, _ = module(x)
    torch.testing.assert_close(out, expected.flatten(2))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_a_constant_share_has_no_parameter() -> None:
    module, plain = layer(OwnValues(), exclusive=1.0), layer(OwnValues())
    assert module.state_dict().keys() == plain.state_dict().keys()
    x, _ = inputs()
    assert not torch.equal(module(x)[0], plain(x)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclusive": "all"}, "exclusive must be a number, 'learned' or None, got 'all'"),
        ({"gate": "token"}, "gate must be 'head', 'channel' or None"),
    ],
)
def test_unknown_epilogues_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer(None, **options)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_learnable_layer_equals_sdpa_over_the_mix(qk_norm: bool) -> None:
    module = layer(qk_norm=qk_norm)
    x, v_first = inputs()
    rotary = RotaryEmbedding(DIM // HEADS, LENGTH)(LENGTH)
    out, own = module(x, v_first, rotary=rotary)
    expected = by_sdpa(module, x, 0.5 * own + 0.5 * v_first, rotary)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(own, module.v_proj(x).unflatten(-1, (KV_HEADS, -1)))


def test_first_layer_is_plain_attention_and_returns_its_values() -> None:
    module = layer(OwnValues())
    x, _ = inputs()
    out, own = module(x)
    torch.testing.assert_close(out, by_sdpa(module, x, own), atol=1e-5, rtol=1e-4)
    assert type(own) is Tensor
    assert own.shape == (2, LENGTH, KV_HEADS, DIM // HEADS)


def test_svformer_layer_has_no_value_projection() -> None:
    module = layer(FirstValues())
    assert not hasattr(module, "v_proj")
    assert not [name for name, _ in module.named_parameters() if "v_" in name]
    x, v_first = inputs()
    out, returned = module(x, v_first)
    assert returned is v_first
    torch.testing.assert_close(out, by_sdpa(module, x, v_first), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_layer_over_an_earlier_layers_keys(qk_norm: bool) -> None:
    rotary = RotaryEmbedding(DIM // HEADS, LENGTH)(LENGTH)
    x, _ = inputs()
    middle = layer(OwnValues(), qk_norm=qk_norm)
    out, v_first, keys = middle(x, rotary=rotary, return_keys=True)
    torch.testing.assert_close(out, by_sdpa(middle, x, v_first, rotary, keys))
    upper = layer(FirstValues(), qk_norm=qk_norm, projects_keys=False)
    assert [name for name, _ in upper.named_children()] == ["v_mix", "q_proj", "o_proj"]
    out, values, returned = upper(2 * x, v_first, keys=keys, rotary=rotary, return_keys=True)
    assert returned is keys
    assert values is v_first
    expected = by_sdpa(upper, 2 * x, v_first, rotary, keys)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert len(upper(x, v_first, keys=keys)) == 2


def test_keys_that_lack_or_are_too_many_are_named() -> None:
    x, keys = inputs()
    with pytest.raises(ValueError, match=r"keys must be an earlier layer's, .* got None"):
        layer(OwnValues(), projects_keys=False)(x)
    with pytest.raises(ValueError, match=r"keys must be None, .* got a tensor of shape \(2, 9"):
        layer(OwnValues())(x, keys=keys)


def test_dense_layer_takes_later_values_as_tensors() -> None:
    module = layer(DenseMix(3))
    x, v_first = inputs()
    out, own = module(x, v_first, 2 * v_first)
    expected = by_sdpa(module, x, (v_first + 2 * v_first + own) / 3)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_window_hides_far_keys() -> None:
    module = layer(OwnValues(), window=(1, 0))
    x, _ = inputs()
    moved = x.clone()
    moved[:, 0] += 1.0
    before, after = module(x)[0], module(moved)[0]
    assert not torch.equal(before[:, :2], after[:, :2])
    torch.testing.assert_close(before[:, 2:], after[:, 2:])


def test_every_parameter_and_the_first_value_get_a_gradient() -> None:
    module = layer()
    x, v_first = inputs()
    v_first.requires_grad_()
    module(x, v_first)[0].square().sum().backward()
    assert v_first.grad is not None
    assert v_first.grad.abs().sum() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_checkpointing_gives_the_same_gradients() -> None:
    module = layer()
    x, v_first = inputs()
    v_first.requires_grad_()
    leaves = [v_first, *module.parameters()]
    plain = torch.autograd.grad(module(x, v_first)[0].square().sum(), leaves)
    out, _ = checkpoint(module, x, v_first, use_reentrant=False)
    recomputed = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(recomputed, plain)


def test_bad_head_counts_are_named() -> None:
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads 3, got 4"):
        ValueResidualAttention(DIM, 4, 3)
    with pytest.raises(ValueError, match=r"dim must be a multiple of num_heads 5.*got 32"):
        ValueResidualAttention(DIM, 5)
