"""FlashAttention's packages, faked on a CPU: their signatures, and the limits of their C++.

Masks are made as `set_params_fprop` of either version makes them, from the window that arrives;
what those kernels never write is NaN, and what they cannot do raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.attention.api import value_residual_attention

Windowing = Callable[[int, int, int, int, bool], tuple[int, int]]


def windows_of_2(left: int, right: int, q_len: int, k_len: int, causal: bool) -> tuple[int, int]:
    """mha_fwd and set_params_fprop of FlashAttention 2."""
    left = -1 if left >= k_len else left
    right = -1 if right >= k_len else right
    if causal and q_len > 1:
        right = 0
    if left < 0 and right < 0:
        return q_len + k_len, q_len + k_len
    return k_len if left < 0 else left, k_len if right < 0 else right


def windows_of_3(left: int, right: int, q_len: int, k_len: int, causal: bool) -> tuple[int, int]:
    """mha_fwd and set_params_fprop of FlashAttention 3."""
    left = -1 if left >= k_len - 1 else left
    right = -1 if right >= q_len - 1 else right
    right = 0 if causal else right
    return k_len - 1 if left < 0 else left, q_len - 1 if right < 0 else right


class _Garbage(torch.autograd.Function):
    """The same values, whose gradients after `rows` are NaN, as memory that nothing wrote."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.rows :] = torch.nan
        return grad, None


_TENSORS = "q, k, v"
_PACKING = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_SHARED = ("softmax_scale", "causal", "window_size", "softcap", "deterministic")
_REST = {
    2: "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False",
    3: "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False",
}
"""The parameters of either package's functions after the tensors, as published."""


class Fake:
    """One package: `calls` are the options that it was called with."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.windows: Windowing = windows_of_2 if version == 2 else windows_of_3
        self.calls: list[dict[str, Any]] = []

    def module(self, name: str) -> ModuleType:
        """What `import name` gives."""
        found: Any = ModuleType(name)
        rest = _REST[self.version]
        found.flash_attn_func = self._function(f"{_TENSORS}, {rest}")
        used = "seqused_q=None, seqused_k=None, " if self.version == 3 else ""
        after = ", block_table=None" if self.version == 2 else ""
        found.flash_attn_varlen_func = self._function(
            f"{_TENSORS}, {', '.join(_PACKING)}, {used}{rest}{after}"
        )
        return found

    def _function(self, parameters: str) -> Callable[..., Any]:
        """A function of these parameters. What the backend has no use for keeps its default."""
        signature = inspect.signature(eval(f"lambda {parameters}: None"))

        def flash_attn(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            given = bound.arguments
            tensors = [given[name] for name in ("q", "k", "v")]
            shared = [given[name] for name in _SHARED]
            used = {"q", "k", "v", *_PACKING, *_SHARED, "return_attn_probs"}
            for name, parameter in signature.parameters.items():
                assert name in used or given[name] == parameter.default
            if "cu_seqlens_q" in given:
                packing = tuple(given[name] for name in _PACKING)
                out, lse = self.packed(*[*tensors, packing, *shared])
            else:
                out, lse = self.fixed(*[*tensors, *shared])
            results = (out, lse, None) if self.version == 2 else (out, lse)
            return results if given["return_attn_probs"] else out

        flash_attn.__signature__ = signature  # type: ignore[attr-defined]
        return flash_attn

    def fixed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
        deterministic: bool,
        lengths: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of (B, T, H, D); the window is normalised by `lengths`, or by the tensors'."""
        self._check(q, k, v, causal, window, softcap, deterministic)
        q_len, k_len = q.shape[1], k.shape[1]
        left, right = self.windows(*window, *(lengths or (q_len, k_len)), causal)
        at = torch.arange(q_len)[:, None] + k_len - q_len
        keys = torch.arange(k_len)[None, :]
        allowed = (keys >= at - left) & (keys <= at + right)
        out, lse = value_residual_attention(
            q,
            k,
            v,
            scale=scale,
            softcap=softcap,
            attn_bias=allowed,
            return_lse=True,
            backend="reference",
        )
        none = torch.inf if self.version == 2 or k_len == 0 else -torch.inf
        return out, lse.detach().nan_to_num(nan=none, neginf=none)

    def packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: tuple[Tensor, Tensor, int, int],
        scale: float | None,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of packed tensors; rows after the last sequence are never written."""
        cu_q, cu_k, max_q, max_k = packing
        assert cu_q.is_contiguous()
        assert cu_k.is_contiguous()
        assert cu_q.dtype is cu_k.dtype is torch.int32
        assert min(len(cu_q) - 1, max_q, max_k) > 0
        ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
        q = _Garbage.apply(q, ends_q[-1])
        k, v = (_Garbage.apply(x, ends_k[-1]) for x in (k, v))
        outs, lses = [], []
        for i in range(len(ends_q) - 1):
            rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
            assert rows.stop - rows.start <= max_q
            assert keys.stop - keys.start <= max_k
            parts = (q[None, rows], k[None, keys], v[None, keys])
            if rows.start == rows.stop:
                continue
            lengths = (max_q, max_k)
            out, lse = self.fixed(
                *parts, scale, causal, window, softcap, deterministic, lengths=lengths
            )
            outs.append(out[0])
            lses.append(lse[0])
        left = q.shape[0] - ends_q[-1]
        # A kernel's output hangs on its inputs even where every sequence is empty.
        unwritten = 0.0 * (q.sum() + k.sum() + v.sum())
        outs.append(q.new_full((left, *q.shape[1:]), torch.nan) + unwritten)
        lses.append(torch.full((q.shape[1], left), torch.nan))
        return torch.cat(outs), torch.cat(lses, dim=1)

    def _check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
        deterministic: bool,
    ) -> None:
        assert q.dtype is k.dtype is v.dtype
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
        assert deterministic
        assert q.shape[0] > 0
        for x in (q, k, v):
            assert x.stride(-1) == 1
            for size, stride in zip(x.shape[1:-1], x.stride()[1:-1], strict=True):
                assert size == 1 or stride > 0
                assert size == 1 or stride % 8 == 0 or x.shape[-1] % 8
            assert x.storage_offset() % 8 == 0 or x.shape[-1] % 8
        if self.version == 3:
            assert q.shape[-1] % 8 == 0
        self.calls.append(
            {"causal": causal, "window": window, "softcap": softcap, "head_dim": q.shape[-1]}
        )


Install = Callable[..., Fake]
"""Puts a package, by the name of its module, in place, and returns it."""
