"""How new tokens come into a cache: layer by layer, all layers before the next tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import DTYPES, autocast_dtype, check_tensor, describe
from resformer_kernels.kvcache.cache import pages
from resformer_kernels.kvcache.cache.layout import KVLayout
from resformer_kernels.kvcache.cache.placement import Placement
from resformer_kernels.kvcache.cache.storage import Copy, Slots
from resformer_kernels.kvcache.record import QUANTISED


@dataclass
class Step:
    """Tokens on their way in: some layers have written them, others have not yet."""

    sequences: tuple[int, ...]
    tokens: int
    lengths: Tensor
    """Before the step, (B,) int32 on the cache's device."""
    table: Tensor | None
    """The op's block_table, with room for the new tokens."""
    num_splits: int
    """For one query a sequence; 0 leaves it to the kernel."""
    written: set[tuple[str, int]] = field(default_factory=set)
    """("k" or "v", slot) of what holds the new tokens."""


@dataclass
class Steps:
    """The step in progress, if any, over a placement and the tensors that it places."""

    layout: KVLayout
    slots: dict[str, Slots]
    """Keys under "k" and values under "v"."""
    place: Placement
    dtype: torch.dtype
    device: torch.device
    step: Step | None = None
    _resting: tuple[tuple[int, ...], Tensor, Tensor | None] | None = None

    def slot(self, name: str, layer: int) -> int:
        """The slot of a layer's keys ("k") or values ("v")."""
        return (self.layout.key_slots if name == "k" else self.layout.value_slots)[layer]

    def pending(self, sequence: int) -> int:
        """Tokens of a sequence that an unfinished step has made room for."""
        step = self.step
        return step.tokens if step is not None and sequence in step.sequences else 0

    def check(self, layer: Any, new: dict[str, Any], chosen: tuple[int, ...]) -> dict[str, Tensor]:
        """New keys and values (those that are given), once all about them is known to be right."""
        layout, step = self.layout, self.step
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"layer must be an int, got {describe(layer)}")
        if not 0 <= layer < layout.num_layers:
            raise ValueError(f"layer must be 0 to {layout.num_layers - 1}, got {layer}")
        given = {name: x for name, x in new.items() if x is not None}
        checked = {name: self._check_one(name, x, layer, chosen) for name, x in given.items()}
        counts = {x.shape[1] for x in checked.values()}
        if len(counts) > 1:
            shape = tuple(checked["v"].shape)
            raise ValueError(f"v must have k's {checked['k'].shape[1]} tokens, got shape {shape}")
        if step is None or not given:
            return checked
        if step.sequences != chosen:
            raise ValueError(
                f"sequences must be the step's, {step.sequences}, got {chosen}; {self._lacking()}"
            )
        if counts != {step.tokens}:
            raise ValueError(
                f"k and v must have the step's {step.tokens} tokens, got {counts.pop()}; "
                f"{self._lacking()}"
            )
        return checked

    def _check_one(self, name: str, new: Any, layer: int, chosen: tuple[int, ...]) -> Tensor:
        heads, dim = self.slots[name].codes.shape[3:]
        axes = f"({len(chosen)}, T, {heads}, {dim})"
        check_tensor(name, new, 4, axes)
        kind = "keys" if name == "k" else "values"
        slot = self.slot(name, layer)
        owner = (self.layout.key_slots if name == "k" else self.layout.value_slots).index(slot)
        if owner != layer:
            raise ValueError(
                f"{name} must be None: layer {layer} reads layer {owner}'s {kind}, got "
                f"{describe(new)}"
            )
        if (new.shape[0], *new.shape[2:]) != (len(chosen), heads, dim) or new.shape[1] < 1:
            raise ValueError(f"{name} must be {axes}, T >= 1, got shape {tuple(new.shape)}")
        if self.step is not None and (name, slot) in self.step.written:
            raise RuntimeError(
                f"layer {layer} has appended its {kind} in this step already; {self._lacking()}"
            )
        return self._check_kind(name, new)

    def _check_kind(self, name: str, new: Tensor) -> Tensor:
        if new.device != self.device:
            raise ValueError(
                f"{name} must be on the cache's device {self.device}, got {new.device}"
            )
        if new.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires a gradient, and the cache has none: call it under torch.no_grad()"
            )
        if self.dtype in QUANTISED:
            if new.dtype not in DTYPES:
                raise TypeError(f"{name} must be a float tensor, got {new.dtype}")
        elif autocast_dtype(new.device, torch.float32) is not torch.float32:
            return new.to(self.dtype)
        elif new.dtype != self.dtype:
            raise TypeError(f"{name} must have the cache's dtype {self.dtype}, got {new.dtype}")
        return new

    def state(
        self, layer: int, new: dict[str, Tensor], chosen: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The op's cache_seqlens and block_table for a layer that is given these new tokens. Those
        of a step that has yet to begin are as wide as they will be, and not filled."""
        step = self.step
        if step is None and not new:
            return self._at_rest(chosen)
        for name in ("k", "v"):
            there = step is not None and (name, self.slot(name, layer)) in step.written
            if not there and name not in new:
                kind = "keys" if name == "k" else "values"
                raise RuntimeError(
                    f"layer {layer}'s {kind} of this step are missing: give {name} to the layer "
                    "whose slot it is"
                )
        if step is None:
            tokens = next(iter(new.values())).shape[1]
            self._check_room(chosen, tokens)
            return self._lengths(chosen), self._table(chosen, tokens)
        if step.sequences != chosen:
            raise ValueError(
                f"sequences must be the step's, {step.sequences}, got {chosen}; {self._lacking()}"
            )
        return step.lengths if new else step.lengths + step.tokens, step.table

    def _begin(self, chosen: tuple[int, ...], new: dict[str, Tensor]) -> Step:
        """A new step with room for the new tokens."""
        tokens = next(iter(new.values())).shape[1]
        self._check_room(chosen, tokens)
        lengths = self._lengths(chosen)
        self.copy(self.place.append(chosen, tokens))
        self._resting = None
        splits = self._plan(chosen)
        self.step = Step(chosen, tokens, lengths, self._table(chosen), splits)
        return self.step

    @contextmanager
    def writing(
        self, layer: int, new: dict[str, Tensor], chosen: tuple[int, ...]
    ) -> Iterator[Step | None]:
        """The step in which a layer writes `new`, begun where there is none; None where nothing is
        written and none is in progress. The step is over once every slot has been written. What
        fails has written nothing, and a step that began for it never was."""
        step = self.step
        if step is None and new:
            step = self._begin(chosen, new)
        try:
            yield step
        except BaseException:
            if step is not None and not step.written:
                self.rollback()
            raise
        if step is None:
            return
        step.written.update((name, self.slot(name, layer)) for name in new)
        if len(step.written) == self.layout.num_key_slots + self.layout.num_value_slots:
            self.step = None

    def settle(self, action: str) -> None:
        """RuntimeError within a step; else forget what described the sequences until now."""
        if self.step is not None:
            raise RuntimeError(f"{action} cannot be called within a step: {self._lacking()}")
        self._resting = None

    def rollback(self) -> None:
        """Give up the step in progress."""
        if self.step is None:
            return
        step, self.step = self.step, None
        kept = [self.place.length(name) - step.tokens for name in step.sequences]
        self.place.crop(step.sequences, kept)

    def copy(self, copies: list[Copy]) -> None:
        """Make the copies in every slot."""
        if copies:
            for slots in self.slots.values():
                slots.copy(copies)

    def _lacking(self) -> str:
        written = set() if self.step is None else self.step.written
        layout = self.layout
        layers = [
            str(layer)
            for layer in range(layout.num_layers)
            if (layout.writes_keys(layer) and ("k", self.slot("k", layer)) not in written)
            or (layout.writes_values(layer) and ("v", self.slot("v", layer)) not in written)
        ]
        return f"layers {', '.join(layers)} have yet to append in this step (or call rollback)"

    def _check_room(self, chosen: tuple[int, ...], tokens: int) -> None:
        for sequence in chosen:
            length = self.place.length(sequence)
            if length + tokens > self.place.capacity:
                raise RuntimeError(
                    f"the cache is full: sequence {sequence} has {length} of "
                    f"{self.place.capacity} tokens, and {tokens} more were to be appended"
                )

    def _lengths(self, chosen: tuple[int, ...]) -> Tensor:
        lengths = [self.place.length(sequence) for sequence in chosen]
        return torch.tensor(lengths, dtype=torch.int32).to(self.device)

    def _table(self, chosen: tuple[int, ...], tokens: int = 0) -> Tensor | None:
        table = self.place.table(chosen, tokens)
        return None if table is None else table.to(self.device)

    def _at_rest(self, chosen: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        if self._resting is None or self._resting[0] != chosen:
            self._resting = (chosen, self._lengths(chosen), self._table(chosen))
        return self._resting[1], self._resting[2]

    def _plan(self, chosen: tuple[int, ...]) -> int:
        # A CPU's kernel reads the lengths itself; a GPU's cannot, and launches must be sized here.
        if self.device.type != "cuda" or not chosen or pages.unavailable_reason() is not None:
            return 0
        lengths = [self.place.length(sequence) for sequence in chosen]
        workers = torch.cuda.get_device_properties(self.device).multi_processor_count
        plan = pages.plan_decode(lengths, self.slots["k"].codes.shape[3], workers)
        return plan.groups[0].num_splits
