"""`ReservoirMemory`: the state that a step reads, streams, and stateful calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resformer_kernels.nn import Reservoir, ReservoirMemory

UNITS, DIM = 12, 3


def make(readout: str | nn.Module = "mlp", **options: Any) -> ReservoirMemory:
    torch.manual_seed(0)
    reservoir = Reservoir(
        UNITS, DIM, rc_connectivity=1.0, input_connectivity=1.0, lr=(1.0, 0.3), groups=2
    )
    return ReservoirMemory(reservoir, 4, readout=readout, **options)


def drawn(batch: int = 3, steps: int = 11) -> Tensor:
    return torch.randn(batch, steps, DIM, generator=torch.Generator().manual_seed(1))


def test_a_step_reads_the_state_before_it() -> None:
    x = drawn()
    memory = make(nn.Identity())
    read = memory(x)
    states, _ = memory.reservoir(x)
    assert not read[:, 0].any()
    torch.testing.assert_close(read[:, 1:], states[:, :-1])
    assert memory.state is None
    assert memory.nbytes == 0


def test_streams_are_memories_of_their_own() -> None:
    x = drawn()
    streams = torch.randint(0, 4, (3, 11), generator=torch.Generator().manual_seed(2))
    streams[0] = 1
    memory = make(nn.Identity(), streams=4)
    read = memory(x, streams=streams)
    for row in range(3):
        for stream in range(4):
            own = (streams[row] == stream).nonzero()[:, 0]
            states, _ = memory.reservoir(x[row, own][None])
            if len(own):
                assert not read[row, own[0]].any()
            torch.testing.assert_close(read[row, own[1:]], states[0, :-1])


@pytest.mark.parametrize("readout", ["linear", "mlp", "attention"])
@pytest.mark.parametrize("streams", [1, 2])
def test_parts_equal_the_whole(readout: str, streams: int) -> None:
    x = drawn()
    which = torch.randint(0, streams, (3, 11), generator=torch.Generator().manual_seed(2))
    options = {"streams": streams, "window": 4, "heads": 2}
    whole = make(readout, **options)(x, streams=which)
    memory = make(readout, stateful=True, **options)
    sizes = (1, 6, 0, 2, 2)
    parts = [
        memory(part, streams=ids)
        for part, ids in zip(x.split(sizes, 1), which.split(sizes, 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    assert memory.state is not None
    assert memory.state.shape == (3, streams, UNITS)


@pytest.mark.parametrize("readout", ["mlp", "attention"])
def test_padding_moves_nothing(readout: str) -> None:
    x = drawn()
    lengths = torch.tensor([11, 4, 0])
    options = {"stateful": True, "window": 4, "heads": 2}
    memory = make(readout, **options)
    padded = x.clone()
    padded[1, 4:], padded[2] = torch.nan, torch.nan
    first = memory(padded, lengths=lengths)
    second = memory(x)
    for row, length in enumerate(lengths):
        alone = make(readout, **options)
        expected = alone(torch.cat((x[row, :length], x[row]))[None])[0]
        torch.testing.assert_close(first[row, :length], expected[:length], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(second[row], expected[length:], atol=1e-5, rtol=1e-4)


def test_a_conversation_is_reset_alone() -> None:
    x = drawn()
    memory = make("attention", stateful=True, heads=2)
    fresh = memory(x)
    memory.reset(torch.tensor([False, True, False]))
    again = memory(x)
    torch.testing.assert_close(again[1], fresh[1], atol=1e-6, rtol=1e-5)
    assert (again[0] - fresh[0]).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"x must hold 3 conversations.*got 2: call reset\(\)"):
        memory(x[:2])
    memory.reset()
    torch.testing.assert_close(memory(x[:2]), fresh[:2])


def test_memory_kept_is_the_same_after_any_history() -> None:
    memory = make("attention", stateful=True, window=8, heads=2)
    x = drawn(steps=50)
    sizes = set()
    for _ in range(20):
        memory(x)
        memory.detach()
        sizes.add(memory.nbytes)
    assert sizes == {3 * (1 + 7) * UNITS * 4}


def test_only_the_readout_is_trained_and_gradients_reach_inputs() -> None:
    x = drawn().requires_grad_()
    memory = make("attention", heads=2, window=3, stateful=True)
    assert all(name.startswith("readout.") for name, _ in memory.named_parameters())
    memory(x)[:, -1].sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].abs().max() > 0
    assert all(
        p.grad is not None and p.grad.any()
        for n, p in memory.named_parameters()
        if "k_proj" not in n
    )
    memory.detach()
    assert memory.state is not None
    assert not memory.state.requires_grad


def test_attention_reads_the_window_and_nothing_older() -> None:
    memory = make("attention", heads=2, window=3)
    # A reservoir without memory: the state after a step is that step's input.
    memory.reservoir = Reservoir(UNITS, DIM, topology="diagonal", sr=0.0, input_connectivity=1.0)
    x = drawn(1).requires_grad_()
    (grad,) = torch.autograd.grad(memory(x, queries=x.detach())[0, 7].sum(), x)
    assert grad[0].any(1).nonzero()[:, 0].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \(B, T, 3\)"),
        ({"streams": torch.zeros(3, 4).long()}, r"streams must be \(3, 11\)"),
        ({"streams": torch.full((3, 11), 2)}, r"streams must lie in \[0, 1\], got 2 to 2"),
        ({"lengths": torch.tensor([1, 2, 12])}, r"lengths must lie in \[0, 11\]"),
        ({"lengths": torch.ones(3)}, "lengths must be an int64 tensor"),
    ],
)
def test_bad_calls_are_named(call: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(streams=2)(**({"x": drawn()} | call))


def test_bad_arguments_are_named() -> None:
    reservoir = Reservoir(UNITS, DIM)
    with pytest.raises(TypeError, match="reservoir must be a Reservoir"):
        ReservoirMemory(nn.Identity(), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be stateful"):
        ReservoirMemory(Reservoir(UNITS, DIM, stateful=True), 4)
    with pytest.raises(ValueError, match="readout must be one of linear, mlp, attention"):
        ReservoirMemory(reservoir, 4, readout="rnn")
    with pytest.raises(ValueError, match="must be a multiple of heads 3"):
        ReservoirMemory(reservoir, 4, readout="attention", heads=3)
    with pytest.raises(ValueError, match="window must be at least 1"):
        ReservoirMemory(reservoir, 4, readout="attention", window=0)
    with pytest.raises(ValueError, match="streams must be at least 1"):
        ReservoirMemory(reservoir, 4, streams=0)
