"""The Triton backend beside its numbers: bits, splits, bounds, torch.compile."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from torch import Tensor

from resformer_kernels import attention_with_kvcache, explain
from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.op import TRITON
from resformer_kernels._triton.launch import Launch, launch, recorded_launches
from resformer_kernels.kvcache import triton
from resformer_kernels.kvcache.op import OP, op_arguments
from resformer_kernels.kvcache.triton import plan
from resformer_kernels.testing.kvcache import (
    KVCacheCase,
    KVCacheInputs,
    kvcache_inputs,
    paginated,
    run_copied,
)
from tests.kvcache.cases import call_of, opcheck

pytestmark = pytest.mark.usefixtures("interpreter")

SPLIT = KVCacheCase(
    lengths=(150, 33), q_len=2, new_tokens=2, num_splits=3, return_lse=True, sinks=True
)


def assert_same_bits(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    for name, x in some.items():
        assert torch.equal(x, others[name]), name


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_change_no_bits(page_size: int, dtype: torch.dtype) -> None:
    inputs = kvcache_inputs(dataclasses.replace(SPLIT, dtype=dtype))
    expected, _ = run_copied(inputs, "triton")
    got, _ = run_copied(paginated(inputs, page_size), "triton")
    assert_same_bits(expected, got)


@pytest.mark.parametrize("stored", [None, torch.int8], ids=["float", "int8"])
@pytest.mark.parametrize("ahead", [False, True])
def test_loads_ahead_change_no_bits(stored: torch.dtype | None, ahead: bool) -> None:
    inputs = kvcache_inputs(dataclasses.replace(SPLIT, dtype=torch.bfloat16, quantised=stored))
    found = []
    for way in (ahead, not ahead):
        tiles = plan.Tiles(16, 32, warps=4, stages=1, ahead=way)
        with mock.patch.object(plan, "choose_tiles", return_value=tiles):
            found.append(run_copied(inputs, "triton")[0])
    assert_same_bits(*found)


def test_same_bits_run_to_run() -> None:
    inputs = kvcache_inputs(SPLIT)
    assert_same_bits(run_copied(inputs, "triton")[0], run_copied(inputs, "triton")[0])


def test_attention_reads_what_was_appended() -> None:
    inputs = kvcache_inputs(KVCacheCase(lengths=(0,), q_len=1, causal=True))
    got, _ = run_copied(inputs, "triton")
    value = inputs.tensors["v"].repeat_interleave(2, dim=2)
    torch.testing.assert_close(got["out"], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("page_size", [0, 16])
def test_a_padding_mask_equals_a_shorter_cache(page_size: int) -> None:
    """Whole tiles that a mask hides are skipped, and hide NaN as well."""
    case = KVCacheCase(lengths=(200,), dtype=torch.bfloat16, append="none", return_lse=True)
    whole = kvcache_inputs(case)
    hidden = 131
    short = dict(whole.tensors)
    for name in ("k_cache", "v_cache"):
        short[name] = short[name][:, hidden:]
        whole.tensors[name][:, :hidden] = torch.nan
    short["cache_seqlens"] = short["cache_seqlens"] - hidden
    mask = torch.arange(200)[None] >= hidden
    masked = KVCacheInputs({**whole.tensors, "key_mask": mask}, whole.options)
    if page_size:
        masked = paginated(masked, page_size)
    got, _ = run_copied(masked, "triton")
    expected, _ = run_copied(KVCacheInputs(short, whole.options), "triton")
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("page", [-1, 10**6])
def test_pages_that_do_not_exist_are_neither_read_nor_written(page: int) -> None:
    """The check is the caller's on a GPU; without it the kernel still stays within the pool."""
    inputs = kvcache_inputs(KVCacheCase(lengths=(40, 20), page_size=16, append="both"))
    call = op_arguments(call_of(inputs))
    assert call.block_table is not None
    wrong = call.block_table.clone()
    wrong[0] = page
    before = call.k_cache.clone()
    copied = call._replace(k_cache=call.k_cache.clone(), v_cache=call.v_cache.clone())
    expected, _ = OP(TRITON, copied)
    out, _ = OP(TRITON, call._replace(block_table=wrong))
    assert out[0].eq(0).all()
    assert torch.equal(out[1], expected[1])
    changed = (call.k_cache != before) & ~(call.k_cache.isnan() & before.isnan())
    assert changed.any(-1).any(-1).sum() == 1  # the other sequence's new token


