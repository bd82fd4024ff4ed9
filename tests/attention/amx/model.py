"""The products of gemm_amx.h beside a model of tdpbf16ps, bit by bit.

python -m tests.attention.amx.model PRODUCTS TRAP HOW   (emulated, own or "without a session")
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LANES, PANEL, ROWS = 16, 64, 16
TINY = np.float32(2.0**-126)


def halves(words: Array) -> tuple[Array, Array]:
    """Both bfloat16 of each word as float64, subnormal numbers as zero."""
    bits = words.view(np.uint32)
    pair = ((bits << 16).view(np.float32), (bits & np.uint32(0xFFFF0000)).view(np.float32))
    return flushed(pair[0]).astype(np.float64), flushed(pair[1]).astype(np.float64)


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x).astype(np.float32)


def tile(a: Array, b: Array, c: Array) -> Array:
    """C + A B as the manual has it: float64 holds a product of bfloat16 whole, and rounding a sum
    of two float32 twice, to float64 and then to float32, is rounding it once."""
    left, right = halves(a), halves(b)
    sums = []
    for x, y in zip(left, right, strict=True):
        total = np.zeros(c.shape, np.float32)
        for k in range(a.shape[1]):
            total = flushed((total + x[:, k, None] * y[k]).astype(np.float32))
        sums.append(total)
    return flushed(flushed(c) + flushed(sums[0] + sums[1]))


def product(a: Array, b: Array, c: Array) -> Array:
    """C + A B in steps of 16 words from the first on."""
    for k in range(0, a.shape[1], ROWS):
        c = tile(a[:, k : k + ROWS], b[k : k + ROWS], c)
    return c


def words(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Random pairs of bfloat16."""
    x = scale * rng.standard_normal((*shape, 2)) * 2.0 ** rng.integers(-12, 12, (*shape, 2))
    upper = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return upper.view(np.float32)[..., 0].copy()


def pack(b: Array) -> Array:
    """B's columns in panels."""
    panels = [b[:, p : p + PANEL].ravel() for p in range(0, b.shape[1], PANEL)]
    return np.ascontiguousarray(np.concatenate(panels))


def pointer(x: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def same(found: Array, expected: Array, case: object) -> None:
    unequal = found.view(np.uint32) != expected.view(np.uint32)
    assert not unequal.any(), f"{case}: {int(unequal.sum())} elements differ"


def check_tiles(library: ctypes.CDLL, name: str) -> None:
    rng = np.random.default_rng(0)
    for scale in (1.0, 2.0**-70):  # the second: sums that are subnormal
        a = words(rng, ROWS, LANES, scale=scale)
        b = words(rng, LANES, LANES, scale=scale)
        c = (rng.standard_normal((ROWS, LANES)) * scale * scale).astype(np.float32)
        found = c.copy()
        library[name](pointer(a), pointer(b), pointer(found))
        same(found, tile(a, b, c), (name, scale))


def check_scores(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(1)
    shapes = itertools.product((1, 16, 37, 96), (16, 48), (16, 80, 192), (1.0, 0.3))
    for rows, k, columns, alpha in shapes:
        a, b = words(rng, rows, k), words(rng, k, columns)
        panels, blocks = pack(b), -(-rows // ROWS)
        lo = np.sort(rng.integers(0, columns, blocks))
        hi = np.minimum(lo + rng.integers(0, columns, blocks), columns)
        spans = np.stack([lo, hi], 1).astype(np.int32)
        c = np.full((rows, columns), np.nan, np.float32)
        library.amx_scores(
            pointer(a), ctypes.c_int64(k), pointer(panels), ctypes.c_int64(k),
            ctypes.c_int64(columns), ctypes.c_bool(True), ctypes.c_int64(rows), pointer(spans),
            ctypes.c_float(alpha), pointer(c), ctypes.c_int64(columns),
        )  # fmt: skip
        whole = product(a, b, np.zeros((rows, columns), np.float32)) * np.float32(alpha)
        expected = np.full_like(c, np.nan)
        for block, (start, end) in enumerate(spans):
            if start < end:
                row, columns_seen = (
                    block * ROWS,
                    slice(start // LANES * LANES, -(-end // LANES) * LANES),
                )
                expected[row : row + ROWS, columns_seen] = whole[row : row + ROWS, columns_seen]
        same(c, expected, (rows, k, columns, alpha))


def check_accumulate(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(2)
    shapes = itertools.product(
        (1, 16, 37, 96), (1, 8, 16, 45, 96), (16, 64, 80, 128), (0, 1), (0, 1)
    )
    for rows, k, columns, turned, packed in shapes:
        a, b = words(rng, rows, k), words(rng, k, columns)
        blocks = -(-rows // ROWS)
        lo = rng.integers(0, k, blocks)
        spans = np.stack([lo, rng.integers(lo, k + 1)], 1).astype(np.int32)
        c = rng.standard_normal((rows, columns)).astype(np.float32)
        expected = c.copy()
        left, right = np.ascontiguousarray(a.T if turned else a), pack(b) if packed else b
        strides = (1, rows) if turned else (k, 1)
        library.amx_accumulate(
            pointer(left), *map(ctypes.c_int64, strides), pointer(right),
            ctypes.c_int64(k), ctypes.c_int64(columns), ctypes.c_bool(packed), ctypes.c_int64(rows),
            pointer(spans), pointer(c), ctypes.c_int64(columns),
        )  # fmt: skip
        for block, (start, end) in enumerate(spans):
            at = slice(block * ROWS, (block + 1) * ROWS)
            expected[at] = product(a[at, start:end], b[start:end], expected[at])
        same(c, expected, (rows, k, columns, turned, packed))


def main() -> None:
    products, trap, how = sys.argv[1:]
    library, emulator = ctypes.CDLL(products), ctypes.CDLL(trap)
    if how == "own":
        # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
        assert ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0
    else:
        assert emulator.amx_emulate() == 0
    if how == "without a session":
        library.amx_tile_of_no_session(pointer(np.zeros(ROWS * LANES, np.float32)))
        return
    check_tiles(emulator, "amx_product")
    check_tiles(library, "amx_tile")
    check_scores(library)
    check_accumulate(library)
    sys.stdout.write("products agree\n")


if __name__ == "__main__":
    main()
