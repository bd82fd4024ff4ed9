"""Hazards in PTX that is written by hand; `test_compile_check.py` has compiled kernels."""

from __future__ import annotations

import pytest

from resformer_kernels.cli.compile.hazards import divergent_barriers

WAIT = """
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared.b64 complete, [%r8], %r9;
    @!complete bra.uni waitLoop;"""
"""As Triton waits for a tensor descriptor's copy: every loop has the same label."""

SHARED = """
    st.shared.b32 [%r8], %r2;
    ld.shared.b32 %r4, [%r8];
    setp.ne.b32 %p1, %r4, 0;"""

KERNEL = """
    .file 1 "/folder/kernel.py"
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u64 .ptr .global .align 1 k_param_1
)
{
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    mul.wide.s32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    .loc 1 7 0
    ld.global.b32 %r2, [%rd4];
    BETWEEN
    .loc 1 8 0
    st.global.b32 [%rd1+8], %r3;
    DECIDED
    @%p1 bra $L__BB0_2;
    bra.uni $L__BB0_1;
$L__BB0_1:
    UNDER
$L__BB0_2:
    ret;
}
"""


def found(
    between: str = "", decided: str = "setp.ne.b32 %p1, %r2, 0;", under: str = "bar.sync 0;"
) -> list[str]:
    text = KERNEL.replace("BETWEEN", between).replace("DECIDED", decided)
    return divergent_barriers(text.replace("UNDER", under))


def test_a_number_that_is_overwritten_decides_over_a_barrier() -> None:
    assert found() == [
        "what kernel.py:7 loads decides over a barrier, and kernel.py:8 stores to the same tensor "
        "with no barrier between: threads may part"
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"between": "bar.sync 0;"},
        # Waiting for a copy orders nothing, and its loop's label is the last loop's, too.
        {"between": f"{WAIT}\n    bar.sync 0;\n{WAIT}"},
        {"under": "st.global.b32 [%rd2], %r3;"},
        # All threads read one number from shared memory.
        {"decided": SHARED},
    ],
)  # fmt: skip
def test_what_cannot_part_threads_is_not_named(change: dict[str, str]) -> None:
    assert found(**change) == []


def test_waiting_for_a_copy_is_no_barrier() -> None:
    assert len(found(between=WAIT)) == 1
