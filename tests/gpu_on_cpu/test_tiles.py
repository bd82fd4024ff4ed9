"""Copies of tiles by tensor maps, and what waits for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu.executor import Program, Schedule
from tests.gpu_on_cpu.snippets import REGISTERS, SCHEDULES
from tests.gpu_on_cpu.tensor_maps import tensor_map

every_schedule = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda x: f"{x.policy}-{x.when}"
)


def tile_kernel(rank: int, at: tuple[int, ...], box_bytes: int, *, store: bool) -> str:
    """Loads the tile at a place, innermost axis first, and stores its bytes or the tile itself."""
    coordinates = ", ".join(f"%r{40 + i}" for i in range(rank))
    moves = " ".join(f"mov.u32 %r{40 + i}, {x};" for i, x in enumerate(at))
    end = (
        f"""@%p1 cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group
        [%rd2, {{{coordinates}}}], [%r4];
        @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""
        if store
        else f"""mov.u32 %r9, %r0;
        COPY: add.u32 %r10, %r4, %r9; ld.shared.u8 %r11, [%r10]; cvt.u64.u32 %rd8, %r9;
        add.s64 %rd9, %rd0, %rd8; st.global.u8 [%rd9], %r11; add.u32 %r9, %r9, 32;
        setp.lt.u32 %p3, %r9, {box_bytes}; @%p3 bra COPY;"""
    )
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(
    .param .u64 out, .param .align 64 .b8 from[128], .param .align 64 .b8 to[128]
) {{
{REGISTERS}
.shared .align 1024 .b8 smem[{box_bytes + 8}];
mov.u32 %r4, smem; ld.param.u64 %rd0, [out]; mov.u64 %rd1, from; cvta.param.u64 %rd1, %rd1;
mov.u64 %rd2, to; cvta.param.u64 %rd2, %rd2; mov.u32 %r0, %tid.x;
setp.eq.u32 %p1, %r0, 0; add.u32 %r20, %r4, {box_bytes};
prefetch.tensormap [%rd1];
@%p1 mbarrier.init.shared::cta.b64 [%r20], 1; bar.sync 0; {moves}
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r20], {box_bytes};
@%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
    [%r4], [%rd1, {{{coordinates}}}], [%r20];
WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r20], 0; @!%p2 bra WAIT;
{end}
ret;
}}
"""


def expected_tile(x: Tensor, at: tuple[int, ...], box: tuple[int, ...], fill: float) -> Tensor:
    """The tile at a place, outermost axis first."""
    tile = torch.full(box, fill, dtype=x.dtype)
    inside = [
        (max(-a, 0), min(size - a, side)) for a, size, side in zip(at, x.shape, box, strict=True)
    ]
    if all(first < end for first, end in inside):
        target = tuple(slice(*span) for span in inside)
        source = tuple(
            slice(a + first, a + end) for a, (first, end) in zip(at, inside, strict=True)
        )
        tile[target] = x[source]
    return tile


def swizzled(tile: Tensor, swizzle: int) -> Tensor:
    """The bytes of a tile as they lie in shared memory, by the definition on address bits."""
    data = tile.contiguous().view(torch.uint8).flatten()
    address = torch.arange(data.numel())
    place = address ^ ((address >> 7 & ((1 << swizzle) - 1)) << 4)
    out = torch.empty_like(data)
    out[place] = data
    return out


TILES = [
    ((100,), (96,), (32,), torch.float32, 0),
    ((40, 64), (8, 8), (16, 64), torch.bfloat16, 3),
    ((40, 64), (32, 48), (16, 32), torch.float16, 2),
    ((40, 64), (-3, -8), (8, 16), torch.float16, 1),
    ((6, 5, 32), (4, 3, -5), (4, 3, 16), torch.float32, 0),
    ((3, 4, 9, 64), (1, 2, 5, 0), (1, 2, 8, 64), torch.bfloat16, 3),
    ((2, 3, 4, 5, 16), (1, -1, 2, 3, 8), (2, 2, 2, 4, 16), torch.uint8, 0),
    ((40, 64), (50, 0), (16, 64), torch.bfloat16, 3),
]


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=lambda x: x.when)
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(("sizes", "at", "box", "dtype", "swizzle"), TILES)
def test_tiles(
    sizes: tuple[int, ...],
    at: tuple[int, ...],
    box: tuple[int, ...],
    dtype: torch.dtype,
    swizzle: int,
    store: bool,
    schedule: Schedule,
) -> None:
    x = torch.randint(-100, 100, sizes).to(dtype)
    y, size = torch.zeros_like(x), x.element_size()
    maps = [
        tensor_map(t.data_ptr(), t.shape, t.stride(), box, element_bytes=size, swizzle=swizzle)
        for t in (x, y)
    ]
    tile = expected_tile(x, at, box, 0)
    bytes_ = tile.numel() * size
    out = torch.zeros(bytes_, dtype=torch.uint8)
    Program(tile_kernel(len(sizes), at[::-1], bytes_, store=store)).run(
        "kernel", 1, 32, [out, *maps], memory={"x": x, "y": y}, schedule=schedule
    )
    if store:
        expected = torch.zeros_like(x)
        inside = tuple(slice(max(a, 0), max(a + b, 0)) for a, b in zip(at, box, strict=True))
        expected[inside] = x[inside]
        assert torch.equal(y, expected)
    else:
        assert torch.equal(out, swizzled(tile, swizzle))


def test_tiles_are_filled_with_nan() -> None:
    x = torch.randn(4, 8)
    map_ = tensor_map(x.data_ptr(), x.shape, x.stride(), (4, 8), element_bytes=4, fill_nan=True)
    out = torch.zeros(128, dtype=torch.uint8)
    program = Program(tile_kernel(2, (4, 2), 128, store=False))
    program.run("kernel", 1, 32, [out, map_, map_], memory={"x": x})
    expected = expected_tile(x, (2, 4), (4, 8), float("nan"))
    torch.testing.assert_close(out.view(torch.float32).view(4, 8), expected, equal_nan=True)


def test_tiles_need_a_map_of_their_rank() -> None:
    x = torch.randn(4, 8)
    map_ = tensor_map(x.data_ptr(), x.shape, x.stride(), (4, 8), element_bytes=4)
    out = torch.zeros(128, dtype=torch.uint8)
    for given, rank, words in ((map_, 3, "of 2 axes"), (bytes(128), 2, "no tensor map")):
        program = Program(tile_kernel(rank, (0,) * rank, 128, store=False))
        with pytest.raises(Exception, match=f"malformed: .*{words}"):
            program.run("kernel", 1, 32, [out, given, given], memory={"x": x})


BUFFERS = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out, .param .align 64 .b8 from[128]) {{
{registers}
.shared .align 1024 .b8 smem[1056];
mov.u32 %r4, smem; ld.param.u64 %rd0, [out]; mov.u64 %rd1, from; cvta.param.u64 %rd1, %rd1;
mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 31; shr.u32 %r2, %r0, 5;
setp.ne.u32 %p1, %r0, 0; add.u32 %r20, %r4, 1024; @%p1 bra READY;
mbarrier.init.shared::cta.b64 [%r20], 1; mbarrier.init.shared::cta.b64 [%r20+8], 1;
mbarrier.init.shared::cta.b64 [%r20+16], {readers};
mbarrier.init.shared::cta.b64 [%r20+24], {readers};
READY: bar.sync 0;
mov.u32 %r30, 0; mov.u32 %r31, 0; mov.u32 %r32, 0;
setp.ne.u32 %p2, %r2, 0; @%p2 bra READ;
setp.ne.u32 %p3, %r1, 0; @%p3 bra DONE;
WRITE:
shl.b32 %r33, %r31, 3; add.u32 %r33, %r20, %r33; shl.b32 %r34, %r31, 9; add.u32 %r34, %r4, %r34;
xor.b32 %r35, %r32, 1;
EMPTY: {empty} @!%p4 bra EMPTY;
mbarrier.arrive.expect_tx.shared.b64 _, [%r33], 512;
shl.b32 %r36, %r30, 2; mov.u32 %r37, 0;
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
    [%r34], [%rd1, {{%r37, %r36}}], [%r33];
add.u32 %r30, %r30, 1; xor.b32 %r31, %r31, 1;
setp.eq.u32 %p5, %r31, 0; @%p5 xor.b32 %r32, %r32, 1;
setp.lt.u32 %p6, %r30, 6; @%p6 bra WRITE;
bra DONE;
READ:
shl.b32 %r33, %r31, 3; add.u32 %r33, %r20, %r33; shl.b32 %r34, %r31, 9; add.u32 %r34, %r4, %r34;
FULL: {full} @!%p4 bra FULL;
sub.u32 %r38, %r0, 32; shl.b32 %r39, %r38, 3; add.u32 %r34, %r34, %r39;
ld.shared.v2.u32 {{%r10, %r11}}, [%r34];
shl.b32 %r40, %r30, 9; add.u32 %r40, %r40, %r39; cvt.u64.u32 %rd8, %r40; add.s64 %rd9, %rd0, %rd8;
st.global.v2.u32 [%rd9], {{%r10, %r11}};
{arrive}
add.u32 %r30, %r30, 1; xor.b32 %r31, %r31, 1;
setp.eq.u32 %p5, %r31, 0; @%p5 xor.b32 %r32, %r32, 1;
setp.lt.u32 %p6, %r30, 6; @%p6 bra READ;
DONE: ret;
}}
"""
WORKING = {
    "empty": "mbarrier.try_wait.parity.shared.b64 %p4, [%r33+16], %r35;",
    "full": "mbarrier.try_wait.parity.shared.b64 %p4, [%r33], %r32;",
    "arrive": "mbarrier.arrive.shared.b64 _, [%r33+16];",
    "readers": 64,
}


