"""A model, its optimiser, and a step of theirs on any layout of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from resformer_kernels.models import LanguageModel, LanguageModelConfig
from training import FlagError
from training.attention import use_sdpa
from training.data import Batches, HeldOut, Order, Tokens
from training.options import Options
from training.parallel import Layout, clip, sequences, spread, total
from training.schedule import Schedule
from training.text import describe, open_tokenizer


class Trainer:
    """Trains one model.

    Args:
        options: the flags.
        layout: where this rank stands.
        prepared: the prepared text's folder.
        attention: "ours" or "sdpa".
    """

    def __init__(self, options: Options, layout: Layout, prepared: Path, attention: str) -> None:
        self.options, self.layout = options, layout
        description = describe(prepared)
        self.tokenizer = open_tokenizer(prepared, description.tokenizer)
        self.config = options.config(description.vocab_size)
        self.prompt = torch.from_numpy(
            self.tokenizer.encode(options.prompt.encode()).astype(np.int64)
        )
        if not 0 < len(self.prompt) <= options.seqlen:
            raise FlagError(
                f"--prompt must have from 1 to --seqlen {options.seqlen} tokens, got "
                f"{len(self.prompt)}"
            )
        text, held_out = (Tokens(prepared, description, x) for x in ("train", "validation"))
        order = Order(len(text), options.seqlen, options.seed)
        self.batches = Batches(text, order, options.batch)
        self.held_out = HeldOut(held_out, options.seqlen, options.validation_batches, options.batch)
        # Drawn whole and on the CPU: the same weights whatever the layout and the device.
        torch.manual_seed(options.seed)
        self.model = LanguageModel(self.config)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if attention == "sdpa":
            use_sdpa(self.model)
        spread(self.model, layout, options)
        self.optimiser = _optimiser(self.model, options)
        self.schedule = Schedule(
            options.schedule,
            options.rate,
            options.steps,
            options.warmup,
            options.decay,
            options.final_rate,
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together train on in a step."""
        return self.options.batch * self.options.seqlen

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """Train on the batch of `step`, counted from 0: this rank's part of the loss, whose sum
        over ranks is the mean over the batch's tokens, and the gradient's norm, each ()."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(step)
        micro_batches = self.options.accumulate
        parts = []
        for number in range(micro_batches):
            if isinstance(self.model, FSDPModule):
                # Gradients are summed over ranks once a step.
                self.model.set_requires_gradient_sync(number == micro_batches - 1)
            rows = self.batches.rows(step, *self._share(number))
            parts.append(self._loss(rows, self.tokens_per_step))
        norm = clip(self.model.parameters(), self.options.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return torch.stack(parts).sum(), norm

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over held-out text, the same number on every rank."""
        parts = []
        tokens = self.tokens_per_step * self.held_out.batches
        for batch in range(self.held_out.batches):
            for number in range(self.options.accumulate):
                rows = self.held_out.rows(batch, *self._share(number))
                parts.append(self._loss(rows, tokens))
        return float(total(torch.stack(parts).sum(), self.layout))

    def _share(self, micro_batch: int) -> tuple[int, int]:
        """The first and the last row, exclusive, of a batch that are this rank's."""
        size = self.options.batch // (self.options.accumulate * self.layout.data)
        first = (micro_batch * self.layout.data + self.layout.data_rank) * size
        return first, first + size

    def _loss(self, rows: Tensor, tokens: int) -> Tensor:
        """This rank's part of the mean loss over `tokens` tokens of all ranks, and its gradients
        where they are enabled. rows: (n, seqlen + 1)."""
        device = self.layout.device
        if device.type == "cuda":
            rows = rows.pin_memory().to(device, non_blocking=True)
        half = self.options.dtype == "bfloat16" and self.options.mixed_precision == "autocast"
        with sequences(self.layout, self.options.seqlen) as mine:
            ids, targets = mine(rows[:, :-1]), mine(rows[:, 1:])
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                mean = self.model(ids, targets)
            if isinstance(mean, DTensor):
                mean = mean.full_tensor()
            loss = mean * (targets.numel() / tokens)
            if torch.is_grad_enabled():
                # FSDP divides the sum of gradients by the number of ranks that share it.
                (loss * self.layout.shard_count).backward()
        return loss.detach()

    def whole(self) -> LanguageModel | None:
        """The model as trained, unsharded, on rank 0; None on the others."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        if self.layout.rank:
            return None
        model = LanguageModel(replace(self.config, checkpointing=False))
        model.load_state_dict(state)
        return model.to(self.layout.device).eval()

    def write(self, model: LanguageModel) -> str:
        """Text that a whole model continues the prompt with."""
        # The last new token is not read.
        room = self.options.seqlen - len(self.prompt) + 1
        made = model.generate(
            self.prompt[None].to(self.layout.device),
            min(self.options.sample, room),
            temperature=self.options.temperature,
            seed=self.options.seed,
        )
        text = self.options.prompt + self.tokenizer.decode(made.tokens[0].tolist())
        # A model that has learned little writes bytes that a terminal would obey.
        return "".join(
            c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
        )


def _optimiser(model: LanguageModel, options: Options) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: decay would pull norms and λ towards no values at all."""
    decaying: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in model.parameters():
        decaying[p.dim() >= 2 and p.shape[-1] > 1].append(p)
    groups = [
        {"params": found, "weight_decay": options.weight_decay if decays else 0.0}
        for decays, found in decaying.items()
    ]
    return torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), fused=True)


def config_facts(config: LanguageModelConfig) -> dict[str, Any]:
    """The fields that a checkpoint's weights depend on."""
    found = dict(vars(config))
    for name in ("backend", "checkpointing"):
        del found[name]
    return found
