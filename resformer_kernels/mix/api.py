"""The public functions: weighted sums of values, and of values and rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resformer_kernels._core.select import explainable, serve
from resformer_kernels.mix import native, reference, triton
from resformer_kernels.mix.record import EMBEDDING, VALUES, check_embedding, check_mix

BACKENDS = (native, triton, reference)


@explainable
def mix_values(
    values: Sequence[Tensor],
    coefficients: Sequence[float | Tensor],
    *,
    backend: str = "auto",
) -> Tensor:
    """sum_i coefficients[i] * values[i], in one pass over memory.

    This is the mix of ResFormer (two sources: this layer's values and the first layer's) and of
    Dense-ResFormer (every layer so far), Zhou et al., arXiv 2410.17897: V'_n = sum_i λ_ni V_i. It
    is computed in float32 (float64 for float64 values), in the order given, and rounded once.

    Attention that follows can fuse the mix of two sources: `value_residual_attention`.

    Args:
        values: one or more tensors (B, T, Hkv, D), or packed (total_tokens, Hkv, D), of one shape,
            device and dtype: float32, bfloat16, float16 or float64 (float64: reference only). Any
            strides; a last axis that is not contiguous is copied once.
        coefficients: as many entries, each a float or a tensor, float32 or the values' dtype, that
            broadcasts to the values' shape by PyTorch's rules without enlarging it: (), (Hkv, 1),
            (Hkv, D), (B, T, 1, 1), (B, T, Hkv, 1), (B, T, Hkv, D). Any real value.
        backend: "auto", "native", "triton" or "reference". A name never falls back.

    Returns:
        The mixed values, contiguous, in their shape and dtype. Gradients flow to every value and
        tensor coefficient; a value is saved for backward only where its coefficient wants one.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; the message
            names it. RuntimeError: the named backend cannot serve the call, the call is under
            vmap, or its gradient is differentiated.

    Under autocast the values are cast to its dtype; the coefficients are not.
    """
    out: Tensor = serve(VALUES, backend, BACKENDS, check_mix(values, coefficients))
    return out


@explainable
def mix_value_embedding(
    v: Tensor,
    table: Tensor,
    token_ids: Tensor,
    gate: float | Tensor,
    *,
    sparse_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """v + gate * table[token_ids]: a value embedding whose rows are read in place.

    Each token adds a learned row of values of its own to those of the layer, as nanochat and
    modded-nanogpt do; it stands in for the first layer's values of arXiv 2410.17897. The gathered
    rows never exist as a tensor, in forward or backward. Mixed in float32 (float64 for float64 v)
    and rounded once.

    Args:
        v: (B, T, Hkv, D), or packed (total_tokens, Hkv, D); float32, bfloat16, float16 or float64
            (float64: reference only).
        table: (vocab, Hkv, D), float32 or v's dtype.
        token_ids: (B, T), or packed (total_tokens,), int64 or int32, each in [0, vocab).
        gate: multiplies the rows. A float, or a tensor, float32 or v's dtype, that broadcasts to
            v's shape by PyTorch's rules without enlarging it; (B, T, Hkv, 1) for a gate by token
            and head. Any real value.
        sparse_grad: the table's gradient is a coalesced sparse COO tensor over the rows that
            occur, for `torch.optim.SparseAdam` and very large tables. Else it is dense.
        backend: "auto", "native", "triton" or "reference". A name never falls back.

    Returns:
        The mixed values, contiguous, in v's shape and dtype. Gradients flow to v, the table and a
        tensor gate, and are the same bits every time.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the
            message names it. Ids are checked on a CPU, and on a GPU under RESFORMER_CHECK=1.
        RuntimeError: the named backend cannot serve the call, the call is under vmap, sparse_grad
            is asked for under torch.compile, or the gradient is differentiated.

    Under autocast v is cast to its dtype; the table and the gate are not.
    """
    call = check_embedding(v, table, token_ids, gate, sparse_grad)
    out: Tensor = serve(EMBEDDING, backend, BACKENDS, call)
    return out
