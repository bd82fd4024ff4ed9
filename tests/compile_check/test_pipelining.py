"""How far ahead of its use a tile is loaded, in PTX that is written by hand."""

from __future__ import annotations

from resformer_kernels.cli.compile.pipelining import Distance, nearest_load

LOOP = """
.visible .entry k()
.reqntid 128
{
    mov.b32 %r1, global_smem;
    mov.b32 %r2, -1;
    add.s32 %r3, %r1, 65536;
    FIRST
$L__BB0_1:
    add.s32 %r4, %r2, 1;
    setp.gt.s32 %p1, %r4, LAST;
    selp.b32 %r2, 0, %r4, %p1;
    shl.b32 %r5, %r2, 3;
    add.s32 %r6, %r3, %r5;
    waitLoop:
    mbarrier.try_wait.parity.shared.b64 complete, [%r6], %r9;
    @!complete bra.uni waitLoop;
    wgmma.commit_group.sync.aligned;
    LOAD [%r10], [%rd9, {%r1, %r2}], [%r6];
    @%p2 bra $L__BB0_1;
    ret;
}
"""
"""Waits for a slot, multiplies, and loads into a slot of the ring whose last one is LAST."""
LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


def distance(last: int, *, load: str = LOAD, first: str = "") -> Distance | None:
    text = LOOP.replace("LAST", str(last)).replace("LOAD", load)
    return nearest_load(text.replace("FIRST", first))


def test_more_slots_are_waited_for_later() -> None:
    assert distance(1) == Distance(products=0, instructions=6)
    # The wait and its branch, the product, the load, and up to the next wait as before.
    newer = LOAD.replace("::cluster", "::cta")
    assert distance(2, load=newer) == distance(2) == Distance(products=1, instructions=16)
    assert distance(3) == Distance(products=2, instructions=26)


def test_loads_before_a_loop_and_stores_do_not_count() -> None:
    before = f"{LOAD} [%r10], [%rd9, {{%r1, %r2}}], [%r3];"
    assert distance(1, first=before) == distance(1)
    assert distance(1, load="cp.async.bulk.tensor.2d.global.shared::cta.bulk_group") is None
    assert distance(1, load="ld.global.b32 %r20,") is None
