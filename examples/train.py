"""Train a language model on text: one script from a laptop to a cluster.

    python examples/train.py --data shakespeare.txt
    torchrun --nproc-per-node 8 examples/train.py --data corpus/ --tokenizer bpe --dtype bfloat16

`--help` lists the flags, examples/README.md explains them. The parts are in `training/`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from training import FlagError, parallel
from training.checkpoint import Checkpoints, finished
from training.compare import compare
from training.log import Log
from training.options import Options, parse
from training.parallel import Layout
from training.text import Source, prepare, prepared_folder
from training.trainer import Trainer, config_facts


def prepared_text(options: Options, layout: Layout) -> Path:
    """The prepared text's folder: rank 0 prepares it where it is not there, the others wait."""
    source = Source(options.data, options.tokenizer, options.vocab, options.held_out)
    folder = prepared_folder(source, options.prepared_root)
    if layout.rank == 0:
        prepare(source, options.prepared_root, lambda text: print(text, flush=True))
    parallel.barrier(layout)
    return folder


def checkpoint_to_load(options: Options) -> Path | None:
    """The checkpoint that `--resume` asks for, if any. FlagError where OUT has newer ones, which a
    later `--resume auto` would take for this run's."""
    there = finished(options.out / "checkpoints")
    if options.resume == "auto":
        return there[-1] if there else None
    asked = None if options.resume == "no" else Path(options.resume)
    if there and (asked is None or asked.name < there[-1].name):
        raise FlagError(
            f"--out: {options.out} holds the checkpoint {there[-1].name} already; go on from it "
            "with --resume auto, or name another folder"
        )
    return asked


class Run:
    """The loop: steps, and what is told and stored between them."""

    def __init__(self, options: Options, layout: Layout, prepared: Path) -> None:
        self.options, self.layout = options, layout
        found = checkpoint_to_load(options)
        self.trainer = Trainer(options, layout, prepared, options.attention)
        text = self.trainer.batches.text
        facts = {
            "--data": f"{len(text):,} tokens, {options.tokenizer}",
            "--seed": options.seed,
            "--batch": options.batch,
            "model": config_facts(self.trainer.config),
        }
        self.checkpoints = Checkpoints(
            options.out / "checkpoints", layout, options.keep, options.save_in_background, facts
        )
        self.first = 0
        if found is not None:
            model, optimiser = self.trainer.model, self.trainer.optimiser
            self.first = self.checkpoints.load(found, model, optimiser)
        self.untold: list[tuple[Tensor, Tensor]] = []
        self.speeds: list[float] = []

    def train(self, log: Log) -> None:
        """All steps."""
        options, trainer = self.options, self.trainer
        self._introduce(log)
        began = time.perf_counter()
        for step in range(self.first, options.steps):
            self.untold.append(trainer.step(step))
            done = step + 1
            last = done == options.steps
            saves = options.save_every and (last or done % options.save_every == 0)
            validates = last or (options.validate_every and done % options.validate_every == 0)
            if not (saves or validates or done % options.log_every == 0):
                continue
            self._tell(log, done, began)
            if validates:
                log.validated(done, trainer.validate())
            if saves:
                self.checkpoints.save(done, trainer.model, trainer.optimiser)
            began = time.perf_counter()
        self.checkpoints.wait()
        if self.speeds:
            log.say(f"median {statistics.median(self.speeds):,.0f} tokens/s")

    def _introduce(self, log: Log) -> None:
        trainer, layout = self.trainer, self.layout
        log.say(
            f"{trainer.config.variant}, {trainer.parameters:,} parameters, "
            f"{trainer.tokens_per_step:,} tokens a step; {layout.world} "
            f"{'ranks' if layout.world > 1 else 'rank'} on "
            f"{layout.device.type}: {layout.data} data x {layout.context} context x "
            f"{layout.tensor} tensor"
        )
        if self.options.resume != "no":
            log.say(f"resumed after step {self.first}" if self.first else "nothing to resume")

    def _tell(self, log: Log, done: int, began: float) -> None:
        """Sum up the losses since the last time. All ranks get the same, and stop alike where the
        loss is not finite."""
        losses, norms = (torch.stack(list(found)) for found in zip(*self.untold, strict=True))
        values = parallel.total(losses, self.layout).tolist()
        count = len(values)
        speed = count * self.trainer.tokens_per_step / (time.perf_counter() - began)
        self.speeds.append(speed)
        self.untold.clear()
        lines = [
            {
                "step": done - count + number + 1,
                "loss": loss,
                "gradient_norm": norm,
                "rate": self.trainer.schedule.rate(done - count + number),
                "tokens_per_second": round(speed, 1),
            }
            for number, (loss, norm) in enumerate(zip(values, norms.tolist(), strict=True))
        ]
        log.steps_done(lines)
        for line in lines:
            if not abs(line["loss"]) < float("inf"):
                raise RuntimeError(f"the loss of step {line['step']} is {line['loss']}")

    def write(self, log: Log) -> None:
        """Store the whole model, and let it write."""
        model = self.trainer.whole()
        if model is None:
            return
        stored = {"config": vars(model.config), "state": model.state_dict()}
        torch.save(stored, self.options.out / "model.pt")
        log.say(f"model: {self.options.out / 'model.pt'}")
        if self.options.sample:
            log.say(self.trainer.write(model))


def run(options: Options, layout: Layout) -> None:
    """What the flags ask for, on this rank."""
    prepared = prepared_text(options, layout)
    if options.prepare_only:
        return
    tells = layout.rank == 0
    if options.compare_sdpa:
        found = compare(options, layout, prepared, lambda text: print(text) if tells else None)
        if tells:
            options.out.mkdir(parents=True, exist_ok=True)
            with (options.out / "compare.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
        return
    job = Run(options, layout, prepared)
    log = Log(options.out, options.steps, job.first, tells=tells)
    with contextlib.closing(log):
        job.train(log)
        job.write(log)


def main(arguments: Sequence[str] | None = None) -> None:
    """Join the other ranks, train, and leave them."""
    options = parse(arguments)
    try:
        layout = parallel.start(options)
        run(options, layout)
    except FlagError as wrong:
        # Every rank finds the same: one says it.
        if parallel.is_first():
            print(f"train.py: error: {wrong}", file=sys.stderr)
        sys.exit(2)
    parallel.finish(layout)


if __name__ == "__main__":
    main()
