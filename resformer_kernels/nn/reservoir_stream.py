"""Series of any length streamed through a reservoir into a readout."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_finite, check_tensor, describe, integer
from resformer_kernels.nn.arguments import listed
from resformer_kernels.nn.reservoir_run import RunsReservoir
from resformer_kernels.nn.ridge import Ridge
from resformer_kernels.nn.rls import RLS
from resformer_kernels.reservoir.segments import segment_length

Scan = partial[Any]
"""`RunsReservoir.run` of a piece, which lacks the reduction alone."""


class _Series(NamedTuple):
    """Series of one length: inputs (B, T, n_in), None for n_in = 0, and targets (B, T, m)."""

    inputs: Tensor | None
    targets: Tensor
    washout: int


class _Gram:
    """Sums over all series, for `Ridge`."""

    def __init__(self, readout: Ridge, device: torch.device) -> None:
        n, m = readout.in_features, readout.out_features
        self.readout, self.count = readout, 0
        like = torch.zeros((n, n), dtype=torch.float64, device=device)
        self.gram, self.cross, self.y_sum = like, like.new_zeros(n, m + 1), like.new_zeros(m)

    def add(self, scan: Scan, targets: Tensor) -> Tensor:
        """Take in targets (..., m) and the states of `scan`. Returns the final state."""
        # The intercept needs the sum of the states: their product with a column of ones.
        ones = torch.cat((targets, torch.ones_like(targets[..., :1])), -1)
        (gram, cross), state = scan(reduce="gram", targets=ones)
        self.gram += gram
        self.cross += cross
        self.y_sum += targets.flatten(0, -2).sum(0)
        self.count += targets[..., 0].numel()
        return state

    def close(self) -> None:
        """Hand the sums to the readout, all at once."""
        x_sum, sums = self.cross[:, -1], (self.gram, self.cross[:, :-1])
        if self.count:
            self.readout.update_gram(*sums, count=self.count, x_sum=x_sum, y_sum=self.y_sum)


class _Online:
    """Updates step after step, for `RLS`."""

    def __init__(self, readout: RLS) -> None:
        self.readout, self.learner = readout, copy.deepcopy(readout)

    def add(self, scan: Scan, targets: Tensor) -> Tensor:
        """Learn targets (..., m) from the states of `scan`. Returns the final state."""
        states, state = scan()
        if states.dim() == 3:  # all series side by side
            states, targets = states.transpose(0, 1), targets.transpose(0, 1)
        self.learner.update(states, targets)
        return state

    def close(self) -> None:
        """Hand over what was learned, all at once."""
        self.readout.become(self.learner)


class Streams(RunsReservoir):
    """A reservoir whose states go straight into a readout."""

    @torch.no_grad()
    def stream(
        self,
        readout: Ridge | RLS,
        inputs: Tensor | Sequence[Tensor] | None,
        targets: Tensor | Sequence[Tensor],
        *,
        washout: int | Sequence[int] | Tensor = 0,
    ) -> Tensor:
        """Fit `readout` to series, in memory that their lengths do not change.

        States exist for some thousand steps at a time. A reservoir with feedback gets the targets
        as its teacher: step t reads y_{t-1}, and the first step zeros, or in a stateful reservoir
        the last target of the call before.

        Args:
            readout: a `Ridge` of N inputs, to which sums are added: call its `solve` after the last
                series. Or an `RLS`, which learns step after step: in a batch from all series at a
                step, in a list from one series after another.
            inputs: (B, T, n_in), or a list of series (T_i, n_in) of any lengths; None for n_in = 0.
            targets: (B, T, m), or a list of (T_i, m).
            washout: number of first steps that drive the reservoir but are not fitted to; one, or
                one for each series.

        Returns:
            The final state (B, N), in a list of each series.

        Raises:
            TypeError, ValueError: inputs or a target that is fitted to, or fed back, is not finite,
                or an argument is out of range. The readout and the stored state are then unchanged.
        """
        if not isinstance(readout, (Ridge, RLS)):
            raise TypeError(f"readout must be a Ridge or an RLS, got {describe(readout)}")
        series = self._series(readout, inputs, targets, washout)
        count = sum(len(each.targets) for each in series)
        stored, device = self._stored(count), self.leak.device
        zeros = torch.zeros((count, self.units), dtype=self.state_dtype, device=device)
        state = stored.get("state", zeros).clone()
        fed = stored.get("feedback", zeros.new_zeros(count, self.feedback_dim)).clone()
        sink = _Gram(readout, device) if isinstance(readout, Ridge) else _Online(readout)
        at = 0
        for group in _groups(series, segment_length(self.units, device)):
            rows = slice(at, at + sum(len(each.targets) for each in group))
            take = self._take_packed if len(group) > 1 else self._take_batch
            state[rows], fed[rows] = take(sink, group, state[rows], fed[rows])
            at = rows.stop
        sink.close()
        if self.stateful:
            self._keep(state=state, **({"feedback": fed} if self.feedback_dim else {}))
        return state

    def _take_batch(
        self, sink: _Gram | _Online, group: list[_Series], state: Tensor, fed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take in series of one length, side by side, piece by piece of time."""
        ((inputs, targets, washout),) = group
        steps, length = targets.shape[1], segment_length(state.numel(), state.device)
        for begin, end in ((0, washout), (washout, steps)):
            for at in range(begin, end, length):
                part = slice(at, min(at + length, end))
                own = None if inputs is None else inputs[:, part]
                drive, fed = self._forced(own, targets[:, part], fed)
                scan = partial(self.run, drive, state)
                if at < washout:
                    _, state = scan(reduce="last")
                else:
                    state = sink.add(scan, targets[:, part].double())
        return state, fed

    def _take_packed(
        self, sink: _Gram | _Online, group: list[_Series], state: Tensor, fed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take in series of several lengths: one scan of the washouts, and one of the rest."""
        given = [each.inputs[0] for each in group if each.inputs is not None]
        inputs = torch.cat(given) if given else None
        targets = torch.cat([each.targets[0] for each in group])
        lengths = torch.tensor([each.targets.shape[1] for each in group], device=targets.device)
        washouts = torch.tensor([each.washout for each in group], device=targets.device)
        drive, fed = self._forced(inputs, targets, fed, _offsets(lengths))
        begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        steps = torch.arange(len(targets), device=targets.device) - begins
        fitted = steps >= washouts.repeat_interleave(lengths)
        _, state = self.run(drive[~fitted], state, cu_seqlens=_offsets(washouts), reduce="last")
        cu_seqlens = _offsets(lengths - washouts)
        scan = partial(self.run, drive[fitted], state, cu_seqlens=cu_seqlens)
        return sink.add(scan, targets[fitted].double()), fed

    def _forced(
        self, inputs: Tensor | None, targets: Tensor, fed: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What drives the scan, and the last targets fed back: (B, m), (B, 0) without feedback."""
        if not self.feedback_dim:
            return self.driven(inputs, None, None, cu_seqlens)[0], fed
        drive, last = self.driven(inputs, targets, fed, cu_seqlens)
        assert last is not None
        return drive, last

    def _series(
        self, readout: Ridge | RLS, inputs: Any, targets: Any, washout: Any
    ) -> list[_Series]:
        """The series, checked: one batch, or one after another."""
        if readout.in_features != self.units:
            raise ValueError(f"readout must take {self.units} states, got {readout}")
        if self.feedback_dim not in (0, readout.out_features):
            raise ValueError(f"readout must give the {self.feedback_dim} fed back, got {readout}")
        washouts = [integer("washout", number) for number in listed("washout", washout)]
        batch = isinstance(targets, Tensor)
        if inputs is not None and batch != isinstance(inputs, Tensor):
            raise TypeError("inputs and targets must be two tensors or two lists of tensors")
        if batch and len(washouts) == 1:
            return [self._one("", 3, readout, inputs, targets, washouts[0])]
        ys = list(targets)
        us = [None] * len(ys) if inputs is None else list(inputs)
        if len(us) != len(ys) or len(washouts) not in (1, len(ys)):
            raise ValueError(
                f"inputs, targets and washout must have as many series, got {len(us)}, {len(ys)} "
                f"and {len(washouts)}"
            )
        given = zip(us, ys, washouts * (len(ys) // len(washouts)), strict=True)
        found = [self._one(f"[{i}]", 2, readout, *each) for i, each in enumerate(given)]
        return [_Series(None if u is None else u[None], y[None], skip) for u, y, skip in found]

    def _one(
        self,
        label: str,
        rank: int,
        readout: Ridge | RLS,
        inputs: Tensor | None,
        targets: Tensor,
        washout: int,
    ) -> _Series:
        """Inputs and targets of `rank` axes, checked; `label` is their place in lists."""
        axes = "(batch, time, " if rank == 3 else "(time, "
        wanted = {"targets": (targets, readout.out_features), "inputs": (inputs, self.input_dim)}
        if inputs is None and not self.input_dim:
            del wanted["inputs"]
        for name, (value, width) in wanted.items():
            check_tensor(f"{name}{label}", value, rank, f"{axes}{width})")
            assert value is not None
            if value.shape != (*targets.shape[:-1], width):
                shape = (*targets.shape[:-1], width)
                raise ValueError(f"{name}{label} must be {shape}, got {describe(value)}")
        steps = targets.shape[-2]
        if not 0 <= washout <= steps:
            raise ValueError(f"washout must lie in [0, {steps}], got {washout}")
        # A target of the washout is read where it is fed back.
        first = 0 if self.feedback_dim else washout
        if inputs is not None:
            check_finite(f"inputs{label}", inputs)
        check_finite(
            f"targets{label}", targets[..., first:, :], first=(0,) * (rank - 2) + (first, 0)
        )
        return _Series(inputs, targets, washout)


def _groups(series: list[_Series], most: int) -> Iterator[list[_Series]]:
    """Series one after another, together while they have `most` steps at most."""
    group: list[_Series] = []
    steps = 0
    for each in series:
        if group and steps + each.targets.shape[1] > most:
            yield group
            group, steps = [], 0
        group.append(each)
        steps += each.targets.shape[1]
    if group:
        yield group


def _offsets(lengths: Tensor) -> Tensor:
    """Where packed sequences of these lengths start, and the last ends: int32."""
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)
