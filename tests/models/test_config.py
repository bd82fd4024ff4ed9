"""The configuration: defaults, windows and errors."""

from __future__ import annotations

from typing import Any

import pytest

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


def test_mlp_is_eight_thirds_wide() -> None:
    assert LanguageModelConfig(dim=192).resolved_mlp_hidden == 512
    assert LanguageModelConfig(dim=128).resolved_mlp_hidden == 352
    assert LanguageModelConfig(mlp_hidden=7).resolved_mlp_hidden == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "resformer"}, "variant must be one of transformer, .* got 'resformer'"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"dim": 1.5}, "dim must be an integer of at least 1, got 1.5"),
        ({"mlp_hidden": -1}, "mlp_hidden must be an integer of at least 1, got -1"),
        ({"window_pattern": "SX"}, "window_pattern must be letters S and L.*got 'SX'"),
        ({"window_pattern": ""}, "window_pattern"),
        ({"num_layers": 4, "sparse_layers": 4}, "sparse_layers must be at most .* = 3, got 4"),
        ({"dim": 30}, "dim must be a multiple of num_heads 4"),
    ],
)
def test_bad_fields_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**options)
