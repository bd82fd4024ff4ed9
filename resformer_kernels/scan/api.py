"""The public function: a linear recurrence over time."""

from __future__ import annotations

from torch import Tensor

from resformer_kernels._core.select import explainable, serve
from resformer_kernels.scan import native, reference, triton
from resformer_kernels.scan.record import SCAN, check_call

BACKENDS = (native, triton, reference)


@explainable
def linear_scan(
    gates: Tensor,
    tokens: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = gates_t * h_{t-1} + tokens_t for every channel, in one pass over memory.

    The recurrence of diagonal linear reservoirs, of gated linear RNNs and of diagonal state-space
    models, real or complex. It is accumulated in float32 (complex64; float64 and complex128 for
    inputs of these), and each state is rounded once. Arguments of other dtypes are promoted as
    torch promotes them, but that float32 beside 16-bit tokens is read as it is, and the states
    stay 16-bit: bfloat16 gates beside float32 tokens give float32, real beside complex complex.

    Args:
        gates: of tokens' shape; or (N,), the same at every step, which moves half the bytes. Any
            of tokens' dtypes. Any value, of modulus above 1 too.
        tokens: (B, T, N), or packed (total_tokens, N) with cu_seqlens; float32, bfloat16, float16,
            complex64, or float64 and complex128 (reference only). T from 0 on. Any strides; a last
            axis that is not contiguous is copied once.
        initial_state: (B, N), packed (S, N): the state before the first step. Any of tokens'
            dtypes. None: zeros.
        reverse: run from the last step to the first: h_t = gates_t * h_{t+1} + tokens_t. The
            initial state then comes after the last step, and the final state is the first step's.
        cu_seqlens: (S + 1,), int32: sequence s is the tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1
            and shares no state with the others. Tokens after the last one are not read; their
            states are zeros.
        backend: "auto", "native", "triton" or "reference". A name never falls back.

    Returns:
        (states, final_state): the states in tokens' shape and the promoted dtype, and the state
        after the last step, (B, N) or (S, N), not rounded: float32 for 16-bit states. Fed back as
        initial_state it continues the sequence: on a CPU with the same bits as one call, however it
        is split. An empty sequence's final state is its initial one. Gradients flow to gates,
        tokens and the initial state, from both.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; the message
            names it. What cu_seqlens holds is checked on a CPU, and on a GPU under
            RESFORMER_CHECK=1.
        RuntimeError: the named backend cannot serve the call, the call is under vmap, or its
            gradient is differentiated.

    Autocast casts nothing here: a state that is carried over many steps should not be rounded
    because a matrix product may be. A gate that it made 16-bit is promoted to the tokens' float32.
    """
    call = check_call(gates, tokens, initial_state, reverse, cu_seqlens)
    states, final_state = serve(SCAN, backend, BACKENDS, call)
    return states, final_state
