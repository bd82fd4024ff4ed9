"""cvt, comparisons, selections and moves."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu_on_cpu.exact import (
    FORMATS,
    ROUND,
    Array,
    codes,
    compute,
    dtype,
    grid,
    rounded,
    same,
    specials,
    values_of,
)
from tests.gpu_on_cpu.executor import Fault

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
REALS = ("f16", "bf16", "f32", "f64")


def register(name: str) -> np.dtype[Any]:
    """That of a type; a byte's has two."""
    return dtype({"u8": "u16", "s8": "s16"}.get(name, name))


def numbers(name: str) -> Array:
    """Integers of a type, in its register."""
    info = np.iinfo(dtype(name))
    near = [
        0,
        1,
        2,
        100,
        info.max,
        info.max - 1,
        info.max // 2,
        info.min,
        info.min + 1,
        info.min // 2,
    ]
    near += [info.max // 3 * 2, info.max // 5, info.min // 3]
    near += [x for k in range(6, 63) for x in (2**k + 1, 3 * 2**k - 1) if x <= info.max]
    return np.array(near, dtype(name)).astype(register(name))


@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_integers(source: str) -> None:
    x = numbers(source)
    values = [int(v) for v in x.tolist()]
    for target in INTEGERS:
        info = np.iinfo(dtype(target))
        found = compute(f"cvt.{target}.{source}", register(target), x)
        wrapped = np.array([v & (2**64 - 1) for v in values], np.uint64).astype(dtype(target))
        assert found.tolist() == wrapped.tolist(), target
        found = compute(f"cvt.sat.{target}.{source}", register(target), x)
        assert found.tolist() == [min(max(v, info.min), info.max) for v in values], target


def test_registers_may_be_wider() -> None:
    wide = np.array([0x1234567812345681, 0x7F, 0x80FF], np.uint64)
    assert compute("cvt.s32.s8", np.int64, wide).tolist() == [-127, 127, -1]
    assert compute("cvt.u16.u8", np.uint32, wide.astype(np.uint32)).tolist() == [0x81, 0x7F, 0xFF]
    assert compute("cvt.s8.s32", np.int32, wide.astype(np.int32)).tolist() == [-127, 127, -1]
    assert compute("cvt.rn.f32.s8", np.float32, wide.astype(np.uint16)).tolist() == [-127, 127, -1]


@pytest.mark.parametrize("target", REALS)
@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_reals(source: str, target: str) -> None:
    x = numbers(source)
    for mode in ("rn", "rz", "rm", "rp"):
        found = compute(f"cvt.{mode}.{target}.{source}", register(target), x)
        expected = [rounded(Fraction(int(v)), target, mode) for v in x.tolist()]
        same(values_of(found, target), np.array(expected))


@pytest.mark.parametrize("source", REALS)
@pytest.mark.parametrize("target", INTEGERS)
def test_reals_to_integers(source: str, target: str) -> None:
    info = np.iinfo(dtype(target))
    halves = [0.5, 1.5, 2.5, 126.5, 127.5, 128.5, -0.5, -1.5, -128.5, 1e5, 3e9, 1e10, 2e19, -2e19]
    x = np.concatenate([specials(source), [v for v in halves if abs(v) <= FORMATS[source].largest]])
    x = np.array([rounded(Fraction(v), source) if math.isfinite(v) else v for v in x.tolist()])
    nan = 0 if source != "f64" and info.bits < 64 else wrap(1 << (info.bits - 1), info)
    for mode in ("rn", "rz", "rm", "rp"):
        expected = []
        for v in x.tolist():
            if math.isnan(v):
                expected.append(nan)
            elif math.isinf(v):
                expected.append(info.max if v > 0 else info.min)
            else:
                expected.append(min(max(ROUND[mode](Fraction(v)), info.min), info.max))
        found = compute(f"cvt.{mode}i.{target}.{source}", register(target), codes(x, source))
        assert found.tolist() == expected


def wrap(value: int, info: np.iinfo[Any]) -> int:
    return value - (1 << info.bits) if value > info.max else value


@pytest.mark.parametrize("source", REALS)
@pytest.mark.parametrize("target", REALS)
def test_reals_to_reals(source: str, target: str) -> None:
    x = specials(source, count=200)
    narrows = FORMATS[target].digits < FORMATS[source].digits and dtype(target) != dtype(source)
    narrows |= {source, target} == {"f16", "bf16"}
    for mode in ("rn", "rz", "rm", "rp") if narrows else ("",):
        opcode = f"cvt.{mode}.{target}.{source}".replace("..", ".")
        found = values_of(compute(opcode, register(target), codes(x, source)), target)
        expected = [
            math.copysign(rounded(Fraction(v), target, mode or "rn"), v) if math.isfinite(v) else v
            for v in x.tolist()
        ]
        same(found, np.array(expected))


def test_reals_to_integral_values_and_clamped() -> None:
    x = np.concatenate([specials("f32", count=200), np.arange(-9, 9) / 4])
    register = codes(x, "f32")
    for mode, exact in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        found = compute(f"cvt.{mode}.f32.f32", np.float32, register)
        same(found.astype(np.float64), exact(register.astype(np.float64)))
    clamped = np.where(register > 0, np.minimum(register, 1), 0).astype(np.float64)
    same(compute("cvt.sat.f32.f32", np.float32, register).astype(np.float64), clamped)
    small = np.array([2.0**-127, -(2.0**-140), 2.0**-126], np.float32)
    assert compute("cvt.ftz.f64.f32", np.float64, small).tolist() == [0, 0, 2.0**-126]
    tiny = np.array([2.0**-140, 1.0])
    assert compute("cvt.rn.ftz.f32.f64", np.float32, tiny).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["f16", "bf16", "e4m3", "e5m2"])
