"""Accesses that nothing orders: each of them found, and none found where there is an order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu.executor import Fault, Schedule
from tests.gpu_on_cpu.snippets import SCHEDULES, fault_of, run

every_schedule = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda x: f"{x.policy}-{x.when}"
)
OWN = "shl.b32 %r5, %r0, 2; add.u32 %r5, %r4, %r5; "
"""%r5: the thread's word of shared memory."""
NEXT = "add.u32 %r6, %r0, 1; and.b32 %r6, %r6, {last}; shl.b32 %r6, %r6, 2; add.u32 %r6, %r4, %r6; "
"""%r6: that of the thread after it."""


def tensors() -> dict[str, Tensor]:
    """An output, and what blocks use to exchange numbers."""
    return {
        "out": torch.zeros(256, dtype=torch.int32),
        "data": torch.zeros(256, dtype=torch.int32),
        "flag": torch.zeros(4, dtype=torch.int32),
    }


def race(
    body: str,
    first: str,
    second: str,
    threads: int = 64,
    grid: int = 1,
    schedule: Schedule = SCHEDULES[0],
    kind: str = "race",
) -> Fault:
    """The fault of a body, which has to be of these two instructions in either order."""
    fault = fault_of(body, tensors(), threads, grid, shared=1024, schedule=schedule)
    assert fault.kind == kind, fault
    assert fault.other is not None
    found = {str(fault.site.instruction), str(fault.other.instruction)}
    assert found == {first, second}, fault
    return fault


def clean(body: str, threads: int, grid: int, schedule: Schedule) -> dict[str, Tensor]:
    given = tensors()
    run(body, given, threads, grid, shared=1024, schedule=schedule, cooperative=grid > 1)
    return given


@every_schedule
def test_warps_write_one_word(schedule: Schedule) -> None:
    store = "st.shared.u32 [%r4+8], %r2"
    fault = race(f"{store};", store, store, schedule=schedule)
    assert fault.other is not None
    assert {fault.site.warp, fault.other.warp} == {0, 1}
    assert "byte 8 of shared memory" in fault.message


def test_lanes_write_one_word() -> None:
    store = "st.global.u32 [%rd0], %r1"
    fault = race(f"{store};", store, store, 32)
    assert (fault.site.lane, fault.site.warp) == (1, 0)


@every_schedule
def test_equal_stores_are_no_race(schedule: Schedule) -> None:
    body = "mov.u32 %r9, 77; st.global.u32 [%rd0], %r9; bar.sync 0; ld.global.u32 %r9, [%rd0];"
    assert clean(body, 128, 1, schedule)["out"][0].item() == 77


SHIFT = (
    OWN
    + NEXT
    + """st.shared.u32 [%r5], %r0; {first} ld.shared.u32 %r9, [%r6]; {second}
    st.shared.u32 [%r5], %r9; mul.wide.u32 %rd8, %r0, 4; add.s64 %rd9, %rd0, %rd8;
    st.global.u32 [%rd9], %r9;"""
)


@every_schedule
@pytest.mark.parametrize(("threads", "sync"), [(128, "bar.sync 0;"), (32, "bar.warp.sync -1;")])
def test_shift_through_shared_memory(threads: int, sync: str, schedule: Schedule) -> None:
    out = clean(SHIFT.format(last=threads - 1, first=sync, second=sync), threads, 1, schedule)[
        "out"
    ]
    assert out[:threads].tolist() == [*range(1, threads), 0]


@pytest.mark.parametrize(("threads", "sync"), [(128, "bar.sync 0;"), (32, "bar.warp.sync -1;")])
@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[1], SCHEDULES[3]])
def test_each_barrier_of_the_shift_is_needed(threads: int, sync: str, schedule: Schedule) -> None:
    """Whether what is read was not written yet, or is overwritten too early."""
    store, load = "st.shared.u32 [%r5], %r0", "ld.shared.u32 %r9, [%r6]"
    again = "st.shared.u32 [%r5], %r9"
    for first, second, one in (("", sync, store), (sync, "", again)):
        body = SHIFT.format(last=threads - 1, first=first, second=second)
        fault = fault_of(body, tensors(), threads, shared=1024, schedule=schedule)
        if fault.kind == "unwritten":
            # The warp that would have written it comes later.
            assert not first
            continue
        assert fault.other is not None
        assert {fault.site.instruction, fault.other.instruction} == {one, load}


def test_warp_barrier_is_no_barrier_of_the_block() -> None:
    body = SHIFT.format(last=63, first="bar.warp.sync -1;", second="bar.sync 0;")
    with pytest.raises(Fault, match=r"race|unwritten"):
        clean(body, 64, 1, SCHEDULES[0])


