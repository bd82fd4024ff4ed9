"""Asynchronous copies of lines: cp.async and cp.async.bulk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu.executor import Program, Schedule, nothing_written
from tests.gpu_on_cpu.snippets import SCHEDULES, fault_of, module, run

every_schedule = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda x: f"{x.policy}-{x.when}"
)
OWN = """mul.wide.u32 %rd8, %r0, 16; add.s64 %rd9, %rd0, %rd8; add.s64 %rd10, %rd1, %rd8;
shl.b32 %r5, %r0, 4; add.u32 %r5, %r4, %r5;"""
"""%rd9 and %rd10: the thread's 16 bytes of the tensors; %r5: of shared memory."""
COPY = "cp.async.cg.shared.global [%r5], [%rd10], 16;"
LOAD = "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r5];"
STORE = "st.global.v4.u32 [%rd9], {%r10, %r11, %r12, %r13};"


def numbers(count: int) -> dict[str, Tensor]:
    x = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32)
    return {"out": torch.zeros_like(x), "x": x}


@every_schedule
@pytest.mark.parametrize(
    "wait",
    [
        "cp.async.wait_all;",
        "cp.async.commit_group; cp.async.wait_group 0;",
        "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;",
    ],
)
def test_cp_async(wait: str, schedule: Schedule) -> None:
    given = numbers(512)
    run(f"{OWN} {COPY} {wait} {LOAD} {STORE}", given, 128, shared=2048, schedule=schedule)
    assert torch.equal(given["out"], given["x"])


@pytest.mark.parametrize("bytes_", [4, 8, 16])
def test_cp_async_fills_with_zeros(bytes_: int) -> None:
    given = numbers(128)
    run(
        f"""{OWN} mov.u32 %r9, -1; st.shared.v4.u32 [%r5], {{%r9, %r9, %r9, %r9}};
        and.b32 %r8, %r0, 3;
        cp.async.ca.shared.global.L2::128B [%r5], [%rd10], {bytes_}, %r8; cp.async.wait_all;
        {LOAD} {STORE}""",
        given,
        shared=512,
    )
    expected = torch.full((32, 16), 0xFF, dtype=torch.uint8)
    x = given["x"].view(torch.uint8).view(32, 16)
    for lane in range(32):
        expected[lane, :bytes_] = 0
        expected[lane, : lane % 4] = x[lane, : lane % 4]
    assert torch.equal(given["out"].view(torch.uint8).view(32, 16), expected)


def test_cp_async_reads_nothing_outside_where_nothing_is_copied() -> None:
    given = numbers(128)
    run(
        f"""{OWN} mov.u32 %r8, 0; add.s64 %rd10, %rd10, 4096; {COPY[:-1]}, %r8;
        cp.async.wait_all; {LOAD} {STORE}""",
        given,
        shared=512,
    )
    assert not given["out"].any()


@every_schedule
@pytest.mark.parametrize(
    "body",
    [
        f"{COPY} cp.async.commit_group; {LOAD} {STORE}",
        f"{COPY} cp.async.commit_group; cp.async.wait_group 1; {LOAD} {STORE}",
        f"{COPY} cp.async.wait_group 0; {LOAD} {STORE}",
        f"{COPY} xor.b32 %r5, %r5, 16; cp.async.wait_all; {LOAD} {STORE}",
        f"{COPY} cp.async.commit_group; st.shared.u32 [%r5], %r0;",
        f"{COPY} {COPY.replace('%rd10', '%rd1')} cp.async.wait_all;",
    ],
    ids=["no wait", "too few groups", "no group", "another lane's", "a write", "a copy"],
)
def test_cp_async_without_order(body: str, schedule: Schedule) -> None:
    fault = fault_of(f"{OWN} {body}", numbers(128), 32, shared=512, schedule=schedule)
    if fault.kind == "unwritten":
        assert schedule.when != "early"
        return
    assert fault.kind == "race"
    assert fault.other is not None
    assert any(str(x.instruction).startswith("cp.async.cg") for x in (fault.site, fault.other))


