"""Every mix against its formula, and the names of its coefficients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resformer_kernels.nn import (
    DenseMix,
    EmbeddingMix,
    FirstValues,
    FixedMix,
    LearnedMix,
    OwnValues,
    ValueMix,
)
from resformer_kernels.nn.value_mix import MixedValues, ValueSources

SHAPE = (2, 5, 3, 8)


def sources(earlier: int = 1, *, own: bool = True) -> ValueSources:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return ValueSources(
        draw(*SHAPE) if own else None,
        tuple(draw(*SHAPE) for _ in range(earlier)),
        draw(2, 5, 16),
        torch.randint(7, (2, 5), generator=generator),
    )


def own(given: ValueSources) -> Tensor:
    assert given.own is not None
    return given.own


def combined(mixed: MixedValues) -> Tensor:
    """V' as `value_residual_attention` defines it."""
    if mixed.v is None:
        assert mixed.v_first is not None
        return mixed.v_first
    if mixed.v_first is None:
        return mixed.v
    return mixed.lambda_v * mixed.v + mixed.lambda_first * mixed.v_first


def test_own_and_first_values() -> None:
    given = sources()
    assert combined(OwnValues()(given)) is own(given)
    assert combined(FirstValues()(given)) is given.earlier[0]
    assert not FirstValues.projects_values


def test_fixed_mix_multiplies_the_first_layers_values_by_lambda_first() -> None:
    given = sources()
    got = combined(FixedMix(lambda_v=1.0, lambda_first=5.0)(given))
    torch.testing.assert_close(got, own(given) + 5.0 * given.earlier[0])


def test_learned_mix_starts_at_one_half_with_named_scalars() -> None:
    mix = LearnedMix()
    assert {name: p.item() for name, p in mix.named_parameters()} == {
        "lambda_v": 0.5,
        "lambda_first": 0.5,
    }
    given = sources()
    torch.testing.assert_close(combined(mix(given)), 0.5 * (own(given) + given.earlier[0]))


def test_learned_mix_a_head() -> None:
    mix = LearnedMix(3, lambda_v=0.25, lambda_first=0.75)
    assert mix.lambda_v.shape == mix.lambda_first.shape == (3, 1)
    given = sources()
    expected = 0.25 * own(given) + 0.75 * given.earlier[0]
    torch.testing.assert_close(combined(mix(given)), expected)


def test_dense_mix_weighs_every_layer() -> None:
    mix = DenseMix(4)
    torch.testing.assert_close(mix.lambda_layers.detach(), torch.full((4,), 0.25))
    with torch.no_grad():
        mix.lambda_layers.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]))
    given = sources(3)
    parts = zip((1.0, -2.0, 3.0, 0.5), (*given.earlier, own(given)), strict=True)
    expected = torch.stack([weight * value for weight, value in parts]).sum(0)
    torch.testing.assert_close(combined(mix(given)).detach(), expected)


def test_embedding_mix_is_gated_by_token_and_head() -> None:
    mix = EmbeddingMix(7, 3, 8, gate_channels=4)
    with torch.no_grad():
        mix.gate_proj.weight.normal_()
    given = sources()
    assert given.token_ids is not None
    assert given.x is not None
    gate = 3 * torch.sigmoid(given.x[..., :4] @ mix.gate_proj.weight.T)
    expected = own(given) + gate[..., None] * mix.table[given.token_ids]
    torch.testing.assert_close(combined(mix(given)), expected)


def test_embedding_mix_starts_half_open() -> None:
    mix = EmbeddingMix(7, 3, 8, gate_channels=4)
    given = sources()
    expected = own(given) + 1.5 * mix.table[given.token_ids]
    torch.testing.assert_close(combined(mix(given)), expected)


@pytest.mark.parametrize("mix", [FirstValues(), FixedMix(1, 2), LearnedMix()])
def test_a_missing_first_value_is_named(mix: ValueMix) -> None:
    with pytest.raises(ValueError, match=r"needs v_first.*OwnValues"):
        mix(sources(0))


def test_other_missing_sources_are_named() -> None:
    with pytest.raises(ValueError, match="this layer's values, got None"):
        OwnValues()(sources(own=False))
    with pytest.raises(ValueError, match="needs the values of 3 earlier layers, got 1"):
        DenseMix(4)(sources(1))
    with pytest.raises(ValueError, match="needs token_ids"):
        EmbeddingMix(7, 3, 8, gate_channels=4)(sources()._replace(token_ids=None))
    with pytest.raises(ValueError, match="num_sources must be at least 2, got 1"):
        DenseMix(1)
    with pytest.raises(NotImplementedError):
        ValueMix()(sources())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("prefix", ["", "layer.v_mix."])
def test_scalars_without_axes_load(prefix: str, assign: bool) -> None:
    mix = LearnedMix()
    module: nn.Module = mix
    for name in reversed(prefix.split(".")[:-1]):
        module = nn.ModuleDict({name: module})
    old = {
        f"{prefix}lambda_v": nn.Parameter(torch.tensor(0.25)),
        f"{prefix}lambda_first": torch.tensor(-2.0),
    }
    module.load_state_dict(old, assign=assign)
    assert mix.lambda_v.tolist() == [0.25]
    assert mix.lambda_first.tolist() == [-2.0]
    assert all(p.shape == (1,) and p.requires_grad for p in mix.parameters())
    assert old[f"{prefix}lambda_v"].shape == ()
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lambda_v.*\[2\].*\[1\]"):
        module.load_state_dict(old | {f"{prefix}lambda_v": torch.ones(2)}, assign=assign)


def test_numbers_of_numpy_and_tensors_are_taken() -> None:
    two: Any = torch.tensor(2)
    mix = LearnedMix(np.int64(3), lambda_v=np.float32(0.5), lambda_first=two)
    assert mix.lambda_first.tolist() == [[2.0]] * 3
    assert FixedMix(np.float64(1.5), two).lambda_first == 2.0
    assert DenseMix(np.int64(4)).lambda_layers.shape == (4,)
    embedding = EmbeddingMix(
        np.int64(7), np.int64(3), np.int64(8), gate_channels=np.int64(4), gate_range=np.float32(2)
    )
    assert embedding(sources()).v is not None
    with pytest.raises(TypeError, match="lambda_v must be a number, got 'a'"):
        FixedMix("a", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate_channels must be at least 1, got 0"):
        EmbeddingMix(7, 3, 8, gate_channels=0)
    with pytest.raises(ValueError, match="num_kv_heads must be at least 1, got 0"):
        LearnedMix(0)
