"""The configuration: defaults, windows and errors."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from resformer_kernels.models import LanguageModelConfig


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


@pytest.mark.parametrize(("layers", "middle"), [(8, 3), (4, 1), (3, 0), (2, 0), (1, 0)])
def test_half_of_the_layers_keep_keys_in_fused_kv_lite(layers: int, middle: int) -> None:
    config = LanguageModelConfig(variant="fused-kv-lite", num_layers=layers)
    assert config.resolved_middle_layer == middle
    last = dataclasses.replace(config, middle_layer=layers - 1)
    assert last.resolved_middle_layer == layers - 1
    assert dataclasses.replace(config, variant="svformer").resolved_middle_layer == layers - 1


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
        ({"num_layers": 4, "middle_layer": 4}, "middle_layer must be at most .* = 3, got 4"),
        ({"middle_layer": -1}, "middle_layer must be at least 0, got -1"),
        ({"exclusive": "all"}, "exclusive must be a number, 'learned' or None, got 'all'"),
        ({"gate": "token"}, "gate must be 'head', 'channel' or None"),
        ({"dim": 30}, "dim must be a multiple of num_heads 4"),
    ],
)
def test_bad_fields_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**options)


def test_fields_of_another_type_are_named() -> None:
    for options in ({"dim": 1.5}, {"num_layers": True}, {"vocab_size": None}, {"head_dim": "8"}):
        (name,) = options
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            LanguageModelConfig(**options)
    with pytest.raises(TypeError, match="rope_base must be a number, got '1'"):
        LanguageModelConfig(rope_base="1")  # type: ignore[arg-type]


def test_numpy_numbers_become_pythons() -> None:
    given = {"dim": np.int64(16), "num_heads": np.array(2), "norm_eps": np.float32(0.5)}
    config = LanguageModelConfig(**given, rope_base=torch.tensor(100))  # type: ignore[arg-type]
    plain = LanguageModelConfig(dim=16, num_heads=2, norm_eps=0.5, rope_base=100)
    assert config == plain
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(plain))
