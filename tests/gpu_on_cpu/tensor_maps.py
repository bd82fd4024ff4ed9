"""Tensor maps: what a tensor descriptor is to a kernel that copies tiles of a tensor.

NVIDIA keeps the form of its own secret; this is the executor's, `TensorMap` in `tensor_map.h`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

BYTES = 128
MOST_AXES = 5
_MAGIC = 0x5445_4E53_4F52_4D41
_FORM = struct.Struct("<QQ II 5Q 4Q 5I II I")
_SWIZZLES = 4
"""None, and patterns of 32, 64 and 128 bytes, numbered as CUDA's are."""


def tensor_map(
    address: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    element_bytes: int,
    swizzle: int = 0,
    fill_nan: bool = False,
) -> bytes:
    """The map of a tensor, outermost axis first; strides in elements, the last of which is 1.

    Raises:
        ValueError: cuTensorMapEncodeTiled would refuse it.
    """
    rank = len(sizes)
    problem = _problem(address, sizes, strides, box, element_bytes, swizzle)
    if problem is not None:
        raise ValueError(f"no tensor map: {problem}")
    return _FORM.pack(
        *(_MAGIC, address, rank, element_bytes),
        *_padded(sizes[::-1], MOST_AXES),
        *_padded([x * element_bytes for x in strides[-2::-1]], MOST_AXES - 1),
        *_padded(box[::-1], MOST_AXES),
        *(swizzle, fill_nan, 0),
    )


def map_of(descriptor: Any, found: Mapping[str, Any]) -> bytes:
    """The map of Triton's TensorDescriptor, as an entry of a kernel's `tensordesc_meta` says."""
    if found["fp4_padded"]:
        raise NotImplementedError("a tensor map of four-bit numbers")
    return tensor_map(
        descriptor.base.data_ptr(),
        descriptor.shape,
        descriptor.strides,
        found["block_size"],
        element_bytes=found["elem_size"],
        swizzle=found["swizzle"],
        fill_nan=descriptor.padding == "nan",
    )


def _padded(values: Sequence[int], size: int) -> list[int]:
    return [*values, *[0] * (size - len(values))]


def _problem(
    address: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_bytes: int,
    swizzle: int,
) -> str | None:
    """What CUDA's driver API documents as an error of cuTensorMapEncodeTiled."""
    if not 1 <= len(sizes) <= MOST_AXES or not len(sizes) == len(strides) == len(box):
        return f"{len(sizes)} sizes, {len(strides)} strides and {len(box)} sides of a box"
    if address % 16:
        return f"an address that is no multiple of 16: {address:#x}"
    if not all(1 <= x <= 2**32 for x in sizes):
        return f"sizes {list(sizes)}, each of which has to be in 1 .. 2**32"
    if strides[-1] != 1:
        return f"a stride of the last axis of {strides[-1]}"
    if any(x * element_bytes % 16 or x * element_bytes >= 2**40 for x in strides[:-1]):
        return f"strides {list(strides)} in elements of {element_bytes} bytes"
    if not all(1 <= x <= 256 for x in box):
        return f"a box of {list(box)}, each of which has to be in 1 .. 256"
    if not 0 <= swizzle < _SWIZZLES:
        return f"swizzle {swizzle}"
    span = box[-1] * element_bytes
    if span % 16 or (swizzle and span > 16 << swizzle):
        return f"rows of {span} bytes of a box at swizzle {swizzle}"
    return None