MESSAGE = """
setp.ne.u32 %p1, %r3, 0; @%p1 bra READ;
st.global.u32 [%rd1], 42;
{send}
bra DONE;
READ:
{receive}
setp.eq.u32 %p2, %r10, 0; @%p2 bra READ;
{after}
ld.global.u32 %r11, [%rd1];
st.global.u32 [%rd0], %r11;
DONE:
"""
STORE_DATA, LOAD_DATA = "st.global.u32 [%rd1], 42", "ld.global.u32 %r11, [%rd1]"
ORDERED = {
    "release and acquire": (
        "st.release.gpu.global.u32 [%rd2], 1;",
        "ld.acquire.gpu.global.u32 %r10, [%rd2];",
        "",
    ),
    "fences": (
        "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%rd2], 1;",
        "ld.relaxed.gpu.global.u32 %r10, [%rd2];",
        "fence.acq_rel.gpu;",
    ),
    "membar and volatile": (
        "membar.gl; st.volatile.global.u32 [%rd2], 1;",
        "ld.volatile.global.u32 %r10, [%rd2];",
        "membar.gl;",
    ),
    "atomics": (
        "atom.release.gpu.global.exch.b32 %r10, [%rd2], 1;",
        "atom.acquire.gpu.global.or.b32 %r10, [%rd2], 0;",
        "",
    ),
    "a system's scope": (
        "fence.sc.sys; red.relaxed.gpu.global.add.u32 [%rd2], 1;",
        "ld.acquire.sys.global.u32 %r10, [%rd2];",
        "",
    ),
    "a later atomic that hands it on": (
        """atom.add.release.gpu.global.u32 %r10, [%rd2], 1;
        atom.add.relaxed.gpu.global.u32 %r10, [%rd2], 1;""",
        "ld.acquire.gpu.global.u32 %r10, [%rd2]; setp.lt.u32 %p2, %r10, 2; @%p2 bra READ;",
        "",
    ),
}
UNORDERED = {
    "relaxed": (
        "st.relaxed.gpu.global.u32 [%rd2], 1;",
        "ld.relaxed.gpu.global.u32 %r10, [%rd2];",
        "",
    ),
    "no acquire": (
        "st.release.gpu.global.u32 [%rd2], 1;",
        "ld.relaxed.gpu.global.u32 %r10, [%rd2];",
        "",
    ),
    "no release": (
        "st.relaxed.gpu.global.u32 [%rd2], 1;",
        "ld.acquire.gpu.global.u32 %r10, [%rd2];",
        "",
    ),
    "a block's scope": (
        "st.release.cta.global.u32 [%rd2], 1;",
        "ld.acquire.gpu.global.u32 %r10, [%rd2];",
        "",
    ),
    "a block's scope of the reader": (
        "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%rd2], 1;",
        "ld.relaxed.gpu.global.u32 %r10, [%rd2];",
        "fence.acq_rel.cta;",
    ),
    "volatile alone": (
        "st.volatile.global.u32 [%rd2], 1;",
        "ld.volatile.global.u32 %r10, [%rd2];",
        "",
    ),
    "a fence after the flag": (
        "st.relaxed.gpu.global.u32 [%rd2], 1; fence.acq_rel.gpu;",
        "ld.acquire.gpu.global.u32 %r10, [%rd2];",
        "",
    ),
    "a store over the release": (
        "st.release.gpu.global.u32 [%rd2], 1; st.relaxed.gpu.global.u32 [%rd2], 2;",
        "ld.acquire.gpu.global.u32 %r10, [%rd2]; setp.lt.u32 %p2, %r10, 2; @%p2 bra READ;",
        "",
    ),
}


@every_schedule
@pytest.mark.parametrize("name", ORDERED)
def test_messages(name: str, schedule: Schedule) -> None:
    send, receive, after = ORDERED[name]
    given = clean(MESSAGE.format(send=send, receive=receive, after=after), 1, 2, schedule)
    assert given["out"][0].item() == 42


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
@pytest.mark.parametrize("name", UNORDERED)
def test_messages_without_order(name: str, schedule: Schedule) -> None:
    send, receive, after = UNORDERED[name]
    body = MESSAGE.format(send=send, receive=receive, after=after)
    fault = fault_of(body, tensors(), 1, 2, schedule=schedule)
    assert fault.kind == "race"
    assert fault.other is not None
    found = {fault.site.instruction, fault.other.instruction}
    # At a block's scope accesses of the flag are no atomics to one another.
    assert found == {STORE_DATA, LOAD_DATA} or (".cta." in send and LOAD_DATA not in found)


