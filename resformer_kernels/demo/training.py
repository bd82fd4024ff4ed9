"""Train byte-level models of equal size side by side, within a time limit."""

from __future__ import annotations

import functools
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
"""Variants to compare, by the model's name."""

_WARM_UP = 0.05
_CLIP = 1.0


@dataclass(frozen=True)
class Plan:
    """Settings of a training run. Lengths are in bytes of text, which are the tokens."""

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 2
    seqlen: int = 256
    batch: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    evaluations: int = 12
    """Points on the held-out curve, without the last one."""
    max_windows: int = 512
    """Held-out windows of seqlen bytes behind the last figure, as far as time allows."""
    evaluation_share: float = 0.1
    """Share of the time for the last figure, and as much again for the curve."""


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
    def median_step(self) -> float:
        """Seconds a step; the first ones, which warm up, are left out."""
        return statistics.median(self.step_seconds[2:] or self.step_seconds)

    @property
    def latest_bits(self) -> float:
        """The last held-out figure. The first one is measured before the first step."""
        return self.curve[-1][1] if self.final_bits is None else self.final_bits


class _Trainee:
    """A model, its optimiser and its record."""

    def __init__(self, name: str, config: LanguageModelConfig, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.model = LanguageModel(config)
        self.run = ModelRun(name, config, sum(p.numel() for p in self.model.parameters()))
        # Decay would pull λ, which is no matrix, towards no values at all.
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for p in self.model.parameters():
            groups[p.dim() >= 2 and p.shape[-1] > 1].append(p)
        self.optimiser = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": plan.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
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
        self.run.losses.append(loss.item() / math.log(2))
        self.run.step_seconds.append(time.perf_counter() - start)

    def held_out_bits(self, windows: Tensor) -> Tensor:
        """Bits a byte of each of the (windows, seqlen + 1) windows, (windows,)."""
        with torch.no_grad():
            logits = self.model(windows[:, :-1]).float().flatten(0, 1)
            targets = windows[:, 1:].flatten()
            losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        return losses.view(len(windows), -1).mean(1) / math.log(2)


def configs(plan: Plan) -> dict[str, LanguageModelConfig]:
    """Configurations of the models, with parameter counts as equal as the MLP's width allows."""
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
    on_progress: Callable[[float, int], None],
) -> dict[str, LanguageModel]:
    """Train every model for `seconds` in all, a step of each in turn on the same batch.

    The learning rate follows the time that has passed, alike for all: warm-up, then linear decay
    to nothing at the limit. At least one step of each is taken. ValueError where the text is too
    short for one window.

    Args:
        corpus: what to train on and what to hold out.
        plan: sizes and rates.
        seconds: the limit; the last evaluation is within it as far as can be foreseen.
        runs: receives a record for each model, kept up to date, so that a cut-off leaves it valid.
        on_progress: called after each round with the share of the time that has passed, at most
            1, and the steps of each model.

    Returns:
        The trained models by name.
    """
    start = time.perf_counter()
    shortest = min(len(corpus.train), len(corpus.held_out))
    if shortest <= plan.seqlen:
        raise ValueError(f"corpus: {shortest} bytes are too few for windows of {plan.seqlen + 1}")
    trainees = [_Trainee(name, config, plan) for name, config in configs(plan).items()]
    runs.extend(trainee.run for trainee in trainees)
    batches = _batches(corpus.train, plan)
    first = next(batches)
    for trainee in trainees:
        forward = functools.partial(trainee.model, first[:, :-1], first[:, 1:])
        trainee.run.activation_bytes = saved_activation_bytes(trainee.model, forward)
    parts = _windows(corpus.held_out, plan).split(plan.batch)
    _held_out_bits(trainees, parts[:1])
    evaluated = time.perf_counter()
    _held_out_bits(trainees, parts[:1])
    round_seconds = time.perf_counter() - evaluated
    affordable = plan.evaluation_share * seconds / round_seconds
    curve = parts[: max(1, int(affordable / plan.evaluations))]
    training = seconds - min(plan.evaluation_share * seconds, len(parts) * round_seconds)
    due, share, steps = 0.0, 0.0, 0
    while share < 1.0 or steps == 0:
        if share >= due:
            for trainee, bits in zip(trainees, _held_out_bits(trainees, curve), strict=True):
                trainee.run.curve.append((steps, float(bits.mean())))
            due = (math.floor(share * plan.evaluations) + 1) / plan.evaluations
        batch = next(batches)
        warm_up, decay = max(0.02, share / _WARM_UP), max(0.0, (1.0 - share) / (1.0 - _WARM_UP))
        rate = plan.learning_rate * min(warm_up, decay)
        turn = steps % len(trainees)
        for trainee in trainees[turn:] + trainees[:turn]:
            trainee.step(batch, rate)
        steps += 1
        share = (time.perf_counter() - start) / max(training, 1e-9)
        on_progress(min(1.0, share), steps)
    finals = _held_out_bits(trainees, parts, deadline=start + seconds)
    for trainee, bits in zip(trainees, finals, strict=True):
        trainee.run.final_bits = float(bits.mean())
        trainee.run.final_windows = len(bits)
        if len(bits) > 1:
            trainee.run.final_error = float(bits.std() / math.sqrt(len(bits)))
    return {trainee.run.name: trainee.model for trainee in trainees}


def _held_out_bits(
    trainees: Sequence[_Trainee], parts: Sequence[Tensor], deadline: float = math.inf
) -> list[Tensor]:
    """Bits a byte of each window by model, (windows,): as many parts as the deadline allows."""
    found: list[list[Tensor]] = []
    for part in parts:
        found.append([trainee.held_out_bits(part) for trainee in trainees])
        if time.perf_counter() > deadline:
            break
    return [torch.cat(bits) for bits in zip(*found, strict=True)]


def _batches(text: Tensor, plan: Plan) -> Iterator[Tensor]:
    """(batch, seqlen + 1) windows at random places, for ever; the same ones in every run."""
    generator = torch.Generator().manual_seed(plan.seed)
    offsets = torch.arange(plan.seqlen + 1)
    while True:
        starts = torch.randint(len(text) - plan.seqlen, (plan.batch, 1), generator=generator)
        yield text[starts + offsets].long()


def _windows(text: Tensor, plan: Plan) -> Tensor:
    """Windows of seqlen + 1 bytes in an order that makes every prefix a fair sample."""
    windows = text.unfold(0, plan.seqlen + 1, plan.seqlen + 1)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(plan.seed))
    return windows[order[: plan.max_windows]].long()
