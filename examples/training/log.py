"""What a run tells: lines or a progress bar, JSON lines, and TensorBoard."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run will write again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A line that a killed run did not finish has no end.
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(kept), encoding="utf-8")
    unfinished.replace(path)


class Log:
    """Tells of a run, on rank 0; the other ranks' calls do nothing.

    Args:
        folder: of `metrics.jsonl` and TensorBoard's files.
        steps: of the whole run.
        first: the step that a resumed run goes on with; its earlier lines stay.
        tells: whether this rank is the one that tells.
    """

    def __init__(self, folder: Path, steps: int, first: int, *, tells: bool) -> None:
        self.tells, self.steps = tells, steps
        self._console = Console(highlight=False, quiet=not tells)
        self._progress: Progress | None = None
        self._board: Any = None
        if not tells:
            return
        folder.mkdir(parents=True, exist_ok=True)
        keep_until(folder / METRICS, first)
        self._file = (folder / METRICS).open("a" if first else "w", encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is None:
            self.say("no TensorBoard files are written: pip install tensorboard")
        else:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("starting", total=steps, completed=first)
            self._progress.start()

    def close(self) -> None:
        """Leave the console and the files."""
        if self._progress is not None:
            self._progress.stop()
        if self.tells:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def say(self, text: str) -> None:
        """A line of the console, as it is."""
        self._console.print(text, markup=False, soft_wrap=True)

    def steps_done(self, lines: list[dict[str, Any]]) -> None:
        """Steps since the last call: a line of `metrics.jsonl` each, one of the console for all."""
        if not self.tells or not lines:
            return
        for line in lines:
            self._write(line)
        last = lines[-1]
        mean = sum(line["loss"] for line in lines) / len(lines)
        told = (
            f"loss {mean:.4f}  norm {last['gradient_norm']:.3f}  rate {last['rate']:.2e}  "
            f"{last['tokens_per_second']:,.0f} tokens/s"
        )
        if self._progress is None:
            self.say(f"step {last['step']:>{len(str(self.steps))}}/{self.steps}  {told}")
        else:
            self._progress.update(self._task, completed=last["step"], description=told)

    def validated(self, step: int, loss: float) -> None:
        """The validation loss after `step` steps."""
        if self.tells:
            self._write({"step": step, "validation_loss": loss})
            self.say(f"step {step:>{len(str(self.steps))}}/{self.steps}  validation {loss:.4f}")

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, line["step"])
