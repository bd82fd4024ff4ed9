"""Tokens a second with this package's attention and with PyTorch's, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from resformer_kernels.bench import machine
from training.options import ATTENTIONS, Options
from training.parallel import Layout, total
from training.trainer import Trainer

_WARM_UP = 3


def compare(
    options: Options, layout: Layout, prepared: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train two models on the same batches, a step of each in turn, and print the medians.

    The order within a round alternates. A step is everything: reading the batch, forward, backward,
    clipping and the optimiser.

    Returns:
        What `OUT/compare.jsonl` stores: machine, options, ranks, and by attention the seconds of
        every step, median tokens a second of all ranks together, and the last loss.
    """
    trainers = {name: Trainer(options, layout, prepared, name) for name in ATTENTIONS}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    losses: dict[str, float] = {}
    for round_ in range(options.compare_sdpa + _WARM_UP):
        for name in list(trainers)[:: 1 if round_ % 2 else -1]:
            _synchronise(layout)
            start = time.perf_counter()
            loss, _ = trainers[name].step(round_)
            _synchronise(layout)
            if round_ >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)
            losses[name] = float(total(loss, layout))
    speeds = {
        name: trainers[name].tokens_per_step / statistics.median(samples)
        for name, samples in seconds.items()
    }
    say(f"medians of {options.compare_sdpa} steps of {trainers['ours'].tokens_per_step:,} tokens")
    for name, speed in speeds.items():
        least, most = min(seconds[name]), max(seconds[name])
        say(
            f"  {name:5} {speed:12,.0f} tokens/s  (steps of {1e3 * least:.1f} to {1e3 * most:.1f} "
            f"ms)  loss {losses[name]:.4f}"
        )
    say(f"  ours / sdpa {speeds['ours'] / speeds['sdpa']:.3f}")
    return {
        "machine": machine.describe(),
        "options": {name: str(value) for name, value in asdict(options).items()},
        "ranks": layout.world,
        "seconds": seconds,
        "tokens_per_second": speeds,
        "loss": losses,
    }


def _synchronise(layout: Layout) -> None:
    if layout.device.type == "cuda":
        torch.cuda.synchronize(layout.device)