def tiles_through_two_buffers(changed: dict[str, str | int], schedule: Schedule) -> None:
    x, out = torch.randn(24, 32), torch.zeros(24, 32)
    map_ = tensor_map(x.data_ptr(), x.shape, x.stride(), (4, 32), element_bytes=4)
    body = BUFFERS.format(registers=REGISTERS, **WORKING | changed)
    Program(body).run("kernel", 1, 96, [out, map_], memory={"x": x}, schedule=schedule)
    assert torch.equal(out, x)


@every_schedule
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {
            "readers": 2,
            "arrive": """bar.warp.sync -1; setp.eq.u32 %p7, %r1, 0;
            @%p7 mbarrier.arrive.shared.b64 _, [%r33+16];""",
        },
    ],
    ids=["all threads arrive", "one of each warp"],
)
def test_tiles_through_two_buffers(changed: dict[str, str | int], schedule: Schedule) -> None:
    tiles_through_two_buffers(changed, schedule)


@every_schedule
@pytest.mark.parametrize(
    "changed",
    [
        {"empty": "setp.eq.u32 %p4, %r0, %r0;"},
        {"full": "setp.eq.u32 %p4, %r0, %r0;"},
        {"full": WORKING["full"], "empty": str(WORKING["empty"]).replace("%r35", "%r32")},
        {
            "readers": 2,
            "arrive": """setp.eq.u32 %p7, %r1, 0;
            @%p7 mbarrier.arrive.shared.b64 _, [%r33+16];""",
        },
        {"readers": 32},
    ],
    ids=["not empty", "not full", "wrong phase", "no warp barrier", "too few arrivals"],
)
def test_two_buffers_of_tiles_without_order(
    changed: dict[str, str | int], schedule: Schedule
) -> None:
    with pytest.raises(Exception, match=r"race|unwritten|deadlock|barrier"):
        tiles_through_two_buffers(changed, schedule)