def test_lengths_that_cannot_be_stay_within_the_cache() -> None:
    inputs = kvcache_inputs(KVCacheCase(lengths=(40, 20), return_lse=True))
    call = op_arguments(call_of(inputs))
    wrong = torch.tensor([2**30, -(2**30)], dtype=torch.int32)
    before = call.k_cache.clone()
    OP(TRITON, call._replace(cache_seqlens=wrong))
    torch.testing.assert_close(call.k_cache, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_query_before_the_first_key_excludes_nothing(page_size: int, splits: int) -> None:
    """Where its position would lie there is NaN: past the end of the sequence before, or of a page.

    With one value a sequence, what excludes it leaves nothing.
    """
    case = KVCacheCase(
        lengths=(5, 1), q_len=4, append="none", causal=False, exclusive="one", slack=4,
        num_splits=splits, out_gate="head",
    )  # fmt: skip
    inputs = kvcache_inputs(case)
    plain = KVCacheInputs(inputs.tensors, {**inputs.options, "exclusive": None})
    if page_size:
        inputs, plain = (paginated(x, page_size) for x in (inputs, plain))
    got, expected = (run_copied(x, "triton")[0]["out"] for x in (inputs, plain))
    assert got.isfinite().all()
    assert torch.equal(got[1, :3], expected[1, :3])
    torch.testing.assert_close(got[1, 3], torch.zeros_like(got[1, 3]), rtol=0, atol=1e-5)
    assert not torch.equal(got[0], expected[0])


@pytest.mark.parametrize("page_size", [0, 16])
def test_a_masked_position_is_not_read(page_size: int) -> None:
    case = KVCacheCase(
        lengths=(40,), q_len=3, append="none", exclusive="token_head", mask="random", slack=0
    )
    inputs = kvcache_inputs(case)
    mask = torch.arange(40)[None] != 38
    inputs.tensors["key_mask"] = mask
    inputs.tensors["v_cache"][:, 38] = torch.nan
    plain = KVCacheInputs(dict(inputs.tensors), inputs.options)
    del plain.tensors["exclusive"]
    if page_size:
        inputs, plain = (paginated(x, page_size) for x in (inputs, plain))
    got, expected = (run_copied(x, "triton")[0]["out"] for x in (inputs, plain))
    assert torch.equal(got[:, 1], expected[:, 1])
    assert not torch.isclose(got[:, [0, 2]], expected[:, [0, 2]]).all()


def test_a_plain_call_has_no_epilogue() -> None:
    for exclusive, gate in (("none", "none"), ("one", "none"), ("none", "head")):
        inputs = kvcache_inputs(KVCacheCase(exclusive=exclusive, out_gate=gate))
        found = _launches(inputs)[-1].kwargs["epilogue"]
        assert (found is None) == (exclusive == gate == "none")
    zero = kvcache_inputs(KVCacheCase())
    zero.options["exclusive"] = 0.0
    assert _launches(zero)[-1].kwargs["epilogue"] is None


CASES = {
    "contiguous": SPLIT,
    "paged": KVCacheCase(lengths=(30, 5), page_size=16, mask="random", append="k"),
    "int8": KVCacheCase(lengths=(30, 5), quantised=torch.int8, dtype=torch.bfloat16),
    "excluded, gated": KVCacheCase(lengths=(30, 5), exclusive="head", out_gate="full"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    opcheck("resformer_triton", CASES[name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", CASES)
def test_compiles_whole_and_mutates_the_cache_in_place(name: str) -> None:
    inputs = kvcache_inputs(CASES[name])
    expected, after = run_copied(inputs, "triton")
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, backend="aot_eager")
    caches = inputs.caches()
    places = {key: x.data_ptr() for key, x in caches.items()}
    with torch.no_grad():
        arguments: dict[str, Any] = {**inputs.tensors, **inputs.options}
        found = compiled(**arguments, backend="triton")
    assert torch.equal(found[0] if isinstance(found, tuple) else found, expected["out"])
    for key, x in caches.items():
        assert x.data_ptr() == places[key]
        torch.testing.assert_close(x, after[key], rtol=0, atol=0, equal_nan=True)


def test_what_the_kernels_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(**changes: Any) -> str:
        found = triton.unsupported_reason(call_of(kvcache_inputs(KVCacheCase(**changes))), MACHINE)
        assert found is not None
        return found

    assert "these are torch.float64" in reason(dtype=torch.float64)
    assert "up to 256, these have 257" in reason(head_dim=257)
    assert "up to 256, these have 300" in reason(value_dim=300)
    inputs = kvcache_inputs(KVCacheCase())
    strided = inputs.tensors["k_cache"].repeat_interleave(2, dim=-1)[..., ::2]
    call = call_of(dataclasses.replace(inputs, tensors={**inputs.tensors, "k_cache": strided}))
    assert "k_cache's last axis has stride 2" in str(triton.unsupported_reason(call, MACHINE))
    assert triton.unsupported_reason(call_of(inputs), MACHINE) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "on the CPU" in reason()


def test_what_is_copied_is_told() -> None:
    inputs = kvcache_inputs(KVCacheCase(layout="strided"))
    notes = explain(
        attention_with_kvcache, **inputs.tensors, **inputs.options, backend="triton"
    ).notes
    assert [note.split()[0] for note in notes] == ["q", "k", "v"]


def test_splits_fill_the_gpu() -> None:
    choose = plan.choose_splits
    assert choose(tiles=0, blocks=100, slots=264) == 1
    # Enough tiles as it is, and too few keys to share.
    assert choose(tiles=212, blocks=1000, slots=264) == 1
    assert choose(tiles=8, blocks=4, slots=264) == 1
    assert choose(tiles=8, blocks=8, slots=264) == 2
    # 33 splits of 8 tiles fill a wave, 29 fill seven eighths of it.
    assert choose(tiles=8, blocks=1000, slots=264) == 29
    for tiles in (1, 3, 8, 32, 100):
        for blocks in (1, 7, 64, 1000):
            splits = choose(tiles, blocks, 264)
            assert splits == 1 or splits * plan.LEAST_BLOCKS <= blocks


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("block", [16, 64, 128, 256])
def test_registers_hold_the_programs_that_splits_count_on(stored: torch.dtype, block: int) -> None:
    for rows in (1, 4, 32, 2048):
        tiles = plan.choose_tiles(rows, block, block, torch.bfloat16, stored)
        assert tiles.resident in ((2, 3) if rows <= 32 else (1,))
        assert tiles.resident * tiles.warps * 32 * tiles.registers <= 65536
        assert tiles.registers >= 168


def _launches(inputs: KVCacheInputs) -> list[Launch]:
    with recorded_launches() as launches:
        run_copied(inputs, "triton")
    return launches


def _again(recorded: Launch) -> None:
    launch(recorded.kernel, recorded.grid, torch.device("cpu"), **recorded.kwargs)


@pytest.mark.parametrize("append", ["both", "k", "none"])
def test_a_call_is_two_launches_at_most(append: str) -> None:
    for splits in (1, 3):
        case = KVCacheCase(lengths=(150,), append=append, num_splits=splits)
        launches = _launches(kvcache_inputs(case))
        assert len(launches) == (1 if append == "none" else 2)
        # Where nothing is appended torch has set the counters.
        counters = launches[-1].kwargs["partials"].counters
        assert (counters is None) == (splits == 1)
        if append == "none" and counters is not None:
            assert not counters.any()


@pytest.mark.parametrize("queries", [2, 90])
def test_any_program_may_be_the_last_and_merges_to_the_same_bits(queries: int) -> None:
    """Partials that are stored already are merged by the first, second or third program."""
    inputs = kvcache_inputs(dataclasses.replace(SPLIT, q_len=queries, dtype=torch.bfloat16))
    expected, _ = run_copied(inputs, "triton")
    append, attend = _launches(inputs)
    counters, out = attend.kwargs["partials"].counters, attend.kwargs["result"].out.pointer
    counters.fill_(77)
    _again(append)
    assert not counters.any()
    _again(attend)
    assert (counters == 3).all()
    assert torch.equal(out, expected["out"])
    for earlier in (2, 1, 0):
        out.fill_(torch.nan)
        counters.fill_(earlier)
        _again(attend)
        assert torch.equal(out, expected["out"])
    # Of six arrivals none is the third.
    out.fill_(torch.nan)
    counters.fill_(3)
    _again(attend)
    assert out.isnan().all()


def test_splits_are_merged_in_their_order() -> None:
    """The bits of a sum from the first split to the last that has keys, more of them than are
    loaded together."""
    case = dataclasses.replace(
        SPLIT, lengths=(400,), num_splits=9, sinks=False, dtype=torch.bfloat16
    )
    append, attend = _launches(kvcache_inputs(case))
    partials, result = attend.kwargs["partials"], attend.kwargs["result"]
    for x in partials[:3]:
        x.fill_(torch.nan)
    _again(append)
    _again(attend)
    used = int((~partials.totals[0, 0, 0].isnan()).sum())
    assert 4 < used < case.num_splits
    assert all(x[..., used:].isnan().all() for x in (partials.peaks, partials.totals))
    peaks, totals = partials.peaks[0, ..., :used], partials.totals[0, ..., :used]
    highest = peaks.amax(-1)
    weights = numpy.exp2((peaks - highest[..., None]).numpy())
    total = acc = torch.zeros(())
    for i in range(used):
        weight = torch.from_numpy(weights[..., i])
        total = total + weight * totals[..., i]
        sums = torch.where(totals[..., i, None] != 0, partials.sums[0, :, :, i], 0.0)
        acc = acc + weight[..., None] * sums
    # (KV heads, rows, channels), rows being queries times their group.
    heads, rows, channels = acc.shape
    shape = (heads, case.q_len, rows // case.q_len)
    merged = (acc * (1 / total)[..., None]).bfloat16().view(*shape, channels).transpose(0, 1)
    assert torch.equal(result.out.pointer[0].view(merged.shape), merged)
    logarithm = (highest.numpy() + numpy.log2(total.numpy())) * numpy.float32(math.log(2))
    merged = torch.from_numpy(logarithm).view(shape).transpose(1, 2)
    assert torch.equal(result.lse.pointer[0].view(merged.shape), merged)


@pytest.mark.parametrize(
    ("queries", "append", "hints"),
    [
        (1, "k", ("evict_first", "evict_last")),
        (1, "both", ("evict_first", "")),
        (1, "none", ("evict_first", "")),
        (90, "k", ("", "")),
    ],
)
def test_what_is_read_once_leaves_the_second_level_cache_first(
    queries: int, append: str, hints: tuple[str, str]
) -> None:
    inputs = kvcache_inputs(KVCacheCase(q_len=queries, append=append, dtype=torch.bfloat16))
    attend = _launches(inputs)[-1]
    cache, tile = attend.kwargs["cache"], attend.kwargs["tile"]
    assert (cache.k.POLICY.value, cache.v.POLICY.value) == hints
    # Loads that the compiler turns into copies to shared memory would lose them.
    assert tile.AHEAD.value == bool(hints[0])


def test_only_keys_in_reach_count() -> None:
    assert plan.keys_in_reach(8192, 1, -1) == 8192
    assert plan.keys_in_reach(8192, 4, 1000) == 1004
    assert plan.keys_in_reach(100, 4, 1000) == 100


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("block", [16, 64, 128, 256])
def test_tiles_follow_the_shape(stored: torch.dtype, block: int) -> None:
    for rows in (1, 16, 17, 40, 2048):
        tiles = plan.choose_tiles(rows, block, block, torch.bfloat16, stored)
        assert 16 <= tiles.rows <= 128
        assert tiles.keys >= 16
        # Hints are for the keys that are read once: those of few rows.
        assert tiles.ahead == (rows <= 32)
        assert 2 * block * tiles.keys * stored.itemsize <= 32 * 1024
