"""Text that the trained models generate, its speed, and the size of their caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from resformer_kernels.demo.corpus import Corpus
from resformer_kernels.models import LanguageModel

WRITERS = ("Transformer", "SVFormer")
"""The models whose caches are compared; the text of the last is shown."""
DRAWS = {"temperature": 0.8, "top_p": 0.95, "seed": 0}
"""Sampling of the text that is shown."""

_ROUNDS = 7


@dataclass
class Writing:
    """One model's text, time and memory. Lengths are in bytes of text, which are the tokens."""

    name: str
    prompt: str
    text: str
    prompt_length: int
    new_tokens: int
    cache_bytes: int
    """Size of keys and values, for one sequence of the model's greatest length, in float32."""
    seconds: list[float] = field(default_factory=list)
    """Duration of each greedy generation of new_tokens, the prompt included."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, by the median."""
        return self.new_tokens / statistics.median(self.seconds)


def write(
    models: Mapping[str, LanguageModel],
    corpus: Corpus,
    seconds: float,
    writings: list[Writing],
    on_progress: Callable[[float], None],
) -> None:
    """Let each of `WRITERS` continue the same held-out text.

    Args:
        models: by name.
        corpus: its held-out text begins with the prompt.
        seconds: the limit of the timing, which alternates between the models; one round is made.
        writings: receives a record for each model.
        on_progress: called with the share that is done.
    """
    start = time.perf_counter()
    chosen = {name: models[name].eval() for name in WRITERS}
    length = min(model.config.max_seqlen for model in chosen.values())
    prompt = corpus.held_out[: max(1, length // 4)].long()[None]
    new = length - prompt.shape[1] + 1
    for name, model in chosen.items():
        drawn = model.generate(prompt, new, **DRAWS)
        shown = (_readable(prompt[0]), _readable(drawn.tokens[0]))
        writings.append(Writing(name, *shown, prompt.shape[1], new, model.new_cache(1).nbytes))
    for done in range(_ROUNDS):
        for writing in writings if done % 2 else writings[::-1]:
            begun = time.perf_counter()
            chosen[writing.name].generate(prompt, new)
            writing.seconds.append(time.perf_counter() - begun)
        on_progress((done + 1) / _ROUNDS)
        if time.perf_counter() - start > seconds:
            break


def _readable(tokens: torch.Tensor) -> str:
    """Bytes as text, with a replacement character for what cannot be shown."""
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
