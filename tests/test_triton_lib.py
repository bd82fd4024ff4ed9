"""The device functions that every Triton kernel shares, in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from resformer_kernels._triton import device as lib
from resformer_kernels._triton.arch import STAND_IN, STAND_IN_MULTIPROCESSORS
from resformer_kernels._triton.available import interpreted
from resformer_kernels._triton.launch import (
    POISON,
    Launch,
    assumed_capability,
    capability,
    empty,
    launch,
    launched_by,
    multiprocessors,
    recorded_launches,
    redirected,
)
from resformer_kernels.testing.poison import environment

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

CPU = torch.device("cpu")
NUMBER, PER_TILE, PER_ROW, PER_COLUMN, PER_ELEMENT = range(5)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _round(source, target, COUNT: tl.constexpr, TYPE: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, lib.round_to(tl.load(source + at), TYPE))


@triton.jit
def _widen(source, target, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, lib.widen(tl.load(source + at)))


@triton.jit
def _functions(
    source, powers, exponentials, tangents, slopes, fast, fast_slopes, COUNT: tl.constexpr
):
    at = tl.arange(0, COUNT)
    x = tl.load(source + at)
    tl.store(powers + at, lib.exp2(x))
    tl.store(exponentials + at, lib.exp(x))
    tangent, slope = lib.tanh(x)
    tl.store(tangents + at, tangent)
    tl.store(slopes + at, slope)
    tangent, slope = lib.fast_tanh(x)
    tl.store(fast + at, tangent)
    tl.store(fast_slopes + at, slope)


@triton.jit
def _dot(a, b, c, SIDE: tl.constexpr):
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    at = row * SIDE + column
    product = lib.dot(tl.load(a + at), tl.load(b + at), tl.load(c + at))
    tl.store(c + at, product)


@triton.jit
def _mix(
    v,
    v_first,
    own,
    first,
    out,
    row_stride,
    column_stride,
    count,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORM: tl.constexpr,
    TYPE: tl.constexpr,
):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    own_tile = lib.coefficient(
        own,
        0.7,
        rows.to(tl.int64),
        columns,
        row_stride,
        column_stride,
        rows < count,
        columns < width,
        FORM,
    )
    mixed = lib.mix(
        own_tile,
        tl.load(v + at, mask=inside, other=0.0),
        first,
        tl.load(v_first + at, mask=inside, other=0.0),
        TYPE,
    )
    tl.store(out + at, mixed, mask=inside)


FUNCTIONS = ("powers", "exponentials", "tangents", "slopes", "fast", "fast_slopes")


def run(kernel: object, **arguments: object) -> None:
    launch(kernel, (1,), CPU, **arguments)


def awkward() -> torch.Tensor:
    """float32 values at every boundary of rounding: ties, subnormals, overflow, NaN, inf."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64)
    ties = torch.arange(1024) * 2**13 + (127 << 23) + 2**12
    halves = torch.arange(1024) * 2**16 + (100 << 23) + 2**15
    small = torch.arange(1024) * 2**11 + (103 << 23)
    drawn = torch.cat([bits, ties, halves, small]).to(torch.int32).view(torch.float32)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65520.0, 3.4e38, 1e-45, 1e-40]
    rest = torch.zeros(8192 - len(drawn) - len(special))
    return torch.cat([drawn, torch.tensor(special), rest])


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).split(".")[1])
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    x = awkward()
    out = torch.empty(len(x), dtype=dtype)
    run(_round, source=x, target=out, COUNT=len(x), TYPE=TYPES[dtype])
    expected = x.to(dtype)
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan)
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(out.view(integer)[~nan], expected.view(integer)[~nan])


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).split(".")[1])
def test_widening_is_exact(dtype: torch.dtype) -> None:
    x = awkward().to(dtype)
    out = torch.empty(len(x))
    run(_widen, source=x, target=out, COUNT=len(x))
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((got.double() - exact) / exact).abs().max())


def test_functions_are_as_exact_as_they_say() -> None:
    x = torch.cat([torch.linspace(-86, 10, 3072), torch.linspace(-1, 1, 1024)])
    x[0] = 1e-30
    found = [torch.empty(len(x)) for _ in FUNCTIONS]
    arguments = dict(zip(FUNCTIONS, found, strict=True))
    run(_functions, source=x, **arguments, COUNT=len(x))
    wide = x.double()
    assert relative(found[0], wide.exp2()) < 2e-7
    assert relative(found[1], wide.exp()) < 1.2e-7
    assert relative(found[2], wide.tanh()) < 4e-7
    near = wide.abs() < 10
    assert relative(found[3][near], wide[near].cosh() ** -2) < 5e-7
    assert float((found[4] - wide.tanh()).abs().max()) < 2e-7
    assert float((found[5] - wide.cosh() ** -2).abs().max()) < 4e-7


