"""The configuration: defaults, windows and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from resformer_kernels.models import LanguageModel, LanguageModelConfig


def test_window_pattern_repeats_and_the_last_layer_sees_all() -> None:
    config = LanguageModelConfig(num_layers=8, window_pattern="SSSL", max_seqlen=64)
    short, full = (31, 0), (-1, -1)
    assert [config.window(layer) for layer in range(8)] == [
        *(short, short, short, full),
        *(short, short, short, full),
    ]
    config = LanguageModelConfig(num_layers=2, window_pattern="S", short_window=5)
    assert [config.window(layer) for layer in range(2)] == [(4, 0), full]


@pytest.mark.parametrize(("layers", "mixing"), [(8, 3), (4, 2), (2, 1), (1, 0)])
def test_sparse_mixes_in_the_last_layers(layers: int, mixing: int) -> None:
    assert LanguageModelConfig(num_layers=layers).resolved_sparse_layers == mixing


def test_mlp_is_eight_thirds_wide() -> None:
    assert LanguageModelConfig(dim=192).resolved_mlp_hidden == 512
    assert LanguageModelConfig(dim=128).resolved_mlp_hidden == 352
    assert LanguageModelConfig(mlp_hidden=7).resolved_mlp_hidden == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "resformer"}, "variant must be one of transformer, .* got 'resformer'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"mlp_hidden": -1}, "mlp_hidden must be at least 1, got -1"),
        ({"window_pattern": "SX"}, "window_pattern must be letters S and L.*got 'SX'"),
        ({"window_pattern": ""}, "window_pattern"),
        ({"num_layers": 4, "sparse_layers": 4}, "sparse_layers must be at most .* = 3, got 4"),
        ({"dim": 30}, "dim must be a multiple of num_heads 4"),
    ],
)
def test_bad_fields_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**options)
    with pytest.raises(TypeError, match=r"dim must be an int, got 1\.5"):
        LanguageModelConfig(dim=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="vocab_size must be an int, got None"):
        LanguageModelConfig(vocab_size=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rope_base must be a number, got 'a'"):
        LanguageModelConfig(rope_base="a")  # type: ignore[arg-type]


def test_numbers_of_numpy_and_tensors_become_pythons() -> None:
    sizes: dict[str, Any] = {"dim": np.int64(64), "num_layers": torch.tensor(3), "head_dim": None}
    reals: dict[str, Any] = {"rope_base": np.float32(500), "attention_scale": torch.tensor(0.25)}
    plain = LanguageModelConfig(dim=64, num_layers=3, rope_base=500.0, attention_scale=0.25)
    config = LanguageModelConfig(**sizes, **reals)
    assert config == plain
    assert type(config.dim) is type(config.num_layers) is int
    assert type(config.rope_base) is type(config.attention_scale) is float
    assert LanguageModel(config)(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 256)
