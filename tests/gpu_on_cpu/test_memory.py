"""Loads, stores and atomics: what they do, and what the executor refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu.executor import Program, nothing_written
from tests.gpu_on_cpu.snippets import fault_of, module, run

INDEX = "mul.wide.u32 %rd8, %r0, {size}; add.s64 %rd9, %rd0, %rd8; add.s64 %rd10, %rd1, %rd8;"
"""%rd9 and %rd10: the thread's places in the first and in the second tensor."""


def index(size: int) -> str:
    return INDEX.format(size=size)


@pytest.mark.parametrize(
    ("type_", "register", "dtype"),
    [
        ("u8", "%r9", torch.uint8),
        ("s8", "%h9", torch.int8),
        ("b16", "%h9", torch.int16),
        ("u16", "%rd20", torch.int16),
        ("s32", "%r9", torch.int32),
        ("f32", "%f9", torch.float32),
        ("b64", "%rd20", torch.int64),
    ],
)
@pytest.mark.parametrize("space", ["", ".global"])
def test_copies_every_width(type_: str, register: str, dtype: torch.dtype, space: str) -> None:
    x = torch.randint(-(2**7), 2**7, (64,)).to(dtype)
    out = torch.zeros_like(x)
    size = x.element_size()
    run(
        f"""{index(size)} ld{space}.{type_} {register}, [%rd10];
        st{space}.{type_} [%rd9], {register};""",
        {"out": out, "x": x},
        64,
    )
    assert torch.equal(out, x)


@pytest.mark.parametrize(
    ("type_", "expected"), [("u8", 0xF0), ("s8", -16), ("u16", 0xF8F0), ("s16", -1808)]
)
def test_widens_by_type(type_: str, expected: int) -> None:
    x, out = torch.tensor([0xF8F0 - 2**16], dtype=torch.int16), torch.zeros(1, dtype=torch.int32)
    run(f"ld.global.{type_} %r9, [%rd1]; st.global.u32 [%rd0], %r9;", {"out": out, "x": x}, 1)
    assert out.item() == expected


@pytest.mark.parametrize(
    ("load", "store"),
    [
        ("ld.global.L1::no_allocate.v4.b32", "st.global.cs.v4.b32"),
        ("ld.global.nc.L1::evict_last.L2::128B.v4.f32", "st.global.wb.v4.f32"),
        ("ld.weak.global.cg.v4.u32", "st.weak.global.v4.u32"),
    ],
)
def test_vectors_and_hints(load: str, store: str) -> None:
    x = torch.randint(0, 2**31 - 1, (128,), dtype=torch.int32)
    out = torch.zeros_like(x)
    registers = "%f{0}" if "f32" in load else "%r1{0}"
    parts = ", ".join(registers.format(i) for i in range(4))
    run(
        f"{index(16)} {load} {{{parts}}}, [%rd10]; {store} [%rd9], {{{parts}}};",
        {"out": out, "x": x},
    )
    assert torch.equal(out, x)


