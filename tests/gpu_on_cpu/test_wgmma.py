"""wgmma.mma_async against PyTorch, by the layouts of the PTX manual."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu.snippets import run
from tests.gpu_on_cpu.test_matrix import (
    A_PLACES,
    DTYPES,
    assert_near,
    packed,
    random_matrix,
    values,
)

SHARED = 65536
B_START = 32768  # of B's descriptor and image; A's is at 0


class Layout(NamedTuple):
    """Where an operand is in shared memory, beginning at a multiple of 1024 bytes."""

    swizzle: int = 128
    """Bytes; 16 is none."""
    k_major: bool = True
    leading: int = 0
    stride: int = 1024
    within: int = 0
    """Bytes from the start of a line to that of the operand."""
    pattern: int = 0
    """Bytes to the start of the swizzle's pattern, or of the operand where there is none."""

    def descriptor(self, start: int) -> int:
        mode = {16: 0, 128: 1, 64: 2, 32: 3}[self.swizzle]
        base = (start + self.pattern) >> 7 & 7 if self.swizzle > 16 else 0
        first = start + self.pattern + self.within
        return (
            first >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | base << 49 | mode << 62
        )

    def image(self, matrix: Tensor) -> Tensor:
        """The bytes of [M or N, K] from a start on."""
        size = matrix.element_size()
        row = torch.arange(matrix.shape[0]).view(-1, 1, 1)
        column = torch.arange(matrix.shape[1]).view(1, -1, 1)
        byte = torch.arange(size).view(1, 1, -1)
        if self.swizzle == 16:
            if self.k_major:
                x = column * size + byte
                place = row // 8 * self.stride + x // 16 * self.leading + row % 8 * 16 + x % 16
            else:
                place = row // 8 * self.stride + column // 8 * self.leading
                place = place + column % 8 * 16 + row % 8 * 2 + byte
        elif self.k_major:
            place = row // 8 * self.stride + self.line(row % 8, column * size + byte)
        else:
            many = self.swizzle // 2
            place = row // many * self.leading + column // 8 * self.stride
            place = place + self.line(column % 8, row % many * 2 + byte)
        image = torch.zeros(B_START, dtype=torch.uint8)
        image[place.flatten() + self.pattern] = matrix.view(torch.uint8).flatten()
        return image

    def line(self, number: Tensor, byte: Tensor) -> Tensor:
        """Where a byte of line 0 to 7 of an atom is: chunks of 16 bytes change places, by the
        number of the line of 128 bytes that they are in."""
        byte = byte + self.within
        chunks = self.swizzle // 16
        moved = byte // 16 ^ number * self.swizzle // 128 % chunks
        return number * self.swizzle + moved * 16 + byte % 16


K_MAJOR = [
    Layout(16, leading=128, stride=256),
    Layout(16, leading=8192, stride=128, pattern=48),
    Layout(32, stride=256),
    Layout(32, stride=512, pattern=128),
    Layout(64, stride=512),
    Layout(64, stride=512, within=32, pattern=256),
    Layout(128),
    *(Layout(128, within=within) for within in (32, 64, 96)),
    Layout(128, stride=2048, within=32, pattern=384),
]
MN_MAJOR = [
    Layout(16, False, leading=128, stride=256),
    Layout(16, False, leading=4096, stride=128),
    Layout(32, False, leading=512, stride=256),
    Layout(32, False, leading=256, stride=4096, pattern=128),
    Layout(64, False, leading=1024, stride=512),
    Layout(64, False, leading=512, stride=8192, pattern=640),
    Layout(128, False, leading=2048, stride=1024),
    Layout(128, False, leading=1024, stride=8192, pattern=256),
]

