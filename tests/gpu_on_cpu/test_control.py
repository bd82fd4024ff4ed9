"""Branches, barriers, mbarriers, what lanes do together, and the scheduler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu.executor import Fault, Program, Schedule
from tests.gpu_on_cpu.snippets import SCHEDULES, fault_of, module, run

STORE = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd0, %rd9; st.global.u32 [%rd9], %r9;"
every_schedule = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda x: f"{x.policy}-{x.when}"
)


def out(count: int = 32) -> Tensor:
    return torch.full((count,), -1, dtype=torch.int32)


def lanes(body: str, threads: int = 32, schedule: Schedule = SCHEDULES[0]) -> list[int]:
    """What each thread leaves in %r9."""
    result = out(threads)
    run(f"{body}\n{STORE}", {"out": result}, threads, schedule=schedule)
    found: list[int] = result.tolist()
    return found


@every_schedule
def test_lanes_part_and_meet(schedule: Schedule) -> None:
    body = """
    mov.u32 %r9, 0;
    mov.u32 %r8, %r1;
    LOOP:
    setp.eq.u32 %p1, %r8, 0;
    @%p1 bra DONE;
    add.u32 %r9, %r9, %r8;
    sub.u32 %r8, %r8, 1;
    bra.uni LOOP;
    DONE:
    shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
    """
    expected = [(i ^ 1) * ((i ^ 1) + 1) // 2 for i in range(32)]
    assert lanes(body, schedule=schedule) == expected


def test_branches_by_index() -> None:
    body = """
    and.b32 %r8, %r1, 3;
    TARGETS: .branchtargets A, B, C, A;
    brx.idx %r8, TARGETS;
    A: mov.u32 %r9, 10; bra END;
    B: mov.u32 %r9, 20; bra END;
    C: mov.u32 %r9, 30;
    END:
    """
    assert lanes(body) == [10, 20, 30, 10] * 8


def test_a_branch_that_is_said_to_be_uniform() -> None:
    fault = fault_of(
        "setp.lt.u32 %p1, %r1, 5; @%p1 bra.uni A; mov.u32 %r9, 1; A: mov.u32 %r9, 2;",
        {"out": out()},
    )
    assert (fault.kind, fault.site.instruction) == ("malformed", "@%p1 bra.uni A")


@pytest.mark.parametrize(
    ("mode", "b", "c", "expected"),
    [
        ("idx", "3", "31", [3] * 32),
        ("idx", "1", "0x181f", [8 * (i // 8) + 1 for i in range(32)]),
        ("up", "2", "0", [0, 1, *range(30)]),
        ("down", "1", "31", [*range(1, 32), 31]),
        ("bfly", "16", "31", [i ^ 16 for i in range(32)]),
        ("bfly", "8", "0x1807", [i ^ 8 if i & 8 else i for i in range(32)]),
    ],
)
def test_shuffles(mode: str, b: str, c: str, expected: list[int]) -> None:
    assert lanes(f"shfl.sync.{mode}.b32 %r9|%p2, %r1, {b}, {c}, -1;") == expected


def test_a_shuffle_says_what_is_in_range() -> None:
    body = "shfl.sync.down.b32 %r8|%p2, %r1, 2, 31, -1; selp.u32 %r9, 1, 0, %p2;"
    assert lanes(body) == [1] * 30 + [0, 0]


def test_a_shuffle_needs_its_members() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 5;
    @%p1 shfl.sync.idx.b32 %r9, %r1, 7, 31, 31;
    """
    fault = fault_of(body, {"out": out()})
    assert fault.kind == "malformed"
    assert "reads lane 7" in fault.message


