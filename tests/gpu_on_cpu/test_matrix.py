"""ldmatrix, stmatrix, movmatrix and mma against PyTorch, by the layouts of the PTX manual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu.executor import Fault, Program
from tests.gpu_on_cpu.snippets import fault_of, module, run

DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "s8": torch.int8,
    "u8": torch.uint8,
    "f32": torch.float32,
    "s32": torch.int32,
}
# Of element i that a lane holds, with g = lane // 4 and t = lane % 4: its row and its number along
# K, as the manual's figures have them, by bytes of an element and K.
A_PLACES: dict[tuple[int, int], Callable[[int, int, int], tuple[int, int]]] = {
    (2, 8): lambda i, g, t: (g if i < 2 else g + 8, t * 2 + (i & 1)),
    (2, 16): lambda i, g, t: (
        g if i in {0, 1, 4, 5} else g + 8,
        t * 2 + (i & 1) + (8 if i >= 4 else 0),
    ),
    (4, 4): lambda i, g, t: (g if i == 0 else g + 8, t),
    (4, 8): lambda i, g, t: (g if i in {0, 2} else g + 8, t if i < 2 else t + 4),
    (1, 16): lambda i, g, t: (g if i < 4 else g + 8, t * 4 + (i & 3)),
    (1, 32): lambda i, g, t: (
        g if i < 4 or 8 <= i < 12 else g + 8,
        t * 4 + (i & 3) + (16 if i >= 8 else 0),
    ),
}
B_PLACES: dict[tuple[int, int], Callable[[int, int, int], tuple[int, int]]] = {
    (2, 8): lambda i, g, t: (t * 2 + i, g),
    (2, 16): lambda i, g, t: (t * 2 + (i & 1) + (8 if i >= 2 else 0), g),
    (4, 4): lambda _, g, t: (t, g),
    (4, 8): lambda i, g, t: (t if i == 0 else t + 4, g),
    (1, 16): lambda i, g, t: (t * 4 + i, g),
    (1, 32): lambda i, g, t: (t * 4 + (i & 3) + (16 if i >= 4 else 0), g),
}


def c_place(i: int, g: int, t: int) -> tuple[int, int]:
    return (g if i < 2 else g + 8, t * 2 + (i & 1))


def packed(matrix: Tensor, place: Callable[[int, int, int], tuple[int, int]]) -> Tensor:
    """Registers that hold a matrix: [register, lane] of int32."""
    count = matrix.numel() // 32
    order = [[place(i, lane // 4, lane % 4) for i in range(count)] for lane in range(32)]
    index = torch.tensor(order)
    held = matrix.view(torch.uint8).view(*matrix.shape, -1)[index[..., 0], index[..., 1]]
    return held.reshape(32, -1).contiguous().view(torch.int32).T.contiguous()


def unpacked(registers: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """The matrix of accumulators that [register, lane] hold."""
    held = registers.T.contiguous().view(dtype)
    matrix = torch.empty(rows, 8, dtype=dtype)
    for lane in range(32):
        for i in range(held.shape[1]):
            matrix[c_place(i, lane // 4, lane % 4)] = held[lane, i]
    return matrix


def random_matrix(rows: int, columns: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[kind]
    if kind in {"s8", "u8"}:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, (rows, columns), generator=generator).to(dtype)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def values(matrix: Tensor, kind: str) -> Tensor:
    """In float64, as a tensor core sees them."""
    if kind == "tf32":
        matrix = (matrix.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return matrix.double()


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Up to the rounding of sums, or of float16."""
    rtol, atol = (2**-11, 2**-20) if found.dtype == torch.float16 else (1e-5, 1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=atol)


def each_lane(name: str, first: int, count: int, opcode: str) -> str:
    """Registers [first, first + count) of a tensor [register, lane] to or from %r10 and on."""
    lines = [f"mul.wide.u32 %rd9, %r1, 4; add.s64 %rd9, {name}, %rd9;"]
    for i in range(first, first + count):
        place, register = f"[%rd9+{128 * i}]", f"%r{10 + i}"
        operands = f"{register}, {place}" if opcode == "ld" else f"{place}, {register}"
        lines.append(f"{opcode}.global.b32 {operands};")
    return "\n".join(lines)


