"""A step of decoding as a transaction: every layer writes its new tokens, or none of them count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import (
    DTYPES,
    autocast_dtype,
    check_device,
    check_tensor,
    describe,
    integer,
)
from resformer_kernels.kvcache.cache import pages
from resformer_kernels.kvcache.cache.layout import KVLayout
from resformer_kernels.kvcache.cache.placement import Placement
from resformer_kernels.kvcache.cache.storage import Copy, Slots
from resformer_kernels.kvcache.record import QUANTISED

_KINDS = {"k": "keys", "v": "values"}


@dataclass
class Transaction:
    """A step in progress: some layers have written its tokens, others have not yet."""

    sequences: tuple[int, ...]
    tokens: int
    """New tokens of each sequence."""
    lengths: Tensor
    """Lengths before the step, (B,) int32 on the cache's device."""
    table: Tensor | None
    """The op's block_table, with room for the new tokens."""
    num_splits: int
    """Splits for one query a sequence; 0 leaves them to the kernel."""
    written: set[tuple[str, int]] = field(default_factory=set)
    """("k" or "v", slot) of what holds the new tokens."""


class Transactions:
    """Opens and closes the transactions of a cache, one at a time."""

    def __init__(self, layout: KVLayout, slots: dict[str, Slots], place: Placement) -> None:
        """`slots` has keys under "k" and values under "v"; `place` says where tokens lie."""
        self.slots, self.place = slots, place
        self.open: Transaction | None = None
        self._num_layers = layout.num_layers
        self._slot_of = {"k": layout.key_slots, "v": layout.value_slots}
        codes = slots["k"].codes
        self._dtype, self._device, self._heads = codes.dtype, codes.device, codes.shape[3]
        self._at_rest: Transaction | None = None

    def slot(self, name: str, layer: int) -> int:
        """The slot of a layer's keys ("k") or values ("v")."""
        return self._slot_of[name][layer]

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, without those of the open transaction."""
        step = self.open
        pending = step.tokens if step is not None and sequence in step.sequences else 0
        return self.place.length(sequence) - pending

    def layer(self, layer: Any) -> int:
        """The number of a layer, checked."""
        number = integer("layer", layer)
        if not 0 <= number < self._num_layers:
            raise ValueError(f"layer must be 0 to {self._num_layers - 1}, got {number}")
        return number

    def check(self, layer: int, new: dict[str, Any], chosen: tuple[int, ...]) -> dict[str, Tensor]:
        """Check the new keys and values of a layer; return those that are given."""
        given = {n: self._check_one(n, x, layer, chosen) for n, x in new.items() if x is not None}
        if len(given) == 2 and given["k"].shape[1] != given["v"].shape[1]:
            raise ValueError(
                f"v must have k's {given['k'].shape[1]} tokens, got shape {tuple(given['v'].shape)}"
            )
        if self.open is not None and given:
            self._check_sequences(self.open, chosen)
            tokens = _tokens(given)
            if tokens != self.open.tokens:
                raise ValueError(
                    f"k and v must have the step's {self.open.tokens} tokens, got {tokens}; "
                    f"{self._lacking()}"
                )
        return given

    def _check_one(self, name: str, new: Any, layer: int, chosen: tuple[int, ...]) -> Tensor:
        heads, dim = self.slots[name].codes.shape[3:]
        axes = f"({len(chosen)}, T, {heads}, {dim})"
        check_tensor(name, new, 4, axes)
        slot = self.slot(name, layer)
        owner = self._slot_of[name].index(slot)
        if owner != layer:
            raise ValueError(
                f"{name} must be None: layer {layer} reads layer {owner}'s {_KINDS[name]}, got "
                f"{describe(new)}"
            )
        self.check_rows(name, new, chosen)
        if new.shape[2:] != (heads, dim) or new.shape[1] < 1:
            raise ValueError(f"{name} must be {axes}, T >= 1, got shape {tuple(new.shape)}")
        if self.open is not None and (name, slot) in self.open.written:
            raise RuntimeError(
                f"layer {layer} has appended its {_KINDS[name]} in this step already; "
                f"{self._lacking()}"
            )
        check_device(name, new, self._device, "the cache")
        if new.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires a gradient, and the cache has none: call it under torch.no_grad()"
            )
        if self._dtype in QUANTISED:
            if new.dtype not in DTYPES:
                raise TypeError(f"{name} must be a float tensor, got {new.dtype}")
        elif autocast_dtype(new.device, torch.float32) is not torch.float32:
            return new.to(self._dtype)
        elif new.dtype != self._dtype:
            raise TypeError(f"{name} must have the cache's dtype {self._dtype}, got {new.dtype}")
        return new

    def check_rows(self, name: str, x: Tensor, chosen: tuple[int, ...]) -> None:
        """ValueError unless `x` has a row for each of the sequences that a call is about."""
        rows, wanted = x.shape[0], len(chosen)
        if rows != wanted:
            raise ValueError(
                f"{name} must have a row for each of {wanted} sequences of the cache, got shape "
                f"{tuple(x.shape)}: name {rows} with sequences=, let add or free change their "
                f"number, or make a cache of batch={rows}"
            )

    def _check_sequences(self, step: Transaction, chosen: tuple[int, ...]) -> None:
        if step.sequences != chosen:
            raise ValueError(
                f"sequences must be the step's, {step.sequences}, got {chosen}; {self._lacking()}"
            )

    def state(
        self, layer: int, new: dict[str, Tensor], chosen: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The op's cache_seqlens and block_table for a layer that is given these new tokens.

        Before the transaction opens, the table has its later width and no new pages.
        """
        step = self.open
        if step is None and not new:
            rest = self._state_at_rest(chosen)
            return rest.lengths, rest.table
        for name in _KINDS:
            written = step is not None and (name, self.slot(name, layer)) in step.written
            if not written and name not in new:
                raise RuntimeError(
                    f"layer {layer}'s {_KINDS[name]} of this step are missing: give {name} to the "
                    "layer whose slot it is"
                )
        if step is None:
            self._check_room(chosen, _tokens(new))
            return self._lengths(chosen), self._table(chosen, _tokens(new))
        self._check_sequences(step, chosen)
        return step.lengths if new else step.lengths + step.tokens, step.table

    def _begin(self, chosen: tuple[int, ...], tokens: int) -> Transaction:
        """Open a transaction, with room for the new tokens."""
        self._check_room(chosen, tokens)
        lengths = self._lengths(chosen)
        self.copy(self.place.append(chosen, tokens))
        self._at_rest = None
        splits = self._plan(chosen)
        self.open = Transaction(chosen, tokens, lengths, self._table(chosen), splits)
        return self.open

    @contextmanager
    def writing(
        self, layer: int, new: dict[str, Tensor], chosen: tuple[int, ...]
    ) -> Iterator[Transaction]:
        """The transaction in which a layer writes `new`, opened if necessary; it closes once every
        slot is written. That of `state` at rest where nothing is written and none is open.

        An exception inside rolls back a transaction that nothing was written to.
        """
        step = self.open
        if step is None:
            step = self._begin(chosen, _tokens(new)) if new else self._state_at_rest(chosen)
        try:
            yield step
        except BaseException:
            if not step.written:
                self.rollback()
            raise
        step.written.update((name, self.slot(name, layer)) for name in new)
        if len(step.written) == sum(len(slots.codes) for slots in self.slots.values()):
            # Layers that write nothing may still attend: they take its lengths, table and splits.
            self.open, self._at_rest = None, step

    def settle(self, action: str) -> None:
        """RuntimeError within a step; else forget the cached state at rest, which is to change."""
        if self.open is not None:
            raise RuntimeError(f"{action} cannot be called within a step: {self._lacking()}")
        self._at_rest = None

    def rollback(self) -> None:
        """Give up the open transaction."""
        if self.open is None:
            return
        step, self.open = self.open, None
        before = [self.place.length(name) - step.tokens for name in step.sequences]
        self.place.crop(step.sequences, before)

    def copy(self, copies: list[Copy]) -> None:
        """Make the copies in every slot."""
        if copies:
            for slots in self.slots.values():
                slots.copy(copies)

    def _lacking(self) -> str:
        written = set() if self.open is None else self.open.written
        wanted = {
            slots.index(slot)
            for name, slots in self._slot_of.items()
            for slot in slots
            if (name, slot) not in written
        }
        layers = ", ".join(map(str, sorted(wanted)))
        return f"layers {layers} have yet to append in this step (or call rollback)"

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
        return torch.tensor(lengths, dtype=torch.int32).to(self._device)

    def _table(self, chosen: tuple[int, ...], tokens: int = 0) -> Tensor | None:
        table = self.place.table(chosen, tokens)
        return None if table is None else table.to(self._device)

    def _state_at_rest(self, chosen: tuple[int, ...]) -> Transaction:
        """What a transaction of no tokens would be, made of the last one where that is known."""
        rest = self._at_rest
        if rest is None or rest.sequences != chosen:
            lengths, table = self._lengths(chosen), self._table(chosen)
            rest = Transaction(chosen, 0, lengths, table, self._plan(chosen))
        elif rest.tokens:
            lengths = rest.lengths + rest.tokens
            rest = Transaction(chosen, 0, lengths, rest.table, rest.num_splits)
        self._at_rest = rest
        return rest

    def _plan(self, chosen: tuple[int, ...]) -> int:
        # A CPU's kernel reads the lengths itself; a GPU's launch is sized here, before it can.
        if self._device.type != "cuda" or not chosen or pages.unavailable_reason() is not None:
            return 0
        lengths = [self.place.length(sequence) for sequence in chosen]
        workers = torch.cuda.get_device_properties(self._device).multi_processor_count
        return pages.plan_decode(lengths, self._heads, workers).groups[0].num_splits


def _tokens(new: dict[str, Tensor]) -> int:
    return next(iter(new.values())).shape[1]
