"""Processes of vLLM: a list of jobs goes in, a list of answers comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vllm.tiny import NEW_TOKENS, Saved, prompts

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    # Fewer than most prompts: they arrive in chunks, beside requests that decode.
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 32 << 20,
    "generation_config": "vllm",
    "disable_log_stats": False,
}
ROUNDS = 2


@dataclass(frozen=True)
class Answer:
    """What an engine did with a model, or why it was not made."""

    tokens: list[list[list[int]]]
    """By round, by prompt."""
    cached: list[list[int]]
    """Tokens of each prompt whose pages were there already."""
    blocks: int
    block_size: int
    metrics: dict[str, float]
    error: str


class Engines:
    """Starts vLLM in processes of its own, with its caches in `folder`."""

    def __init__(self, models: dict[str, Saved], folder: Path) -> None:
        self.models, self.folder, self.started = models, folder, 0

    def run(
        self,
        jobs: dict[str, tuple[str, dict[str, Any]]],
        *,
        version: str | None = None,
        **environment: str,
    ) -> tuple[dict[str, Answer], str]:
        """Serve models, one after the other, in one process.

        Args:
            jobs: by any key, a name of `models` and options of vLLM beside `OPTIONS`.
            version: what vLLM says that its version is; None: the truth.
            environment: variables of the process.

        Returns:
            The answers by key, and what the process wrote to stderr.
        """
        self.started += 1
        path = self.folder / f"{self.started}.json"
        described = {
            "version": version,
            "prompts": prompts(),
            "rounds": ROUNDS,
            "new_tokens": NEW_TOKENS,
            "jobs": [
                {**OPTIONS, "model": str(self.models[name].folder), **options}
                for name, options in jobs.values()
            ],
        }
        path.write_text(json.dumps(described))
        done = subprocess.run(
            [sys.executable, "-m", "tests.vllm.engine", str(path)],
            env={**self._environment(), **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        answers = json.loads(path.with_suffix(".answers").read_text())
        found = {key: Answer(**answer) for key, answer in zip(jobs, answers, strict=True)}
        return found, done.stderr

    def _environment(self) -> dict[str, str]:
        # It would replace `kv_cache_memory_bytes`.
        outer = {name: x for name, x in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
        return {
            **outer,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CACHE_ROOT": str(self.folder / "cache"),
        }
