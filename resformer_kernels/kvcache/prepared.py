"""A call of `attention_with_kvcache` that was checked before: the plan of `plan_kvcache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_flag, describe
from resformer_kernels._core.select import Backend
from resformer_kernels.attention.epilogue import check_epilogue
from resformer_kernels.attention.record import check_sinks
from resformer_kernels.kvcache import checks
from resformer_kernels.kvcache.record import QUANTISED, KVCacheCall

_OUT = KVCacheCall._fields.index("out")


class KVCachePlan:
    """What the layers of a step share, checked once: made by `plan_kvcache`."""

    def __init__(self, call: KVCacheCall, backend: Backend) -> None:
        self._call, self._backend = call, backend
        self._packed_q = call.cu_seqlens_q is not None
        self._packed_new = call.cu_seqlens_k_new is not None
        self._adds = call.k is not None or call.v is not None
        self._shared = call[5:16]  # from cache_seqlens to softcap
        self._device = call.q.device
        self._strides = call.k_cache.stride(), call.v_cache.stride()
        q = tuple(call.q.shape[1:] if self._packed_q else call.q.shape)
        self._out = (*q[:-1], call.v_cache.shape[-1])
        self._given: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "q": (q, call.q.dtype),
            "k_cache": (tuple(call.k_cache.shape), call.k_cache.dtype),
            "v_cache": (tuple(call.v_cache.shape), call.v_cache.dtype),
        }
        if self._adds:
            rows = (call.new_rows,) if self._packed_new else (call.sequences, call.new_rows)
            for name, cache in (("k", call.k_cache), ("v", call.v_cache)):
                self._given[name] = ((*rows, *cache.shape[2:]), call.q.dtype)

    def __repr__(self) -> str:
        call = self._call
        return f"KVCachePlan({call.sequences} sequences, backend={self.backend!r})"

    @property
    def backend(self) -> str:
        """The name of the backend that serves the calls."""
        return self._backend.NAME

    def run(self, call: KVCacheCall) -> tuple[Tensor, Tensor | None]:
        """Serve a call that `call_of` made."""
        found: tuple[Tensor, Tensor | None] = self._backend.run(call)
        return found

    def call_of(
        self,
        q: Any,
        k_cache: Any,
        v_cache: Any,
        k: Any,
        v: Any,
        *,
        scales: tuple[Any, Any],
        sinks: Any,
        return_lse: Any,
        out: Any,
        exclusive: Any = None,
        exclusive_eps: Any = None,
        out_gate: Any = None,
    ) -> KVCacheCall:
        """The call of one layer. TypeError or ValueError where it does not fit the plan."""
        self._check("q", q)
        self._check("k_cache", k_cache)
        self._check("v_cache", v_cache)
        if k is not None:
            self._check("k", k)
        if v is not None:
            self._check("v", v)
        if self._adds and k is None and v is None:
            raise ValueError("k or v must be given: the plan has new tokens")
        if (k_cache.stride(), v_cache.stride()) != self._strides and self._adds:
            checks.check_writable("k_cache", k_cache)
            checks.check_writable("v_cache", v_cache)
        if scales[0] is not None or scales[1] is not None or k_cache.dtype in QUANTISED:
            checks.check_scales("k_scale", scales[0], k_cache)
            checks.check_scales("v_scale", scales[1], v_cache)
        if self._packed_q:
            q = q[None]
        if self._packed_new:
            k, v = None if k is None else k[None], None if v is None else v[None]
        if sinks is not None:
            check_sinks(sinks, q)
        if return_lse is not False:
            check_flag("return_lse", return_lse)
        splits = self._call.num_splits
        call = KVCacheCall(
            q, k_cache, v_cache, k, v, *self._shared, sinks, *scales, splits, return_lse, None
        )
        if out is not None:
            # A contiguous tensor is what engines give: the whole check takes 5 us.
            fits = isinstance(out, Tensor) and out.shape == self._out and out.is_contiguous()
            fits = fits and out.dtype is q.dtype and out.device == self._device
            written = (out[None] if self._packed_q else out) if fits else None
            written = checks.check_out(out, call) if written is None else written
            call = KVCacheCall._make((*call[:_OUT], written, *call[_OUT + 1 :]))
        given = (exclusive, exclusive_eps, out_gate)
        if any(x is not None for x in given):
            call = call._replace(**check_epilogue(*given, q, v_cache.shape[3], k_cache.shape[2]))
        checks.refuse_gradients(call)
        return call

    def _check(self, name: str, x: Any) -> None:
        """That an argument is of the shape, dtype and device that the plan has for it."""
        given = self._given.get(name)
        if given is None:
            raise ValueError(f"{name} must be None: the plan has no new tokens")
        shape, dtype = given
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor {shape}, as planned, got {describe(x)}")
        if x.shape != shape:
            raise ValueError(f"{name} must have the planned shape {shape}, got {tuple(x.shape)}")
        if x.dtype is not dtype:
            raise TypeError(f"{name} must have the planned dtype {dtype}, got {x.dtype}")
        if x.device != self._device:
            raise ValueError(f"{name} must be on the plan's {self._device}, got {x.device}")
