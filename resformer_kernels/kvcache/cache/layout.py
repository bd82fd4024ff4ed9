"""The slots of a cache that each layer reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from resformer_kernels._core.checks import integer, integers


@dataclass(frozen=True)
class KVLayout:
    """The key slot and the value slot of every layer; a slot holds one layer's keys or values.

    Layers with the same slot read the same tensor, and the first of them writes it.

    Args:
        key_slots: for each layer the slot of its keys, as a list or a tuple of ints. Slots are
            numbered from 0, and each is used.
        value_slots: the same for values.

    Raises:
        TypeError, ValueError: the lists are empty, differ in length, or leave a slot out.

    >>> KVLayout.svformer(4)
    KVLayout(key_slots=(0, 1, 2, 3), value_slots=(0, 0, 0, 0))
    """

    key_slots: tuple[int, ...]
    value_slots: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("key_slots", "value_slots"):
            object.__setattr__(self, name, _slots(name, getattr(self, name)))
        if len(self.key_slots) != len(self.value_slots):
            raise ValueError(
                f"value_slots must name a slot for each of key_slots' {len(self.key_slots)} "
                f"layers, got {len(self.value_slots)}"
            )

    @classmethod
    def standard(cls, num_layers: int) -> KVLayout:
        """Each layer has keys and values of its own: Transformer and ResFormer."""
        own = _range("num_layers", num_layers)
        return cls(own, own)

    @classmethod
    def svformer(cls, num_layers: int) -> KVLayout:
        """Keys in each layer, and one slot of values for all: SVFormer (arXiv 2410.17897)."""
        own = _range("num_layers", num_layers)
        return cls(own, (0,) * len(own))

    @classmethod
    def cla(cls, num_layers: int, n: int, *, share_values: bool = False) -> KVLayout:
        """Each n adjacent layers share their keys: cross-layer attention (arXiv 2405.12981).

        That paper shares the values of the same layers too: `share_values=True`.
        """
        shared = _adjacent(num_layers, n)
        return cls(shared, shared if share_values else _range("num_layers", num_layers))

    @classmethod
    def svformer_cla(cls, num_layers: int, n: int) -> KVLayout:
        """Each n adjacent layers share their keys, and all layers one slot of values."""
        shared = _adjacent(num_layers, n)
        return cls(shared, (0,) * len(shared))

    @classmethod
    def fused_kv_lite(cls, num_layers: int, middle: int) -> KVLayout:
        """Keys and values in each layer up to `middle`, counted from 0; each later layer reads the
        keys of `middle` and the values of layer 0: FusedKV-Lite (arXiv 2512.03870).

        (middle + 1) / num_layers of a standard cache's bytes; the paper's `middle` is
        num_layers / 2 - 1. Keys that are rotated (RoPE) are shared rotated, as in the paper.

        >>> KVLayout.fused_kv_lite(4, 1)
        KVLayout(key_slots=(0, 1, 1, 1), value_slots=(0, 1, 0, 0))
        """
        layers = _range("num_layers", num_layers)
        last = integer("middle", middle)
        if not 0 <= last < len(layers):
            raise ValueError(f"middle must be 0 to num_layers - 1 = {len(layers) - 1}, got {last}")
        keys = tuple(min(layer, last) for layer in layers)
        return cls(keys, tuple(layer if layer <= last else 0 for layer in layers))

    @property
    def num_layers(self) -> int:
        """Number of layers that read the cache."""
        return len(self.key_slots)

    @property
    def num_key_slots(self) -> int:
        """Number of key slots."""
        return max(self.key_slots) + 1

    @property
    def num_value_slots(self) -> int:
        """Number of value slots."""
        return max(self.value_slots) + 1

    def writes_keys(self, layer: int) -> bool:
        """Whether `layer`, counted from 0, is the first with its key slot, which writes it."""
        return self.key_slots.index(self.key_slots[layer]) == layer

    def writes_values(self, layer: int) -> bool:
        """Whether `layer`, counted from 0, is the first with its value slot, which writes it."""
        return self.value_slots.index(self.value_slots[layer]) == layer


def _slots(name: str, slots: object) -> tuple[int, ...]:
    found = tuple(integers(name, slots))
    if not found or set(found) != set(range(max(found) + 1)):
        raise ValueError(
            f"{name} must name at least one layer's slot and every slot from 0 up to the largest, "
            f"got {found}"
        )
    return found


def _range(name: str, count: int) -> tuple[int, ...]:
    return tuple(range(integer(name, count, 1)))


def _adjacent(num_layers: int, n: int) -> tuple[int, ...]:
    together = integer("n", n, 1)
    return tuple(layer // together for layer in _range("num_layers", num_layers))