def test_votes_and_elections() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 4;
    vote.sync.ballot.b32 %r8, %p1, -1;
    vote.sync.any.pred %p2, %p1, -1;
    vote.sync.all.pred %p3, !%p1, -1;
    selp.u32 %r7, 100, 0, %p2;
    selp.u32 %r6, 1000, 0, %p3;
    add.u32 %r9, %r8, %r7;
    add.u32 %r9, %r9, %r6;
    elect.sync %r5|%p4, -1;
    @%p4 add.u32 %r9, %r9, 5000;
    """
    assert lanes(body) == [5115, *[115] * 31]


@pytest.mark.parametrize(
    ("form", "expected"), [("add.s32", 496 - 160), ("min.s32", -5), ("max.u32", 2**32 - 1)]
)
def test_reductions(form: str, expected: int) -> None:
    found = lanes(f"sub.s32 %r8, %r1, 5; redux.sync.{form} %r9, %r8, -1;")
    assert found == [(expected + 2**31) % 2**32 - 2**31] * 32


def test_matches_find_equal_values() -> None:
    found = lanes("and.b32 %r8, %r1, 1; match.any.sync.b32 %r9, %r8, -1;")
    assert [x % 2**32 for x in found] == [0x55555555, 0xAAAAAAAA] * 16


EXCHANGE = """
shl.b32 %r8, %r0, 2;
add.u32 %r8, %r4, %r8;
st.shared.u32 [%r8], %r0;
{barrier}
xor.b32 %r7, %r0, 64;
shl.b32 %r7, %r7, 2;
add.u32 %r7, %r4, %r7;
ld.shared.u32 %r9, [%r7];
"""


@every_schedule
@pytest.mark.parametrize("form", ["bar.sync 0;", "bar.sync 3, 128;", "barrier.cta.sync 1;"])
def test_a_barrier_orders_its_threads(form: str, schedule: Schedule) -> None:
    result = out(128)
    body = EXCHANGE.format(barrier=form) + STORE
    run(body, {"out": result}, 128, shared=512, schedule=schedule)
    assert result.tolist() == [i ^ 64 for i in range(128)]


@every_schedule
def test_without_a_barrier_threads_race(schedule: Schedule) -> None:
    fault = fault_of(
        EXCHANGE.format(barrier="") + STORE, {"out": out(128)}, 128, shared=512, schedule=schedule
    )
    # Whoever reads before anybody wrote has read what is not there.
    assert fault.kind in ("race", "unwritten")
    assert fault.site.instruction in ("ld.shared.u32 %r9, [%r7]", "st.shared.u32 [%r8], %r0")


@every_schedule
def test_some_arrive_and_others_wait(schedule: Schedule) -> None:
    body = f"""
    setp.ge.u32 %p1, %r0, 64;
    @%p1 bra CONSUME;
    shl.b32 %r8, %r0, 2;
    add.u32 %r8, %r4, %r8;
    st.shared.u32 [%r8], %r0;
    bar.arrive 2, 128;
    bra.uni END;
    CONSUME:
    bar.sync 2, 128;
    xor.b32 %r7, %r0, 64;
    shl.b32 %r7, %r7, 2;
    add.u32 %r7, %r4, %r7;
    ld.shared.u32 %r9, [%r7];
    {STORE}
    END:
    """
    result = out(128)
    run(body, {"out": result}, 128, shared=512, schedule=schedule)
    assert result.tolist() == [-1] * 64 + [*range(64)]


def test_barriers_count_predicates() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 40;
    bar.red.popc.u32 %r9, 0, %p1;
    bar.red.or.pred %p2, 0, %p1;
    bar.red.and.pred %p3, 0, !%p1;
    selp.u32 %r8, 100, 0, %p2;
    selp.u32 %r7, 1000, 0, %p3;
    add.u32 %r9, %r9, %r8;
    add.u32 %r9, %r9, %r7;
    """
    assert lanes(body, 64) == [140] * 64


@every_schedule
@pytest.mark.parametrize(
    ("body", "instruction"),
    [
        ("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", None),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 bar.sync 0;", "@%p1 bar.sync 0"),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 bra A; bar.sync 0; A:", None),
        ("bar.sync 1, 96;", "bar.sync 1, 96"),
        ("bar.sync 1, 40;", "bar.sync 1, 40"),
        ("mad.lo.u32 %r8, %r2, -32, 64; bar.sync 1, %r8;", None),
    ],
)
def test_barriers_that_not_all_reach(
    body: str, instruction: str | None, schedule: Schedule
) -> None:
    fault = fault_of(body, {"out": out()}, 64, schedule=schedule)
    assert fault.kind == "barrier"
    assert fault.site.instruction is not None
    assert instruction in (None, fault.site.instruction)


def test_a_warp_that_waits_for_another_one_in_vain() -> None:
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64; @!%p1 bar.sync 2, 64;"
    fault = fault_of(body, {"out": out()}, 64)
    assert fault.kind == "deadlock"
    assert any("block 0 warp 0" in x and "barrier 1" in x for x in fault.warps)
    assert any("block 0 warp 1" in x and "barrier 2" in x for x in fault.warps)


WARP = """
shl.b32 %r8, %r0, 2;
add.u32 %r8, %r4, %r8;
st.shared.u32 [%r8], %r0;
{barrier}
xor.b32 %r7, %r8, 4;
ld.shared.u32 %r9, [%r7];
"""


def test_lanes_of_a_warp_are_ordered_by_its_barrier_alone() -> None:
    result = out()
    body = WARP.format(barrier="bar.warp.sync -1;") + STORE
    run(body, {"out": result}, shared=128)
    assert result.tolist() == [i ^ 1 for i in range(32)]
    fault = fault_of(WARP.format(barrier="") + STORE, {"out": out()}, shared=128)
    assert (fault.kind, fault.site.instruction) == ("race", "ld.shared.u32 %r9, [%r7]")
    assert fault.other is not None
    assert fault.other.instruction == "st.shared.u32 [%r8], %r0"


HANDOVER = """
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r4], {count};
bar.sync 0;
setp.ge.u32 %p2, %r0, 32;
@%p2 bra CONSUME;
st.shared.u32 [%r4+64], %r0;
bar.warp.sync -1;
@%p1 st.shared.u32 [%r4+64], 77;
@%p1 mbarrier.arrive{semantics}.shared::cta.b64 _, [%r4];
bra.uni END;
CONSUME:
WAIT:
mbarrier.try_wait.parity.shared.b64 %p3, [%r4], {parity};
@!%p3 bra WAIT;
ld.shared.u32 %r9, [%r4+64];
{store}
END:
"""


