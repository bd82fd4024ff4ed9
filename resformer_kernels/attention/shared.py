"""What several backends of attention take: V' as a tensor of its own, and positions as a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.mix import mix_values


def mixed(call: AttentionCall) -> Tensor:
    """V'; the source itself where there is one alone."""
    if call.v is None or call.v_first is None:
        return call.value
    own = call.lambda_v_value if call.lambda_v is None else call.lambda_v
    first = call.lambda_first_value if call.lambda_first is None else call.lambda_first
    return mix_values([call.v, call.v_first], [own, first])


def allowed_positions(
    call: AttentionCall, q_len: int | Tensor, k_len: int | Tensor, device: torch.device
) -> Tensor:
    """Which keys each query may see by length and window, broadcastable to (B, Hq, Tq, Tk).

    Aligned bottom-right: query i sits at key i + k_len - q_len.
    """
    i = torch.arange(call.max_seqlen_q, device=device)[:, None]
    j = torch.arange(call.max_seqlen_k, device=device)[None, :]
    at = i + k_len - q_len
    allowed = (i < q_len) & (j < k_len)
    if call.window_left >= 0:
        allowed = allowed & (j >= at - call.window_left)
    if call.window_right >= 0:
        allowed = allowed & (j <= at + call.window_right)
    return allowed
