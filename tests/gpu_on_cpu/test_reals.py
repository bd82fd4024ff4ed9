"""Floating-point arithmetic, compared with fractions that are rounded once, and with float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.gpu_on_cpu.exact import (
    FORMATS,
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

FLOATS = ("f32", "f64", "f16", "bf16")
MODES = ("rn", "rz", "rm", "rp")
PACKED = ("f16x2", "bf16x2")
Real = Callable[..., Any]


def applied(opcode: str, *operands: Array) -> Array:
    """What an opcode of reals makes of values, as float64; its last part is their type."""
    name = opcode.rpartition(".")[2]
    each = name.removesuffix("x2")
    registers = [codes(x, each) for x in operands]
    kind = np.dtype(np.uint32) if each != name else dtype(each)
    found = compute(opcode, kind, *(x.view(kind) for x in registers))
    return values_of(found.view(registers[0].dtype), each)


def check(opcode: str, exact: Real, ieee: Real, *axes: Array) -> None:
    """Compare an opcode with `exact` of fractions. Where those know no result, and for the sign of
    a zero, with `ieee` of float64."""
    operands = grid(*axes)
    found = applied(opcode, *operands)
    name = opcode.rpartition(".")[2]
    mode = next((x for x in opcode.split(".") if x in MODES), "rn")
    with np.errstate(all="ignore"):
        expected = np.array(ieee(*operands), np.float64)
    for i, row in enumerate(zip(*(x.tolist() for x in operands), strict=True)):
        if not all(map(math.isfinite, row)):
            continue
        try:
            value = exact(*map(Fraction, row))
        except ZeroDivisionError:
            continue
        if value != 0:
            expected[i] = rounded(value, name, mode)
        elif mode == "rm" or expected[i] != 0:
            expected[i] = math.copysign(0, found[i])
    same(found, expected)


def multiply_add(x: Array, y: Array, z: Array) -> Array:
    """Right where something is no number, and about right elsewhere."""
    product = x * y
    return np.where(np.isfinite(x) & np.isfinite(y), np.clip(product, -1, 1), product) + z


def check_fma(opcode: str, *axes: Array) -> None:
    check(opcode, lambda x, y, z: x * y + z, multiply_add, *axes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["f32", "f64"])
def test_every_mode_rounds_once(name: str, mode: str) -> None:
    a, b = specials(name), specials(name, seed=1)
    check(f"add.{mode}.{name}", lambda x, y: x + y, np.add, a, b)
    check(f"sub.{mode}.{name}", lambda x, y: x - y, np.subtract, a, b)
    check(f"mul.{mode}.{name}", lambda x, y: x * y, np.multiply, a, b)
    check(f"div.{mode}.{name}", lambda x, y: x / y, np.divide, a, b)
    check(f"rcp.{mode}.{name}", lambda x: 1 / x, np.reciprocal, a)
    few, more = specials(name, count=4)[::2], specials(name, seed=2, count=4)[1::2]
    check_fma(f"fma.{mode}.{name}", few, more, more)
    check_fma(f"mad.{mode}.{name}", few, few, more)


@pytest.mark.parametrize("mode", MODES)
def test_square_roots(mode: str) -> None:
    x = np.abs(specials("f32"))
    found = applied(f"sqrt.{mode}.f32", x)
    for value, root in zip(x.tolist(), found.tolist(), strict=True):
        if math.isfinite(value) and value != 0:
            exact = Fraction(math.isqrt(int(Fraction(value) * 2**400)), 2**200)
            exact += 0 if exact**2 == Fraction(value) else Fraction(1, 2**202)
            assert root == rounded(exact, "f32", mode)
        else:
            assert root == value or (math.isnan(root) and math.isnan(value))
    assert np.isnan(applied(f"sqrt.{mode}.f32", -x[:1])).all()


@pytest.mark.parametrize("name", ["f16", "bf16", *PACKED])
def test_halves_are_rounded_once(name: str) -> None:
    each = name.removesuffix("x2")
    a, b = specials(each)[:38], specials(each, seed=1)[:38]
    check(f"add.{name}", lambda x, y: x + y, np.add, a, b) if name == each else None
    if name != each:  # pairs, element by element
        x, y = grid(a, b)
        same(applied(f"add.rn.{name}", x, y), applied(f"add.rn.{each}", x, y))
        same(applied(f"sub.{name}", x, y), applied(f"sub.{each}", x, y))
        same(applied(f"fma.rn.{name}", x, y, x), applied(f"fma.rn.{each}", x, y, x))
        return
    check(f"sub.rn.{name}", lambda x, y: x - y, np.subtract, a, b)
    check(f"mul.rn.{name}", lambda x, y: x * y, np.multiply, a, b)
    check_fma(f"fma.rn.{name}", a[::3], b[1::3], b[::3])
    # Results that lie by a hair beside the middle of two neighbours.
    unit = 2.0 ** (1 - FORMATS[name].digits)
    middles = np.array([1 + unit, 1 + 2 * unit, 1.5])
    least = -24 if name == "f16" else -100
    hairs = np.array([s * 2.0**e for e in (least, least + 1, -14, 0, 10) for s in (1, -1)])
    check_fma(f"fma.rn.{name}", middles, middles, hairs)


@pytest.mark.parametrize("name", [*FLOATS, *PACKED])
def test_smallest_largest_and_signs(name: str) -> None:
    each = name.removesuffix("x2")
    a, b = (x[:1600] for x in grid(specials(each), specials(each, seed=1)))
    nan = np.isnan(a) | np.isnan(b)
    above = (a > b) | ((a == b) & ~np.signbit(a))
    either = np.where(np.isnan(a), b, a)
    larger = np.where(nan, either, np.where(above, a, b))
    smaller = np.where(nan, either, np.where(above, b, a))
    same(applied(f"max.{name}", a, b), larger)
    same(applied(f"min.{name}", a, b), smaller)
    same(applied(f"neg.{name}", a), -a)
    same(applied(f"abs.{name}", a), np.abs(a))
    if name == "f64":
        return
    same(applied(f"max.NaN.{name}", a, b), np.where(nan, math.nan, larger))
    same(applied(f"min.NaN.{name}", a, b), np.where(nan, math.nan, smaller))
    if name == "f32":
        sign = np.where(np.signbit(a) == np.signbit(b), 1.0, -1.0)
        same(
            applied(f"max.xorsign.abs.{name}", a, b),
            np.copysign(np.fmax(np.abs(a), np.abs(b)), sign),
        )


def test_subnormals_are_flushed() -> None:
    least, normal = 2.0**-149, 2.0**-126
    x = np.array([least, -least, normal - least, normal, -normal, 0.75 * normal, 1.5 * normal, 1.0])
    a, b = grid(x, x)
    flush = {
        name: np.where(np.abs(v) < normal, np.copysign(0, v), v) for name, v in (("a", a), ("b", b))
    }
    for opcode, exact in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        kept = exact(a, b).astype(np.float32).astype(np.float64)
        same(applied(f"{opcode}.f32", a, b), kept)
        flushed = exact(flush["a"], flush["b"]).astype(np.float32).astype(np.float64)
        flushed = np.where(np.abs(flushed) < normal, np.copysign(0, flushed), flushed)
        same(applied(f"{opcode}.ftz.f32", a, b), flushed)
    same(applied("ex2.approx.ftz.f32", np.array([-127.0, -126.0])), np.array([0, normal]))
    same(applied("ex2.approx.f32", np.array([-127.0, -149.0])), np.array([normal / 2, least]))
    halves = np.array([2.0**-24, -(2.0**-15), 2.0**-14])
    same(applied("add.ftz.f16", halves, 0 * halves), np.array([0.0, -0.0, 2.0**-14]))


def test_results_are_clamped() -> None:
    a, b = grid(specials("f32"), specials("f32", seed=1))
    with np.errstate(all="ignore"):
        total = np.nan_to_num(a + b, nan=0.0, posinf=2.0, neginf=-1.0)
    expected = np.clip(total, 0, 1).astype(np.float32).astype(np.float64) + 0.0
    same(applied("add.sat.f32", a, b), np.abs(expected))
    x = specials("f16")
    one, zero = np.ones_like(x), np.zeros_like(x)
    same(applied("fma.rn.relu.f16", x, one, zero), np.where(x <= 0, 0.0, x))
    same(
        applied("fma.rn.relu.bf16", codes_in("bf16", x), one, zero),
        np.where(x <= 0, 0.0, codes_in("bf16", x)),
    )


def codes_in(name: str, x: Array) -> Array:
    """Values rounded to a format."""
    return np.array([rounded(Fraction(v), name) if math.isfinite(v) else v for v in x.tolist()])


FUNCTIONS: dict[str, Real] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
}


@pytest.mark.parametrize("opcode", FUNCTIONS)
def test_approximations_are_rounded_float64(opcode: str) -> None:
    draws = np.random.default_rng(3).standard_normal(1000)
    x = np.concatenate([specials("f32", count=1000), 64 * draws]).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = np.array(FUNCTIONS[opcode](x.astype(np.float64)), np.float64).astype(np.float32)
    found = compute(f"{opcode}.approx.f32", np.float32, x)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.array_equal(found[np.isinf(expected)], expected[np.isinf(expected)])
    # float64's functions may themselves be by a last bit off, which decides few of the roundings.
    found, expected = found[np.isfinite(expected)], expected[np.isfinite(expected)]
    assert np.mean(found != expected) < 0.002
    assert np.all(np.abs(found - expected) <= np.spacing(np.abs(expected)))


@pytest.mark.parametrize("name", ["f16", "bf16", *PACKED])
def test_approximations_of_halves(name: str) -> None:
    each = name.removesuffix("x2")
    x = specials(each)[:38]
    with np.errstate(all="ignore"):
        same(applied(f"tanh.approx.{name}", x), codes_in(each, np.tanh(x)))
        ftz = ".ftz" if each == "bf16" else ""
        if each == "f16":
            same(applied(f"ex2.approx{ftz}.{name}", x), codes_in(each, np.exp2(x)))
        else:
            found, normal = applied(f"ex2.approx{ftz}.{name}", x), 2.0**-126
            expected = codes_in(each, np.exp2(x))
            same(found, np.where(expected < normal, 0.0, expected))


def test_first_guesses_in_float64_have_half_of_its_bits() -> None:
    x = np.array([3.0, -7.0, 1e300, 0.1 + 1e-15, 5e-324, np.inf, 1.7e308])
    cut = (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    cut[4] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for opcode, exact in (("rcp", 1 / cut), ("rsqrt", 1 / np.sqrt(cut))):
            bits = exact.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
            expected = np.where(np.abs(exact) < np.finfo(np.float64).tiny, 0, bits.view(np.float64))
            found = compute(f"{opcode}.approx.ftz.f64", np.float64, x)
            assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_kinds_of_numbers(name: str) -> None:
    x = codes(specials(name), name)
    normal = np.abs(x) >= np.finfo(x.dtype).tiny
    kinds = {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": ~np.isnan(x),
        "notanumber": np.isnan(x),
        "normal": normal & np.isfinite(x),
        "subnormal": ~normal & (x != 0) & np.isfinite(x),
    }
    for kind, expected in kinds.items():
        assert np.array_equal(compute(f"testp.{kind}.{name}", np.bool_, x), expected)
    a, b = grid(x, x)
    same(
        values_of(compute(f"copysign.{name}", x.dtype, a, b), name),
        np.copysign(b, a).astype(np.float64),
    )


def test_nans_of_arithmetic_have_one_code() -> None:
    nan = np.array([0x7F812345, 0xFFC00000], np.uint32)
    zero = np.zeros(2, np.uint32)
    assert (compute("add.f32", np.uint32, nan, zero) == 0x7FFFFFFF).all()
    assert (
        compute(
            "add.f16", np.uint16, (nan >> 16).astype(np.uint16) | 0x7E00, zero.astype(np.uint16)
        )
        == 0x7FFF
    ).all()


@pytest.mark.parametrize(
    "opcode",
    [
        "add.relu.f32",
        "add.ftz.f64",
        "mul.rna.f32",
        "add.rz.f16",
        "max.sat.f32",
        "ex2.approx.f64",
        "add.f8",
    ],
)
def test_other_modifiers_are_unknown(opcode: str) -> None:
    kind = np.dtype(np.float64 if opcode.endswith("64") else np.float32)
    with pytest.raises(Fault, match=opcode) as caught:
        compute(opcode, kind, np.ones(1, kind), np.ones(1, kind))
    assert caught.value.kind == "unknown"
