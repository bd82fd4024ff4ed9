"""What PTX may look like, and what is said of PTX that is not modelled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu_on_cpu.executor import Fault, Program
from tests.gpu_on_cpu.snippets import module, run

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"


def result(body: str) -> list[int]:
    """What each lane leaves in %r9."""
    out = torch.zeros(32, dtype=torch.int32)
    store = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd0, %rd9; st.global.u32 [%rd9], %r9;"
    run(f"{body}\n{store}", {"out": out})
    found: list[int] = out.tolist()
    return found


def first(body: str) -> int:
    found = result(body)
    assert found == found[:1] * 32
    return found[0]


def fault_of(body: str) -> Fault:
    with pytest.raises(Fault) as caught:
        Program(module(body))
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("0x10", 16),
        ("-0x10", -16),
        ("0xFFFFFFFF", -1),
        ("0x3340U", 0x3340),
        ("010", 8),
        ("0b101", 5),
        ("0f3F800000", 0x3F800000),
        ("0FBF800000", 0xBF800000 - 2**32),
        ("-0f3F800000", 0xBF800000 - 2**32),
        ("0d3FF8000000000000", 0x3FC00000),
        ("1.5", 0x3FC00000),
        ("WARP_SZ", 32),
    ],
)
def test_constants(text: str, value: int) -> None:
    assert first(f"mov.b32 %r9, {text};") == value


def test_constants_of_eight_bytes() -> None:
    high = "mov.b64 {_, %r9}, %rd8;"
    assert first(f"mov.b64 %rd8, -1; {high}") == -1
    assert first(f"mov.b64 %rd8, 0xFFFFFFFF; {high}") == 0
    assert first(f"mov.b64 %rd8, 4611686293305294848; {high}") == 0x40000040
    assert first(f"mov.b64 %rd8, 0d3FF8000000000000; {high}") == 0x3FF80000
    assert first(f"mov.b64 %rd8, 0f3FC00000; {high}") == 0x3FF80000


def test_scopes_have_their_own_names() -> None:
    """As in inline assembly that is written twice: the same label, and registers of one name."""
    wait = """
    {
    .reg .pred done; .reg .b32 n, r<4>;
    mov.u32 n, 3;
    wait:
    add.s32 %r9, %r9, 1; sub.s32 n, n, 1; mov.u32 r3, n;
    setp.eq.u32 done, r3, 0;
    @!done bra.uni wait;
    }
    """
    assert first(f"mov.u32 %r9, 0; {wait} {wait}") == 6
    outer = "{ .reg .u32 %r9; mov.u32 %r9, 7; }"
    assert first(f"mov.u32 %r9, 1; {outer}") == 1


def test_comments_directives_and_statements_on_a_line() -> None:
    body = """
    /* a comment
       of two lines */ mov.u32 %r9, 1; add.u32 %r9, %r9, 1; // add.u32 %r9, %r9, 1;
    .pragma "nounroll";
    .loc 1 7 3, function_name $L__info_string0, inlined_at 1 3 5
    $L__tmp0:
    add.u32 %r9, %r9, 1;;
    .section .debug_str { $L__info: .b8 117, 0 }
    """
    assert first(body) == 3


SECTIONS = """
.file 1 "/some/where/kernel.py"
.section .debug_info
{
.b32 79 // a length
.b64 $L__tmp0
.b8 1, 2 { nested }
}
.section .debug_macinfo { }
"""


def test_what_is_said_of_a_kernel() -> None:
    program = Program(f"""{HEADER}
.file 2 "other.cu", 17, 4
.visible .func (.param .b32 f) unused(.param .b32 a) {{ {{ call.uni (f), other, (a); }} ret; }}
.global .align 1 .b8 text[4] = {{65, 66, 67, 0}};
.extern .shared .align 16 .b8 dynamic[];
.shared .align 4 .b8 never_used[65536];
.visible .entry first(
    .param .u32 a, .param .u64 .ptr .global .align 1 b, .param .u8 c,
    .param .align 64 .b8 d[128], .param .f32 e
) .reqntid 128, 2 .maxnreg 80 .minnctapersm 2
{{ .shared .align 8 .b8 own[12]; .reg .b32 r<3>; mov.u32 r1, dynamic; mov.u32 r2, own; ret; }}
.entry second() .maxntid 64, 1, 1 {{ ret; }}
{SECTIONS}""")
    assert program.target == "sm_90a"
    one, two = program.kernels["first"], program.kernels["second"]
    assert [(x.name, x.offset, x.bytes) for x in one.params] == [
        ("a", 0, 4),
        ("b", 8, 8),
        ("c", 16, 1),
        ("d", 64, 128),
        ("e", 192, 4),
    ]
    assert (one.max_threads, one.max_registers, one.shared_bytes) == (256, 80, 16)
    assert (two.max_threads, two.params, two.instructions) == (64, (), 1)


def test_variables_have_addresses() -> None:
    text = f"""{HEADER}
