"""Drop-ins: other libraries' signatures, with `v_first`, `lambda_v`, `lambda_first`, `exclusive`,
`exclusive_eps` and `out_gate` added.

They hold no kernels: each translates its arguments for an op of this package.
`compat.scaled_dot_product_attention` is PyTorch's; `compat.flash_attn` has FlashAttention 2's and
`compat.flash_attn_3` FlashAttention 3's.

A number is whatever Python, numpy or a tensor of no axes calls one. Their ValueErrors and
TypeErrors are RuntimeErrors too: that is what the originals' kernels raise.
"""

from resformer_kernels.compat.sdpa import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
