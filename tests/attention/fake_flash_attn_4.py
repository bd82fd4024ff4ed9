"""FlashAttention 4's two entry points, faked on a CPU: their signatures, and their limits.

Masks are made from the window as it arrives; what the kernels never write is NaN, and what they
cannot do raises. `tests/fa4` holds the signatures to those of the package.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.attention.api import (
    value_residual_attention,
    value_residual_attention_varlen,
)

MODULE = "flash_attn.cute.interface"

SIGNATURES = {
    "_flash_attn_fwd": "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, "
    "seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, "
    "softmax_scale=None, causal=False, softcap=None, window_size_left=None, "
    "window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, "
    "intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, "
    "score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None, "
    "lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None, "
    "v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None, "
    "disable_scheduler_metadata=False, gather_bwd_recompute_p=False",
    "_flash_attn_bwd": "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
    "window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128, "
    "num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, "
    "dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, "
    "V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, "
    "score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, "
    "block_sparse_tensors=None, dlse=None, learnable_sink=None",
}
"""The parameters of either, and their defaults, as of 4.0.0b36."""

_USED = {
    *("q", "k", "v", "softmax_scale", "causal", "softcap", "learnable_sink", "return_lse"),
    *("window_size_left", "window_size_right", "out", "dout", "lse", "dq", "dk", "dv", "dlse"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "deterministic"),
}
"""What the backend has a use for. The rest keeps its default."""


class Fake4:
    """The package: `forwards` and `backwards` are the arguments that it was called with."""

    def __init__(self) -> None:
        self.forwards: list[dict[str, Any]] = []
        self.backwards: list[dict[str, Any]] = []

    def module(self) -> ModuleType:
        """What `import flash_attn.cute.interface` gives."""
        found: Any = ModuleType(MODULE)
        for name, run in (("_flash_attn_fwd", self.forward), ("_flash_attn_bwd", self.backward)):
            setattr(found, name, _function(SIGNATURES[name], run))
        return found

    def forward(self, given: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """(out, lse or None, and three that are None), as `_flash_attn_fwd`."""
        _check(given)
        self.forwards.append(given)
        assert given["out"] is given["lse"] is None
        with torch.no_grad():
            out, lse = _attend(given, *(given[name] for name in ("q", "k", "v", "learnable_sink")))
        return out, _theirs(given, lse) if given["return_lse"] else None, None, None, None

    def backward(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        """(dq, dk, dv), and the sink's gradient where there is a sink, as `_flash_attn_bwd`."""
        _check(given)
        self.backwards.append(given)
        assert given["deterministic"] is True
        names = [
            "q",
            "k",
            "v",
            *(["learnable_sink"] if given["learnable_sink"] is not None else []),
        ]
        leaves = {name: given[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            out, lse = _attend(given, *leaves.values())
        kept = _sequences(given, "q")
        torch.testing.assert_close(given["out"][kept], out[kept], equal_nan=True)
        theirs = _theirs(given, lse.detach())
        torch.testing.assert_close(_by_row(given, given["lse"])[kept], _by_row(given, theirs)[kept])
        outputs, seeds = [out], [given["dout"]]
        if given["dlse"] is not None:
            assert given["dlse"].is_contiguous()
            outputs.append(lse)
            seeds.append(given["dlse"])
        found = list(torch.autograd.grad(outputs, list(leaves.values()), seeds))
        for i, name in enumerate(("q", "k", "v")):
            buffer = given[f"d{name}"]
            assert buffer.is_contiguous()
            assert (buffer.shape, buffer.dtype) == (given[name].shape, given[name].dtype)
            buffer.fill_(torch.nan)
            rows = _sequences(given, "q" if name == "q" else "k")
            buffer[rows] = found[i][rows]
            found[i] = buffer
        return tuple(found)


def _function(parameters: str, run: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    signature = inspect.signature(eval(f"lambda {parameters}: None"))

    def entry(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        for name, parameter in signature.parameters.items():
            assert name in _USED or bound.arguments[name] == parameter.default
        return run(dict(bound.arguments))

    entry.__signature__ = signature  # type: ignore[attr-defined]
    return entry


def _check(given: dict[str, Any]) -> None:
    """What the package asserts, and what its kernels take for granted."""
    q, k, v, sink = (given[name] for name in ("q", "k", "v", "learnable_sink"))
    assert q.dtype is k.dtype is v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[-1] == k.shape[-1]
    for x in (q, k, v, *([given["dout"]] if "dout" in given else [])):
        assert x.shape[-1] % 8 == 0
        assert 8 <= x.shape[-1] <= 256
        assert x.stride(-1) == 1
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            assert size == 1 or (stride > 0 and stride % 8 == 0)
        assert x.storage_offset() % 8 == 0
    assert given["softmax_scale"] > 0
    assert sink is None or (sink.shape == (q.shape[-2],) and sink.dtype in (torch.float32, q.dtype))
    left, right = given["window_size_left"], given["window_size_right"]
    assert all(side is None or side >= 0 for side in (left, right))
    if given["cu_seqlens_q"] is None:
        assert given["max_seqlen_q"] is given["max_seqlen_k"] is None
        return
    for name, rows in (("q", q), ("k", k)):
        cu = given[f"cu_seqlens_{name}"]
        assert cu.is_contiguous()
        assert cu.dtype is torch.int32
        longest = int((cu[1:] - cu[:-1]).max())
        assert longest <= given[f"max_seqlen_{name}"]
        # Tiles reach into the rows after a sequence: no NaN may lie there.
        assert (rows[int(cu[-1]) :] == 0).all()


def _attend(
    given: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    left, right = given["window_size_left"], given["window_size_right"]
    shared: dict[str, Any] = {
        "causal": given["causal"],
        "window": (-1 if left is None else left, -1 if right is None else right),
        "scale": given["softmax_scale"],
        "softcap": given["softcap"],
        "sinks": sinks,
        "return_lse": True,
        "backend": "reference",
    }
    if given["cu_seqlens_q"] is None:
        return value_residual_attention(q, k, v, **shared)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"):
        shared[name] = given[name]
    out, lse = value_residual_attention_varlen(q, k, v, **shared)
    after = torch.arange(len(q)) >= given["cu_seqlens_q"][-1]
    return out.masked_fill(after[:, None, None], torch.nan), lse.masked_fill(after, torch.nan)


def _theirs(given: dict[str, Any], lse: Tensor) -> Tensor:
    """Their LSE: -inf where it is NaN, but for rows that nothing wrote."""
    shown = lse.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    if given["cu_seqlens_q"] is not None:
        shown[:, int(given["cu_seqlens_q"][-1]) :] = torch.nan
    return shown


def _by_row(given: dict[str, Any], lse: Tensor) -> Tensor:
    """The LSE with its rows first, as `_sequences` selects them."""
    return lse if given["cu_seqlens_q"] is None else lse.transpose(0, 1)


def _sequences(given: dict[str, Any], name: str) -> slice:
    """The rows of packed sequences; all of what is not packed."""
    cu = given[f"cu_seqlens_{name}"]
    return slice(None) if cu is None else slice(int(cu[-1]))