def vector(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{10 + i}" for i in range(first, first + count)) + "}"


def multiplied(opcode: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """D's registers, of those of A, B and C."""
    given = torch.cat([c, a, b])
    out = torch.empty_like(c)
    na, nb, nc = len(a), len(b), len(c)
    body = f"""
    {each_lane("%rd1", 0, len(given), "ld")}
    {opcode} {vector(0, nc)}, {vector(nc, na)}, {vector(nc + na, nb)}, {vector(0, nc)};
    {each_lane("%rd0", 0, nc, "st")}
    """
    run(body, {"out": out, "given": given})
    return out


FLOATS = [
    *((f"m16n8k{k}", d, "f16", "f16") for k in (8, 16) for d in ("f16", "f32")),
    *((f"m16n8k{k}", "f32", "bf16", "bf16") for k in (8, 16)),
    *((f"m16n8k{k}", "f32", "tf32", "tf32") for k in (4, 8)),
    *(
        ("m16n8k32", d, a, b)
        for d in ("f16", "f32")
        for a in ("e4m3", "e5m2")
        for b in ("e4m3", "e5m2")
    ),
]
INTEGERS = [
    (shape, a, b, saturates)
    for shape in ("m8n8k16", "m16n8k16", "m16n8k32")
    for a in ("s8", "u8")
    for b in ("s8", "u8")
    for saturates in ("", ".satfinite")
]


@pytest.mark.parametrize(("shape", "d", "a", "b"), FLOATS)
def test_mma(shape: str, d: str, a: str, b: str) -> None:
    k = int(shape.split("k")[1])
    left, right = random_matrix(16, k, a, 1), random_matrix(k, 8, b, 2)
    addend = random_matrix(16, 8, d, 3)
    size = left.element_size()
    found = multiplied(
        f"mma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{d}",
        packed(left, A_PLACES[size, k]),
        packed(right, B_PLACES[size, k]),
        packed(addend, c_place),
    )
    exact = values(left, a) @ values(right, b) + addend.double()
    assert_near(unpacked(found, DTYPES[d], 16), exact)


@pytest.mark.parametrize(("shape", "a", "b", "saturates"), INTEGERS)
def test_mma_of_integers(shape: str, a: str, b: str, saturates: str) -> None:
    m, k = int(shape[1:].split("n")[0]), int(shape.split("k")[1])
    left, right = random_matrix(m, k, a, 1), random_matrix(k, 8, b, 2)
    addend = torch.randint(-(2**31), 2**31, (m, 8), generator=torch.Generator().manual_seed(3))
    addend[0], addend[1] = 2**31 - 1, -(2**31)
    found = multiplied(
        f"mma.sync.aligned.{shape}.row.col{saturates}.s32.{a}.{b}.s32",
        packed(left, A_PLACES[1, k]),
        packed(right, B_PLACES[1, k]),
        packed(addend.int(), c_place),
    )
    exact = left.long() @ right.long() + addend
    expected = exact.clamp(-(2**31), 2**31 - 1).int() if saturates else exact.int()
    assert saturates or not torch.equal(exact, expected.long()), "no sum overflows"
    assert torch.equal(unpacked(found, torch.int32, m), expected)


@pytest.mark.parametrize(
    "opcode",
    [
        "mma.sync.aligned.m16n8k16.row.col.f16.bf16.bf16.f16",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32",
        "mma.sync.aligned.m16n8k16.col.row.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n16k16.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.f16.s32",
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16",
    ],
)
def test_forms_that_are_not_known(opcode: str) -> None:
    operands = "{%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, {%r8,%r9}, {%r0,%r1,%r2,%r3};"
    if opcode.startswith("ldmatrix"):
        operands = "{%r5,%r6,%r7}, [%r4];"
    with pytest.raises(Fault) as caught:
        Program(module(f"{opcode} {operands}", shared=1024))
    assert caught.value.kind == "unknown"


FILL = """
    mul.wide.u32 %rd9, %r1, 16; add.s64 %rd9, %rd1, %rd9;
    ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd9];
    shl.b32 %r5, %r1, 4; add.u32 %r5, %r4, %r5;
    st.shared.v4.b32 [%r5], {%r20, %r21, %r22, %r23};
    bar.warp.sync -1;
"""


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
def test_ldmatrix(count: int, trans: str, space: str) -> None:
    given = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(count, 32, 2, dtype=torch.int16)
    address = "%r5"
    # Lane i has the address of row i, from the last one on.
    body = f"{FILL} sub.u32 %r5, 31, %r1; shl.b32 %r5, %r5, 4; add.u32 %r5, %r5, %r4;"
    if not space:
        body += "cvt.u64.u32 %rd8, %r5; cvta.shared.u64 %rd8, %rd8;"
        address = "%rd8"
    opcode = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}{space}.b16"
    body += f"{opcode} {vector(0, count)}, [{address}]; {each_lane('%rd0', 0, count, 'st')}"
    run(body, {"out": out, "given": given}, shared=512)
    for i in range(count):
        matrix = given.view(32, 8).flip(0).view(4, 8, 8)[i]
        expected = matrix.T if trans else matrix
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            assert out[i, lane].tolist() == expected[row, column : column + 2].tolist()


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, trans: str) -> None:
    given = torch.arange(256, dtype=torch.int16).view(4, 32, 2)
    out = torch.zeros(32, 8, dtype=torch.int16)
    body = f"""
    {each_lane("%rd1", 0, count, "ld")}
    shl.b32 %r5, %r1, 4; add.u32 %r5, %r5, %r4;
    mov.u32 %r6, 0; st.shared.v4.b32 [%r5], {{%r6, %r6, %r6, %r6}};
    bar.warp.sync -1;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r5], {vector(0, count)};
    bar.warp.sync -1;
    ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r5];
    mul.wide.u32 %rd9, %r1, 16; add.s64 %rd9, %rd0, %rd9;
    st.global.v4.b32 [%rd9], {{%r20, %r21, %r22, %r23}};
    """
    run(body, {"out": out, "given": given}, shared=512)
    matrices = given.view(4, 8, 8)[:count]
    expected = matrices.transpose(1, 2) if trans else matrices
    assert torch.equal(out.view(4, 8, 8)[:count], expected)
    assert not out.view(4, 8, 8)[count:].any()


