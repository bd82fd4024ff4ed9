"""Cases of what follows the softmax."""

from __future__ import annotations

from resformer_kernels.testing import AttentionCase

EPILOGUES = {
    "exclusive": AttentionCase(exclusive="one", return_mixed_value=True, lambda_v="token_head"),
    "gate": AttentionCase(out_gate="token_head", q_len=21, k_len=40),
    "scalar, per head": AttentionCase(exclusive="scalar", out_gate="head", zero_values=True),
    "token, per element": AttentionCase(
        exclusive="token_head", out_gate="full", causal=True, coefficient_dtype="same"
    ),
    "late queries": AttentionCase(exclusive="head", out_gate="channel", q_len=40, k_len=21),
    "one source": AttentionCase(exclusive="token", out_gate="token_head", sources="v"),
    "packed": AttentionCase(
        exclusive="token_head", out_gate="token_head", lambda_v="full", coefficient_dtype="same",
        causal=True, lengths=((5, 9), (0, 3), (7, 2), (20, 20)), tail=3,
    ),
    "packed, per element": AttentionCase(
        exclusive="head", out_gate="full", lengths=((5, 9), (20, 20)), tail=3, slack=2,
        return_mixed_value=True,
    ),
}  # fmt: skip