def test_cache_policy() -> None:
    x, out = torch.arange(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    run(
        f"""{index(16)} createpolicy.fractional.L2::evict_first.b64 %rd20, 1.0;
        ld.global.L1::evict_first.L2::cache_hint.v2.b64 {{%rd21, _}}, [%rd10], %rd20;
        st.global.L2::cache_hint.b64 [%rd9], %rd21, %rd20;""",
        {"out": out, "x": x},
    )
    assert torch.equal(out[::2], x[::2])
    assert not out[1::2].any()


def test_generic_addresses_of_shared_memory() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    run(
        f"""{index(4)} cvt.u64.u32 %rd20, %r4; cvta.shared.u64 %rd21, %rd20;
        mul.wide.u32 %rd22, %r0, 4; add.s64 %rd23, %rd21, %rd22;
        st.u32 [%rd23], %r0; bar.sync 0;
        isspacep.shared %p1, %rd23; isspacep.global %p2, %rd23;
        mapa.shared::cluster.u32 %r20, %r4, 0;
        shl.b32 %r21, %r0, 2; sub.u32 %r22, 124, %r21; add.u32 %r22, %r20, %r22;
        ld.shared::cluster.u32 %r9, [%r22]; @%p2 mov.u32 %r9, 7; @!%p1 mov.u32 %r9, 8;
        cvta.to.shared.u64 %rd24, %rd23; setp.ne.u64 %p3, %rd24, %rd20;
        st.global.u32 [%rd9], %r9;""",
        {"out": out, "x": out},
        shared=128,
    )
    assert out.tolist() == list(range(31, -1, -1))


ATOMICS: list[tuple[str, torch.dtype, Callable[[Tensor], object]]] = [
    ("add.u32", torch.int32, lambda x: x.sum()),
    ("add.s32", torch.int32, lambda x: x.sum()),
    ("min.s32", torch.int32, lambda x: min(x.min().item(), 0)),
    ("max.s32", torch.int32, lambda x: max(x.max().item(), 0)),
    ("add.u64", torch.int64, lambda x: x.sum()),
    ("max.s64", torch.int64, lambda x: max(x.max().item(), 0)),
    ("add.f32", torch.float32, lambda x: x.sum()),
    ("add.f64", torch.float64, lambda x: x.sum()),
    ("add.noftz.f16", torch.float16, lambda x: x.sum()),
    ("add.noftz.bf16", torch.bfloat16, lambda x: x.sum()),
]


@pytest.mark.parametrize(
    ("operation", "dtype", "expected"), ATOMICS, ids=[name for name, *_ in ATOMICS]
)
def test_atomics_of_all_threads(
    operation: str, dtype: torch.dtype, expected: Callable[[Tensor], object]
) -> None:
    x = torch.randint(-2, 3, (128,)).to(dtype)
    out = torch.zeros(1, dtype=dtype)
    register = {2: "%h9", 4: "%f9" if dtype.is_floating_point else "%r9", 8: "%rd20"}[
        x.element_size()
    ]
    body = f"""{index(x.element_size())} ld.global.b{8 * x.element_size()} {register}, [%rd10];
    red.global.{operation} [%rd0], {register};"""
    run(body, {"out": out, "x": x}, 64)
    assert out.item() == torch.as_tensor(expected(x[:64])).item()


def test_atomics_return_what_was_there() -> None:
    out = torch.full((64,), -1, dtype=torch.int32)
    counter = torch.zeros(4, dtype=torch.int32)
    run(
        f"""{index(4)} atom.global.add.u32 %r9, [%rd1], 1; st.global.u32 [%rd9], %r9;
        atom.global.inc.u32 _, [%rd1+4], 5; atom.relaxed.gpu.global.or.b32 %r10, [%rd1+8], %r0;
        mov.u32 %r11, 0;
        atom.global.cas.b32 %r12, [%rd1+12], %r11, 9;""",
        {"out": out, "counter": counter},
        64,
    )
    assert sorted(out.tolist()) == list(range(64))
    assert counter.tolist() == [64, 64 % 6, 63, 9]


def test_vector_and_packed_reductions() -> None:
    out = torch.zeros(4)
    half = torch.zeros(2, dtype=torch.bfloat16)
    run(
        """mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f40000000;
        red.global.add.v4.f32 [%rd0], {%f1, %f2, %f1, %f2};
        mov.b32 %r9, 0x40003F80; red.global.add.noftz.bf16x2 [%rd1], %r9;""",
        {"out": out, "half": half},
    )
    assert out.tolist() == [32, 64, 32, 64]
    assert half.tolist() == [32, 64]


def test_global_atomics_flush_subnormal_floats() -> None:
    out = torch.full((1,), 1e-40)
    run("mov.f32 %f1, 0f00000000; red.global.add.f32 [%rd0], %f1;", {"out": out}, 1)
    assert out.item() == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("ld.global.u32 %r9, [%rd0+256];", "byte 256 of out, which has 256"),
        ("ld.global.u32 %r9, [%rd0+-4];", "4 bytes before out"),
        ("st.global.v2.u32 [%rd0+256], {%r0, %r0};", "which has 256"),
        ("ld.shared.u32 %r9, [%r4+128];", "at 128 of shared memory, which has 128"),
        ("atom.shared.add.u32 %r9, [%r4+128], 1;", "which has 128"),
        ("mov.u64 %rd9, 4096; st.global.u32 [%rd9], %r0;", "before out"),
        ("cvt.u64.u32 %rd9, %r4; ld.u32 %r9, [%rd9];", "of global memory"),
    ],
)
def test_addresses_outside(body: str, words: str) -> None:
    fault = fault_of(body, {"out": torch.zeros(64, dtype=torch.int32)}, 1, shared=128)
    assert fault.kind == "bounds"
    assert words in fault.message
    assert str(fault.site.instruction) in body
    assert fault.site.lane == 0


@pytest.mark.parametrize(
    "body",
    [
        "ld.global.u32 %r9, [%rd0+2];",
        "ld.global.v4.u32 {%r9, %r10, %r11, %r12}, [%rd0+8];",
        "st.shared.u16 [%r4+1], %h0;",
        "red.global.add.u64 [%rd0+4], %rd1;",
    ],
)
def test_misaligned_addresses(body: str) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    assert (
        fault_of(f"mov.u16 %h0, 0; {body}", {"out": out, "x": out}, 1, shared=128).kind
        == "misaligned"
    )


def test_unwritten_shared_memory() -> None:
    body = "st.shared.u16 [%r4], %h0; ld.shared.u32 %r9, [%r4];"
    fault = fault_of(f"mov.u16 %h0, 0; {body}", {"out": torch.zeros(1)}, 1, shared=128)
    assert (fault.kind, fault.site.instruction) == ("unwritten", "ld.shared.u32 %r9, [%r4]")
    assert "byte 2 of shared memory" in fault.message


@pytest.mark.parametrize(
    "body", ["ld.global.u32 %r9, [%rd0+4];", "red.global.add.u32 [%rd0+4], 1;"]
)
def test_unwritten_global_memory(body: str) -> None:
    out = torch.zeros(4, dtype=torch.int32)
    program = Program(module(f"st.global.u32 [%rd0], 1; {body}"))
    written = nothing_written(out)
    with pytest.raises(Exception, match="unwritten: byte 4 of out"):
        program.run("kernel", 1, 1, [out], written=written)
    assert written[out.data_ptr()].tolist() == [1] * 4 + [0] * 12


def test_read_only_memory() -> None:
    out = torch.zeros(4)
    program = Program(module("st.global.u32 [%rd0], 1;"))
    with pytest.raises(Exception, match="may only be read"):
        program.run("kernel", 1, 1, [out], read_only={out.data_ptr()})


@pytest.mark.parametrize(
    "opcode", ["ld.mmio.relaxed.sys.global.u32 %r9, [%rd0]", "atom.global.add.b32 %r9, [%rd0], %r9"]
)
def test_unknown_forms(opcode: str) -> None:
    with pytest.raises(Exception, match="unknown"):
        Program(module(f"{opcode};"))
