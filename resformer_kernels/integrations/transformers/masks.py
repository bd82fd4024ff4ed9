"""The masks of `attn_implementation="resformer"`: whole, or in a form that the kernel reads faster.

transformers describes a mask by a function of positions and the padding. Where that function is
causal order or a window, `resformer_mask` returns a `KeyMask`, which holds (B, Tk) booleans and the
window; to everything but this package's attention it is the bool tensor (B, 1, Tq, Tk) that sdpa
would get. Any other function gives that tensor itself. A compiler gets what sdpa gets, None
included: causal order or no mask, as the attention module's `is_causal` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.utils import is_torchdynamo_compiling
from transformers.utils.import_utils import is_tracing
from typing_extensions import Self

Window = tuple[int, int]
"""Keys that a query sees on its left and right beside its own; -1 is unbounded."""


class KeyMask(Tensor):
    """A bool mask (B, 1, Tq, Tk), True where a query attends, held as keys and a window.

    Any operation on it runs on the whole mask and returns a plain tensor, so model code may slice,
    invert or copy it.

    Args:
        keys: (B, n) bool, True where a key may be attended to, n <= Tk. Query i has the position of
            key n - Tq + i; keys from n on are unused slots of a cache.
        window: around a query's position.
        padded: whether some of `keys` is False.
        lengths: Tq and Tk.
    """

    keys: Tensor
    window: Window
    padded: bool

    @staticmethod
    def __new__(cls, keys: Tensor, window: Window, padded: bool, lengths: tuple[int, int]) -> Self:
        mask: Self = Tensor._make_wrapper_subclass(
            cls, (keys.shape[0], 1, *lengths), dtype=torch.bool, device=keys.device
        )
        mask.keys, mask.window, mask.padded = keys, window, padded
        return mask

    # A compiler that is given this mask takes it apart, and puts it together, by these two.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[Window, bool]]:
        return ["keys"], (self.window, self.padded)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], held: tuple[Window, bool], size: Any, stride: Any
    ) -> KeyMask:
        return KeyMask(inner["keys"], *held, (size[2], size[3]))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _SAME or (function is torch.ops.aten.slice.Tensor and _is_all(*args)):
            mask: KeyMask = args[0]
            return KeyMask(mask.keys, mask.window, mask.padded, (mask.shape[2], mask.shape[3]))
        if function._schema.is_mutable:
            raise RuntimeError(
                f"a KeyMask cannot be written to, which {function} would do: clone it first"
            )
        args, kwargs = tree_map_only(KeyMask, KeyMask.whole, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KeyMask({self.keys}, window={self.window}, shape={tuple(self.shape)})"

    def whole(self) -> Tensor:
        """The mask as a plain tensor, (B, 1, Tq, Tk)."""
        q_length, kv_length = self.shape[2:]
        count = self.keys.shape[1]
        places = torch.arange(count, device=self.keys.device)
        ahead = places - places[count - q_length :, None]
        left, right = self.window
        visible = self.keys[:, None, None, :].expand(-1, 1, q_length, count)
        if left >= 0:
            visible = visible & (ahead >= -left)
        if right >= 0:
            visible = visible & (ahead <= right)
        return torch.nn.functional.pad(visible, (0, kv_length - count))


_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def _is_all(mask: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> bool:
    """Whether a slice keeps a whole axis, as in `mask[:, :, :, : keys.shape[-2]]`."""
    return not start and step == 1 and (end is None or end >= mask.shape[dim])


def _parts(function: Any) -> tuple[tuple[Any, ...], list[int]]:
    """The code objects of a mask function and its closures, and the integers that they hold."""
    cells = function.__closure__ or ()
    inner = [cell.cell_contents for cell in cells]
    codes, numbers = [function.__code__], []
    for item in (x for value in inner for x in (value if isinstance(value, tuple) else (value,))):
        if isinstance(item, int):
            numbers.append(item)
        elif hasattr(item, "__code__"):
            found, more = _parts(item)
            codes.extend(found)
            numbers.extend(more)
        else:
            codes.append(type(item))
    return tuple(codes), numbers


_CAUSAL_WINDOW = _parts(sliding_window_causal_mask_function(1))[0]
_TWO_SIDED_WINDOW = _parts(sliding_window_bidirectional_mask_function(1))[0]


def window_of(function: Any) -> Window | None:
    """The window that a mask function describes; None if it masks by anything else."""
    if function is causal_mask_function:
        return -1, 0
    if function is bidirectional_mask_function:
        return -1, -1
    if not hasattr(function, "__code__"):
        return None
    codes, numbers = _parts(function)
    # A causal window counts the query's own key, a two-sided one does not.
    if codes == _CAUSAL_WINDOW:
        return numbers[0] - 1, 0
    return (numbers[0], numbers[0]) if codes == _TWO_SIDED_WINDOW else None


def resformer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass: a `KeyMask` where one can say it, else what sdpa gets.

    The arguments are those of every mask function of transformers: queries start at position
    q_offset, keys at kv_offset, and attention_mask is bool, (B, all tokens so far). A compiler gets
    sdpa's mask, as it can read neither the function nor the padding; so does a caller that allows
    no skip, as transformers does for single tokens over a static cache, which are compiled.
    """
    compiling = is_torchdynamo_compiling()
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    if may_skip and not use_vmap and not compiling:
        window = window_of(mask_function)
        count = _count_keys(window, q_length, kv_length, q_offset, kv_offset)
        if window is not None and count is not None and not is_tracing(attention_mask):
            keys = _keys(attention_mask, batch_size, kv_offset, count, device)
            padded = attention_mask is not None and not bool(keys.all())
            return KeyMask(keys, window, padded, (q_length, kv_length))
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        # Skipping leaves causal order to what the attention module says of itself.
        allow_is_causal_skip=allow_is_causal_skip and compiling,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and compiling,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _count_keys(
    window: Window | None, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int
) -> int | None:
    """How many of kv_length keys a `KeyMask` has: its last is the last query's own. None where no
    count says where the queries are."""
    if window is None or window == (-1, -1):
        return kv_length
    if isinstance(q_offset, Tensor):
        # A static cache holds its length on the device. Reading it costs one synchronisation.
        if is_tracing(q_offset):
            return None
        q_offset = int(q_offset)
    count = q_offset + q_length - kv_offset
    fits = q_length <= count <= kv_length
    # Keys after the last query are hidden by causal order, and by nothing else.
    return count if fits and (window[1] == 0 or count == kv_length) else None


def _keys(padding: Tensor | None, batch_size: int, start: int, count: int, device: Any) -> Tensor:
    """(B, count) bool: which of the keys from `start` on are there; those past the padding not."""
    if padding is None:
        return torch.ones((batch_size, count), dtype=torch.bool, device=device)
    missing = max(0, start + count - padding.shape[-1])
    return torch.nn.functional.pad(padding, (0, missing))[:, start : start + count]
