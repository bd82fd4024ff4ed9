"""Text generation over a cache of keys and mixed values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_ids, integer, integers, real
from resformer_kernels.kvcache.cache.cache import SharedValueCache
from resformer_kernels.models.config import LanguageModelConfig


class Decoder(Protocol):
    """The part of a `LanguageModel` that generation uses."""

    config: LanguageModelConfig

    def new_cache(self, batch: int, max_seqlen: int | None = None) -> SharedValueCache:
        """An empty cache for this model."""

    def hidden(self, token_ids: Tensor, cache: SharedValueCache | None = None) -> Tensor:
        """The head's input, (B, T, dim), for tokens (B, T), which are appended to the cache."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab_size) from the head's input, (..., dim)."""


class Generation(NamedTuple):
    """The result of `generate`."""

    tokens: Tensor
    """(B, N) int64, N at most max_new_tokens: the new tokens of each row, padded with
    stop_token."""
    lengths: Tensor
    """(B,) int64: new tokens of each row, including its stop_token, without the padding."""


@dataclass(frozen=True)
class Sampling:
    """How to draw a token from logits. Raises TypeError or ValueError for invalid fields."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        temperature = real("temperature", self.temperature)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        object.__setattr__(self, "temperature", temperature)
        if self.top_k is not None:
            object.__setattr__(self, "top_k", integer("top_k", self.top_k, 1))
        if self.top_p is not None:
            top_p = real("top_p", self.top_p)
            if not 0 < top_p <= 1:
                raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
            object.__setattr__(self, "top_p", top_p)

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B,) tokens from logits (B, vocab)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probs = self.probabilities(logits)
        return torch.multinomial(probs, 1, generator=generator)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution to draw from, (B, vocab) float32: among the `top_k` largest logits, the
        fewest whose probabilities sum to `top_p`."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        probs = logits.softmax(-1)
        if self.top_p is None:
            return probs
        ordered, order = probs.sort(-1, descending=True)
        # A token is kept where the sum before it is below top_p, so the first always is.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
        return probs / probs.sum(-1, keepdim=True)


@torch.no_grad()
def generate(
    model: Decoder,
    token_ids: Tensor,
    max_new_tokens: int,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    prefill_chunk: int | None = None,
    cache: SharedValueCache | None = None,
) -> Generation:
    """Continue each row of token_ids.

    Args:
        model: a `LanguageModel`.
        token_ids: (B, T) int64 or int32, the prompts, padded on the right with any value. T is at
            least 1 where B is.
        max_new_tokens: number of tokens to generate, at least 1.
        lengths: tokens of each prompt, 1 to T; None: T each.
        temperature: 0 takes the likeliest token; else logits are divided by it and one is drawn.
        top_k: draw from the top_k likeliest tokens only.
        top_p: draw from the fewest tokens, likeliest first, whose probabilities reach top_p.
        seed: seeds the draws; None: torch's global generator.
        stop_token: ends a row; generation ends when all rows have ended.
        prefill_chunk: prompt tokens processed at a time, which bounds memory; None: all at once.
        cache: from `model.new_cache`, with B sequences that the prompts continue; None: a new one.
            On return it holds every token of each row except the last.

    Returns:
        Generation(tokens, lengths).

    Raises:
        TypeError, ValueError: an argument has the wrong type or range, or the tokens exceed the
            model's max_seqlen.
        RuntimeError: the cache is full.
    """
    prompts = _check_prompts(token_ids, lengths)
    sampling = Sampling(temperature, top_k, top_p)
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
    if prefill_chunk is not None:
        prefill_chunk = integer("prefill_chunk", prefill_chunk, 1)
    if stop_token is not None:
        stop_token = integer("stop_token", stop_token)
    generator = None
    if seed is not None:
        generator = torch.Generator(token_ids.device).manual_seed(integer("seed", seed))
    if cache is None:
        room = max(token_ids.shape[1], max(prompts, default=1) + max_new_tokens - 1)
        cache = model.new_cache(token_ids.shape[0], room)
    before = cache.lengths
    _check_room(model, before, token_ids.shape, prompts, max_new_tokens)
    if not prompts:
        nothing = torch.zeros((0,), dtype=torch.int64, device=token_ids.device)
        return Generation(nothing[:, None], nothing)
    try:
        last = _prefill(model, token_ids, prompts, cache, prefill_chunk or token_ids.shape[1])
        drawn = _continue(model, last, cache, max_new_tokens, sampling, generator, stop_token)
    except BaseException:
        cache.crop(before)
        raise
    made = drawn.lengths.tolist()
    cache.crop([b + p + n - 1 for b, p, n in zip(before, prompts, made, strict=True)])
    return drawn


