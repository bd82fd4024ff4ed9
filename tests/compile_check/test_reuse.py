"""Shared memory that is written while another warp group may still multiply with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from resformer_kernels._triton import available
from resformer_kernels.cli.compile.reuse import early_writes

pytestmark = pytest.mark.skipif(
    available.version_reason() is not None, reason=str(available.version_reason())
)

PRODUCT = """
    .file 1 "/folder/kernel.py"
.visible .entry k()
.reqntid THREADS
{
    mov.u32 %r1, %tid.x;
    mov.b32 %r2, global_smem;
    and.b32 %r3, %r1, 127;
    shl.b32 %r4, %r3, 4;
    add.s32 %r5, %r2, %r4;
    add.s32 %r6, %r2, 16384;
    bfe.u32 %r7, %r6, 4, 14;
    cvt.u64.u32 %rd1, %r7;
    or.b64 %rd2, %rd1, 4611686293305294848;
    mov.b32 %r9, -1;
$L__BB0_1:
    SLOT
    .loc 1 7 0
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r20,%r21}, {%r22,%r23}, %rdB, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    BEFORE
    wgmma.wait_group.sync.aligned 0;
    AFTER
    .loc 1 9 0
    WRITE
    .loc 1 10 0
    @%p1 bra $L__BB0_1;
    ret;
}
"""
"""A product of 64 columns of 128 bytes from byte 16,384 on, in a loop."""

RING = """
    add.s32 %r10, %r9, 1;
    setp.gt.s32 %p2, %r10, 1;
    selp.b32 %r9, 0, %r10, %p2;
    shl.b32 %r11, %r9, 13;
    add.s32 %r12, %r6, %r11;
    bfe.u32 %r13, %r12, 4, 14;
    cvt.u64.u32 %rd3, %r13;
    or.b64 %rd4, %rd3, 4611686293305294848;
    xor.b32 %r14, %r9, 1;
    shl.b32 %r15, %r14, 13;
    add.s32 %r16, %r6, %r15;"""
"""Two slots of 8,192 bytes: the product's in rd4, the other one from r16 on."""

WARNING = (
    "kernel.py:9 writes shared memory that the product of kernel.py:7 may still read in another "
    "warp group: no barrier follows its wait"
)


def found(
    write: str, *, threads: int = 256, before: str = "", after: str = "", slot: str = ""
) -> list[str]:
    text = PRODUCT.replace("THREADS", str(threads)).replace("BEFORE", before)
    text = text.replace("AFTER", after).replace("SLOT", slot).replace("WRITE", write)
    return early_writes(text.replace("%rdB", "%rd4" if slot else "%rd2"))


@pytest.mark.parametrize(
    "write",
    [
        "st.shared.v4.b32 [%r5+16384], {%r30, %r31, %r32, %r33};",
        # The last of 64 rows of 128 bytes.
        "st.shared.b32 [%r2+24572], %r30;",
        "cp.async.cg.shared.global [ %r6 + 0 ], [ %rd9 + 0 ], 0x10, %r31;",
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5+22528], {%r30, %r31, %r32, %r33};",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%r6], [%rd9, {%r1, %r2}], [%r2];",
        # Nothing is known of the address.
        "st.shared.b32 [%r40], %r30;",
    ],
)
def test_a_write_after_the_wait_is_named(write: str) -> None:
    assert found(write) == [WARNING]
    # Other warp groups may have issued their products after such a barrier.
    assert found(write, before="bar.sync 0;") == [WARNING]


def test_what_comes_after_a_barrier_or_elsewhere_is_not_named() -> None:
    write = "st.shared.v4.b32 [%r5+16384], {%r30, %r31, %r32, %r33};"
    assert found(write, after="bar.sync 0;") == []
    assert found(write, threads=128) == []
    # Rows of 16 bytes for 128 threads, before the product's memory and behind it.
    assert found("st.shared.v4.b32 [%r5+14336], {%r30, %r31, %r32, %r33};") == []
    assert found("st.shared.v4.b32 [%r5+24576], {%r30, %r31, %r32, %r33};") == []
    assert len(found("st.shared.v4.b32 [%r5+14340], {%r30, %r31, %r32, %r33};")) == 1


def test_slots_of_a_ring_are_apart_in_one_iteration_alone() -> None:
    other_slot = "st.shared.b32 [%r16], %r30;"
    assert found(other_slot, slot=f"bar.sync 0;{RING}") == []
    # With no barrier the next iteration writes the slot that this one reads.
    assert found(other_slot, slot=RING) == [WARNING]
    assert len(found("st.shared.b32 [%r6], %r30;", slot=f"bar.sync 0;{RING}")) == 1


COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from tests.compile_check.gluon_kernels import multiply_twice

constants = {"EARLY": True, "LATE": sys.argv[2] == "True"}
types = {"out": "*fp32"} | dict.fromkeys(constants, "constexpr")
triton.knobs.cache.dir = sys.argv[1]
artifact = triton.compile(
    GluonASTSource(multiply_twice, types, constants),
    target=GPUTarget("cuda", 90, 32),
    options={"num_warps": 8},
)
print(artifact.asm["ptx"])
"""
"""Prints the PTX of a kernel that multiplies twice with the same shared memory, filled between."""


def _compiled(folder: Path, *, late: bool) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", COMPILED, str(folder), str(late)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=environment
    ).stdout


def test_the_compilers_own_omission_is_named(tmp_path: Path) -> None:
    named = early_writes(_compiled(tmp_path, late=False))
    source = (Path(__file__).with_name("gluon_kernels.py")).read_text().splitlines()
    assert named
    for sentence in named:
        line = re.match(r"gluon_kernels.py:(\d+) writes", sentence)
        assert line is not None, sentence
        assert "right.store(" in source[int(line[1]) - 1]
    assert early_writes(_compiled(tmp_path, late=True)) == []
