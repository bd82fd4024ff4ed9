"""The public function: a reservoir over all of time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.select import explainable, serve
from resformer_kernels.reservoir import native, reference, triton
from resformer_kernels.reservoir.record import NAME, RingWeight, check_call

BACKENDS = (native, triton, reference)
ON_CUDA = (triton, native, reference)
"""Triton's kernel splits time into chunks, which the CUDA C++ kernel does not; no GPU has timed the
two side by side yet."""


@explainable
def reservoir_scan(
    inputs: Tensor,
    weight: Tensor | RingWeight,
    *,
    input_weight: Tensor | None = None,
    leak: float | Tensor = 1.0,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str = "tanh",
    mode: str = "auto",
    tolerance: float | None = None,
    cu_seqlens: Tensor | None = None,
    reduce: str = "none",
    targets: Tensor | None = None,
    return_info: bool = False,
    backend: str = "auto",
) -> Any:
    """h_t = (1 - a) h_{t-1} + a f(W h_{t-1} + W_in u_t + b), over all of time in one call.

    The leaky-integrator reservoir that carries long context in Liu and Xu, "All-time reservoir
    memory" (arXiv 2509.24074), and any recurrence of that form. The state is float32 (float64 for
    float64 inputs, which the reference serves). All else has that dtype, or 16 bits that are
    widened, which is exact; autocast casts nothing.

    Args:
        inputs: u, (B, T, n_in) with input_weight, else the drive itself, (B, T, N). Packed
            (total_steps, ...) with cu_seqlens. float32, bfloat16, float16 or float64. Any strides;
            a last axis that is not contiguous is copied once.
        weight: W. Dense (N, N); block-diagonal groups (G, n, n) with N = G n, unit g n + j being
            the j-th of group g; diagonal (N,); a sparse CSR tensor (N, N); or a
            `RingWeight(values, source)`, of which unit i receives values[i] * h[source[i]].
            Kernels read bfloat16 as it is.
        input_weight: W_in, (N, n_in), likewise. The (B, T, N) drive then never exists.
        leak: a, a number in [0, 1], or a tensor () or (N,); numpy's arrays (N,) are converted.
        bias: b, (N,).
        initial_state: h_0, (B, N), packed (sequences, N); None: zeros.
        activation: f, "tanh", "relu", "identity", "sigmoid", "softplus", or "softmax" over the N
            units of a step (of each group on its own), which the reference alone serves.
        mode: "sequential" steps through time. "chunked" runs pieces of time at once from guessed
            states and again from corrected ones until they agree; see `tolerance`. "auto" takes
            whichever is expected to be faster, by shape. A backward runs in the same mode.
        tolerance: how near two trajectories must come to count as one, in units of the state or,
            where the state exceeds 1, of its largest element. None: 3e-6. A reservoir that does
            not forget its start costs time, never exactness: its chunks run one after another.
        cu_seqlens: int32 (sequences + 1,), where each packed sequence starts and the last ends.
            Steps after that are neither read nor computed; their states are zeros.
        reduce: "none": every state. "last": the last state. "mean": the mean over time. "gram":
            sums for a linear readout, in float64. What is reduced is never held in memory, unless
            a gradient is wanted.
        targets: Y of reduce="gram", (B, T, m), packed (total_steps, m), of any floating dtype.
        return_info: also return a `ReservoirInfo`.
        backend: "auto", "native", "triton" or "reference". A name never falls back. On CUDA "auto"
            prefers Triton's, and "native" is sequential.

    Returns:
        (states, final_state), or (states, final_state, info). states: (B, T, N), packed
        (total_steps, N); under reduce "last" and "mean" (B, N), packed (sequences, N) (zeros are
        the mean of no steps); under "gram" the pair (XᵀX (N, N), XᵀY (N, m)) with X all states
        (m = 0 without targets). final_state: (B, N) or (sequences, N), the initial state where a
        sequence has no steps. Gradients flow to inputs, weight, input_weight, leak, bias,
        initial_state and targets.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the
            message names it. RuntimeError: the named backend cannot serve the call, the call is
            under vmap, or its gradient is differentiated.
    """
    call = check_call(
        inputs,
        weight,
        input_weight,
        leak,
        bias,
        initial_state,
        activation,
        mode,
        tolerance,
        cu_seqlens,
        reduce,
        targets,
        return_info,
    )
    backends = ON_CUDA if call.scan.inputs.device.type == "cuda" else BACKENDS
    states, final_state, info = serve(NAME, backend, backends, call)
    return (states, final_state, info) if return_info else (states, final_state)