COPY = f"""
    .reg .b32 %d<128>;
    .reg .b32 %a<4>;
    .reg .b64 %desc<4>;
    mul.wide.u32 %rd9, %r0, 16;
    add.s64 %rd9, %rd1, %rd9;
    shl.b32 %r5, %r0, 4;
    add.u32 %r5, %r4, %r5;
    mov.u32 %r6, 0;
    COPY:
    ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd9];
    st.shared.v4.b32 [%r5], {{%r20, %r21, %r22, %r23}};
    add.s64 %rd9, %rd9, 2048;
    add.u32 %r5, %r5, 2048;
    add.u32 %r6, %r6, 2048;
    setp.lt.u32 %p1, %r6, {SHARED};
    @%p1 bra COPY;
"""
PUBLISH = """
    fence.proxy.async;
    bar.sync 0;
"""
TAIL = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def names(letter: str, count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%{letter}{i}" for i in range(first, first + count)) + "}"


def moved(opcode: str, tensor: str, letter: str, count: int, first: int = 0) -> str:
    """Registers from or to a tensor [register, thread]."""
    lines = [f"mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, {tensor}, %rd9;"]
    for i in range(first, first + count):
        place, register = f"[%rd9+{512 * i}]", f"%{letter}{i}"
        operands = f"{register}, {place}" if opcode == "ld" else f"{place}, {register}"
        lines.append(f"{opcode}.global.b32 {operands};")
    return "\n".join(lines)


