"""The order of wgmma's operations, of its registers and its shared memory, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_on_cpu.executor import Fault, Program, Schedule
from tests.gpu_on_cpu.snippets import SCHEDULES, fault_of, module, run
from tests.gpu_on_cpu.test_matrix import assert_near, random_matrix
from tests.gpu_on_cpu.test_wgmma import (
    B_START,
    COPY,
    PUBLISH,
    SHARED,
    TAIL,
    Layout,
    matrix_of,
    moved,
    names,
)

ISSUE = """wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
  {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, %desc0, 1, 1, 1, 0;"""
OTHER = ISSUE.replace("{%d0, %d1, %d2, %d3}", "{%d4, %d5, %d6, %d7}")
FENCE, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned {};"
ZEROS = "".join(
    f"mov.b32 %{x}, 0;" for x in (*(f"d{i}" for i in range(16)), "a0", "a1", "a2", "a3")
)
START = f"{COPY} {PUBLISH} mov.u64 %desc0, {Layout().descriptor(0)}; {ZEROS}"
TOUCH = "add.f32 %f1, %d1, %d2;"


def faulty(body: str, threads: int = 128, schedule: Schedule = SCHEDULES[0]) -> Fault:
    image = torch.zeros(SHARED, dtype=torch.uint8)
    tensors = {"out": torch.zeros(1), "image": image}
    return fault_of(body, tensors, threads, shared=SHARED, schedule=schedule)


def instruction(fault: Fault) -> str:
    """As in these tests."""
    return (fault.site.instruction or "").rstrip(";") + ";"


@pytest.mark.parametrize(
    ("body", "at"),
    [
        (f"{FENCE} {ISSUE} {COMMIT} {TOUCH}", TOUCH),
        (f"{FENCE} {ISSUE} {COMMIT} mov.b32 %d3, 1; {WAIT.format(0)}", "mov.b32 %d3, 1;"),
        (f"{FENCE} {ISSUE} {COMMIT} mov.b32 %a3, 1; {WAIT.format(0)}", "mov.b32 %a3, 1;"),
        (f"{FENCE} {ISSUE} {COMMIT} {WAIT.format(1)} {TOUCH}", TOUCH),
        (f"{FENCE} {ISSUE} {WAIT.format(0)} {TOUCH}", TOUCH),
        (f"{FENCE} {OTHER} {COMMIT} {ISSUE} {COMMIT} {WAIT.format(1)} {TOUCH}", TOUCH),
        (f"{FENCE} {ISSUE} {COMMIT} {OTHER} {ISSUE} {COMMIT} {WAIT.format(1)} {TOUCH}", TOUCH),
    ],
)
@pytest.mark.parametrize("when", ["early", "late"])
def test_registers_in_flight(body: str, at: str, when: str) -> None:
    fault = faulty(f"{START} {body}", schedule=Schedule(when=when))
    assert (fault.kind, instruction(fault)) == ("in_flight", at)
    assert fault.other is not None
    assert (fault.other.instruction or "").startswith("wgmma.mma_async")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (ISSUE, "in_flight"),
        (f"{FENCE} mov.b32 %d1, 1; {ISSUE}", "in_flight"),
        (f"{FENCE} mov.b32 %a1, 1; {ISSUE}", "in_flight"),
        (f"{FENCE} {TOUCH} {ISSUE}", "in_flight"),
        (f"{FENCE} {ISSUE} {COMMIT} {WAIT.format(0)} {TOUCH} {ISSUE}", "in_flight"),
        # Other accumulators, or another shape on the same ones.
        (f"{FENCE} {ISSUE} {ISSUE.replace('%d0, %d1', '%d1, %d0')}", "in_flight"),
        (f"{FENCE} {ISSUE} {COMMIT} {WAIT.format(0)} {ISSUE.replace('%d0', '%d4')}", "in_flight"),
        (f"{FENCE} {ISSUE} {OTHER.replace('%a0', '%d0')}", "in_flight"),
        (f"{FENCE} {ISSUE} {OTHER.replace('%d4', '%a0')}", "in_flight"),
        (f"mov.u64 %desc0, {1 << 14}; {FENCE} {ISSUE}", "malformed"),
        (f"mov.u64 %desc0, {1 << 55}; {FENCE} {ISSUE}", "malformed"),
        (f"mov.u64 %desc0, {SHARED >> 4}; {FENCE} {ISSUE}", "malformed"),
        (f"mov.u64 %desc0, {1 << 49}; {FENCE} {ISSUE}", "malformed"),
        (f"mov.u64 %desc0, {1 << 62 | 128 >> 4}; {FENCE} {ISSUE}", "malformed"),
        (f"mov.u64 %desc0, {1 << 62 | 1 << 49}; {FENCE} {ISSUE}", "malformed"),
        (f"mov.u64 %desc0, {2 << 62 | 48 >> 4}; {FENCE} {ISSUE}", "malformed"),
        (f"mov.u64 %desc0, {3 << 62 | 64 >> 4}; {FENCE} {ISSUE}", "malformed"),
        (f"cvt.u64.u32 %desc0, %r1; {FENCE} {ISSUE}", "malformed"),
        (f"setp.eq.u32 %p1, %r1, 3; {FENCE} {ISSUE.replace('0, 1, 1', '0, %p1, 1')}", "malformed"),
        (f"mov.u64 %desc0, {0xFFF | 1 << 16}; {FENCE} {ISSUE}", "bounds"),
        (f"setp.eq.u32 %p1, %r1, 3; {FENCE} @%p1 {ISSUE}", "barrier"),
    ],
)
def test_operations_that_are_wrong(body: str, kind: str) -> None:
    fault = faulty(f"{START} {body}")
    assert fault.kind == kind
    assert (fault.site.instruction or "").removeprefix("@%p1 ").startswith("wgmma.mma_async")


def test_orders_that_are_right() -> None:
    body = f"""
    {FENCE} {ISSUE} {ISSUE} {OTHER} {COMMIT} {ISSUE} {COMMIT} {WAIT.format(1)}
    mov.b32 %d5, 1; {FENCE} {ISSUE} {OTHER} {COMMIT} {WAIT.format(0)} {TOUCH}
    """
    for schedule in SCHEDULES:
        image = torch.zeros(SHARED, dtype=torch.uint8)
        tensors = {"out": torch.zeros(1), "image": image}
        run(f"{START} {body}", tensors, 128, shared=SHARED, schedule=schedule)


def test_a_warpgroup_has_four_warps() -> None:
    body = f"{COPY.split('mul.wide')[0]} mov.u64 %desc0, 0; {ZEROS} {FENCE} {ISSUE}"
    assert faulty(body, 96).kind == "barrier"


OVERWRITE = "mov.b32 %r7, 1; st.shared.b32 [%r4+4], %r7;"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (f"{COPY} bar.sync 0;", "proxy"),
        (f"{COPY} fence.proxy.async;", "race"),
        (f"{COPY} bar.sync 0; fence.proxy.async;", "ok"),
        (f"{COPY} {PUBLISH}", "ok"),
        ("", "unwritten"),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda x: f"{x.policy}-{x.when}")
def test_operands_have_to_be_published(body: str, kind: str, schedule: Schedule) -> None:
    body = body or COPY.split("mul.wide")[0]
    body = f"{body} mov.u64 %desc0, {Layout().descriptor(0)}; {ZEROS} {FENCE} {ISSUE} {TAIL}"
    image = torch.zeros(SHARED, dtype=torch.uint8)
    tensors = {"out": torch.zeros(1), "image": image}
    if kind == "ok":
        run(body, tensors, 128, shared=SHARED, schedule=schedule)
    else:
        fault = fault_of(body, tensors, 128, shared=SHARED, schedule=schedule)
        # Where a warp gets ahead, the others have not even written their part.
        assert fault.kind == kind or (kind, fault.kind) == ("race", "unwritten")
        assert (fault.site.instruction or "").startswith("wgmma.mma_async")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda x: f"{x.policy}-{x.when}")
def test_operands_are_read_until_all_warps_waited(schedule: Schedule) -> None:
    start = f"{START} {FENCE} {ISSUE}"
    assert (
        faulty(f"{start} {COMMIT} {OVERWRITE} {WAIT.format(0)}", schedule=schedule).kind == "race"
    )
    assert faulty(f"{start} {TAIL} {OVERWRITE}", schedule=schedule).kind == "race"
    image = torch.zeros(SHARED, dtype=torch.uint8)
    tensors = {"out": torch.zeros(1), "image": image}
    body = f"{start} {TAIL} bar.sync 0; {OVERWRITE}"
    run(body, tensors, 128, shared=SHARED, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda x: f"{x.policy}-{x.when}")
def test_operations_follow_one_another(schedule: Schedule) -> None:
    """Four of K = 16 in two groups, on accumulators that are read where only one is waited for."""
    left, right = random_matrix(64, 64, "bf16", 1), random_matrix(64, 64, "bf16", 2)
    image = torch.zeros(SHARED, dtype=torch.uint8)
    for i in range(4):
        layout = Layout(within=32 * i)
        image[:B_START] += layout.image(left[:, 16 * i : 16 * i + 16])
        image[B_START:] += layout.image(right[:, 16 * i : 16 * i + 16])
    lines = []
    for group in range(2):
        for i in range(4):
            layout = Layout(within=32 * i)
            lines.append(f"""
            mov.u64 %desc0, {layout.descriptor(0)}; mov.u64 %desc1, {layout.descriptor(B_START)};
            wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16
              {names("d", 32, 32 * group)}, %desc0, %desc1, {int(i > 0)}, 1, {1 - 2 * group}, 0, 0;
            """)
        lines.append(COMMIT)
    out = torch.zeros(64, 128, dtype=torch.int32)
    body = f"""
    {COPY} {PUBLISH} {FENCE} {" ".join(lines)}
    {WAIT.format(1)} {moved("st", "%rd0", "d", 32)}
    {WAIT.format(0)} {moved("st", "%rd0", "d", 32, 32)}
    """
    run(body, {"out": out, "image": image}, 128, shared=SHARED, schedule=schedule)
    exact = left.double() @ right.double().T
    for part, sign in ((out[:32], 1), (out[32:], -1)):
        assert_near(matrix_of(part, torch.float32), sign * exact)


@pytest.mark.parametrize(
    ("opcode", "arch"),
    [
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.bf16", 90),
        ("wgmma.mma_async.sync.aligned.m64n8k8.f32.f16.f16", 90),
        ("wgmma.mma_async.sync.aligned.m64n12k16.f32.f16.f16", 90),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f16.bf16.bf16", 90),
        ("wgmma.mma_async.sync.aligned.m32n8k16.f32.f16.f16", 90),
        ("wgmma.mma_async.sync.aligned.m64n8k16.satfinite.f32.f16.f16", 90),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16", 80),
    ],
)
def test_forms_that_are_not_known(opcode: str, arch: int) -> None:
    body = f"{START.split('mul.wide')[0]} {opcode} {ISSUE.split('f16', 2)[2]}"
    with pytest.raises(Fault) as caught:
        Program(module(body, shared=1024, arch=arch))
    assert caught.value.kind == "unknown"
