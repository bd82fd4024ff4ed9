"""What the axes of every op's arguments and results mean: the table behind `sharding`.

An axis is a letter, and axes of one letter have one size, or size 1 where a tensor broadcasts:

    b  sequences of a batch     t  steps of time        g  groups of a block-diagonal reservoir
    h  query heads              k  KV heads             u  units of a reservoir
    d  entries of a head        n  channels of a scan   .  anything that no rank can have a part of

A rule reads the record of a call whose tensors are torch's descriptions of DTensors, which have a
shape alone. Arguments that it does not name are read whole by every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from resformer_kernels.attention import epilogue_op
from resformer_kernels.attention import op as attention
from resformer_kernels.attention.record import LEAVES
from resformer_kernels.kvcache import op as kvcache
from resformer_kernels.mix import op as mix
from resformer_kernels.mix.op import WANTS_GATE, WANTS_TABLE
from resformer_kernels.reservoir import op as reservoir
from resformer_kernels.scan import op as scan


class Result(NamedTuple):
    """One result of an op: its axes, and what a rank's part of it is.

    `shape` is that of the leaf whose gradient it is, None for what is no gradient. Where ranks
    split what such a result has no part in, theirs `add_up`; else each has the whole.
    """

    axes: str
    shape: tuple[int, ...] | None = None
    adds_up: bool = False


ABSENT = Result("")
"""What was not asked for."""


class Rule(NamedTuple):
    """Axes of the arguments by name, a list for a list of tensors, and of the results. `splits` are
    the letters that go to the ranks of one mesh axis together; of "hk" every KV head keeps its
    query heads, and of "gu" every group its units. `shared` names the gradients that are given to a
    backward op and of which ranks take shares where they would otherwise all count the whole."""

    arguments: dict[str, str | list[str]]
    results: list[Result]
    splits: tuple[str, ...]
    shared: tuple[str, ...] = ()


def gradients(
    leaves: Iterable[tuple[Any, str]], wanted: Callable[[int], object] = lambda _: True
) -> list[Result]:
    """The results of a backward op: a gradient for each (leaf, axes) that is there and wanted."""
    return [
        ABSENT if leaf is None or not wanted(i) else Result(axes, tuple(leaf.shape), True)
        for i, (leaf, axes) in enumerate(leaves)
    ]


def _asked(axes: str, asked: object) -> Result:
    return Result(axes) if asked else ABSENT


_FACTORS = ("exclusive", "out_gate")


def _attention_axes(call: Any) -> dict[str, str]:
    """Of q, k, v, everything that broadcasts to them, and the rest of a call."""
    rows = "." if call.packed else "b."
    axes = dict.fromkeys(("q", *_FACTORS), f"{rows}h.")
    axes |= dict.fromkeys(("k", "v", "v_first", "lambda_v", "lambda_first"), f"{rows}k.")
    return axes | {"sinks": "h", "attn_bias": ".h.." if call.packed else "bh.."}


def _splits(call: Any) -> tuple[str, ...]:
    """Of packed sequences every rank reads every offset, so that they stay together."""
    return ("hk",) if call.cu_seqlens_q is not None else ("b", "hk")


def _attention_forward(call: Any) -> Rule:
    axes = _attention_axes(call)
    of_rows = "h." if call.packed else "bh."
    results = [
        Result(axes["q"]),
        _asked(of_rows, call.return_lse),
        _asked(axes["k"], call.return_mixed_value),
        _asked(of_rows, call.return_along),
        _asked(axes["q"], call.return_ungated),
    ]
    return Rule({**axes}, results, _splits(call))


def _attention_backward(given: Any) -> Rule:
    axes = _attention_axes(given.call)
    of_rows = "h." if given.call.packed else "bh."
    others = {"grad_out": axes["q"], "out": axes["q"], "grad_mixed": axes["k"]}
    others |= dict.fromkeys(("grad_lse", "lse", "along"), of_rows)
    leaves = [(getattr(given.call, name), axes[name]) for name in LEAVES]
    results = gradients(leaves, lambda bit: given.grad_mask >> bit & 1)
    # Ranks that split the query heads of one KV head all have V'.
    return Rule({**axes, **others}, results, _splits(given.call), ("grad_mixed",))


def _epilogue_axes(call: Any) -> dict[str, str]:
    rows = "." if call.cu_seqlens_q is not None else "b."
    return {**dict.fromkeys(("y", *_FACTORS), f"{rows}h."), "value": f"{rows}k."}


def _epilogue_forward(call: Any) -> Rule:
    axes = _epilogue_axes(call)
    return Rule({**axes}, [Result(axes["y"])], _splits(call))


def _epilogue_backward(given: Any) -> Rule:
    axes = _epilogue_axes(given.call)
    leaves = [(getattr(given.call, name), axes[name]) for name in epilogue_op.LEAVES]
    results = gradients(leaves, lambda bit: given.grad_mask >> bit & 1)
    return Rule({**axes, "grad_out": axes["y"]}, results, _splits(given.call))


def _kvcache(call: Any) -> Rule:
    """Pages belong to every sequence, so that only a contiguous cache has sequences to split."""
    packed = call.cu_seqlens_q is not None or call.cu_seqlens_k_new is not None
    b = "." if packed or call.block_table is not None else "b"
    axes = dict.fromkeys(("q", "out", *_FACTORS), f"{b}.h.")
    axes |= dict.fromkeys(("k_cache", "v_cache", "k", "v"), f"{b}.k.")
    axes |= dict.fromkeys(("k_scale", "v_scale"), f"{b}.k")
    axes |= {"cache_seqlens": b, "key_mask": f"{b}.", "sinks": "h"}
    results = [_asked(axes["q"], call.out is None), _asked(f"{b}h.", call.return_lse)]
    return Rule({**axes}, results, ("hk",) if b == "." else ("b", "hk"))


def _value_axes(rank: int) -> str:
    """Of values, of which every entry is mixed on its own. An absent one has one axis."""
    return {4: "btkd", 3: "tkd", 1: "."}[rank]


def _mix_axes(call: Any) -> dict[str, str | list[str]]:
    return {
        name: [_value_axes(len(x.shape)) for x in getattr(call, name)]
        for name in ("values", "coefficients")
    }


_ENTRIES = ("b", "t", "k", "d")


def _mix_forward(call: Any) -> Rule:
    axes = _mix_axes(call)
    return Rule(axes, [Result(_value_axes(len(call.values[0].shape)))], _ENTRIES)


def _mix_backward(given: Any) -> Rule:
    """A value that is absent has a gradient all the same: its shape is that of `grad`."""
    of_grad = _value_axes(len(given.grad.shape))
    leaves = [(given.grad, of_grad)] * len(given.call.values)
    leaves += [(c, _value_axes(len(c.shape))) for c in given.call.coefficients]
    results = gradients(leaves, lambda i: given.grad_mask[i])
    return Rule({**_mix_axes(given.call), "grad": of_grad}, results, _ENTRIES)


def _embedding_axes(like: Any) -> dict[str, str]:
    """`like` has the values' shape. Every rank may need any row of the table."""
    rows = _value_axes(len(like.shape))
    return {"v": rows, "grad": rows, "gate": rows, "token_ids": rows[:-2], "table": ".kd"}