def test_functions_of_special_values() -> None:
    x = torch.tensor([0.0, -math.inf, -200.0, math.nan, -0.0, 30.0, -30.0, -87.5])
    found = {name: torch.empty(8) for name in FUNCTIONS}
    run(_functions, source=x, **found, COUNT=8)
    assert found["exponentials"][:3].tolist() == [1.0, 0.0, 0.0]
    assert found["tangents"][[0, 1, 4, 5, 6]].tolist() == [0.0, -1.0, 0.0, 1.0, -1.0]
    assert found["fast"][[0, 1, 4, 5, 6]].tolist() == [0.0, -1.0, 0.0, 1.0, -1.0]
    assert found["slopes"][0] == found["fast_slopes"][0] == 1.0
    assert all(bool(values[3].isnan()) for values in found.values())


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).split(".")[1])
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    c = torch.randn(32, 32)
    expected = a.double() @ b.double() + c.double()
    run(_dot, a=a, b=b, c=c, SIDE=32)
    torch.testing.assert_close(c, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("form", [NUMBER, PER_TILE, PER_ROW, PER_COLUMN, PER_ELEMENT])
def test_mix_reads_a_coefficient_of_any_form(dtype: torch.dtype, form: int) -> None:
    torch.manual_seed(form)
    shape = {PER_TILE: (1, 1), PER_ROW: (5, 1), PER_COLUMN: (1, 3), PER_ELEMENT: (5, 3)}
    own = torch.randn(shape.get(form, (1, 1)))
    v, v_first = torch.randn(5, 3).to(dtype), torch.randn(5, 3).to(dtype)
    out = torch.empty(5, 3, dtype=dtype)
    strides = own.expand(5, 3).stride()
    run(
        _mix, v=v, v_first=v_first, own=own, first=-1.3, out=out, row_stride=strides[0],
        column_stride=strides[1], count=5, width=3, ROWS=8, COLUMNS=4, FORM=form, TYPE=TYPES[dtype],
    )  # fmt: skip
    factor = 0.7 if form == NUMBER else own
    expected = (factor * v.float() + (-1.3) * v_first.float()).to(dtype)
    torch.testing.assert_close(out, expected)


def test_an_empty_grid_launches_nothing() -> None:
    out = torch.full((4,), 7.0)
    launch(_widen, (0,), CPU, source=out, target=out, COUNT=4)
    assert out.tolist() == [7.0] * 4


def test_launches_go_elsewhere() -> None:
    out, taken, fresh = torch.full((4,), 7.0), list[Launch](), list[torch.Tensor]()
    with launched_by(taken.append, fresh.append):
        assert redirected()
        made = empty(out, (3, 2), torch.int32)
        for grid in ((0,), (2, 3)):
            launch(_widen, grid, CPU, source=out, target=out, COUNT=4)
        with recorded_launches() as inner:
            empty(out, (1,))
            launch(_widen, (1,), CPU, source=out, target=out, COUNT=4)
    assert not redirected()
    assert out.tolist() == [7.0] * 4
    assert [x.data_ptr() for x in fresh] == [made.data_ptr()]
    assert [(x.kernel, x.grid, x.kwargs["COUNT"]) for x in taken] == [(_widen, (2, 3), 4)]
    assert [x.grid for x in inner] == [(1,)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64, torch.int32], ids=str)
def test_what_a_kernel_ought_to_write_is_poisoned(dtype: torch.dtype) -> None:
    with environment(POISON, "1"):
        fresh = empty(torch.zeros(3), (5, 2), dtype)
    assert (fresh.shape, fresh.dtype) == ((5, 2), dtype)
    assert bool(fresh.isnan().all()) or dtype is torch.int32


def test_a_gpu_that_is_assumed() -> None:
    assert (capability(CPU), multiprocessors(CPU)) == (STAND_IN, STAND_IN_MULTIPROCESSORS)
    with assumed_capability((8, 0)):
        assert (capability(CPU), multiprocessors(CPU)) == ((8, 0), STAND_IN_MULTIPROCESSORS)
        with assumed_capability((9, 0), 5):
            assert (capability(CPU), multiprocessors(CPU)) == ((9, 0), 5)
    assert multiprocessors(CPU) == STAND_IN_MULTIPROCESSORS
