"""Drop-ins with the signatures of others, and `v_first`, `lambda_v`, `lambda_first` added.

They hold no kernels: each translates its arguments for `value_residual_attention`.
`compat.scaled_dot_product_attention` is PyTorch's; `compat.flash_attn` has FlashAttention 2's.
"""

from resformer_kernels.compat.sdpa import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
