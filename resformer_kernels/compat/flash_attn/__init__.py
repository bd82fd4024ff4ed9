"""FlashAttention 2's functions over mixed values.

Signatures and meaning are those of `flash_attn` 2.6 and later (Dao, arXiv 2307.08691), on every
device and dtype that `value_residual_attention` serves, with the added keywords `v_first`,
`lambda_v`, `lambda_first`, `exclusive`, `exclusive_eps`, `out_gate` and `backend`. Differences:

- `dropout_p` above 0 and `alibi_slopes` raise NotImplementedError.
- Pages have any size. `flash_attn_with_kvcache` takes `cache_leftpad` with pages, and k without v.
  Differentiating the result of a call over a cache or over pages raises.
- `window_size` is any pair of integers, such as a tensor of two.
- An error of a wrong shape or dtype is a RuntimeError, as FlashAttention's, and a ValueError or
  TypeError too.
- `deterministic` changes nothing: results are bitwise reproducible either way.
- With `return_attn_probs` the functions return (out, softmax_lse, S_dmask) as FlashAttention's do.
  S_dmask, the dropout mask, is an empty tensor, as FlashAttention's is without dropout.
  softmax_lse is differentiable, and -inf for a query that attends to no key (FlashAttention: +inf).
- The head_dim of q and k can differ from v's, and be of any size; float32 and float64 are served.
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
