"""The Triton kernels, in Triton's interpreter, held against float64 over every argument."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resformer_kernels._triton.available import interpreted
from tests.replaced import replaced
from tests.reservoir.together import launch_at_once
from tests.scan.cases import DTYPES, Case, cases, check_budget, inputs_of, run

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("interpreter"),
]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
sweep = settings(max_examples=6)


@pytest.fixture
def short_chunks() -> Iterator[None]:
    """Chunks of time at lengths that are quick in the interpreter."""
    from resformer_kernels.scan.triton import partition

    with replaced(partition, LEAST_TIME=4, STEPS=4, WINDOW=2):
        yield


@by_dtype
@sweep
@given(data=st.data())
def test_stays_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(data.draw(cases(dtype, longest=12)), "triton")


@by_dtype
@pytest.mark.usefixtures("short_chunks")
@sweep
@given(data=st.data())
def test_chunks_stay_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(data.draw(cases(dtype, longest=24)), "triton")


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("constant", [False, True])
def test_more_chunks_than_are_loaded_at_once(constant: bool) -> None:
    check_budget(Case(torch.float32, 3, batch=1, length=41, constant=constant), "triton")
    packed = Case(torch.float32, 3, lengths=(19, 0, 2, 20), tail=1, constant=constant)
    check_budget(packed, "triton")


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("lengths", [None, (9, 0, 21)], ids=["batch", "packed"])
def test_programs_that_run_at_once_give_the_bits_of_programs_in_turn(
    dtype: torch.dtype, lengths: tuple[int, ...] | None
) -> None:
    from resformer_kernels.scan.triton import backward, forward

    case = Case(dtype, 3, batch=1, length=30, lengths=lengths)
    inputs = inputs_of(case)
    in_turn = run(case, inputs, "triton")
    launched: list[int] = []
    with (
        mock.patch.object(forward, "launch", launch_at_once(launched)),
        mock.patch.object(backward, "launch", launch_at_once(launched)),
    ):
        at_once = run(case, inputs, "triton")
    assert min(launched) >= 8
    for a, b in zip(at_once, in_turn, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("short_chunks")
def test_what_overflowed_stays_in_its_sequence() -> None:
    """A chunk's product and sum that are not finite do not pass the beginning of a sequence."""
    from resformer_kernels import linear_scan

    tokens, gates = torch.ones(40, 3), torch.full((40, 3), 0.5)
    gates[:17] = 1e30
    offsets = torch.tensor([0, 17, 40], dtype=torch.int32)
    states, final = linear_scan(gates, tokens, cu_seqlens=offsets, backend="triton")
    expected, end = linear_scan(gates, tokens, cu_seqlens=offsets, backend="reference")
    torch.testing.assert_close(states[17:], expected[17:])
    torch.testing.assert_close(final[1], end[1])


def test_few_channels_split_time_and_many_do_not() -> None:
    from resformer_kernels.scan.triton import partition

    def chunks(batch: int, time: int, width: int) -> int:
        like = torch.empty(batch, time, width, device="meta")
        programs, work = partition.partition(like, None, (like, like), reverse=False)
        assert programs == batch * work.chunks * work.column_tiles
        return work.chunks

    assert chunks(1, 65536, 1024) == 65536 // partition.STEPS
    assert chunks(16, 2048, 2048) == 1
    assert chunks(1, partition.LEAST_TIME, 64) == 1
    assert chunks(1, 0, 0) == 1