def _embedding_forward(call: Any) -> Rule:
    axes = _embedding_axes(call.v)
    return Rule({**axes}, [Result(axes["v"])], _ENTRIES)


def _embedding_backward(given: Any) -> Rule:
    call = given.call
    axes = _embedding_axes(call.grad)
    leaves = [(call.table, axes["table"]), (call.gate, axes["gate"])]
    bits = (WANTS_TABLE, WANTS_GATE)
    results = gradients(leaves, lambda i: given.grad_mask & bits[i])
    return Rule({**axes}, results, _ENTRIES)


def _scan_axes(gates: Any, packed: bool) -> dict[str, str]:
    rows, of_state = (".n", ".n") if packed else ("b.n", "bn")
    axes = dict.fromkeys(("tokens", "states", "grad_states"), rows)
    axes |= dict.fromkeys(("initial_state", "grad_final"), of_state)
    return axes | {"gates": "n" if len(gates.shape) == 1 else rows}


def _scan_forward(call: Any) -> Rule:
    packed = call.cu_seqlens is not None
    axes = _scan_axes(call.gates, packed)
    results = [Result(axes["tokens"]), Result(axes["initial_state"])]
    return Rule({**axes}, results, ("n",) if packed else ("b", "n"))


def _scan_backward(call: Any) -> Rule:
    packed = call.cu_seqlens is not None
    axes = _scan_axes(call.gates, packed)
    initial = call.states if call.initial_state is None else call.initial_state
    leaves = [
        (call.states, axes["tokens"]),
        (call.gates, axes["gates"]),
        (initial, axes["initial_state"]),
    ]
    results = gradients(leaves, lambda bit: call.grad_mask >> bit & 1)
    return Rule({**axes}, results, ("n",) if packed else ("b", "n"))


