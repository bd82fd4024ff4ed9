"""Checkpoints that all ranks write together, and that are whole or not there.

A checkpoint is a folder `step-00000100`: `torch.distributed.checkpoint`'s files with the model, the
optimiser and every rank's random generators, and `run.json`. It is written as `step-00000100.part`
and renamed when the last rank has finished, so a run that is killed while it writes leaves nothing
that counts.
"""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from training import FlagError
from training.parallel import Layout, barrier, new_group

_FACTS = "run.json"
_UNFINISHED = ".part"
# Names by parameter, so that another layout of ranks can load it.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def finished(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(p for p in folder.glob("step-*") if p.suffix != _UNFINISHED)


def _generators(layout: Layout) -> dict[str, torch.Tensor]:
    found = {f"cpu-{layout.rank}": torch.get_rng_state()}
    if layout.device.type == "cuda":
        found[f"cuda-{layout.rank}"] = torch.cuda.get_rng_state(layout.device)
    return found


class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Args:
        folder: holds them.
        layout: where this rank stands.
        keep: how many of the newest stay.
        background: write in a thread, from copies, while training goes on.
        facts: what a run that resumes must have in common with this one.
    """

    def __init__(
        self, folder: Path, layout: Layout, keep: int, background: bool, facts: dict[str, Any]
    ) -> None:
        self.folder, self.layout, self.keep, self.facts = folder, layout, keep, facts
        self.background = background
        self._running: tuple[int, Future[Any]] | None = None
        self._alone = layout.world == 1
        if self._alone:
            # Said at every save and load, also where it is asked for.
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        # A group of their own, beside which training can go on; None where there is one rank.
        self._group = new_group(layout, "gloo")
        if layout.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"step-*{_UNFINISHED}"):
                shutil.rmtree(left)
        barrier(layout)

    def save(self, step: int, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Write the state after `step` steps. Every rank calls it."""
        self.wait()
        unfinished = self._path(step).with_suffix(_UNFINISHED)
        state = self._state(model, optimiser)
        if self.background:
            found = async_save(
                state,
                checkpoint_id=unfinished,
                process_group=self._group,
                no_dist=self._alone,
            )
            assert isinstance(found, Future)
            self._running = step, found
        else:
            save(
                state,
                checkpoint_id=unfinished,
                process_group=self._group,
                no_dist=self._alone,
            )
            self._finish(step)

    def wait(self) -> None:
        """Finish the checkpoint that is being written in the background."""
        if self._running is not None:
            step, running = self._running
            running.result()
            self._running = None
            self._finish(step)

    def load(self, path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
        """Restore a checkpoint: the number of steps that it has behind it. FlagError where it is
        none, or is one of another run."""
        if not (path / _FACTS).exists():
            raise FlagError(f"--resume: {path} is not a finished checkpoint")
        found = json.loads((path / _FACTS).read_text())
        mine = json.loads(json.dumps(self.facts))
        for name, value in mine.items():
            if found["facts"].get(name) != value:
                raise FlagError(
                    f"--resume: {path} has {name} {found['facts'].get(name)}, and this run has "
                    f"{value}"
                )
        state = self._state(model, optimiser)
        same = found["world"] == self.layout.world and found["device"] == self.layout.device.type
        if not same:
            del state["generators"]  # each is one rank's
        load(state, checkpoint_id=path, process_group=self._group, no_dist=self._alone)
        set_state_dict(
            model,
            optimiser,
            model_state_dict=state["model"],
            optim_state_dict=state["optimiser"],
            options=_OPTIONS,
        )
        if same:
            torch.set_rng_state(state["generators"][f"cpu-{self.layout.rank}"])
            if self.layout.device.type == "cuda":
                own = state["generators"][f"cuda-{self.layout.rank}"]
                torch.cuda.set_rng_state(own, self.layout.device)
        return int(found["step"])

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def _state(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimiser, options=_OPTIONS)
        return {
            "model": weights,
            "optimiser": moments,
            "generators": _generators(self.layout),
        }

    def _finish(self, step: int) -> None:
        """Let the checkpoint count, and remove the oldest. Every rank has written its part: rank 0
        returns from a save when all have."""
        if self.layout.rank:
            return
        path = self._path(step)
        unfinished = path.with_suffix(_UNFINISHED)
        facts = {
            "step": step,
            "world": self.layout.world,
            "device": self.layout.device.type,
            "facts": self.facts,
        }
        (unfinished / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")
        if path.exists():
            shutil.rmtree(path)  # of a run that went further before it was resumed here
        unfinished.rename(path)
        for old in finished(self.folder)[: -self.keep]:
            shutil.rmtree(old)
