"""Integer arithmetic, bits and bytes, compared with Python's integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.gpu_on_cpu.exact import Array, compute, dtype, grid

Integer = Callable[..., int]


def edges(name: str, seed: int = 0) -> Array:
    """Numbers at the edges of an integer type, and some more."""
    info = np.iinfo(dtype(name))
    near = [0, 1, 2, 3, 7, info.max - 1, info.max, info.min, info.min + 1, info.max // 2 + 1]
    near += [-1, -2, -7] if info.min else [info.max - 7]
    draws = np.random.default_rng(seed).integers(info.min, info.max, 12, dtype(name), endpoint=True)
    return np.concatenate([np.array(near, dtype(name)), draws])


def wrapped(value: int, kind: np.dtype[Any]) -> int:
    """A number as it is in so many bits."""
    bits = 8 * kind.itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind.kind == "i" and value >> (bits - 1) else value


def check_integers(opcode: str, result: str, exact: Integer, *operands: Array) -> None:
    """Compare an opcode with what Python's integers give, for every combination of operands."""
    axes = grid(*operands)
    kind = dtype(result)
    found = compute(opcode, kind, *axes).tolist()
    rows = list(zip(*(x.tolist() for x in axes), strict=True))
    expected = [wrapped(exact(*row), kind) for row in rows]
    wrong = [x for x in zip(rows, found, expected, strict=True) if x[1] != x[2]]
    assert not wrong, wrong[:5]


def quotient(a: int, b: int) -> int:
    """Towards 0; all bits where b is 0."""
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def remainder(a: int, b: int) -> int:
    return a - b * quotient(a, b) if b else -1


SUMS: dict[str, Integer] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": quotient,
    "rem": remainder,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ["u16", "u32", "u64", "s16", "s32", "s64"])
def test_sums(kind: str) -> None:
    bits = int(kind[1:])
    a, b = edges(kind), edges(kind, 1)
    for opcode, exact in SUMS.items():
        check_integers(f"{opcode}.{kind}", kind, exact, a, b)
    few = edges(kind)[:10]
    check_integers(f"mul.hi.{kind}", kind, lambda x, y: x * y >> bits, a, b)
    check_integers(f"mad.lo.{kind}", kind, lambda x, y, z: x * y + z, few, few, few)
    check_integers(f"mad.hi.{kind}", kind, lambda x, y, z: (x * y >> bits) + z, few, few, few)
    check_integers(f"sad.{kind}", kind, lambda x, y, z: abs(x - y) + z, few, few, few)
    shifts = np.array([0, 1, bits - 1, bits, bits + 1, 255, 2**32 - 1], np.uint32)
    check_integers(f"shr.{kind}", kind, lambda x, by: x >> min(by, 64), a, shifts)
    if kind[0] == "s":
        check_integers(f"abs.{kind}", kind, abs, a)
        check_integers(f"neg.{kind}", kind, lambda x: -x, a)
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        check_integers(f"mul.wide.{kind}", wide, lambda x, y: x * y, a, b)
        check_integers(
            f"mad.wide.{kind}", wide, lambda x, y, z: x * y + z, few, few, edges(wide)[:10]
        )


def test_saturated_sums() -> None:
    def clamped(x: int) -> int:
        return max(-(2**31), min(2**31 - 1, x))

    a, b, few = edges("s32"), edges("s32", 1), edges("s32")[:9]
    check_integers("add.sat.s32", "s32", lambda x, y: clamped(x + y), a, b)
    check_integers("sub.sat.s32", "s32", lambda x, y: clamped(x - y), a, b)
    check_integers("min.relu.s32", "s32", lambda x, y: max(0, min(x, y)), a, b)
    check_integers("max.relu.s32", "s32", lambda x, y: max(0, x, y), a, b)
    check_integers(
        "mad.hi.sat.s32", "s32", lambda x, y, z: clamped((x * y >> 32) + z), few, few, few
    )


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits(bits: int) -> None:
    kind, a, b = f"b{bits}", edges(f"b{bits}"), edges(f"b{bits}", 1)
    check_integers(f"and.{kind}", kind, lambda x, y: x & y, a, b)
    check_integers(f"or.{kind}", kind, lambda x, y: x | y, a, b)
    check_integers(f"xor.{kind}", kind, lambda x, y: x ^ y, a, b)
    check_integers(f"not.{kind}", kind, lambda x: ~x, a)
    check_integers(f"cnot.{kind}", kind, lambda x: int(x == 0), a)
    shifts = np.array([0, 1, bits - 1, bits, bits + 1, 2**31], np.uint32)
    check_integers(f"shl.{kind}", kind, lambda x, by: x << min(by, 64), a, shifts)
    check_integers(f"shr.{kind}", kind, lambda x, by: x >> min(by, 64), a, shifts)
    if bits == 16:
        return
    check_integers(f"popc.{kind}", "u32", lambda x: x.bit_count(), a)
    check_integers(f"clz.{kind}", "u32", lambda x: bits - x.bit_length(), a)
    check_integers(f"brev.{kind}", kind, lambda x: int(f"{x:0{bits}b}"[::-1], 2), a)
    places = np.array([0, 1, 5, bits - 1, bits, 255, 256 + 3], np.uint32)

    def insert(x: int, y: int, place: int, length: int) -> int:
        mask = ((1 << (length & 255)) - 1) << (place & 255)
        return (y & ~mask) | (x << (place & 255) & mask)

    check_integers(f"bfi.{kind}", kind, insert, a[-6:], b[-6:], places, places)
    for sign in "us":
        check_fields(f"{sign}{bits}", places)


