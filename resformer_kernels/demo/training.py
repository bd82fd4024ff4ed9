"""Train byte-level models of equal size side by side, within a time limit."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from resformer_kernels.demo.corpus import Corpus
from resformer_kernels.demo.memory import saved_activation_bytes
from resformer_kernels.models import (
    LanguageModel,
    LanguageModelConfig,
    parameter_count,
    with_parameter_budget,
)

MODELS = {"Transformer": "transformer", "ResFormer": "learnable", "SVFormer": "svformer"}
"""The models that are compared, and their variants."""

_WARM_UP = 0.05
_CLIP = 1.0


@dataclass(frozen=True)
class Plan:
    """How to train. Lengths are in bytes of text, which are the tokens."""

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 2
    seqlen: int = 256
    batch: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    evaluations: int = 12
    """Points on the held-out curve, the last one apart."""
    max_windows: int = 512
    """Held-out windows of seqlen bytes behind the last figure, if there is time for them."""
    evaluation_share: float = 0.1
    """Of the time: for the last figure, and as much again for the curve."""


@dataclass
class ModelRun:
    """One model's training so far."""

    name: str
    config: LanguageModelConfig
    parameters: int
    activation_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    """Training loss of each step, bits a byte."""
    step_seconds: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, held-out bits a byte)."""
    final_bits: float | None = None
    """Held-out bits a byte after the last step; None where training was cut off."""
    final_windows: int = 0
    """Held-out windows behind `final_bits`."""
    final_error: float | None = None
    """The standard error of `final_bits` from the choice of held-out windows."""

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def median_step(self) -> float | None:
        """Seconds a step; the first ones, which warm up, are left out."""
        timed = self.step_seconds[2:] or self.step_seconds
        return statistics.median(timed) if timed else None

    @property
    def latest_bits(self) -> float | None:
        """The last held-out figure there is."""
        if self.final_bits is not None:
            return self.final_bits
        return self.curve[-1][1] if self.curve else None


@dataclass(frozen=True)
class Progress:
    """How far training has come: `share` of its time, `steps` of each model."""

    share: float
    steps: int


class _Trainee:
    """A model, its optimiser and its record."""

    def __init__(self, name: str, config: LanguageModelConfig, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.model = LanguageModel(config)
        self.plan = plan
        self.run = ModelRun(name, config, sum(p.numel() for p in self.model.parameters()))
        matrices = [p for p in self.model.parameters() if p.dim() >= 2 and p.shape[-1] > 1]
        ids = {id(p) for p in matrices}
        # Decay would pull λ, which is no matrix, towards no values at all.
        rest = [p for p in self.model.parameters() if id(p) not in ids]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": plan.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )

    def measure_activations(self, batch: Tensor) -> None:
        self.run.activation_bytes = saved_activation_bytes(
            self.model, lambda: self.model(batch[:, :-1], batch[:, 1:])
        )

    def step(self, batch: Tensor, learning_rate: float) -> None:
        start = time.perf_counter()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        loss = self.model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        bits = float(loss.detach()) / math.log(2)
        self.run.step_seconds.append(time.perf_counter() - start)
        self.run.losses.append(bits)

    def held_out_bits(self, windows: Tensor) -> Tensor:
        """Bits a byte of each of the (windows, seqlen + 1) windows, (windows,)."""
        with torch.no_grad():
            logits = self.model(windows[:, :-1])
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none"
            )
        return losses.view(len(windows), -1).mean(1) / math.log(2)


def configs(plan: Plan) -> dict[str, LanguageModelConfig]:
    """The models' configurations, of as equal parameter counts as the MLP's width allows."""
    base = LanguageModelConfig(
        variant="transformer",
        dim=plan.dim,
        num_layers=plan.num_layers,
        num_heads=plan.num_heads,
        max_seqlen=plan.seqlen,
        qk_norm=True,
    )
    budget = parameter_count(base)
    return {
        name: with_parameter_budget(replace(base, variant=variant), budget)
        for name, variant in MODELS.items()
    }


def train(
    corpus: Corpus,
    plan: Plan,
    seconds: float,
    runs: list[ModelRun],
    on_progress: Callable[[Progress], None],
) -> dict[str, LanguageModel]:
    """Train every model for `seconds` in all, a step of each in turn on the same batch.

    The learning rate follows the time that has passed, alike for all: warm-up, then linear decay
    to nothing at the limit. At least one step of each is taken.

    Args:
        corpus: what to train on and what to hold out.
        plan: sizes and rates.
        seconds: the limit; the last evaluation is within it as far as can be foreseen.
        runs: receives a record for each model, kept up to date: what a cut-off leaves.
        on_progress: called after each round.

    Returns:
        The trained models by name.
    """
    start = time.perf_counter()
    trainees = [_Trainee(name, config, plan) for name, config in configs(plan).items()]
    runs.extend(trainee.run for trainee in trainees)
    batches = _batches(corpus.train, plan)
    first = next(batches)
    for trainee in trainees:
        trainee.measure_activations(first)
    parts = _windows(corpus.held_out, plan).split(plan.batch)
    _evaluate(trainees, parts[:1])
    round_seconds = _timed(lambda: _evaluate(trainees, parts[:1]))
    for trainee in trainees:
        trainee.run.curve.clear()
    affordable = plan.evaluation_share * seconds / round_seconds
    curve = parts[: max(1, int(affordable / plan.evaluations))]
    _evaluate(trainees, curve)
    training = seconds - min(plan.evaluation_share * seconds, len(parts) * round_seconds)
    due, share, steps = 1.0 / plan.evaluations, 0.0, 0
    while share < 1.0 or steps == 0:
        batch = next(batches)
        rate = plan.learning_rate * _schedule(share)
        turn = steps % len(trainees)
        for trainee in trainees[turn:] + trainees[:turn]:
            trainee.step(batch, rate)
        steps += 1
        if share >= due:
            _evaluate(trainees, curve)
            due = (math.floor(share * plan.evaluations) + 1) / plan.evaluations
        share = (time.perf_counter() - start) / max(training, 1e-9)
        on_progress(Progress(min(1.0, share), steps))
    _finish(trainees, parts, start + seconds)
    return {trainee.run.name: trainee.model for trainee in trainees}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _evaluate(trainees: list[_Trainee], parts: Sequence[Tensor]) -> None:
    """Add a point to every curve."""
    for trainee in trainees:
        bits = torch.cat([trainee.held_out_bits(part) for part in parts])
        trainee.run.curve.append((trainee.run.steps, float(bits.mean())))


def _finish(trainees: list[_Trainee], parts: Sequence[Tensor], deadline: float) -> None:
    """The last figures, from as many windows as the deadline allows, the same for all."""
    found: list[list[Tensor]] = [[] for _ in trainees]
    for part in parts:
        for bits, trainee in zip(found, trainees, strict=True):
            bits.append(trainee.held_out_bits(part))
        if time.perf_counter() > deadline:
            break
    for bits, trainee in zip(found, trainees, strict=True):
        windows = torch.cat(bits)
        trainee.run.final_bits = float(windows.mean())
        trainee.run.final_windows = len(windows)
        if len(windows) > 1:
            trainee.run.final_error = float(windows.std() / math.sqrt(len(windows)))


def _schedule(share: float) -> float:
    if share < _WARM_UP:
        return max(0.02, share / _WARM_UP)
    return max(0.0, (1.0 - share) / (1.0 - _WARM_UP))


def _batches(text: Tensor, plan: Plan) -> Iterator[Tensor]:
    """(batch, seqlen + 1) windows at random places, for ever; the same ones in every run."""
    generator = torch.Generator().manual_seed(plan.seed)
    offsets = torch.arange(plan.seqlen + 1)
    last = len(text) - plan.seqlen
    if last < 1:
        raise ValueError(f"corpus: {len(text)} bytes are too few for windows of {plan.seqlen}")
    while True:
        starts = torch.randint(last, (plan.batch, 1), generator=generator)
        yield text[starts + offsets].long()


def _windows(text: Tensor, plan: Plan) -> Tensor:
    """Windows of seqlen + 1 bytes in an order that makes every prefix a fair sample."""
    size = plan.seqlen + 1
    count = len(text) // size
    if count < 1:
        raise ValueError(f"corpus: {len(text)} held-out bytes are too few for one of {size}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(plan.seed))
    return text[: count * size].view(count, size)[order[: plan.max_windows]].long()
