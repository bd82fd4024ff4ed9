"""A cache of keys and values whose layers may share slots, as SVFormer shares its values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import DTYPES, alone, describe, integer, integers
from resformer_kernels._core.select import prepare, select
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.kvcache.cache.layout import KVLayout
from resformer_kernels.kvcache.cache.placement import Pages, Placement, Rows
from resformer_kernels.kvcache.cache.storage import Slots
from resformer_kernels.kvcache.cache.transaction import Transactions
from resformer_kernels.kvcache.record import QUANTISED
from resformer_kernels.kvcache.reference import append


class SharedValueCache:
    """Keys and values of `batch` or more sequences, for every layer of a model.

    `layout` says which layers share memory: SVFormer (Zhou et al., arXiv 2410.17897) keeps L slots
    of keys and one of values, (L + 1) / 2L of a standard cache's bytes. A ResFormer keeps its mixed
    values V': the mix and its gates run on the new tokens, and V' is what is appended.

    Contiguous, with `batch` and `max_seqlen`: keys (key_slots, batch, max_seqlen, Hkv, Dk) and
    values (value_slots, batch, max_seqlen, Hkv, Dv), with `batch` empty sequences to begin with.
    Paged, with `num_pages` and `page_size`: keys (key_slots, pages, page_size, Hkv, Dk) and values
    alike, one block table for all; `batch` sequences to begin with (none by default; `add` makes
    more), and `max_seqlen`, where given, limits each. Paging needs the compiled host module.

    A step appends T new tokens to each sequence: every layer that writes a slot appends once, in
    any order, with `append` or within `attend`. Layers count from 0. Then the step is over: layers
    that write nothing may still attend, the next step may begin, and `crop`, `reorder`, `fork` and
    `free` may be called; `rollback` gives up an unfinished step. Sequences go by names, ints that
    `add`, `fork` and `reorder` return; `sequences` has those of the batch in order. A call that
    raises leaves the cache as it was. `copy` and `pickle` make an independent cache of the same
    contents, an unfinished step's included.

    Whether keys are rotated (RoPE) before they are appended is the caller's choice. The models of
    this package append rotated ones, which `reorder`, `fork` and `crop` keep right.

    Args:
        layout: which slots each layer reads.
        batch, max_seqlen, num_pages, page_size: as above, in sequences, tokens, pages, tokens.
        num_kv_heads: Hkv.
        head_dim: Dk.
        value_head_dim: Dv; None: Dk.
        dtype: float32, bfloat16, float16 (float64: the reference alone attends), or int8,
            float8_e4m3fn, float8_e5m2 with a float32 scale per token and head (float8 on a CPU:
            the reference alone attends).
        device: where the tensors lie.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, or a mix of the two forms.
        RuntimeError: paged, and the host module is not built.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        batch: int | None = None,
        max_seqlen: int | None = None,
        num_pages: int | None = None,
        page_size: int | None = None,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout must be a KVLayout, got {describe(layout)}")
        if dtype not in (*DTYPES, *QUANTISED):
            raise TypeError(
                "dtype must be float32, bfloat16, float16, float64, int8, float8_e4m3fn or "
                f"float8_e5m2, got {dtype}"
            )
        self.layout, self.num_kv_heads = layout, integer("num_kv_heads", num_kv_heads, 1)
        key_dim = value_dim = integer("head_dim", head_dim, 1)
        if value_head_dim is not None:
            value_dim = integer("value_head_dim", value_head_dim, 1)
        self.dtype, self.device = dtype, torch.empty(0, device=device).device
        self._place: Placement
        begun, rows, length, self._place = _placement(batch, max_seqlen, num_pages, page_size)
        self.paged = num_pages is not None
        shape = (rows, length, self.num_kv_heads)
        self._keys = Slots((layout.num_key_slots, *shape, key_dim), dtype, self.device)
        self._values = Slots((layout.num_value_slots, *shape, value_dim), dtype, self.device)
        slots = {"k": self._keys, "v": self._values}
        self._transactions = Transactions(layout, slots, self._place)
        self._batch = self._place.create(begun)

    @property
    def keys(self) -> Tensor:
        """(key_slots, B, T, Hkv, Dk) or (key_slots, pages, page_size, Hkv, Dk)."""
        return self._keys.codes

    @property
    def values(self) -> Tensor:
        """(value_slots, B, T, Hkv, Dv) or (value_slots, pages, page_size, Hkv, Dv)."""
        return self._values.codes

    @property
    def key_scales(self) -> Tensor | None:
        """float32, as `keys` without its last axis; None where the cache is not quantised."""
        return self._keys.scales

    @property
    def value_scales(self) -> Tensor | None:
        """float32, as `values` without its last axis; None where the cache is not quantised."""
        return self._values.scales

    @property
    def sequences(self) -> tuple[int, ...]:
        """The names of the batch's sequences, in its order."""
        return tuple(self._batch)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, in the batch's order, without those of an unfinished step."""
        return tuple(self._transactions.length(name) for name in self._batch)

    @property
    def max_seqlen(self) -> int:
        """The most tokens that a sequence can have."""
        return self._place.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their scales, used or not."""
        return sum(x.nbytes for x in (*self._keys.tensors(), *self._values.tensors()))

    @property
    def utilisation(self) -> float:
        """Share of the room for tokens (contiguous) or of the pages (paged) that is in use."""
        return self._place.utilisation()

    def __repr__(self) -> str:
        kind = "paged" if self.paged else "contiguous"
        return (
            f"SharedValueCache({kind}, {self.layout.num_layers} layers, {len(self._batch)} "
            f"sequences of {self.dtype} on {self.device}, {self.nbytes} bytes, "
            f"{self.utilisation:.0%} used)"
        )

    def __copy__(self) -> SharedValueCache:
        # Two caches over the same tensors would each take for free what the other has written to.
        return copy.deepcopy(self)

    def append(
        self,
        layer: int,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        sequences: Sequence[int] | None = None,
    ) -> None:
        """Write a layer's new tokens, without attending.

        Args:
            layer: from 0.
            k: (B, T, Hkv, Dk), the cache's dtype, or any float where it is quantised; None where
                the layer's key slot is another layer's.
            v: (B, T, Hkv, Dv), likewise.
            sequences: names of B sequences; None: all of the batch, in its order.

        Raises:
            TypeError, ValueError: a layer or sequence that does not exist, a tensor of the wrong
                shape, dtype or device, keys or values for a slot of another layer, or other
                sequences or another T than the step's.
            RuntimeError: the layer has appended in this step already, the cache is full, or a
                tensor requires a gradient.
        """
        if k is None and v is None:
            raise ValueError("k and v are both None: there is nothing to append")
        steps, chosen = self._transactions, self._names(sequences)
        layer = steps.layer(layer)
        new = steps.check(layer, {"k": k, "v": v}, chosen)
        with steps.writing(layer, new, chosen) as step:
            for name, x in new.items():
                codes, scales = steps.slots[name].slot(steps.slot(name, layer))
                append(codes, scales, x, step.table, step.lengths)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        sequences: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Append what is given, then attend over the layer's slots.

        Args:
            layer: from 0.
            q: (B, Tq, Hq, Dk); the last query stands at the last token.
            k, v: as in `append`; None where the slot is another layer's, or was appended to in this
                step already, or where the step is over and nothing is to be appended.
            sequences: as in `append`.
            options: `causal` (True), `window`, `scale`, `softcap`, `sinks`, `key_mask`,
                `exclusive`, `exclusive_eps`, `out_gate`, `num_splits`, `return_lse` and `backend`
                of `attention_with_kvcache`. What `exclusive` takes out lies along the value that
                the layer's slot holds for a query's own token: appended by then, as every key.

        Returns:
            out (B, Tq, Hq, Dv), or (out, lse) with `return_lse`, as `attention_with_kvcache`.

        Raises:
            As `append` and `attention_with_kvcache`; RuntimeError, too, where a step has begun and
            the layer's slots lack its tokens.
        """
        steps, chosen = self._transactions, self._names(sequences)
        layer = steps.layer(layer)
        if isinstance(q, Tensor) and q.dim() == 4:
            steps.check_rows("q", q, chosen)
        new = steps.check(layer, {"k": k, "v": v}, chosen)
        lengths, table = steps.state(layer, new, chosen)
        keys, key_scales = self._keys.slot(steps.slot("k", layer))
        values, value_scales = self._values.slot(steps.slot("v", layer))
        request = prepare(
            attention_with_kvcache,
            q,
            keys,
            values,
            new.get("k"),
            new.get("v"),
            cache_seqlens=lengths,
            block_table=table,
            k_scale=key_scales,
            v_scale=value_scales,
            **options,
        )
        backend = select(request.op, request.backend, request.backends, request.call)
        call = request.call
        # From here on nothing but a lack of pages can raise.
        with steps.writing(layer, new, chosen) as step:
            splits = call.num_splits or (step.num_splits if q.shape[1] == 1 else 0)
            call = call._replace(block_table=step.table, num_splits=splits)
            out, lse = backend.run(call)
        return (out, lse) if call.return_lse else out

    def read(self, layer: int, *, sequences: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer attends over, (B, T, Hkv, D), for other attention code.

        T is the longest sequence's length, tokens of an unfinished step included; tokens past a
        shorter one's end are meaningless. Views of the cache, to be read before it changes, where
        the batch is whole and was never reordered; else copies. Quantised caches give float32.

        Raises:
            ValueError, TypeError: a layer or sequence that does not exist.
            RuntimeError: a step has begun and the layer's slots lack its tokens.
        """
        steps, chosen = self._transactions, self._names(sequences)
        layer = steps.layer(layer)
        lengths, table = steps.state(layer, {}, chosen)
        tokens = int(lengths.max()) if chosen else 0
        keys = self._keys.read(steps.slot("k", layer), table, tokens)
        return keys, self._values.read(steps.slot("v", layer), table, tokens)

    def add(self, count: int = 1) -> tuple[int, ...]:
        """Names of `count` new empty sequences, put at the end of the batch. RuntimeError where a
        contiguous cache has no row left."""
        count = integer("count", count, 0)
        self._transactions.settle("add")
        created = self._place.create(count)
        self._batch += created
        return tuple(created)

    def crop(self, lengths: int | Sequence[int], *, sequences: Sequence[int] | None = None) -> None:
        """Keep the first tokens of each sequence: one length for all, or one each.

        ValueError where a sequence has fewer; RuntimeError within a step.
        """
        self._transactions.settle("crop")
        chosen = self._names(sequences)
        if alone(lengths):
            wanted = [integer("lengths", lengths)] * len(chosen)
        else:
            wanted = integers("lengths", lengths)
        if len(wanted) != len(chosen):
            raise ValueError(
                f"lengths must be an int or one for each of {len(chosen)} sequences, "
                f"got {len(wanted)}"
            )
        self._place.crop(chosen, wanted)

    def reorder(self, picks: Sequence[int] | Tensor) -> tuple[int, ...]:
        """Make the batch of the sequences at `picks`, places in the present batch: beam search.

        A repeated pick is a fork; sequences never picked are freed. Paged, no token is copied;
        contiguous, only those of a fork. Returns `sequences`. ValueError for a place
        that does not exist; RuntimeError within a step, or where a contiguous cache lacks rows.
        """
        self._transactions.settle("reorder")
        places = integers("picks", picks)
        for place in places:
            if not 0 <= place < len(self._batch):
                raise ValueError(f"picks must be 0 to {len(self._batch) - 1}, got {place}")
        self._batch, copies = self._place.reorder(self._batch, places)
        self._transactions.copy(copies)
        return self.sequences

    def fork(self, sequence: int) -> int:
        """Another sequence with the same tokens, at the end of the batch; its name.

        Paged, pages are shared and copied when one of the two writes into them; contiguous, the
        tokens are copied to a free row. ValueError for a sequence that does not exist; RuntimeError
        within a step, or where a contiguous cache has no row left.
        """
        self._transactions.settle("fork")
        twin, copies = self._place.fork(integer("sequence", sequence))
        self._transactions.copy(copies)
        self._batch.append(twin)
        return twin

    def free(self, sequences: Sequence[int] | int) -> None:
        """Remove sequences from the batch and free their room. ValueError for one that does not
        exist; RuntimeError within a step."""
        self._transactions.settle("free")
        if alone(sequences):
            chosen = [integer("sequences", sequences)]
        else:
            chosen = integers("sequences", sequences)
        self._place.free(chosen)
        self._batch = [name for name in self._batch if name not in chosen]

    def rollback(self) -> None:
        """Give up an unfinished step, if any."""
        self._transactions.rollback()

    def _names(self, sequences: Sequence[int] | None) -> tuple[int, ...]:
        if sequences is None:
            return tuple(self._batch)
        chosen = tuple(integers("sequences", sequences))
        for sequence in chosen:
            self._place.length(sequence)
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"a sequence is named twice in {chosen}")
        return chosen


def _placement(
    batch: int | None, max_seqlen: int | None, num_pages: int | None, page_size: int | None
) -> tuple[int, int, int, Placement]:
    """Sequences to begin with, number of rows or pages, their length, and their allocator."""
    sizes = {"batch": batch, "max_seqlen": max_seqlen}
    sizes |= {"num_pages": num_pages, "page_size": page_size}
    for name, size in sizes.items():
        if size is not None:
            sizes[name] = integer(name, size, 0 if name in ("batch", "num_pages") else 1)
    batch, max_seqlen, num_pages, page_size = sizes.values()
    if num_pages is not None and page_size is not None:
        return batch or 0, num_pages, page_size, Pages(num_pages, page_size, max_seqlen)
    if num_pages is None and page_size is None and batch is not None and max_seqlen is not None:
        return batch, batch, max_seqlen, Rows(batch, max_seqlen)
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    raise ValueError(
        "a cache takes batch and max_seqlen (contiguous), or num_pages and page_size (paged; batch "
        f"and max_seqlen may be added), got {given}"
    )