def test_pairs(name: str) -> None:
    """The first operand is the upper half."""
    x = np.concatenate([specials(name, count=100), specials("f32"), 1.0625 * specials(name)[:20]])
    x = x[np.abs(x) < 3e38].astype(np.float32)
    high, low = x, x[::-1].copy()
    finite = name[0] == "e"
    for relu in ("", ".relu"):
        opcode = f"cvt.rn{'.satfinite' if finite else ''}{relu}.{name}x2.f32"
        found = compute(opcode, np.uint16 if finite else np.uint32, high, low)
        halves = found.view(np.uint8 if finite else np.uint16)
        for at, source in ((1, high), (0, low)):
            expected = [
                real_of(0.0 if relu and v <= 0 else v, name, finite=finite) for v in source.tolist()
            ]
            same(narrow_values(halves[at::2], name), np.array(expected))


def real_of(value: float, name: str, *, finite: bool = False) -> float:
    if math.isinf(value) and finite:
        return math.copysign(float(FORMATS[name].largest), value)
    if not math.isfinite(value):
        return value
    return math.copysign(rounded(Fraction(value), name, finite=finite), value)


def narrow_values(found: Array, name: str) -> Array:
    kinds = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    if name not in kinds:
        return values_of(found.copy().view(codes(np.zeros(1), name).dtype), name)
    return torch.from_numpy(found.copy()).view(kinds[name]).double().numpy()


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_pairs_of_bytes_and_halves(name: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    pairs = np.stack([every, every[::-1]], 1).copy().view(np.uint16).ravel()
    found = compute(f"cvt.rn.f16x2.{name}x2", np.uint32, pairs).view(np.float16)
    same(found.astype(np.float64), narrow_values(pairs.view(np.uint8), name))
    halves = np.arange(2**16, dtype=np.uint16)[::7][:9000].copy()
    back = compute(f"cvt.rn.satfinite.{name}x2.f16x2", np.uint16, halves.view(np.uint32))
    values = halves.view(np.float16).astype(np.float64)
    expected = [real_of(v, name, finite=True) for v in values.tolist()]
    same(narrow_values(back.view(np.uint8), name), np.array(expected))


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(mode: str) -> None:
    x = np.concatenate([specials("f32", count=200), specials("tf32") * (1 + 2.0**-11)])
    register = codes(x, "f32")
    found = compute(f"cvt.{mode}.tf32.f32", np.float32, register).astype(np.float64)
    expected = [
        math.copysign(rounded(Fraction(v), "tf32", mode), v) if math.isfinite(v) else v
        for v in register.astype(np.float64).tolist()
    ]
    same(found, np.array(expected))


@pytest.mark.parametrize(
    "opcode",
    [
        "cvt.f32.s32",
        "cvt.rn.s32.f32",
        "cvt.f16.f32",
        "cvt.rna.f32.f64",
        "cvt.approx.f32.f32",
        "cvt.rn.u32.s32",
    ],
)
def test_conversions_that_ptx_does_not_have(opcode: str) -> None:
    target, source = opcode.split(".")[-2:]
    with pytest.raises(Fault, match=opcode):
        compute(opcode, register(target), np.ones(1, register(source)))


COMPARISONS: dict[str, Any] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b)),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("name", ["b16", "b64", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_are_compared(name: str) -> None:
    values = numbers(name.replace("b", "u"))
    a, b = grid(values[:20], values[:20])
    for comparison, exact in COMPARISONS.items():
        if name[0] == "b" and comparison not in ("eq", "ne"):
            continue
        expected = a != b if comparison == "ne" else exact(a, b)
        assert np.array_equal(compute(f"setp.{comparison}.{name}", np.bool_, a, b), expected)
    for comparison, exact in (("lo", np.less), ("hs", np.greater_equal)):
        if name[0] == "u":
            assert np.array_equal(compute(f"setp.{comparison}.{name}", np.bool_, a, b), exact(a, b))


@pytest.mark.parametrize("name", REALS)
def test_reals_are_compared(name: str) -> None:
    a, b = grid(specials(name), specials(name, seed=1))
    x, y = codes(a, name), codes(b, name)
    unordered = np.isnan(a) | np.isnan(b)
    for comparison, exact in COMPARISONS.items():
        assert np.array_equal(compute(f"setp.{comparison}.{name}", np.bool_, x, y), exact(a, b))
        found = compute(f"setp.{comparison}u.{name}", np.bool_, x, y)
        assert np.array_equal(found, exact(a, b) | unordered)
    assert np.array_equal(compute(f"setp.nan.{name}", np.bool_, x, y), unordered)
    assert np.array_equal(compute(f"setp.num.{name}", np.bool_, x, y), ~unordered)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_comparisons_of_pairs(name: str) -> None:
    a, b = grid(specials(name), specials(name, seed=1))
    x, y = codes(a, name), codes(b, name)
    pairs = [np.stack([u.view(np.uint16), u.view(np.uint16)[::-1]], -1) for u in (x, y)]
    words = [np.ascontiguousarray(pair).view(np.uint32).ravel() for pair in pairs]
    for comparison, exact in COMPARISONS.items():
        expected = exact(a, b)
        for result, wanted in (("%p0|%p6", expected), ("%p6|%p0", expected[::-1])):
            form = f"setp.{comparison}.{name}x2 {result}, %v32_1, %v32_2;"
            assert np.array_equal(compute(form, np.bool_, *words), wanted)
    unordered = np.isnan(a) | np.isnan(b)
    found = compute(f"setp.nan.{name}x2 %p0|%p6, %v32_1, %v32_2;", np.bool_, *words)
    assert np.array_equal(found, unordered)
    with pytest.raises(Fault, match=rf"setp.lt.{name}x2"):
        compute(f"setp.lt.{name}x2 %p0, %v32_1, %v32_2;", np.bool_, *words)


def test_comparisons_are_joined_and_set() -> None:
    a, b, c = grid(
        np.arange(-2, 3, dtype=np.int32), np.arange(3, dtype=np.int32), np.array([False, True])
    )
    less = a < b
    assert np.array_equal(compute("setp.lt.and.s32", np.bool_, a, b, c), less & c)
    assert np.array_equal(compute("setp.lt.or.s32", np.bool_, a, b, c), less | c)
    assert np.array_equal(compute("setp.lt.xor.s32", np.bool_, a, b, c), less ^ c)
    negated = compute("setp.lt.and.s32 %p0, %v32_1, %v32_2, !%p3;", np.bool_, a, b, c)
    assert np.array_equal(negated, less & ~c)
    second = compute("setp.lt.or.s32 %p1|%p0, %v32_1, %v32_2, %p3;", np.bool_, a, b, c)
    assert np.array_equal(second, ~less | c)
    assert compute("set.lt.u32.s32", np.uint32, a, b).tolist() == [
        0xFFFFFFFF * x for x in less.tolist()
    ]
    assert np.array_equal(compute("set.lt.f32.s32", np.float32, a, b), less.astype(np.float32))
    small = np.array([2.0**-140, 1.0], np.float32)
    assert compute("setp.gt.f32", np.bool_, small, np.zeros(2, np.float32)).tolist() == [True, True]
    assert compute("setp.gt.ftz.f32", np.bool_, small, np.zeros(2, np.float32)).tolist() == [
        False,
        True,
    ]


def test_selections_and_logic() -> None:
    p, q = grid(np.array([False, True]), np.array([False, True]))
    assert np.array_equal(compute("and.pred", np.bool_, p, q), p & q)
    assert np.array_equal(compute("or.pred", np.bool_, p, q), p | q)
    assert np.array_equal(compute("xor.pred", np.bool_, p, q), p ^ q)
    assert np.array_equal(compute("not.pred", np.bool_, p), ~p)
    assert np.array_equal(compute("mov.pred", np.bool_, p), p)
    for kind in (np.uint16, np.float32, np.uint64):
        a, b = np.arange(4, dtype=kind), np.arange(4, dtype=kind) + 10
        name = "f32" if kind == np.float32 else f"b{8 * a.itemsize}"
        assert np.array_equal(compute(f"selp.{name}", kind, a, b, p), np.where(p, a, b))
    c = np.array([-1, 0, 1, -5], np.int32)
    assert compute("slct.s32.s32", np.int32, c, -c, c).tolist() == [1, 0, 1, 5]
    assert compute(
        "slct.u32.f32", np.int32, c, -c, np.array([-1, -0.0, 1, math.nan], np.float32)
    ).tolist() == [1, 0, 1, 5]


def test_moves_pack_and_unpack() -> None:
    low, high = np.array([1, 0x8001], np.uint16), np.array([2, 0xFFFF], np.uint16)
    both = compute("mov.b32 %v32_0, {%v16_1, %v16_2};", np.uint32, low, high)
    assert both.tolist() == [0x20001, 0xFFFF8001]
    assert compute("mov.b32 {_, %v16_0}, %v32_1;", np.uint16, both).tolist() == [2, 0xFFFF]
    wide = compute("mov.b64 %v64_0, {%v32_1, %v32_2};", np.uint64, both, both[::-1].copy())
    assert wide.tolist() == [0xFFFF800100020001, 0x20001FFFF8001]
    assert compute("mov.b64 {%v32_0, %v32_7}, %v64_1;", np.uint32, wide).tolist() == both.tolist()
    four = "{%v16_1, %v16_2, %v16_2, %v16_1}"
    assert compute(f"mov.b64 %v64_0, {four};", np.uint64, low, high).tolist()[0] == 0x1000200020001
    part = compute(
        "{ .reg .b8 s<4>; mov.b32 {s0, s1, s2, s3}, %v32_1; cvt.s32.s8 %v32_0, s3; }",
        np.int32,
        both,
    )
    assert part.tolist() == [0, -1]
    pair = "{ .reg .b128 q; mov.b128 q, {%v64_1, %v64_2}; mov.b128 {%v64_3, %v64_0}, q; }"
    assert compute(pair, np.uint64, wide, wide + np.uint64(1)).tolist() == [
        x + 1 for x in wide.tolist()
    ]
