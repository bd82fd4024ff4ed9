"""Where published figures put FlashAttention's kernels before a Triton kernel such as ours.

Forward in bfloat16, TFLOP/s over keys a sequence; "tutorial" is Triton's own attention.

    H100, FA3, full   0.5k 1k 2k 16k   D64 333 392 460 497 (tutorial 340 382 396 403)
                                       D128 467 565 625 648 (tutorial 323 372 389 395)
                                       D256 482 at 0.5k to 756 at 16k (FA2 275 to 326)
    H100, FA3, causal 0.5k, 16k        D64 197, 473 (tutorial 152, 363)  D128 292, 616 (146, 378)
    H100, FA3, backward 0.5k, 16k      D64 272, 474 (FA2 198, 291)  D128 316, 561 (FA2 214, 322)
    H200, FA4, backward 16k            D128 as FA3; D256 373
    B200, FA4         1k 2k 16k        D64 775 980 1215, causal 457 696 1164
                                       D128 1145 1385 1749, causal 785 1142
    B200, FA4         2.7 times Triton at most

Sources: Shah et al., arXiv 2407.08608, figures 5 and 6 (H100); github.com/Dao-AILab/flash-attention
pull requests 2888 and 2889 (H200) and 2605 (B200); Zadouri et al., arXiv 2603.05451 (FA4 beside
Triton). Each is of as many queries as keys, full or causal.

`_ROWS` counts the mix too, which is a pass of its own before their kernel: about 170/T of a forward
of T keys (modelled: 3 passes over V), so short forwards of D64 stay ours. Nobody has published
windows, a softcap, D256 on B200 or a head_dim below 64: those stay ours too.
"""

from __future__ import annotations

from typing import NamedTuple

from resformer_kernels.attention.flash_attn.rows import window
from resformer_kernels.attention.record import AttentionCall


class _Row(NamedTuple):
    """A head_dim, of keys and values alike, from which it holds up to that of the next row."""

    major: int
    """Of the compute capability."""
    generation: int
    """The oldest FlashAttention of which it holds."""
    head_dim: int
    forward: int
    """Queries and keys a sequence from which forward alone is faster."""
    training: int
    """The same for forward and backward."""


_ROWS = (
    _Row(9, 3, head_dim=64, forward=2048, training=512),
    _Row(9, 3, head_dim=128, forward=512, training=512),
    _Row(10, 4, head_dim=64, forward=1024, training=1024),
)
_MAX_HEAD_DIM = {9: 256, 10: 128}


def least_generation(call: AttentionCall, major: int) -> int | None:
    """The oldest FlashAttention that is faster than our kernels here; None where none is."""
    head_dim = call.q.shape[-1]
    if head_dim != call.value.shape[-1] or head_dim > _MAX_HEAD_DIM.get(major, 0):
        return None
    left, right = window(call)
    if left >= 0 or right > 0 or call.softcap > 0:
        return None
    found = None
    for row in _ROWS:
        if row.major == major and row.head_dim <= head_dim:
            found = row
    if found is None:
        return None
    # Whatever the grad mode is: `explain` has none, and must answer as the call does.
    trains = any(leaf is not None and leaf.requires_grad for leaf in call.leaves)
    enough = found.training if trains else found.forward
    return found.generation if min(call.max_seqlen_q, call.max_seqlen_k) >= enough else None