@every_schedule
def test_a_flag_without_atomics_is_a_race(schedule: Schedule) -> None:
    body = MESSAGE.format(
        send="fence.sc.gpu; st.global.u32 [%rd2], 1;",
        receive="ld.acquire.gpu.global.u32 %r10, [%rd2];",
        after="",
    )
    fault = fault_of(body, tensors(), 1, 2, schedule=schedule)
    assert fault.kind == "race"


@every_schedule
def test_scope_of_a_block_within_it(schedule: Schedule) -> None:
    body = MESSAGE.replace("%r3", "%r2").format(
        send="st.release.cta.global.u32 [%rd2], 1;",
        receive="ld.acquire.cta.global.u32 %r10, [%rd2];",
        after="",
    )
    lane0 = f"setp.ne.u32 %p3, %r1, 0; @%p3 bra DONE; {body}"
    assert clean(lane0, 64, 1, schedule)["out"][0].item() == 42


LAST = """
mul.wide.u32 %rd8, %r3, 4; add.s64 %rd9, %rd1, %rd8;
st.global.u32 [%rd9], %r3;
{atomic}
setp.ne.u32 %p1, %r10, 3; @%p1 bra DONE;
ld.global.u32 %r11, [%rd1]; ld.global.u32 %r12, [%rd1+4]; ld.global.u32 %r13, [%rd1+8];
add.u32 %r11, %r11, %r12; add.u32 %r11, %r11, %r13; add.u32 %r11, %r11, %r3;
st.global.u32 [%rd0], %r11;
DONE:
"""


@every_schedule
def test_the_last_block_sees_what_all_did(schedule: Schedule) -> None:
    body = LAST.format(atomic="atom.acq_rel.gpu.global.add.u32 %r10, [%rd2], 1;")
    given = tensors()
    given["data"][3] = 3
    # Blocks may end in any order: only block 3 adds its own number by what it loaded.
    run(
        body.replace(
            "add.u32 %r11, %r11, %r3;", "ld.global.u32 %r14, [%rd1+12]; add.u32 %r11, %r11, %r14;"
        ),
        given,
        1,
        4,
        schedule=schedule,
    )
    assert given["out"][0].item() == 6


@pytest.mark.parametrize("order", ["acquire", "release", "relaxed"])
def test_the_last_block_needs_both_halves(order: str) -> None:
    body = LAST.format(atomic=f"atom.{order}.gpu.global.add.u32 %r10, [%rd2], 1;")
    fault = fault_of(body, tensors(), 1, 4)
    assert fault.kind == "race"
    assert fault.other is not None
    assert fault.other.instruction == "st.global.u32 [%rd9], %r3"
    assert str(fault.site.instruction).startswith("ld.global.u32")


@every_schedule
def test_barrier_of_a_grid(schedule: Schedule) -> None:
    """As cooperative groups have it: one thread of each block, between barriers of the block."""
    body = """mad.lo.u32 %r8, %r3, 64, %r0; mul.wide.u32 %rd8, %r8, 4; add.s64 %rd9, %rd1, %rd8;
        st.global.u32 [%rd9], %r8;
        bar.sync 0; setp.ne.u32 %p1, %r0, 0; @%p1 bra WAITED;
        fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [%rd2], 1;
        POLL: ld.relaxed.gpu.global.u32 %r10, [%rd2]; setp.lt.u32 %p2, %r10, 3; @%p2 bra POLL;
        fence.acq_rel.gpu;
        WAITED: bar.sync 0;
        sub.u32 %r9, 191, %r8; mul.wide.u32 %rd10, %r9, 4; add.s64 %rd11, %rd1, %rd10;
        ld.global.u32 %r10, [%rd11]; add.s64 %rd12, %rd0, %rd8; st.global.u32 [%rd12], %r10;"""
    out = clean(body, 64, 3, schedule)["out"]
    assert out[:192].tolist() == list(range(191, -1, -1))


ONE_LANE = """
setp.ne.u32 %p1, %r2, 0; setp.ne.u32 %p3, %r1, 0; @%p1 bra READ;
@%p3 bra DONE;
st.global.u32 [%rd1], 42; st.release.gpu.global.u32 [%rd2], 1; bra DONE;
READ:
@%p3 bra READY;
POLL: ld.acquire.gpu.global.u32 %r10, [%rd2]; setp.eq.u32 %p2, %r10, 0; @%p2 bra POLL;
READY: {sync}
ld.global.u32 %r11, [%rd1]; mul.wide.u32 %rd8, %r1, 4; add.s64 %rd9, %rd0, %rd8;
st.global.u32 [%rd9], %r11;
DONE:
"""


