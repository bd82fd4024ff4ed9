"""A language model small enough for tests of every variant."""

from __future__ import annotations

import pytest

from resformer_kernels.models import VARIANTS, LanguageModelConfig

SMALL = LanguageModelConfig(
    dim=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    max_seqlen=24,
    mlp_hidden=48,
    window_pattern="SSL",
    short_window=8,
    qk_norm=True,
    gate_channels=8,
    vocab_size=50,
)

EPILOGUES = (
    {"exclusive": "learned", "gate": "head"},
    {"exclusive": 1.0, "gate": "channel"},
    {"exclusive": "learned"},
)
"""What any variant may switch on after its softmax."""

all_epilogues = pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda x: ", ".join(map(str, x)))
all_variants = pytest.mark.parametrize("variant", VARIANTS)