def test_movmatrix() -> None:
    given = torch.arange(64, dtype=torch.int16)
    out = torch.zeros(8, 8, dtype=torch.int16)
    body = f"""
    {each_lane("%rd1", 0, 1, "ld")}
    movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r10;
    {each_lane("%rd0", 0, 1, "st")}
    """
    run(body, {"out": out, "given": given})
    assert torch.equal(out, given.view(8, 8).T)


LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5];"


@pytest.mark.parametrize(
    ("body", "kind", "lane"),
    [
        (f"{FILL} add.u32 %r5, %r5, 8; {LOAD}", "misaligned", 0),
        (f"{FILL} add.u32 %r5, %r5, 16; {LOAD}", "bounds", 31),
        (f"{FILL.replace('bar.warp.sync -1;', '')} xor.b32 %r5, %r5, 16; {LOAD}", "race", 0),
        (f"shl.b32 %r5, %r1, 4; {LOAD}", "unwritten", 0),
        (f"{FILL} setp.lt.u32 %p1, %r1, 16; @%p1 {LOAD}", "barrier", -1),
        (f"{FILL} setp.lt.u32 %p1, %r1, 16; @%p1 ret; {LOAD}", "barrier", -1),
    ],
)
def test_ldmatrix_that_is_wrong(body: str, kind: str, lane: int) -> None:
    given = torch.zeros(256, dtype=torch.int16)
    fault = fault_of(body, {"out": torch.zeros(1), "given": given}, shared=512)
    assert (fault.kind, fault.site.lane) == (kind, lane)
    assert LOAD.rstrip(";") in (fault.site.instruction or "")


def test_part_of_a_warp_cannot_multiply() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 16;
    @%p1 bra OTHER;
    movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r10;
    ret;
    OTHER:
    movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r10;
    """
    assert fault_of(body, {"out": torch.zeros(1)}).kind == "barrier"