def _continue(
    model: Decoder,
    last: Tensor,
    cache: SharedValueCache,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    stop_token: int | None,
) -> Generation:
    """Draw and append tokens in turn, starting from the head's input at each row's last token."""
    drawn: list[Tensor] = []
    counts = torch.zeros(len(last), dtype=torch.int64, device=last.device)
    running = torch.ones_like(counts, dtype=torch.bool)
    while True:
        token = sampling.draw(model.logits(last), generator)
        if stop_token is not None:
            token = token.masked_fill(~running, stop_token)
        drawn.append(token)
        counts += running
        if stop_token is not None:
            running = running & (token != stop_token)
        if len(drawn) == max_new_tokens or not bool(running.any()):
            return Generation(torch.stack(drawn, 1), counts)
        last = model.hidden(token[:, None], cache)[:, -1]


def _prefill(
    model: Decoder,
    token_ids: Tensor,
    prompts: list[int],
    cache: SharedValueCache,
    chunk: int,
) -> Tensor:
    """Append the prompts; return the head's input at the last token of each, (B, dim)."""
    before = cache.lengths
    ends = torch.tensor(prompts, device=token_ids.device) - 1
    last: Tensor | None = None
    longest = max(prompts)
    for start in range(0, longest, chunk):
        piece = token_ids[:, start : min(start + chunk, longest)]
        hidden = model.hidden(piece, cache)
        last = torch.zeros_like(hidden[:, 0]) if last is None else last
        here = (ends >= start) & (ends < start + piece.shape[1])
        at = (ends - start).clamp(0, piece.shape[1] - 1)
        rows = torch.arange(len(prompts), device=token_ids.device)
        last = torch.where(here[:, None], hidden[rows, at], last)
    # Attention is causal, so no prompt token saw the padding; remove it from the cache.
    cache.crop([b + p for b, p in zip(before, prompts, strict=True)])
    assert last is not None
    return last


def _check_prompts(token_ids: Any, lengths: Any) -> list[int]:
    check_ids(token_ids, "(B, T)")
    batch, longest = token_ids.shape
    if batch and longest < 1:
        raise ValueError(f"token_ids must hold a token at least, got shape {(batch, longest)}")
    if lengths is None:
        return [longest] * batch
    found = integers("lengths", lengths)
    if len(found) != batch or any(not 1 <= length <= longest for length in found):
        raise ValueError(f"lengths must be {batch} numbers of 1 to {longest}, got {found}")
    return found


def _check_room(
    model: Decoder,
    before: tuple[int, ...],
    shape: torch.Size,
    prompts: list[int],
    new: int,
) -> None:
    if len(before) != shape[0]:
        raise ValueError(f"cache must hold token_ids' {shape[0]} sequences, got {len(before)}")
    # The last generated token is never read. Padding is read before it is removed.
    longest = max(prompts, default=0)
    rows = zip(before, prompts, strict=True)
    most = max((b + max(longest, p + new - 1) for b, p in rows), default=0)
    if most > model.config.max_seqlen:
        raise ValueError(
            f"max_new_tokens: {most} tokens would be read, and the model's max_seqlen is "
            f"{model.config.max_seqlen}; got {new}"
        )
