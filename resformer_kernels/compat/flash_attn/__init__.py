"""FlashAttention 2's functions, over a mix of values.

Signatures and meaning are those of `flash_attn` 2.6 and later (Dao, arXiv 2307.08691), on every
device and dtype that `value_residual_attention` serves; `v_first`, `lambda_v`, `lambda_first` and
`backend` are keywords more. Where the two differ:

- `dropout_p` above 0, `alibi_slopes` and (but for `flash_attn_with_kvcache`) `block_table` raise
  NotImplementedError.
- `flash_attn_with_kvcache` takes pages of any size, `cache_leftpad` with pages, and k without v.
- `deterministic` changes nothing: results are the same bits from run to run either way.
- With `return_attn_probs` the functions return (out, softmax_lse, S_dmask) as FlashAttention's do.
  S_dmask, the pattern of dropout, holds no elements, as there without dropout. softmax_lse is
  differentiable, and -inf for a query that may attend to nothing (there: +inf).
- q and k may have another head_dim than v, of any size; float32 and float64 are served.
"""

from resformer_kernels.compat.flash_attn.kvcache import flash_attn_with_kvcache
from resformer_kernels.compat.flash_attn.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from resformer_kernels.compat.flash_attn.separate import flash_attn_func, flash_attn_varlen_func

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
