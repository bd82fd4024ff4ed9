"""The reference against PyTorch's SDPA, against loops over single scores, and by gradcheck."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resformer_kernels import value_residual_attention
from resformer_kernels.testing import AttentionCase, attention_inputs

WIDE = torch.float64
BASE = AttentionCase(
    batch=2, q_len=5, k_len=6, heads=4, kv_heads=2, head_dim=3, value_dim=2, dtype=WIDE
)
CASES = {
    "plain": BASE,
    "causal": dataclasses.replace(BASE, causal=True),
    "more queries": dataclasses.replace(BASE, q_len=7, k_len=4, causal=True),
    "window": dataclasses.replace(BASE, window=(1, 2)),
    "window and causal": dataclasses.replace(BASE, window=(2, 3), causal=True),
    "order": dataclasses.replace(
        BASE, softcap=1.5, scale=-0.7, bias="additive", sinks=True, causal=True
    ),
    "mask": dataclasses.replace(BASE, bias="mask", causal=True),
    "padding": dataclasses.replace(BASE, bias="padding", sinks=True),
    "empty rows": dataclasses.replace(BASE, bias="empty_rows"),
    "empty rows, sinks": dataclasses.replace(BASE, bias="empty_rows", sinks=True),
    "minus infinity": dataclasses.replace(BASE, bias="infinite", window=(1, 0)),
    "first values alone": dataclasses.replace(BASE, sources="v_first", causal=True),
    "own values alone": dataclasses.replace(BASE, sources="v"),
    "per channel": dataclasses.replace(BASE, lambda_v="channel", lambda_first="token"),
    "per token and head": dataclasses.replace(BASE, lambda_v="token_head", lambda_first="scalar"),
    "full": dataclasses.replace(BASE, lambda_v="full", lambda_first="head"),
    "no keys": dataclasses.replace(BASE, k_len=0, sinks=True),
}
PACKED = {
    "packed": dataclasses.replace(BASE, lengths=((3, 3), (0, 2), (4, 1)), tail=2, slack=1),
    "packed, all of it": dataclasses.replace(
        BASE,
        lengths=((3, 4), (2, 0), (3, 2)),
        tail=2,
        lambda_v="token",
        lambda_first="head",
        sinks=True,
        causal=True,
        bias="additive",
        slack=1,
    ),
}


def naive(case: AttentionCase, tensors: dict[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """One score at a time, with Python numbers: the contract read aloud."""
    sources = [
        (tensors[name], coefficient)
        for name, coefficient in (
            ("v", tensors.get("lambda_v", torch.tensor(0.7, dtype=WIDE))),
            ("v_first", tensors.get("lambda_first", torch.tensor(-1.3, dtype=WIDE))),
        )
        if name in tensors
    ]
    if len(sources) == 1:
        value = sources[0][0]
    else:
        value = sum((x * c for x, c in sources), torch.zeros((), dtype=WIDE))
    q, k = tensors["q"], tensors["k"]
    bias = tensors.get("attn_bias")
    full = (case.batch, case.heads, case.q_len, case.k_len)
    bias = None if bias is None else bias.expand(full)
    out = torch.zeros(case.batch, case.q_len, case.heads, case.value_dim, dtype=WIDE)
    lse = torch.full(full[:3], -math.inf, dtype=WIDE)
    left, right = case.window
    for b in range(case.batch):
        for h in range(case.heads):
            kv = h // (case.heads // case.kv_heads)
            for i in range(case.q_len):
                total = math.exp(tensors["sinks"][h].item()) if case.sinks else 0.0
                row = torch.zeros(case.value_dim, dtype=WIDE)
                for j in range(case.k_len):
                    at = i + case.k_len - case.q_len
                    if case.causal and j > at:
                        continue
                    if (left >= 0 and j < at - left) or (right >= 0 and j > at + right):
                        continue
                    s = scale * float(q[b, i, h] @ k[b, j, kv])
                    if case.softcap:
                        s = case.softcap * math.tanh(s / case.softcap)
                    if bias is not None and bias.dtype is torch.bool:
                        if not bias[b, h, i, j]:
                            continue
                    elif bias is not None:
                        s += bias[b, h, i, j].item()
                    total += math.exp(s)
                    row += math.exp(s) * value[b, j, kv]
                if total > 0:
                    out[b, i, h] = row / total
                    lse[b, h, i] = math.log(total)
    return out, lse


@pytest.mark.parametrize("name", CASES)
def test_equals_loops_over_single_scores(name: str) -> None:
    case = dataclasses.replace(CASES[name], return_lse=True, coefficient_dtype="same")
    inputs = attention_inputs(case)
    out, lse = inputs.function(**inputs.tensors, **inputs.options, backend="reference")
    scale = case.scale if case.scale is not None else case.head_dim**-0.5
    expected_out, expected_lse = naive(case, inputs.tensors, scale)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_packed_equals_one_sequence_at_a_time() -> None:
    case = dataclasses.replace(
        BASE, lengths=((5, 5), (0, 3), (4, 0), (2, 7)), tail=2, causal=True, return_lse=True,
        sinks=True, slack=3,
    )  # fmt: skip
    inputs = attention_inputs(case)
    out, lse = inputs.function(**inputs.tensors, **inputs.options, backend="reference")
    assert case.lengths is not None
    q_at = k_at = 0
    for q_len, k_len in case.lengths:
        rows = {"q": slice(q_at, q_at + q_len), "k": slice(k_at, k_at + k_len)}
        rows["v"] = rows["v_first"] = rows["k"]
        alone: dict[str, Any] = {name: inputs.tensors[name][rows[name]][None] for name in rows}
        one_out, one_lse = value_residual_attention(
            **alone, lambda_v=0.7, lambda_first=-1.3, causal=True, return_lse=True,
            sinks=inputs.tensors["sinks"], backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(out[rows["q"]], one_out[0])
        torch.testing.assert_close(lse[:, rows["q"]], one_lse[0])
        q_at, k_at = q_at + q_len, k_at + k_len
    assert out[q_at:].eq(0).all()
    assert lse[:, q_at:].eq(-torch.inf).all()


@pytest.mark.parametrize(
    ("causal", "bias"), [(False, "none"), (True, "none"), (False, "mask"), (False, "additive")]
)
def test_equals_sdpa_on_the_mixed_value(causal: bool, bias: str) -> None:
    case = AttentionCase(dtype=WIDE, causal=causal, bias=bias, coefficient_dtype="same", seed=1)
    inputs = attention_inputs(case)
    t = inputs.tensors
    out = inputs.function(**t, **inputs.options, backend="reference")
    expected = F.scaled_dot_product_attention(
        t["q"].transpose(1, 2),
        t["k"].transpose(1, 2),
        (0.7 * t["v"] - 1.3 * t["v_first"]).transpose(1, 2),
        attn_mask=t.get("attn_bias"),
        is_causal=causal,
        enable_gqa=True,
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", [*CASES, *PACKED])
def test_gradcheck(name: str) -> None:
    case = {**CASES, **PACKED}[name]
    case = dataclasses.replace(
        case, return_lse=True, return_mixed_value=True, coefficient_dtype="same"
    )
    inputs = attention_inputs(case)
    names = [n for n, x in inputs.tensors.items() if x.is_floating_point()]
    # Numerical differences cannot step off minus infinity, nor through the NaN past a sequence.
    leaves = [inputs.tensors[n].nan_to_num(0.0, neginf=-40.0).requires_grad_() for n in names]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        tensors = {**inputs.tensors, **dict(zip(names, values, strict=True))}
        out, lse, mixed = inputs.function(**tensors, **inputs.options, backend="reference")
        return out, lse.where(lse > -torch.inf, 0), mixed

    assert torch.autograd.gradcheck(run, leaves, fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_the_mix_once(dtype: torch.dtype) -> None:
    inputs = attention_inputs(AttentionCase(dtype=dtype, return_mixed_value=True))
    _, mixed = inputs.function(**inputs.tensors, **inputs.options, backend="reference")
    v, v_first = (inputs.tensors[name].float() for name in ("v", "v_first"))
    assert torch.equal(mixed, (0.7 * v - 1.3 * v_first).to(dtype))