.global .align 4 .b32 table[4] = {{10, -20, 30, 0x28}};
.const .align 8 .f64 half = 0d3FE0000000000000;
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(.param .u64 out, .param .align 8 .b8 packed[16]) {{
.shared .align 4 .b8 own[20];
.local .align 8 .b8 depot[16];
.reg .b32 %r<9>; .reg .b64 %d<9>; .reg .f64 %f;
ld.param.u64 %d0, [out];
ld.global.u32 %r0, [table+4];
st.global.u32 [%d0], %r0;
mov.u64 %d1, table; ld.global.u32 %r0, [%d1+12];
st.global.u32 [%d0+4], %r0;
ld.const.f64 %f, [half]; cvt.rzi.s32.f64 %r0, %f; cvt.rpi.s32.f64 %r1, %f;
st.global.v2.u32 [%d0+8], {{%r0, %r1}};
mov.u32 %r2, dynamic; mov.u32 %r3, own;
st.global.v2.u32 [%d0+16], {{%r2, %r3}};
mov.b64 %d2, packed; ld.param.u32 %r4, [%d2+8]; ld.param.u32 %r5, [packed+12];
st.global.v2.u32 [%d0+24], {{%r4, %r5}};
mov.u32 %r6, 77; mov.u64 %d3, depot; st.local.u32 [%d3+4], %r6; ld.local.u32 %r7, [depot+4];
st.global.u32 [%d0+32], %r7;
ret;
}}"""
    out = torch.zeros(9, dtype=torch.int32)
    packed = np.array([1, 2, 3, 4], np.int32).tobytes()
    Program(text).run("kernel", 1, 1, [out, packed], dynamic_shared=64)
    assert out.tolist() == [-20, 40, 0, 1, 32, 0, 3, 4, 77]


def test_special_registers() -> None:
    assert result("mov.u32 %r9, %laneid;") == list(range(32))
    assert result("mov.u32 %r9, %lanemask_lt;") == [(1 << i) - 1 for i in range(32)]
    assert first("mov.u32 %r9, %ntid.x;") == 32
    assert first("add.u32 %r9, %nctaid.x, %nctaid.y;") == 2


def test_lanes_that_are_off_keep_their_registers() -> None:
    odd = "and.b32 %r8, %r1, 1; setp.eq.u32 %p1, %r8, 1;"
    assert result(f"{odd} mov.u32 %r9, 5; @%p1 add.u32 %r9, %r9, %r1;") == [
        5 + i * (i % 2) for i in range(32)
    ]
    guarded = "setp.ge.u32 %p2, %r1, 0; @!%p1 setp.lt.u32 %p2, %r1, 0; selp.b32 %r9, 1, 0, %p2;"
    assert result(f"{odd} {guarded}") == [i % 2 for i in range(32)]


@pytest.mark.parametrize(
    ("statement", "kind", "words"),
    [
        ("frobnicate.b32 %r9, %r1;", "unknown", "the opcode frobnicate.b32"),
        ("add.s128 %r9, %r1, %r1;", "unknown", "this form of add.s128"),
        ("add.s32.wide %r9, %r1, %r1;", "unknown", "this form of add.s32.wide"),
        ("mov.b32.odd %r9, %r1;", "unknown", "this form of mov.b32.odd"),
        ("setp.lt.ftz.s32 %p1, %r1, 2;", "unknown", ".ftz of setp.lt.ftz.s32"),
        ("setp.ltu.s32 %p1, %r1, 2;", "unknown", "this form of setp.ltu.s32"),
        ("add.s32 %r9, %r1;", "unknown", "this form of add.s32"),
        ("add.f32 %f1, %f2, 1;", "unknown", "this form of add.f32"),
        ("add.s32 %r9, %r1, 1.5;", "unknown", "this form of add.s32"),
        ("add.s32 5, %r1, %r1;", "unknown", "this form of add.s32"),
        ("add.s32 %r9, %rd1, 1;", "malformed", "%rd1 has 8 bytes where 4 bytes"),
        ("add.s32 %r9, %p1, 1;", "malformed", "%p1 is a predicate where 4 bytes"),
        ("and.pred %p1, %p2, %r1;", "malformed", "%r1 has 4 bytes where a predicate"),
        ("add.s32 %r9, {%r1, %r2}, 1;", "malformed", "a vector"),
        ("mov.u32 %r9, %tid.w;", "unknown", "%tid.w was not declared"),
        ("mov.u32 %r9, %r64;", "unknown", "%r64 was not declared"),
        ("mov.u32 %r9, nowhere;", "unknown", "nowhere was not declared"),
        ("mov.u16 %h9, %tid.x;", "unknown", "%tid.x as 2 bytes"),
        ("bra nowhere;", "malformed", "the label nowhere"),
        ("call.uni (%r9), f, (%r1);", "unknown", "call.uni"),
        ("{ .param .b32 a; }", "unknown", "calls"),
        (".reg .f8 %q;", "unknown", "type .f8"),
        (".cluster 2;", "unknown", ".cluster"),
        ("mov.u32 %r9, (1 + 2);", "unknown", '"("'),
        ("mov.u32 %r9, 0x;", "unknown", "0x"),
    ],
)
def test_what_is_not_modelled_is_named(statement: str, kind: str, words: str) -> None:
    fault = fault_of(statement)
    assert fault.kind == kind
    assert words in fault.message
    assert "kernel kernel" in fault.message
    assert "PTX line" in fault.message


def test_the_source_line_is_named() -> None:
    body = ".loc 1 42 7\nadd.s32 %r8, %r1, 1;\nfrobnicate.b32 %r9, {%r1, %r2};"
    with pytest.raises(Fault) as caught:
        Program(module(body) + SECTIONS)
    message = caught.value.message
    assert "kernel.py:42" in message
    assert "frobnicate.b32 %r9, {%r1, %r2}" in message


def test_all_of_a_module_is_decoded() -> None:
    bad = ".entry other() { .reg .b32 r; frobnicate.b32 r, r; ret; }"
    with pytest.raises(Fault, match="kernel other"):
        Program(module("") + bad)


@pytest.mark.parametrize(
    "text", [".extern .global .b32 x;", ".tex .u64 x;", ".entry f( {", ".entry f() {"]
)
def test_modules_that_are_not_read(text: str) -> None:
    with pytest.raises(Fault) as caught:
        Program(HEADER + text)
    assert caught.value.kind == "unknown"


FORMS = """
add.f32 fff|add.f64 ddd|add.rz.f32 fff|add.s32 rrr|add.s64 ddd|and.b16 hhh|and.b32 rrr|and.b64 ddd
and.pred ppp|abs.f32 ff|bfe.s32 rrrr|bfe.u32 rrrr|bfi.b64 dddrr|copysign.f32 fff|cvt.f32.bf16 fh
cvt.f32.f16 fh|cvt.f64.f32 df|cvt.rn.bf16.f32 hf|cvt.rn.bf16x2.f32 rff|cvt.rn.f16.f32 hf
cvt.rn.f16x2.f32 rff|cvt.rn.f32.f64 fd|cvt.rn.f32.s32 fr|cvt.rn.f32.s8 fh|cvt.rn.f64.s64 dd
cvt.rzi.s16.f32 hf|cvt.s64.s32 dr|cvt.sat.f32.f32 ff|cvt.u16.u32 hr|cvt.u32.u16 rh|cvt.u32.u64 rd
cvt.u64.u32 dr|div.full.f32 fff|div.rn.f32 fff|div.s32 rrr|div.s64 ddd|div.u32 rrr|div.u64 ddd
ex2.approx.ftz.f32 ff|fma.rm.f32 ffff|fma.rn.f32 ffff|fma.rn.f64 dddd|fma.rn.ftz.f32 ffff
mad.lo.s32 rrrr|mad.lo.s64 dddd|mad.wide.s32 drrd|mad.wide.u32 drrd|max.f32 fff|max.s32 rrr
max.s64 ddd|min.f32 fff|min.s32 rrr|min.s64 ddd|mov.b16 hh|mov.b32 rr|mov.b64 dd|mov.f32 ff
mov.f64 dd|mov.pred pp|mov.u16 hh|mov.u32 rr|mov.u64 dd|mul.f32 fff|mul.f64 ddd|mul.hi.s32 rrr
mul.lo.s32 rrr|mul.lo.s64 ddd|mul.wide.s32 drr|mul.wide.u32 drr|neg.f32 ff|neg.s32 rr|not.b32 rr
not.b64 dd|not.pred pp|or.b16 hhh|or.b32 rrr|or.b64 ddd|or.pred ppp|prmt.b32 rrrr
rcp.approx.ftz.f32 ff|rem.s32 rrr|rem.s64 ddd|rem.u32 rrr|selp.b16 hhhp|selp.b32 rrrp
selp.b64 dddp|selp.f32 fffp|selp.f64 dddp|selp.u16 hhhp|selp.u64 dddp|setp.eq.b16 phh
setp.eq.f32 pff|setp.geu.f32 pff|setp.lt.s64 pdd|setp.nan.bf16 phh|setp.nan.f32 pff
setp.num.f32 pff|setp.neu.f32 pff|shl.b16 hhr|shl.b32 rrr|shl.b64 ddr|shr.s32 rrr|shr.s64 ddr
shr.u16 hhr|shr.u32 rrr|shr.u64 ddr|sub.bf16x2 rrr|sub.f32 fff|sub.s32 rrr|sub.s64 ddd|xor.b32 rrr
"""
"""Every opcode from register to register that Triton and nvcc make of this package's kernels."""
NAMES = {"p": "%p", "h": "%h", "r": "%r", "d": "%rd", "f": "%f"}


def test_every_form_that_the_kernels_have() -> None:
    forms = [x.split() for x in FORMS.replace("\n", "|").split("|") if x]
    statements = [
        f"{opcode} {', '.join(f'{NAMES[kind]}{i + 1}' for i, kind in enumerate(kinds))};"
        for opcode, kinds in forms
    ]
    program = Program(module("\n".join(statements)))
    assert program.kernels["kernel"].instructions > len(statements) > 100
