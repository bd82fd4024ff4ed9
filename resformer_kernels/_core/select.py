"""Which backend serves a call, and why the others do not.

A backend is a module, or any object, with the three names of `Backend`. An op lists its backends in
order of preference. The last is "reference", which serves every call and has `is_large(call)`:
whether `auto` should warn that it fell back. A backend may have `notes(call) -> list[str]`: what it
does beside the kernel, for `explain`; and `reason_against_auto(call, hardware)`: why only its name
takes it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from resformer_kernels._core import across, dtensors
from resformer_kernels._core.hardware import MACHINE, Hardware

F = TypeVar("F", bound=Callable[..., Any])


class Backend(Protocol):
    """What an op's backend offers. `call` is the op's record."""

    NAME: str

    def unsupported_reason(self, call: Any, hardware: Hardware, /) -> str | None:
        """Why it cannot serve the call on that hardware, by metadata alone; None where it can."""

    def run(self, call: Any, /) -> Any:
        """Serve the call."""


class Request(NamedTuple):
    """A public call, validated and normalised, before a backend is chosen for it."""

    op: str
    backend: str
    backends: Sequence[Backend]
    call: Any


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: `backend` serves `op` (None: nothing does)."""

    op: str
    backend: str | None
    reasons: dict[str, str]
    """Why each backend that cannot serve the call cannot."""
    notes: list[str] = field(default_factory=list)
    """What the chosen backend does beside the kernel itself, such as copying an argument."""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend serves this call'}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


_announced: set[tuple[str, str]] = set()


class _Asked(Exception):  # carries a request, not an error
    def __init__(self, request: Request) -> None:
        self.request = request


_asking: set[int] = set()
"""Threads in which `prepare` wants a public function's request instead of its result."""


def explaining() -> bool:
    """Whether this thread's call is that of `explain`: a drop-in then computes nothing."""
    return bool(_asking) and threading.get_ident() in _asking


def serve(op: str, backend: str, backends: Sequence[Backend], call: Any) -> Any:
    """Run a call on the backend that serves it, across ranks where sequences are split among them.
    Public functions call this directly: the warning about a fallback names their caller's line."""
    dtensors.refuse_mixed(call)
    if explaining():
        raise _Asked(Request(op, backend, backends, call))
    split = across.current()
    if split is not None:
        return split.serve(op, backend, backends, call)
    return select(op, backend, backends, call).run(call)


def select(op: str, backend: str, backends: Sequence[Backend], call: Any) -> Backend:
    """The backend that serves `call`.

    "auto" takes the first that can; a name never falls back. Raises ValueError for an unknown
    name and RuntimeError, with every reason, where nothing can serve the call.
    """
    if backend == "auto":
        reasons: list[str] = []
        for candidate in backends:
            reason = _reason(candidate, backend, call)
            if reason is None:
                if reasons and candidate.NAME == "reference" and candidate.is_large(call):  # type: ignore[attr-defined]
                    _announce_fallback(op, "; ".join(reasons))
                return candidate
            reasons.append(f"{candidate.NAME}: {reason}")
        raise RuntimeError(f"{op}: no backend serves this call: {'; '.join(reasons)}")
    for candidate in backends:
        if backend == candidate.NAME:
            reason = _reason(candidate, backend, call)
            if reason is not None:
                raise RuntimeError(f"{op}: backend={backend!r} cannot serve this call: {reason}")
            return candidate
    names = ", ".join(repr(candidate.NAME) for candidate in backends)
    raise ValueError(f"{op}: backend must be 'auto' or one of {names}, got {backend!r}")


def _reason(candidate: Backend, backend: str, call: Any) -> str | None:
    """Why a candidate does not serve a call that asks for `backend`."""
    own_ops = candidate.NAME in ("native", "triton")
    reason = None if own_ops else dtensors.reason(call)
    reason = reason or candidate.unsupported_reason(call, MACHINE)
    against = getattr(candidate, "reason_against_auto", None)
    if reason is None and backend == "auto" and against is not None:
        reason = against(call, MACHINE)
    return reason


def _announce_fallback(op: str, reasons: str) -> None:
    if (op, reasons) in _announced:
        return
    _announced.add((op, reasons))
    warnings.warn(
        f"{op} runs on the slow reference for a large input ({reasons}); this is said once",
        UserWarning,
        stacklevel=5,  # whoever called the public function, not this package
    )


# torch.compile may run this at trace time or skip it, but must not break the graph over it.
_announce_fallback._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explainable(function: F) -> F:
    """Mark a public function that ends in `serve`: `explain` understands it."""
    function.__resformer_explainable__ = True  # type: ignore[attr-defined]
    return function


def prepare(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Request:
    """What `function(*args, **kwargs)` asks for, checked and normalised; no backend runs.

    TypeError where `function` is neither a public op of this package nor an `nn.Reservoir`.
    """
    if not getattr(function, "__resformer_explainable__", False):
        raise TypeError(
            "explain: function must be a public op of resformer_kernels, such as "
            f"value_residual_attention, got {function!r}"
        )
    thread = threading.get_ident()
    _asking.add(thread)
    try:
        function(*args, **kwargs)
    except _Asked as asked:
        return asked.request
    finally:
        _asking.discard(thread)
    raise AssertionError("unreachable: an explainable function ends in serve")


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would serve `function(*args, **kwargs)` and why each other would not.

    Nothing is computed. The arguments are validated, so a bad one raises what the call raises.
    TypeError where `function` is neither a public op of this package nor an `nn.Reservoir`.

    >>> print(explain(value_residual_attention, q, k, v, v_first, causal=True))  # doctest: +SKIP
    value_residual_attention: native
      not reference: native is preferred
    """
    request = prepare(function, *args, **kwargs)
    chosen = None
    reasons: dict[str, str] = {}
    for candidate in request.backends:
        reason = _reason(candidate, request.backend, request.call)
        if reason is not None:
            reasons[candidate.NAME] = reason
        elif request.backend not in ("auto", candidate.NAME):
            reasons[candidate.NAME] = f"backend={request.backend!r} was asked for"
        elif chosen is None:
            chosen = candidate
        else:
            reasons[candidate.NAME] = f"{chosen.NAME} is preferred"
    names = ["auto", *(candidate.NAME for candidate in request.backends)]
    if request.backend not in names:
        raise ValueError(f"{request.op}: backend must be one of {names}, got {request.backend!r}")
    describe = getattr(chosen, "notes", None)
    notes = describe(request.call) if describe is not None else []
    return Explanation(request.op, chosen.NAME if chosen else None, reasons, notes)
