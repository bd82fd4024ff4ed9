"""Products take tiles with the swizzle that a tensor copy gave them."""

from __future__ import annotations

import pytest
import torch

from tests.gpu_on_cpu.executor import Schedule
from tests.gpu_on_cpu.snippets import SCHEDULES, fault_of, run
from tests.gpu_on_cpu.tensor_maps import tensor_map
from tests.gpu_on_cpu.test_wgmma import Layout

BODY = """
.reg .b32 %d<4>;
.reg .b64 %desc<1>;
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r4+8192], 1;
bar.sync 0;
add.u32 %r6, %r4, 8192;
mov.u32 %r7, 0;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r6], {bytes};
@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
    [%r4], [%rd1, {{%r7, %r7}}], [%r6];
WAIT:
mbarrier.try_wait.parity.shared.b64 %p2, [%r6], 0;
@!%p2 bra WAIT;
{between}
wgmma.fence.sync.aligned;
mov.b64 %desc0, {descriptor};
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%d0, %d1, %d2, %d3}}, %desc0, %desc0,
    0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
"""
REWRITTEN = """
shl.b32 %r5, %r0, 4;
add.u32 %r5, %r4, %r5;
mov.u32 %r8, 0;
AGAIN:
ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r5];
st.shared.v4.b32 [%r5], {%r20, %r21, %r22, %r23};
add.u32 %r5, %r5, 2048;
add.u32 %r8, %r8, 2048;
setp.lt.u32 %p3, %r8, BYTES;
@%p3 bra AGAIN;
fence.proxy.async;
bar.sync 0;
"""
MODES = {16: 0, 32: 1, 64: 2, 128: 3}
"""Of a tensor map, by the bytes of a line."""


def given(copied: int, taken: int, between: str = "") -> tuple[str, dict[str, torch.Tensor]]:
    """A tile of 64 lines that is copied with one swizzle and taken with another."""
    bytes_ = 64 * copied
    tile = torch.randn(64, copied // 2).bfloat16()
    shape, strides = tuple(tile.shape), tile.stride()
    tensor = tensor_map(
        *(tile.data_ptr(), shape, strides, shape), element_bytes=2, swizzle=MODES[copied]
    )
    layout = Layout(taken, leading=128, stride=8 * taken)
    body = BODY.format(
        bytes=bytes_,
        between=between.replace("BYTES", str(bytes_)),
        descriptor=layout.descriptor(0),
    )
    # The kernel finds the map in memory, and the tile by its address.
    map_ = torch.frombuffer(bytearray(tensor), dtype=torch.uint8).clone()
    return body, {"out": torch.zeros(1), "map": map_, "tile": tile}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda x: f"{x.policy}-{x.when}")
@pytest.mark.parametrize("span", [32, 64, 128])
def test_a_tile_is_taken_as_it_was_copied(span: int, schedule: Schedule) -> None:
    body, tensors = given(span, span)
    run(body, tensors, 128, shared=8200, schedule=schedule)


@pytest.mark.parametrize(
    ("copied", "taken"), [(128, 64), (64, 128), (128, 16), (32, 128), (64, 32)]
)
def test_a_tile_is_not_taken_otherwise(copied: int, taken: int) -> None:
    body, tensors = given(copied, taken)
    fault = fault_of(body, tensors, 128, shared=8200)
    assert fault.kind == "malformed"
    assert str(fault.site.instruction).startswith("wgmma.mma_async")
    assert f"a swizzle of {taken} bytes" in fault.message
    assert f"with one of {copied}" in fault.message


def test_what_a_thread_stored_may_be_taken_in_any_way() -> None:
    body, tensors = given(128, 64, REWRITTEN)
    run(body, tensors, 128, shared=8200)
