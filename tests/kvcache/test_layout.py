"""KVLayout: which layer has which slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from resformer_kernels import KVLayout


def test_named_layouts() -> None:
    assert KVLayout.standard(3) == KVLayout((0, 1, 2), (0, 1, 2))
    assert KVLayout.svformer(3) == KVLayout((0, 1, 2), (0, 0, 0))
    assert KVLayout.cla(5, 2) == KVLayout((0, 0, 1, 1, 2), (0, 1, 2, 3, 4))
    assert KVLayout.cla(4, 2, share_values=True) == KVLayout((0, 0, 1, 1), (0, 0, 1, 1))
    assert KVLayout.svformer_cla(5, 3) == KVLayout((0, 0, 0, 1, 1), (0, 0, 0, 0, 0))
    assert KVLayout.cla(4, 1) == KVLayout.standard(4)
    assert KVLayout.fused_kv_lite(5, 1) == KVLayout((0, 1, 1, 1, 1), (0, 1, 0, 0, 0))
    assert KVLayout.fused_kv_lite(3, 0) == KVLayout((0, 0, 0), (0, 0, 0))
    assert KVLayout.fused_kv_lite(3, 2) == KVLayout.standard(3)


def test_fused_kv_lite_writes_up_to_the_middle() -> None:
    layout = KVLayout.fused_kv_lite(6, 2)
    assert (layout.num_key_slots, layout.num_value_slots) == (3, 3)
    for layer in range(6):
        assert layout.writes_keys(layer) == layout.writes_values(layer) == (layer <= 2)


def test_free_layout_counts_slots_and_says_who_writes() -> None:
    layout = KVLayout([1, 0, 1, 0], [0, 1, 1, 0])  # type: ignore[arg-type]
    assert (layout.num_layers, layout.num_key_slots, layout.num_value_slots) == (4, 2, 2)
    assert layout.key_slots == (1, 0, 1, 0)
    assert [layout.writes_keys(layer) for layer in range(4)] == [True, True, False, False]
    assert [layout.writes_values(layer) for layer in range(4)] == [True, True, False, False]
    assert len({layout, KVLayout((1, 0, 1, 0), (0, 1, 1, 0))}) == 1


@pytest.mark.parametrize(
    ("keys", "values", "error", "said"),
    [
        ((), (), ValueError, "key_slots must name at least one layer's slot"),
        ((0, 2), (0, 1), ValueError, r"every slot from 0 up to the largest, got \(0, 2\)"),
        ((0, -1), (0, 1), ValueError, "every slot from 0"),
        ((0, 1), (0,), ValueError, "value_slots must name a slot for each of .* 2 layers, got 1"),
        ((0, 1.0), (0, 1), TypeError, r"key_slots\[1\] must be an int, got 1.0"),
        ((0, True), (0, 1), TypeError, r"key_slots\[1\] must be an int, got True"),
        (3, (0, 1), TypeError, "key_slots must be a sequence of ints, got 3"),
        ((0, 1), "01", TypeError, r"value_slots\[0\] must be an int, got '0'"),
    ],
)
def test_bad_slots_are_named(keys: Any, values: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        KVLayout(keys, values)


def test_numbers_and_sequences_of_numpy_and_torch() -> None:
    layout = KVLayout(np.array([0, 1, 1]), torch.tensor([0, 0, 0]))  # type: ignore[arg-type]
    assert layout == KVLayout((0, 1, 1), (0, 0, 0))
    assert {type(slot) for slot in (*layout.key_slots, *layout.value_slots)} == {int}
    three, two = np.int64(3), torch.tensor(2)
    assert KVLayout.svformer(three) == KVLayout.svformer(3)
    assert KVLayout.cla(three, two) == KVLayout.cla(3, 2)  # type: ignore[arg-type]
    assert KVLayout.svformer_cla(three, two) == KVLayout.svformer_cla(3, 2)  # type: ignore[arg-type]
    assert KVLayout.fused_kv_lite(three, two) == KVLayout.fused_kv_lite(3, 2)  # type: ignore[arg-type]


def test_bad_counts_are_named() -> None:
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        KVLayout.svformer(0)
    with pytest.raises(TypeError, match="num_layers must be an int"):
        KVLayout.standard(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        KVLayout.svformer_cla(4, 0)
    for middle in (-1, 4):
        with pytest.raises(ValueError, match=f"middle must be 0 to .* = 3, got {middle}"):
            KVLayout.fused_kv_lite(4, middle)
    with pytest.raises(TypeError, match=r"middle must be an int, got 1\.5"):
        KVLayout.fused_kv_lite(4, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        KVLayout.fused_kv_lite(0, 0)