def check_fields(kind: str, places: Array) -> None:
    bits = int(kind[1:])

    def extract(x: int, place: int, length: int) -> int:
        place, length = place & 255, length & 255
        x = wrapped(x, dtype(f"b{bits}"))
        sign = x >> min(place + length - 1, bits - 1) & 1 if kind[0] == "s" and length else 0
        found = [
            x >> (place + i) & 1 if i < length and place + i < bits else sign for i in range(bits)
        ]
        return sum(bit << i for i, bit in enumerate(found))

    def highest(x: int) -> int:
        return (~x if x < 0 else x).bit_length() - 1

    check_integers(f"bfe.{kind}", kind, extract, edges(kind), places, places)
    check_integers(f"bfind.{kind}", "u32", highest, edges(kind))
    check_integers(
        f"bfind.shiftamt.{kind}",
        "u32",
        lambda x: -1 if highest(x) < 0 else bits - 1 - highest(x),
        edges(kind),
    )


def test_words() -> None:
    a, few = edges("b32"), edges("b32")[-4:]
    by = np.array([0, 1, 31, 32, 33, 40], np.uint32)
    check_integers(
        "shf.l.wrap.b32", "b32", lambda x, y, n: (y << 32 | x) << (n & 31) >> 32, a, few, by
    )
    check_integers("shf.r.wrap.b32", "b32", lambda x, y, n: (y << 32 | x) >> (n & 31), a, few, by)
    check_integers(
        "shf.l.clamp.b32", "b32", lambda x, y, n: (y << 32 | x) << min(n, 32) >> 32, a, few, by
    )
    check_integers(
        "shf.r.clamp.b32", "b32", lambda x, y, n: (y << 32 | x) >> min(n, 32), a, few, by
    )

    def logic(x: int, y: int, z: int, table: int) -> int:
        rows = [
            table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1 for i in range(32)
        ]
        return sum(bit << i for i, bit in enumerate(rows))

    tables = np.array([0, 255, 0x80, 0xE8, 0x96, 0xCA], np.uint32)
    check_integers("lop3.b32", "b32", logic, few, few, few, tables)


MODES_OF_PRMT = {
    "": [],
    ".f4e": [0x3210, 0x4321, 0x5432, 0x6543],
    ".b4e": [0x5670, 0x6701, 0x7012, 0x0123],
    ".rc8": [0x0000, 0x1111, 0x2222, 0x3333],
    ".ecl": [0x3210, 0x3211, 0x3222, 0x3333],
    ".ecr": [0x0000, 0x1110, 0x2210, 0x3210],
    ".rc16": [0x1010, 0x3232, 0x1010, 0x3232],
}


@pytest.mark.parametrize("mode", MODES_OF_PRMT)
def test_bytes_are_permuted(mode: str) -> None:
    def permute(x: int, y: int, selector: int) -> int:
        table = MODES_OF_PRMT[mode]
        selector = table[selector & 3] if table else selector
        data, result = (y << 32 | x).to_bytes(8, "little"), 0
        for i in range(4):
            nibble = selector >> (4 * i) & 15
            byte = data[nibble & 7]
            result |= (byte if nibble < 8 else 255 * (byte >> 7)) << (8 * i)
        return result

    selectors = np.array([0, 1, 2, 3, 0x3210, 0x7654, 0x0F8E, 0x5410, 0xBA98], np.uint32)
    check_integers(f"prmt.b32{mode}", "b32", permute, edges("b32"), edges("b32", 1), selectors)


@pytest.mark.parametrize("a", ["u32", "s32"])
@pytest.mark.parametrize("b", ["u32", "s32"])
def test_dot_products_of_bytes(a: str, b: str) -> None:
    def parts(x: int, kind: str, size: int) -> list[int]:
        data = wrapped(x, np.dtype(np.uint32)).to_bytes(4, "little")
        split = [data[i : i + size] for i in range(0, 4, size)]
        return [int.from_bytes(part, "little", signed=kind[0] == "s") for part in split]

    def dot(x: list[int], y: list[int], z: int) -> int:
        return sum(i * j for i, j in zip(x, y, strict=True)) + z

    u, v, w = edges("b32")[-8:], edges("b32", 1)[-8:], edges("b32")[:4]
    check_integers(
        f"dp4a.{a}.{b}", "b32", lambda x, y, z: dot(parts(x, a, 1), parts(y, b, 1), z), u, v, w
    )
    for half, name in enumerate(("lo", "hi")):
        check_integers(
            f"dp2a.{name}.{a}.{b}",
            "b32",
            lambda x, y, z, at=2 * half: dot(parts(x, a, 2), parts(y, b, 1)[at : at + 2], z),
            *(u, v, w),
        )