@every_schedule
@pytest.mark.parametrize("noinc", ["", ".noinc"])
def test_cp_async_and_an_mbarrier(noinc: str, schedule: Schedule) -> None:
    given = numbers(256)
    count = 64 if noinc else 1
    run(
        f"""{OWN} setp.eq.u32 %p1, %r0, 0; add.u32 %r20, %r4, 1024;
        @%p1 mbarrier.init.shared::cta.b64 [%r20], {count}; bar.sync 0;
        {COPY} cp.async.mbarrier.arrive{noinc}.shared.b64 [%r20]; bar.sync 0;
        {"" if noinc else "@%p1 mbarrier.arrive.shared.b64 _, [%r20];"}
        WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r20], 0; @!%p2 bra WAIT;
        xor.b32 %r5, %r5, 768; {LOAD} {STORE}""",
        given,
        64,
        shared=1032,
        schedule=schedule,
    )
    assert torch.equal(given["out"].view(64, 4), given["x"].view(64, 4)[torch.arange(64) ^ 48])


@every_schedule
def test_bulk_copies_of_what_cp_async_brought(schedule: Schedule) -> None:
    """The async proxy sees it without a fence, but not without the wait and the barrier."""
    given = numbers(512)
    body = f"""{OWN} setp.eq.u32 %p1, %r0, 0; {COPY} {{0}}
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r4], 2048;
    @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""
    run(
        body.replace("{0}", "cp.async.wait_all; bar.sync 0;"),
        given,
        128,
        shared=2048,
        schedule=schedule,
    )
    assert torch.equal(given["out"], given["x"])
    for missing in ("bar.sync 0;", "cp.async.wait_all;"):
        fault = fault_of(
            body.replace("{0}", missing), numbers(512), 128, shared=2048, schedule=schedule
        )
        assert fault.kind == "race"


PIPELINE = f"""
mul.wide.u32 %rd8, %r0, 16; add.s64 %rd9, %rd0, %rd8; add.s64 %rd10, %rd1, %rd8;
shl.b32 %r5, %r0, 4; add.u32 %r5, %r4, %r5; xor.b32 %r6, %r5, 512;
cp.async.cg.shared.global [%r5], [%rd10], 16; cp.async.commit_group;
add.s64 %rd10, %rd10, 1024; mov.u32 %r30, 0;
LOOP:
setp.lt.u32 %p1, %r30, 7; and.b32 %r31, %r30, 1; shl.b32 %r31, %r31, 10;
xor.b32 %r32, %r31, 1024; add.u32 %r32, %r5, %r32;
@%p1 cp.async.cg.shared.global [%r32], [%rd10], 16;
cp.async.commit_group; cp.async.wait_group 1;
FIRST
add.u32 %r33, %r6, %r31; {LOAD.replace("%r5", "%r33")}
{STORE}
SECOND
add.s64 %rd9, %rd9, 1024; add.s64 %rd10, %rd10, 1024;
add.u32 %r30, %r30, 1; setp.lt.u32 %p2, %r30, 8; @%p2 bra LOOP;
"""


@every_schedule
def test_two_buffers_of_cp_async(schedule: Schedule) -> None:
    given = numbers(8 * 256)
    body = PIPELINE.replace("FIRST", "bar.sync 0;").replace("SECOND", "bar.sync 0;")
    run(body, given, 64, shared=2048, schedule=schedule)
    out, x = (given[name].view(8, 64, 4) for name in ("out", "x"))
    assert torch.equal(out, x[:, torch.arange(64) ^ 32])


@every_schedule
@pytest.mark.parametrize(("first", "second"), [("", "bar.sync 0;"), ("bar.sync 0;", "")])
def test_two_buffers_need_both_barriers(first: str, second: str, schedule: Schedule) -> None:
    body = PIPELINE.replace("FIRST", first).replace("SECOND", second)
    fault = fault_of(body, numbers(8 * 256), 64, shared=2048, schedule=schedule)
    assert fault.kind == "race" or (fault.kind == "unwritten" and not first)


def test_copies_keep_what_was_not_written() -> None:
    given = numbers(8)
    program = Program(
        module(
            f"{OWN} {COPY} cp.async.wait_all; ld.shared.u32 %r9, [%r5+8];",
            ("out", "x"),
            shared=512,
        )
    )
    written = nothing_written(given["x"])
    written[given["x"].data_ptr()][:8] = 1
    with pytest.raises(Exception, match="unwritten: byte 8 of shared memory"):
        program.run("kernel", 1, 1, list(given.values()), written=written)


LINE = """
setp.eq.u32 %p1, %r0, 0; add.u32 %r20, %r4, 4096;
@%p1 mbarrier.init.shared::cta.b64 [%r20], 1; bar.sync 0;
mul.wide.u32 %rd8, %r0, 4; add.s64 %rd9, %rd0, %rd8; shl.b32 %r5, %r0, 2; add.u32 %r5, %r4, %r5;
{before}
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 512;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd1], 512, [%r20];
{wait}
ld.shared.u32 %r9, [%r5]; add.u32 %r9, %r9, 1; {between} st.shared.u32 [%r5], %r9;
{after}
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r4], 512;
@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group{read} 0;
{end}
"""
GOOD = {
    "before": "",
    "wait": "WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r20], 0; @!%p2 bra WAIT;",
    "between": "",
    "after": "fence.proxy.async.shared::cta; bar.sync 0;",
    "read": ".read",
    "end": "",
}


@every_schedule
def test_bulk_copies(schedule: Schedule) -> None:
    given = numbers(128)
    run(LINE.format(**GOOD), given, 128, shared=4104, schedule=schedule)
    assert torch.equal(given["out"], given["x"] + 1)


REUSE = "bar.sync 0; st.shared.u32 [%r5], %r9;"
SEEN = "bar.sync 0; ld.global.u32 %r9, [%rd9];"
BAD = {
    "no wait": ({"wait": ""}, ("race", "unwritten")),
    "no barrier": ({"after": "fence.proxy.async.shared::cta;"}, ("race", "proxy")),
    "no fence": ({"after": "bar.sync 0;"}, ("proxy",)),
    "a fence of the wrong thread": (
        {"after": "bar.sync 0; @!%p1 fence.proxy.async.shared::cta;"},
        ("proxy",),
    ),
    "a write before the copy": (
        {"before": "st.shared.u32 [%r5], %r0; bar.sync 0;"},
        ("proxy",),
    ),
    "a write before the copy, without a barrier": (
        {"before": "st.shared.u32 [%r5], %r0; fence.proxy.async;"},
        ("race",),
    ),
    "the source is used again without a barrier": (
        {"end": "st.shared.u32 [%r5], %r9;"},
        ("race",),
    ),
    "the result is read when only the source was": ({"end": SEEN}, ("race",)),
}


@every_schedule
@pytest.mark.parametrize("name", BAD)
def test_bulk_copies_without_order(name: str, schedule: Schedule) -> None:
    changed, kinds = BAD[name]
    given = {"out": torch.zeros(128, dtype=torch.int32), "x": numbers(128)["x"]}
    # Stores of equal bytes are no race.
    changed = {
        k: v.replace("st.shared.u32 [%r5], %r9", "st.shared.u32 [%r5], %r0")
        for k, v in changed.items()
    }
    fault = fault_of(LINE.format(**GOOD | changed), given, 128, shared=4104, schedule=schedule)
    assert fault.kind in kinds, fault


@every_schedule
@pytest.mark.parametrize(
    "changed",
    [
        {"before": "st.shared.u32 [%r5], %r0; fence.proxy.async; bar.sync 0;"},
        {"before": "st.shared.u32 [%r5], %r0; bar.sync 0; fence.proxy.async;"},
        {
            "before": """st.shared.u32 [%r5], %r0; ld.shared.u32 %r9, [%r5];
            fence.proxy.async; bar.sync 0;"""
        },
        {"end": REUSE},
        {"read": "", "end": SEEN},
    ],
)
def test_bulk_copies_in_order(changed: dict[str, str], schedule: Schedule) -> None:
    given = numbers(128)
    run(LINE.format(**GOOD | changed), given, 128, shared=4104, schedule=schedule)
    assert torch.equal(given["out"], given["x"] + 1)
