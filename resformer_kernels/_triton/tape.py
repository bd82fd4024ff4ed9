"""Calls of a launcher that were made before, replayed with other pointers.

A launcher decides by metadata alone: shapes, strides, dtypes, alignment, numbers. So the second
call with the same metadata is recorded while it runs, its allocations, torch's ops and launches,
and written down as a Python function of its tensors in which all else is constant. From the third
call on that function runs in the launcher's place.

A launcher that waits for the device, or leaves it, is never recorded: it runs as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from resformer_kernels._triton import launch
from resformer_kernels._triton.available import interpreted

SWITCHES = (launch.POISON, "RESFORMER_MIX")
"""Variables of the environment that launchers look at."""
_MOST = 1024
"""Calls of a launcher that are remembered."""
_WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")
_SEVERAL = (list, tuple)
LAUNCHERS: dict[str, Replayed] = {}
"""Of each op that was called, by its name."""
_everywhere = False


@contextmanager
def everywhere() -> Iterator[None]:
    """Within it calls are replayed on a CPU too: for tests, and to measure without a GPU."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before
        forget()


def forget() -> None:
    """Record anew: after a change of what launchers decide by, such as the table of tiles."""
    for launcher in LAUNCHERS.values():
        launcher.clear()


class Replayed:
    """A launcher whose calls are replayed.

    Args:
        name: of its op.
        run: the launcher, of the op's arguments.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self._run = run
        self._replays: dict[Any, Callable[..., Any] | None] = {}
        """By metadata; None after the first call."""
        self._plain: dict[Any, str] = {}
        """By metadata, why a call is not recorded."""
        LAUNCHERS[name] = self

    def clear(self) -> None:
        """Forget all calls."""
        self._replays.clear()
        self._plain.clear()

    @property
    def recorded(self) -> int:
        """Number of recordings."""
        return sum(replay is not None for replay in self._replays.values())

    @property
    def problems(self) -> list[str]:
        """Why calls are not recorded."""
        return list(self._plain.values())

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """Serve a call of the op."""
        tensors: list[Tensor] = []
        found = _metadata(arguments, tensors)
        if not tensors:
            return self._run(*arguments)
        device = tensors[0].device
        found += device, launch.assumed()
        found += map(os.environ.get, SWITCHES)
        if len(set(map(id, tensors))) != len(tensors):
            # One tensor in several places is one argument.
            places = [id(x) for x in tensors]
            found += map(places.index, places)
            tensors = [x for i, x in enumerate(tensors) if places.index(id(x)) == i]
        key = tuple(found)
        replay = self._replays.get(key)
        if replay is None or launch.redirected():
            return self._remembered(key, tensors, arguments)
        if launch.current(device):
            return replay(*tensors)
        with launch.on(device):
            return replay(*tensors)

    def _remembered(self, key: Any, tensors: list[Tensor], arguments: tuple[Any, ...]) -> Any:
        """A call that is not replayed, yet."""
        served = tensors[0].is_cuda or _everywhere
        if not served or launch.redirected() or key in self._plain:
            return self._run(*arguments)
        if key not in self._replays:
            _put(self._replays, key, None)
            return self._run(*arguments)
        recording = Recording(tensors)
        with launch.taken_by(recording), recording:
            result = self._run(*arguments)
        replay = recording.function(result)
        if recording.problem is None:
            self._replays[key] = replay
        else:
            _put(self._plain, key, recording.problem)
        return result


def _put(found: dict[Any, Any], key: Any, value: Any) -> None:
    """Remember a call, and forget the oldest where there are too many."""
    if len(found) >= _MOST:
        found.pop(next(iter(found)), None)
    found[key] = value


def _metadata(arguments: Iterable[Any], tensors: list[Tensor]) -> list[Any]:
    """All that a launcher decides by, but for the environment; tensors are added to the list."""
    found: list[Any] = []
    for x in arguments:
        if x is None:
            found.append(None)
        elif isinstance(x, Tensor):
            tensors.append(x)
            found.append((x.shape, x.stride(), x.dtype, x.data_ptr() & 15))
        elif type(x) in _SEVERAL:
            found.append(tuple(_metadata(x, tensors)))
        else:
            # 0.0 equals -0.0.
            found.append(x or repr(x))
    return found


class Step(NamedTuple):
    """A line of the function, and the numbers of the tensors that it makes and reads."""

    line: str
    makes: set[int]
    reads: set[int]
    kept: bool
    """Whether it does more than make tensors."""


class Recording(TorchDispatchMode):
    """A call, as it runs. Its tensors have numbers, and names t0, t1, ..., the arguments first."""

    def __init__(self, arguments: list[Tensor]) -> None:
        super().__init__()
        self.problem: str | None = None
        """Why the call cannot be replayed."""
        self._device, self._count = arguments[0].device, len(arguments)
        self._steps: list[Step] = []
        self._constants: dict[str, Any] = {}
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []
        """All tensors, so that none has another's id."""
        self._roots: dict[int, tuple[int, int]] = {}
        """For a view: what it is a view of, and the bytes from there to it."""
        for x in arguments:
            self._add(x)

    def _add(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return self._numbers.setdefault(id(tensor), len(self._kept) - 1)

    def _number(self, tensor: Tensor) -> int:
        found = self._numbers.get(id(tensor))
        if found is None:
            self.problem = "it uses a tensor that no argument and no op gave"
        return found or 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if _waits(func, given):
            self.problem = f"{func} waits for the device"
        if any(x.device != self._device for x in made):
            self.problem = f"{func} leaves the device"
        reads = {self._number(x) for x in given}
        fresh = {self._add(x) for x in made if id(x) not in self._numbers}
        for x in made:
            self._find_root(x, given)
        if func._schema.name in _ALLOCATIONS:
            form = f"{tuple(made[0].shape)}, {made[0].stride()}"
            more = f"dtype={self._named(made[0].dtype)}, device={self._named(made[0].device)}"
            call = f"{self._named(torch.empty_strided)}({form}, {more})"
        else:
            passed = [self._written(x, set()) for x in args]
            passed += [f"{name}={self._written(x, set())}" for name, x in kwargs.items()]
            call = f"{self._named(func)}({', '.join(passed)})"
        if made:
            several = "," if isinstance(result, list | tuple) else ""
            call = f"{', '.join(f't{self._number(x)}' for x in made)}{several} = {call}"
        self._steps.append(Step(call, fresh, reads, func._schema.is_mutable or not made))
        return result

    def _find_root(self, made: Tensor, given: list[Tensor]) -> None:
        for x in given:
            if x is not made and _memory(x) == _memory(made):
                root, before = self._root(x)
                self._roots[self._number(made)] = root, before + _start(made) - _start(x)
                return

    def _root(self, tensor: Tensor) -> tuple[int, int]:
        number = self._number(tensor)
        return self._roots.get(number, (number, 0))

    def take(self, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Do a launch, and write it down; not what Triton's interpreter does with torch."""
        with _disable_current_modes():
            run(*arguments)
        reads: set[int] = set()
        write = self._written if interpreted() else self._pointed
        passed = ", ".join(write(x, reads) for x in arguments)
        self._steps.append(Step(f"{self._named(run)}({passed})", set(), reads, True))

    def _pointed(self, value: Any, reads: set[int]) -> str:
        """A kernel's argument, with addresses in place of tensors: views need not be made."""
        if isinstance(value, Tensor):
            root, offset = self._root(value)
            reads.add(root)
            return f"t{root}.data_ptr() + {offset}" if offset else f"t{root}.data_ptr()"
        if isinstance(value, TensorDescriptor):
            root, offset = self._root(value.base)
            number = self._number(value.base) if offset else root
            reads.add(number)
            return f"{self._named(Based(value))}(t{number})"
        if isinstance(value, tuple):
            inner: set[int] = set()
            members = "".join(f"{self._pointed(x, inner)}, " for x in value)
            reads |= inner
            return f"({members})" if inner else self._named(value)
        return self._named(value)

    def _written(self, value: Any, reads: set[int]) -> str:
        """A value in Python, with names in place of tensors, which `reads` receives."""
        if isinstance(value, Tensor):
            reads.add(self._number(value))
            return f"t{self._number(value)}"
        if isinstance(value, TensorDescriptor):
            return f"{self._named(Based(value))}({self._written(value.base, reads)})"
        if isinstance(value, list | tuple):
            members = "".join(f"{self._written(x, reads)}, " for x in value)
            if hasattr(value, "_fields"):
                return f"{self._named(type(value))}({members})"
            return f"[{members}]" if isinstance(value, list) else f"({members})"
        return self._named(value)

    def _named(self, constant: Any) -> str:
        if constant is None or type(constant) in (bool, int):
            return repr(constant)
        for name, known in self._constants.items():
            if known is constant:
                return name
        name = f"c{len(self._constants)}"
        self._constants[name] = constant
        return name

    def function(self, result: Any) -> Callable[..., Any]:
        """The function that does what was recorded and returns such a result."""
        needed: set[int] = set()
        lines = [f"return {self._written(result, needed)}"]
        for step in reversed(self._steps):
            if step.kept or needed & step.makes:
                # Memory is free for others from its last use on.
                last = sorted(step.reads - needed - set(range(self._count)))
                lines += [f"del {', '.join(f't{i}' for i in last)}"] * bool(last)
                lines.append(step.line)
                needed |= step.reads
        names = ", ".join(f"t{i}" for i in range(self._count))
        body = "\n    ".join(reversed(lines))
        exec(f"def replay({names}):\n    {body}", self._constants)
        replay: Callable[..., Any] = self._constants["replay"]
        return replay


class Based:
    """Makes tensor descriptors like one that was checked, of other tensors."""

    def __init__(self, like: TensorDescriptor) -> None:
        self._fields = {name: x for name, x in vars(like).items() if name != "base"}

    def __call__(self, base: Tensor) -> TensorDescriptor:
        made = object.__new__(TensorDescriptor)
        vars(made).update(self._fields, base=base)
        return made


def _waits(func: Any, given: list[Tensor]) -> bool:
    """Whether an op reads numbers from the device, as for the size of its result."""
    if func is torch.ops.aten.index.Tensor and all(x.dtype is not torch.bool for x in given):
        return False
    return any(tag in func.tags for tag in _WAITS)


def _start(tensor: Tensor) -> int:
    """Bytes from the start of its memory."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
