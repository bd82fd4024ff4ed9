"""Numbers rounded exactly, and opcodes run lane by lane, for the tests of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from tests.gpu_on_cpu.executor import Program

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
THREADS = 128


class Format(NamedTuple):
    """A binary floating-point format."""

    digits: int
    """Of a normal number, its hidden one too."""
    exponent: int
    """Of the largest number, whose leading digit is worth 2 ** exponent."""
    least: int
    """2 ** least is the least number above 0."""
    largest: Fraction
    """The largest number."""


def _format(digits: int, exponent: int, largest: Fraction | None = None) -> Format:
    ieee = (2 - Fraction(2) ** (1 - digits)) * 2**exponent
    return Format(digits, exponent, 2 - exponent - digits, largest or ieee)


FORMATS = {
    "f16": _format(11, 15),
    "bf16": _format(8, 127),
    "tf32": _format(11, 127),
    "f32": _format(24, 127),
    "f64": _format(53, 1023),
    "e5m2": _format(3, 15),
    # Its exponents are of numbers up to the last one, whose last code alone is a NaN.
    "e4m3": Format(4, 8, -9, Fraction(448)),
}


def _nearest(x: Fraction) -> int:
    return round(x)  # ties to even


def _away(x: Fraction) -> int:
    return int(math.copysign(math.floor(abs(x) + Fraction(1, 2)), x))


ROUND: dict[str, Callable[[Fraction], int]] = {
    "rn": _nearest,
    "rna": _away,
    "rz": math.trunc,
    "rm": math.floor,
    "rp": math.ceil,
}


def rounded(x: Fraction, name: str, mode: str = "rn", *, finite: bool = False) -> float:
    """`x` in a format. Beyond the largest number is infinity, where the mode does not turn to 0."""
    kind = FORMATS[name]
    if x == 0:
        return 0.0
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - kind.digits + 1, kind.least)
    value = ROUND[mode](x / unit) * unit
    sign = 1 if x > 0 else -1
    if abs(value) <= kind.largest:
        return math.copysign(float(value), sign)
    inwards = finite or mode == "rz" or (mode == "rm" and x > 0) or (mode == "rp" and x < 0)
    return math.copysign(float(kind.largest) if inwards else math.inf, sign)


def compute(opcode: str, result: np.dtype[Any] | type, *operands: Array) -> Array:
    """What an opcode gives, a thread for each element of its operands.

    Operands of bool are predicates, and so is such a result. A whole statement can stand for the
    opcode: its operands are %v<bits>_1, %p2 and so on, the results %v<bits>_0 or %p0.
    """
    arrays = [np.ascontiguousarray(x) for x in operands]
    count = len(arrays[0])
    kind = np.dtype(result)
    out = np.zeros(count, np.uint8 if kind == np.bool_ else kind)
    tensors = [torch.from_numpy(x.view(np.uint8)) for x in (out, *arrays)]
    body = [_load(at, x.dtype) for at, x in enumerate(arrays, 1)]
    names = [_register(0, kind), *(_register(at, x.dtype) for at, x in enumerate(arrays, 1))]
    body.append(opcode if ";" in opcode else f"{opcode} {', '.join(names)};")
    body.append(_store(kind))
    _program(len(tensors), "\n".join(body)).run(
        "kernel", -(-count // THREADS), THREADS, [*tensors, count]
    )
    return out.view(np.bool_) if kind == np.bool_ else out


def _register(at: int, kind: np.dtype[Any]) -> str:
    return f"%p{at}" if kind == np.bool_ else f"%v{8 * kind.itemsize}_{at}"


def _load(at: int, kind: np.dtype[Any]) -> str:
    place = f"mad.wide.u32 %a0, %i, {kind.itemsize}, %a{at};"
    if kind == np.bool_:
        return f"{place} ld.global.u8 %v16_{at}, [%a0]; setp.ne.u16 %p{at}, %v16_{at}, 0;"
    return f"{place} ld.global.b{8 * kind.itemsize} {_register(at, kind)}, [%a0];"


def _store(kind: np.dtype[Any]) -> str:
    place = f"mad.wide.u32 %a0, %i, {kind.itemsize}, %out;"
    if kind == np.bool_:
        return f"{place} selp.u16 %v16_0, 1, 0, %p0; st.global.u8 [%a0], %v16_0;"
    return f"{place} st.global.b{8 * kind.itemsize} [%a0], {_register(0, kind)};"


def _program(tensors: int, body: str) -> Program:
    params = ", ".join(f".param .u64 p{i}" for i in range(tensors))
    loads = " ".join(f"ld.param.u64 %a{i}, [p{i}];" for i in range(1, tensors))
    return Program(f"""
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel({params}, .param .u32 count) {{
.reg .pred %p<8>, %over; .reg .b16 %v16_<8>; .reg .b32 %v32_<8>, %i, %n; .reg .b64 %v64_<8>;
.reg .b64 %a<8>, %out; .reg .b32 %block;
mov.u32 %i, %tid.x; mov.u32 %block, %ctaid.x;
mad.lo.u32 %i, %block, {THREADS}, %i;
ld.param.u32 %n, [count];
setp.ge.u32 %over, %i, %n;
@%over bra END;
ld.param.u64 %out, [p0];
{loads}
{body}
END: ret;
}}
""")


def dtype(name: str) -> np.dtype[Any]:
    """The type of a register, by PTX's name of a type; of a bfloat16, its bits."""
    letter = {"s": "i", "u": "u", "b": "u", "f": "f"}[name[0]]
    return np.dtype(np.uint16 if name == "bf16" else f"{letter}{int(name[1:]) // 8}")


def grid(*axes: Array) -> list[Array]:
    """Every combination of values."""
    return [x.ravel() for x in np.meshgrid(*axes, indexing="ij")]


REAL = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def specials(name: str, *, seed: int = 0, count: int = 24) -> Array:
    """Zeros, subnormals, large and infinite numbers, a NaN, and some more, as float64."""
    kind = FORMATS[name]
    unit = 2.0**kind.least
    normal = unit * 2.0 ** (kind.digits - 1)
    one = [1.0, 1 + 2.0 ** (1 - kind.digits), 1 - 2.0**-kind.digits, 1.5, 3.0, 0.1]
    small = [0.0, unit, 3 * unit, normal - unit, normal]
    large = [float(kind.largest), float(kind.largest) / 2, math.inf]
    draws = np.random.default_rng(seed).standard_normal(count).tolist()
    values = [rounded(Fraction(x), name) if math.isfinite(x) else x for x in one + small + large]
    values += [rounded(Fraction(x), name) for x in draws]
    return np.array([*values, *(-x for x in values[:14]), math.nan])


def codes(values: Array, name: str) -> Array:
    """Values of a format as a register holds them."""
    assert all(rounded(Fraction(x), name) == x for x in values.tolist() if math.isfinite(x))
    if name == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(REAL[name])


def values_of(found: Array, name: str) -> Array:
    """The reverse, as float64."""
    if name == "bf16":
        return (found.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return found.astype(np.float64)


def same(found: Array, expected: Array) -> None:
    """Assert that two arrays of float64 are one, signs of zeros too; NaNs are all alike."""
    wrong = ~((found == expected) & (np.signbit(found) == np.signbit(expected)))
    wrong &= ~(np.isnan(found) & np.isnan(expected))
    where = np.flatnonzero(wrong)
    assert not len(where), [(int(i), found[i], expected[i]) for i in where[:5]]