def _reservoir_axes(call: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """(axes, splits) of a record that has a weight. A unit reads all others, so that units are
    split only where the weight says which ones it reads: groups and a diagonal."""
    grouped, columns = len(call.weight.shape) == 3, call.columns is not None
    apart = grouped or (len(call.weight.shape) == 1 and not columns)
    u, b = "u" if apart else ".", "." if call.cu_seqlens is not None else "b"
    rows = ("." if call.cu_seqlens is not None else "b.") + u
    axes = dict.fromkeys(("states", "grad_states", "grad", "slope"), rows)
    axes |= dict.fromkeys(("initial_state", "grad_final"), f"{b}{u}")
    axes |= {"bias": u, "leak": u if call.leak.shape else "", "input_weight": f"{u}."}
    axes["weight"] = "g.." if grouped else u if len(call.weight.shape) == 1 else ".."
    splits = ("b",) if b == "b" else ()
    return axes, (*splits, *(("gu",) if grouped else ("u",) if apart else ()))


def _driven_axes(scan: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """`_reservoir_axes` of a record that has inputs, which are a drive of the units where they have
    no weight."""
    axes, splits = _reservoir_axes(scan)
    rows = axes["states"]
    axes["inputs"] = rows if scan.input_weight is None else f"{rows[:-1]}."
    return axes, splits


def _reservoir_forward(call: Any) -> Rule:
    """What `info` says is true of the part of the rank that reads it."""
    axes, splits = _driven_axes(call)
    results = [Result(axes["states"]), Result(axes["initial_state"]), ABSENT]
    return Rule({**axes}, results, splits)


def _reservoir_adjoint(call: Any) -> Rule:
    axes, splits = _reservoir_axes(call)
    return Rule({**axes}, [Result(axes["grad"]), ABSENT], splits)


def _reservoir_backward(given: Any) -> Rule:
    axes, splits = _driven_axes(given.scan)
    leaves = [(getattr(given.scan, name), axes[name]) for name in reservoir.LEAVES]
    results = gradients(leaves, lambda bit: given.grad_mask >> bit & 1)
    return Rule({**axes}, results, splits)


def _reservoir_reduced(call: Any) -> Rule:
    axes, splits = _driven_axes(call.scan)
    final = axes["initial_state"]
    if call.reduce != "gram":
        return Rule({**axes}, [Result(final), ABSENT, Result(final), ABSENT], splits)
    # Products of two units of all steps: sums over sequences, and no rank lacks a unit.
    axes["targets"] = f"{axes['states'][:-1]}."
    results = [Result("..", None, True), Result("..", None, True), Result(final), ABSENT]
    return Rule({**axes}, results, tuple(x for x in splits if x == "b"))


OF_A_PART = "under `context_parallel` tensors are plain: the parts that this rank holds"
"""Why the ops of this package, which run across ranks themselves, take no DTensors."""

RULES: dict[str, Callable[[Any], Rule] | str] = {
    attention.FORWARD.name: _attention_forward,
    attention.BACKWARD.name: _attention_backward,
    epilogue_op.FORWARD.name: _epilogue_forward,
    epilogue_op.BACKWARD.name: _epilogue_backward,
    kvcache.OP.name: _kvcache,
    mix.VALUES_FORWARD.name: _mix_forward,
    mix.VALUES_BACKWARD.name: _mix_backward,
    mix.EMBEDDING_FORWARD.name: _embedding_forward,
    mix.EMBEDDING_BACKWARD.name: _embedding_backward,
    scan.FORWARD.name: _scan_forward,
    scan.BACKWARD.name: _scan_backward,
    reservoir.FORWARD.name: _reservoir_forward,
    reservoir.ADJOINT.name: _reservoir_adjoint,
    reservoir.BACKWARD.name: _reservoir_backward,
    reservoir.REDUCED.name: _reservoir_reduced,
    mix.EMBEDDING_SPARSE.name: "a DTensor cannot be sparse: pass sparse_grad=False",
}
"""The rule of every op below this package by its name; a text where an op takes no DTensors, and
why."""