def held(matrix: Tensor) -> Tensor:
    """Accumulators [register, thread] that hold a matrix of 64 rows."""
    columns = matrix.shape[1]
    registers = torch.empty(128, columns // 2, dtype=matrix.dtype)
    for thread in range(128):
        for i in range(columns // 2):
            registers[thread, i] = matrix[accumulator(thread, i)]
    return registers.view(torch.int32).T.contiguous()


def accumulator(thread: int, i: int) -> tuple[int, int]:
    """Row and column of element i that a thread holds."""
    row = 16 * (thread // 32) + thread % 32 // 4 + (0 if i % 4 < 2 else 8)
    return row, i // 4 * 8 + thread % 4 * 2 + i % 2


def matrix_of(registers: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse of `held`."""
    each = registers.T.contiguous().view(dtype)
    matrix = torch.empty(64, each.shape[1] * 2, dtype=dtype)
    for thread in range(128):
        for i in range(each.shape[1]):
            matrix[accumulator(thread, i)] = each[thread, i]
    return matrix


def multiplied(
    d: str,
    a: tuple[str, Tensor, Layout | None],
    b: tuple[str, Tensor, Layout],
    addend: Tensor,
    *,
    scales: str = "1, 1",
    adds: str = "1",
    saturates: str = "",
) -> Tensor:
    """D of one wgmma.mma_async; A is in registers where it has no layout."""
    (a_type, left, a_layout), (b_type, right, b_layout) = a, b
    n, k, size = len(right), left.shape[1], left.element_size()
    accumulators = held(addend)
    out, count = torch.empty_like(accumulators), len(accumulators)
    images = [torch.zeros(B_START, dtype=torch.uint8), b_layout.image(right)]
    if a_layout is not None:
        images[0] = a_layout.image(left)
    tensors = {"out": out, "image": torch.cat(images)}
    tensors["given"] = accumulators
    operand, load = "%desc0", f"mov.u64 %desc0, {(a_layout or b_layout).descriptor(0)};"
    if a_layout is None:
        parts = [packed(x, A_PLACES[size, k]) for x in left.view(4, 16, k)]
        tensors["a"] = torch.cat(parts, dim=1).contiguous()
        operand, load = names("a", 4), moved("ld", "%rd3", "a", 4)
    immediates = "" if d == "s32" else f", {scales}"
    if size == 2:
        majors = [b_layout] if a_layout is None else [a_layout, b_layout]
        immediates += "".join(f", {int(not x.k_major)}" for x in majors)
    body = f"""
    {COPY} {PUBLISH} {load}
    {moved("ld", "%rd2", "d", count)}
    mov.u64 %desc1, {b_layout.descriptor(B_START)};
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}{saturates}.{d}.{a_type}.{b_type}
      {names("d", count)}, {operand}, %desc1, {adds}{immediates};
    {TAIL}
    {moved("st", "%rd0", "d", count)}
    """
    run(body, tensors, threads=128, shared=SHARED)
    return matrix_of(out, DTYPES[d])


def check(d: str, a: str, b: str, n: int, a_layout: Layout | None, b_layout: Layout) -> None:
    """A product of random matrices."""
    k = 32 // DTYPES[a].itemsize
    left, right, addend = (
        random_matrix(64, k, a, 1),
        random_matrix(n, k, b, 2),
        random_matrix(64, n, d, 3),
    )
    found = multiplied(d, (a, left, a_layout), (b, right, b_layout), addend)
    exact = values(left, a) @ values(right, b).T + addend.double()
    assert_near(found, exact)


TYPES = [
    ("f16", "f16", "f16"),
    ("f32", "f16", "f16"),
    ("f32", "bf16", "bf16"),
    ("f32", "tf32", "tf32"),
    *((d, a, b) for d in ("f16", "f32") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
]


@pytest.mark.parametrize(("d", "a", "b"), TYPES)
@pytest.mark.parametrize("registers", [False, True], ids=["shared", "registers"])
def test_types(d: str, a: str, b: str, registers: bool) -> None:
    check(d, a, b, 40, None if registers else Layout(), Layout())


@pytest.mark.parametrize("saturates", ["", ".satfinite"])
@pytest.mark.parametrize(("a", "b"), [("s8", "s8"), ("s8", "u8"), ("u8", "s8"), ("u8", "u8")])
def test_integers(a: str, b: str, saturates: str) -> None:
    left, right = random_matrix(64, 32, a, 1), random_matrix(48, 32, b, 2)
    addend = torch.zeros(64, 48, dtype=torch.int64)
    addend[0], addend[1], addend[2] = 2**31 - 1, -(2**31), 12345
    found = multiplied(
        "s32", (a, left, Layout()), (b, right, Layout()), addend.int(), saturates=saturates
    )
    exact = left.long() @ right.long().T + addend
    expected = exact.clamp(-(2**31), 2**31 - 1) if saturates else exact
    assert torch.equal(found, expected.int())


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_n(n: int) -> None:
    check("f32", "bf16", "bf16", n, None, Layout(16, leading=128, stride=256))


@pytest.mark.parametrize("layout", [*K_MAJOR, *MN_MAJOR], ids=str)
def test_layouts_of_b(layout: Layout) -> None:
    check("f32", "f16", "f16", 96, None, layout)


@pytest.mark.parametrize("layout", [*K_MAJOR, *MN_MAJOR], ids=str)
def test_layouts_of_a(layout: Layout) -> None:
    check("f32", "bf16", "bf16", 16, layout, MN_MAJOR[0])


@pytest.mark.parametrize("layout", K_MAJOR, ids=str)
def test_layouts_of_bytes(layout: Layout) -> None:
    check("f32", "e4m3", "e4m3", 16, layout, layout)


@pytest.mark.parametrize(
    ("adds", "scales", "a_sign", "c_sign"),
    [
        ("1", "-1, 1", -1, 1),
        ("1", "1, -1", -1, 1),
        ("1", "-1, -1", 1, 1),
        ("0", "1, 1", 1, 0),
        ("%p2", "1, 1", 1, 0),
        ("!%p2", "1, 1", 1, 1),
        ("!%p2", "-1, 1", -1, 1),
    ],
)
def test_scales(adds: str, scales: str, a_sign: int, c_sign: int) -> None:
    left, right = random_matrix(64, 16, "f16", 1), random_matrix(8, 16, "f16", 2)
    addend = random_matrix(64, 8, "f32", 3)
    # %p2 is false: no register was written before.
    found = multiplied(
        "f32",
        ("f16", left, Layout()),
        ("f16", right, Layout()),
        addend,
        scales=scales,
        adds=adds,
    )
    exact = a_sign * left.double() @ right.double().T + c_sign * addend.double()
    assert_near(found, exact)
