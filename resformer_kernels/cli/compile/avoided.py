"""Forms of kernels that known faults of Triton's compilers need, found in its TTGIR."""

from __future__ import annotations

import re

from resformer_kernels._triton import faults

_TRANSPOSED_PRODUCT = re.compile(r"tt\.trans .*: tensor<[^>]*#mma\d*>")
_PRODUCT = re.compile(r"ttng\.(?:warp_group_dot|tc_gen5_mma) .*")
_OPERAND = re.compile(r"(?:memdesc|tensor)<(\d+)x(\d+)x")
_NARROW = 32
_FEW_WARPS = 4


def forms_to_avoid(capability: int, ttgir: str, warps: int, stages: int) -> list[str]:
    """What a kernel has that a known fault needs, whichever version of Triton compiled it."""
    narrow = warps == _FEW_WARPS and _narrowest_operand(ttgir) <= _NARROW
    has = {
        faults.TRANSPOSED_PRODUCT: _TRANSPOSED_PRODUCT.search(ttgir) is not None,
        faults.NARROW_ON_HOPPER: narrow,
        faults.NARROW_ON_BLACKWELL: narrow and stages > 1,
    }
    return [
        f"{fault.wrong} ({fault.issue}), and this kernel has one"
        for fault, found in has.items()
        if found and divmod(capability, 10) in fault.capabilities
    ]


def _narrowest_operand(ttgir: str) -> int:
    """The smallest size of a right operand of the products of wgmma or tcgen05."""
    rights = (_OPERAND.findall(product)[1] for product in _PRODUCT.findall(ttgir))
    return min((int(size) for right in rights for size in right), default=1 << 30)