@every_schedule
def test_one_lane_acquires_for_its_warp(schedule: Schedule) -> None:
    out = clean(ONE_LANE.format(sync="bar.warp.sync -1;"), 64, 1, schedule)["out"]
    assert out[:32].tolist() == [42] * 32


@pytest.mark.parametrize("schedule", SCHEDULES[:4])
def test_an_acquire_is_of_its_lane(schedule: Schedule) -> None:
    race(ONE_LANE.format(sync=""), STORE_DATA, LOAD_DATA, schedule=schedule)


@every_schedule
def test_sums_by_atomics(schedule: Schedule) -> None:
    body = """
    mov.u32 %r9, 0; setp.ne.u32 %p1, %r0, 0; @!%p1 st.shared.u32 [%r4], %r9;
    bar.sync 0; red.shared.add.u32 [%r4], %r0; bar.sync 0;
    ld.shared.u32 %r9, [%r4]; @!%p1 st.global.u32 [%rd0], %r9;"""
    assert clean(body, 128, 1, schedule)["out"][0].item() == 127 * 64


@pytest.mark.parametrize("before", [True, False])
def test_atomics_and_others_race(before: bool) -> None:
    atomic, load = "red.shared.add.u32 [%r4], %r0", "ld.shared.u32 %r9, [%r4]"
    store = "st.shared.u32 [%r4], 0"
    if before:
        body = f"setp.ne.u32 %p1, %r0, 0; @!%p1 {store}; {atomic};"
        race(body, f"@!%p1 {store}", atomic)
    else:
        body = f"setp.ne.u32 %p1, %r0, 0; @!%p1 {store}; bar.sync 0; {atomic}; {load};"
        race(body, atomic, load)


def test_all_atomics_before_a_load_count() -> None:
    """The second warp's atomic is ordered before the load, the first one's is not."""
    body = """
    setp.ne.u32 %p3, %r1, 0; @%p3 bra DONE;
    setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r2, 1;
    @%p1 red.global.add.u32 [%rd1], 1; @%p1 bra DONE;
    @!%p2 bra READ;
    red.global.add.u32 [%rd1], 1; st.release.gpu.global.u32 [%rd2], 1; bra DONE;
    READ: ld.acquire.gpu.global.u32 %r10, [%rd2]; setp.eq.u32 %p4, %r10, 0; @%p4 bra READ;
    ld.global.u32 %r11, [%rd1];
    DONE:"""
    race(body, "@%p1 red.global.add.u32 [%rd1], 1", LOAD_DATA, 96)


@pytest.mark.parametrize("first", [True, False])
def test_read_only_loads_and_stores(first: bool) -> None:
    load, store = "ld.global.nc.u32 %r9, [%rd1]", "st.global.u32 [%rd1], 1"
    body = f"{load}; bar.sync 0; {store};" if first else f"{store}; bar.sync 0; {load};"
    fault = race(body, load, store, 1)
    assert "ld.global.nc" in fault.message


def test_reads_of_many_are_all_remembered() -> None:
    """A write that all readers but one are ordered before."""
    body = """
    ld.global.u32 %r9, [%rd1];
    setp.eq.u32 %p1, %r2, 5; @%p1 bra DONE;
    bar.sync 1, 224;
    setp.ne.u32 %p2, %r0, 0; @!%p2 st.global.u32 [%rd1], 1;
    DONE:"""
    fault = race(body, "ld.global.u32 %r9, [%rd1]", "@!%p2 st.global.u32 [%rd1], 1", 256)
    assert fault.other is not None
    assert 5 in (fault.site.warp, fault.other.warp)


@every_schedule
@pytest.mark.parametrize("words", ["b64 %rd9, [%rd2], %rd10", "b32 %r9, [%rd2], %r10"])
def test_atomics_of_two_sizes_race(words: str, schedule: Schedule) -> None:
    load = "ld.relaxed.gpu.global.u64 %rd8, [%rd2]"
    exchange = f"atom.relaxed.gpu.global.exch.{words}"
    body = f"""
    mov.b64 %rd10, 1; mov.b32 %r10, 1; setp.eq.u32 %p1, %r3, 0;
    @%p1 bra CHANGE; {load}; ret; CHANGE: {exchange};
    """
    if "b64" in words:
        clean(body, 1, 2, schedule)
    else:
        race(body, exchange, load, 1, 2, schedule)
