"""The op of `attention_with_kvcache`, in torch alone.

It writes the caches and their scales in place, at the positions of appended tokens alone, and `out`
where it is given. An LSE that was not asked for has no elements. There is no gradient.
"""

from __future__ import annotations

from torch import Tensor, float32

from resformer_kernels._core.op import Op
from resformer_kernels._core.strides import with_unit_strides
from resformer_kernels.kvcache.record import ATTEND, READ_ONLY, KVCacheCall


def _fake(call: KVCacheCall) -> tuple[Tensor, Tensor]:
    return (
        call.q.new_empty(call.out_shape if call.out is None else (0,)),
        call.q.new_empty(call.lse_shape, dtype=float32),
    )


OP = Op(
    ATTEND,
    KVCacheCall,
    "(Tensor out, Tensor lse)",
    function=ATTEND,
    fake=_fake,
    triton="resformer_kernels.kvcache.triton.attend:attend",
)


def run(namespace: str, call: KVCacheCall) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of `call`, by the op of `namespace`; the caches have the new tokens."""
    out, lse = OP(namespace, op_arguments(call))
    return out if call.out is None else call.out, lse if call.return_lse else None


def op_arguments(call: KVCacheCall) -> KVCacheCall:
    """The call as kernels take it: tensors that they only read have a contiguous last axis."""
    return with_unit_strides(call, READ_ONLY)