def handover(count: int = 1, parity: int = 0, semantics: str = "") -> str:
    # Equal numbers may be written by all lanes: here they are not, before one lane writes again.
    text = HANDOVER.format(count=count, parity=parity, semantics=semantics, store=STORE)
    return text.replace("st.shared.u32 [%r4+64], %r0;\n", "")


@every_schedule
def test_an_mbarrier_hands_over(schedule: Schedule) -> None:
    result = out(64)
    run(handover(), {"out": result}, 64, shared=128, schedule=schedule)
    assert result.tolist() == [-1] * 32 + [77] * 32


@every_schedule
def test_an_mbarrier_of_the_wrong_parity_or_count(schedule: Schedule) -> None:
    early = fault_of(handover(parity=1), {"out": out(64)}, 64, shared=128, schedule=schedule)
    assert early.kind in ("race", "unwritten", "deadlock")
    never = fault_of(handover(count=2), {"out": out(64)}, 64, shared=128, schedule=schedule)
    assert never.kind == "deadlock"
    assert any("mbarrier.try_wait" in x or "@!%p3 bra" in x for x in never.warps)
    weak = fault_of(
        handover(semantics=".relaxed.cta"), {"out": out(64)}, 64, shared=128, schedule=schedule
    )
    assert (weak.kind, weak.site.instruction) == ("race", "ld.shared.u32 %r9, [%r4+64]")


def test_mbarriers_are_initialised_once_and_by_an_ordered_thread() -> None:
    fault = fault_of("mbarrier.arrive.shared::cta.b64 _, [%r4];", {"out": out()}, shared=128)
    assert fault.kind == "barrier"
    body = """
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r4], 32;
    setp.ge.u32 %p2, %r0, 32;
    @%p2 mbarrier.arrive.shared::cta.b64 _, [%r4];
    """
    fault = fault_of(body, {"out": out()}, 64, shared=128)
    assert (fault.kind, fault.site.warp) == ("race", 1)


def test_grids_beyond_the_architecture() -> None:
    with pytest.raises(Fault, match="2048 threads a block"):
        run("", {"out": out()}, 2048)
    with pytest.raises(Fault, match="bytes of shared memory"):
        run("mov.u32 %r9, %r4;", {"out": out()}, shared=240_000)
    with pytest.raises(Fault, match="cooperative grid of 133 blocks, of which 132 are resident"):
        run("", {"out": out()}, 1024, grid=133, registers=64, cooperative=True)
    run("", {"out": out()}, 1024, grid=132, registers=64, cooperative=True)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    # Of an H100, worked out by hand from the rules of CUDA's occupancy calculator.
    [
        *((32, 146, 0, 12), (256, 168, 0, 1), (128, 168, 0, 3), (1024, 64, 0, 1)),
        *((32, 16, 0, 32), (128, 32, 100_000, 2), (128, 32, 40_000, 5)),
    ],
)
def test_blocks_of_a_multiprocessor(threads: int, registers: int, shared: int, blocks: int) -> None:
    program = Program(module("mov.u32 %r9, %r4;" if shared else "", shared=shared))
    assert program.resident("kernel", threads, registers=registers) == blocks


CHAIN = """
setp.ne.u32 %p1, %r0, 0;
@%p1 ret;
{ticket}
mul.wide.u32 %rd8, %r3, 4;
add.s64 %rd8, %rd1, %rd8;
setp.eq.u32 %p2, %r3, {first};
@%p2 bra GO;
WAIT:
ld.acquire.gpu.global.u32 %r8, [%rd8+{before}];
setp.eq.u32 %p3, %r8, 0;
@%p3 bra WAIT;
GO:
ld.global.u32 %r7, [%rd0];
add.u32 %r7, %r7, 1;
st.global.u32 [%rd0], %r7;
st.release.gpu.global.u32 [%rd8], 1;
"""


@every_schedule
def test_blocks_that_wait_for_earlier_ones_take_tickets(schedule: Schedule) -> None:
    count, flags = torch.zeros(1, dtype=torch.int32), torch.zeros(700, dtype=torch.int32)
    ticket = torch.zeros(1, dtype=torch.int32)
    body = CHAIN.format(
        ticket="atom.global.gpu.relaxed.add.u32 %r3, [%rd2], 1;", first=0, before=-4
    )
    run(
        body,
        {"out": count, "flags": flags, "ticket": ticket},
        1024,
        grid=700,
        registers=64,
        schedule=schedule,
    )
    assert count.item() == 700


def test_a_grid_that_waits_for_a_block_that_has_no_room() -> None:
    flags = torch.zeros(134, dtype=torch.int32)
    body = CHAIN.format(ticket="", first=133, before=4)
    count = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Fault) as caught:
        run(body, {"out": count, "flags": flags}, 1024, grid=134, registers=64)
    assert caught.value.kind == "deadlock"
    assert "2 blocks wait for room" in caught.value.message
    assert len(caught.value.warps) >= 132
