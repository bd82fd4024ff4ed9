"""Measurements of a demo so far, from which the report is written."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from resformer_kernels.bench.timing import Result
from resformer_kernels.demo.corpus import Corpus
from resformer_kernels.demo.training import ModelRun, Plan
from resformer_kernels.demo.writing import Writing
from resformer_kernels.testing.verification import Verdict

FILE = "results.json"


@dataclass
class Record:
    """Filled in part by part, and reported however much of it is filled."""

    machine: dict[str, str | int]
    minutes: float
    plan: Plan
    started: datetime
    command: str
    corpus: Corpus
    verdicts: list[Verdict] = field(default_factory=list)
    cases_checked: int = 0
    cases_planned: int = 0
    gemm: dict[str, float] = field(default_factory=dict)
    """FLOP/s by dtype."""
    results: list[Result] = field(default_factory=list)
    benchmarks_planned: int = 0
    runs: list[ModelRun] = field(default_factory=list)
    writings: list[Writing] = field(default_factory=list)
    interrupted_in: str | None = None
    """The part that Ctrl-C ended."""
    elapsed: float = 0.0
    """Seconds from start to end."""

    @property
    def failed(self) -> list[Verdict]:
        """Tensors over their budget."""
        return [verdict for verdict in self.verdicts if not verdict.ok]

    @property
    def timed_writings(self) -> list[Writing]:
        """Generations that were timed at least once."""
        return [writing for writing in self.writings if writing.seconds]

    def save(self, folder: Path) -> None:
        """Write results.json."""
        content = {
            "machine": self.machine,
            "command": self.command,
            "started": self.started.isoformat(timespec="seconds"),
            "minutes": self.minutes,
            "elapsed_s": self.elapsed,
            "interrupted_in": self.interrupted_in,
            "plan": asdict(self.plan),
            "verdicts": [asdict(v) | {"ok": v.ok} for v in self.verdicts],
            "gemm_flops_per_s": self.gemm,
            "timings": [
                asdict(r)
                | {"peer": r.peer, "ratio": r.ratio}
                | {"medians_s": {name: timing.median for name, timing in r.timings.items()}}
                for r in self.results
            ],
            "models": [asdict(run) for run in self.runs],
            "generation": [
                asdict(w) | {"tokens_per_s": w.tokens_per_second} for w in self.timed_writings
            ],
        }
        (folder / FILE).write_text(json.dumps(content, indent=1) + "\n")
