"""Rotary embedding: relative positions, lengths, errors."""

from __future__ import annotations

import pytest
import torch

from resformer_kernels.nn import RotaryEmbedding, apply_rotary


def test_scores_depend_on_the_distance_alone() -> None:
    rotary = RotaryEmbedding(16, 64)
    q, k = torch.randn(2, 1, 1, 1, 16)
    scores = []
    for shift in (0, 7, 40):
        turned_q = apply_rotary(q, *rotary(1, shift + 5))
        turned_k = apply_rotary(k, *rotary(1, shift))
        scores.append((turned_q * turned_k).sum())
    torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores[2], scores[0], atol=1e-4, rtol=1e-4)


def test_position_zero_is_left_alone_and_norms_are_kept() -> None:
    x = torch.randn(1, 4, 2, 8)
    turned = apply_rotary(x, *RotaryEmbedding(8, 4)(4))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_dtype_is_kept_and_nothing_is_stored_in_checkpoints() -> None:
    rotary = RotaryEmbedding(8, 4)
    assert apply_rotary(torch.randn(1, 4, 2, 8).bfloat16(), *rotary(4)).dtype is torch.bfloat16
    assert not rotary.state_dict()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="head_dim must be even and at least 2, got 7"):
        RotaryEmbedding(7, 4)
    with pytest.raises(ValueError, match="max_seqlen must be at least 1, got 0"):
        RotaryEmbedding(8, 0)
    with pytest.raises(ValueError, match="positions 2 to 6 are not within max_seqlen 4"):
        RotaryEmbedding(8, 4)(4, 2)
