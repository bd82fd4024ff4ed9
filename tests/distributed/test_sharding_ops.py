"""The other ops on DTensors: results and gradients are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import resformer_kernels as ours
from resformer_kernels._core.op import NATIVE
from resformer_kernels.attention import epilogue_op
from resformer_kernels.distributed import sharding
from resformer_kernels.reservoir.op import ADJOINT
from resformer_kernels.reservoir.record import AdjointCall
from tests.distributed import ranks
from tests.distributed.sharded import Case, Given, close, hold

pytestmark = pytest.mark.usefixtures("native")

B, T, K, D = 3, 4, 4, 6
VALUE = Given("btkd", (B, T, K, D))
MIX = [
    Case("mix_values", {"values": [VALUE] * 4, "coefficients": [
        Given("kd", (K, 1)), Given("btkd", (B, T, 1, 1)), 0.5, Given("btkd", (B, T, K, D))]}),
    Case("mix_values", {"values": [VALUE] * 2, "coefficients": [Given("", ()), Given("d", (D,))]}),
    Case("mix_values", {"values": [Given("tkd", (6, K, D))] * 2, "coefficients": [
        Given("tkd", (6, K, 1)), 0.25]}),
    Case("mix_value_embedding", {
        "v": VALUE, "table": Given("vkd", (5, K, D)), "token_ids": Given("bt", (B, T), "5"),
        "gate": Given("btkd", (B, T, K, 1))}),
    Case("mix_value_embedding", {
        "v": VALUE, "table": Given("vkd", (5, K, D)), "token_ids": Given("bt", (B, T), "5"),
        "gate": Given("kd", (K, 1))}),
]  # fmt: skip


def test_mixes_split_by_every_axis() -> None:
    letters = ("b", "t", "k", "d")
    packed = MIX[2]
    calls = [(case, (x,), True) for case in MIX for x in letters if case is not packed or x != "b"]
    # Any row of a table may be needed anywhere: its shards are gathered, its gradient scattered.
    calls.append((MIX[3], ("v",), False))
    hold((2,), calls)
    hold(
        (2, 2),
        [(case, split, True) for case in MIX for split in (("t", "k"), ("d", "d"))],
    )


SCANS = [
    Case("linear_scan", {
        "gates": Given("btn", (B, T, 5), "gate"), "tokens": Given("btn", (B, T, 5)),
        "initial_state": Given("bn", (B, 5))}),
    Case("linear_scan", {"gates": Given("n", (5,), "gate"), "tokens": Given("btn", (B, T, 5))},
         {"reverse": True}),
]  # fmt: skip
OFFSETS = Given("", (4,), "offsets")
PACKED_SCAN = Case("linear_scan", {
    "gates": Given("tn", (9, 5), "gate"), "tokens": Given("tn", (9, 5)),
    "initial_state": Given("bn", (3, 5)), "cu_seqlens": OFFSETS})  # fmt: skip


def test_scans_split_by_sequences_and_channels() -> None:
    hold((2,), [(case, (x,), True) for case in SCANS for x in ("b", "n")])
    hold(
        (2,), [(SCANS[0], ("t",), False), (PACKED_SCAN, ("n",), True), (PACKED_SCAN, ("t",), False)]
    )
    hold((2, 2), [(case, split, True) for case in SCANS for split in (("b", "n"), ("n", "b"))])


def reservoir(weight: Given, axes: str = ".", **others: object) -> Case:
    """`axes` is the letter of the units."""
    tensors = {"inputs": Given("bti", (B, 6, 3)), "weight": weight,
               "input_weight": Given(f"{axes}i", (8, 3)), "leak": Given(axes, (8,), "gate"),
               "bias": Given(axes, (8,)), "initial_state": Given(f"b{axes}", (B, 8))}  # fmt: skip
    more = {name: x for name, x in others.items() if isinstance(x, Given)}
    return Case("reservoir_scan", {**tensors, **more}, {
        name: x for name, x in others.items() if name not in more})  # fmt: skip


DENSE = reservoir(Given("..", (8, 8), "weight"))
GROUPED = reservoir(Given("u..", (4, 2, 2), "weight"), "u", activation="relu")
DIAGONAL = reservoir(Given("u", (8,), "gate"), "u", mode="chunked")


def test_reservoirs_split_by_sequences_groups_and_units() -> None:
    calls = [(case, ("b",), True) for case in (DENSE, GROUPED, DIAGONAL)]
    calls += [(GROUPED, ("u",), True), (DIAGONAL, ("u",), True)]
    driven = Case("reservoir_scan", {"inputs": Given("btu", (B, 6, 8)),
                                     "weight": Given("u..", (4, 2, 2), "weight")})  # fmt: skip
    calls += [(driven, ("u",), True), (driven, ("b",), True)]
    hold((2,), calls)
    hold(
        (2, 2),
        [(GROUPED, ("b", "u"), True), (DIAGONAL, ("u", "b"), True), (DENSE, ("b", "b"), True)],
    )


def test_reductions_of_states() -> None:
    """With a gradient, from states; without, in the op of its own."""
    calls = []
    for reduce in ("last", "mean", "gram"):
        targets: dict[str, Any] = {"targets": Given("bto", (B, 6, 2))} if reduce == "gram" else {}
        case = reservoir(Given("u..", (4, 2, 2), "weight"), "u", reduce=reduce, **targets)
        calls += [(case, ("b",), True), (frozen(case), ("b",), True)]
        calls.append((frozen(case), ("u",), reduce != "gram"))
    hold((2,), calls)


def frozen(case: Case) -> Case:
    """The case without gradients."""
    tensors = {
        x: given._replace(kind=f"constant {given.kind}") for x, given in case.tensors.items()
    }
    return case._replace(tensors=tensors)


def _epilogue_alone() -> None:
    sharding.register()  # no public function is given a DTensor here
    mesh = init_device_mesh("cpu", (2,))
    y, value, gate, part = (torch.randn(2, 5, n, d) for n, d in ((4, 6), (2, 6), (4, 6), (4, 1)))
    for at in (Shard(0), Shard(2), None):
        found = []
        for many in (False, True):
            leaves = [
                (distribute_tensor(x, mesh, [at or Replicate()]) if many else x.clone())
                for x in (y, value, part, gate)
            ]
            rows, values, exclusive, out_gate = (x.requires_grad_() for x in leaves)
            # Where nothing is excluded no values are given.
            call = epilogue_op.EpilogueCall(
                y=rows,
                value=values if at else None,
                cu_seqlens_q=None,
                cu_seqlens_k=None,
                max_seqlen_q=5,
                max_seqlen_k=5,
                exclusive=exclusive if at else None,
                exclusive_value=0.0,
                exclusive_eps=1e-6,
                out_gate=out_gate,
            )
            out = epilogue_op.run(NATIVE, call)
            out.sin().sum().backward()
            found.append([out, *[x.grad for x in leaves if x.grad is not None]])
        for one, more in zip(*found, strict=True):
            assert more.placements == (at or Replicate(),)
            close(more, one, f"epilogue {at}")


def _adjoint_alone() -> None:
    sharding.register()
    mesh = init_device_mesh("cpu", (2,))
    grad, slope, weight = torch.randn(2, 5, 6), torch.rand(2, 5, 6), torch.randn(2, 3, 3) / 4
    leak, tolerance = torch.tensor(0.5), torch.tensor(1e-6, dtype=torch.float64)
    call = AdjointCall(grad, slope, weight, None, None, leak, 0, tolerance, None)
    expected = ADJOINT(NATIVE, call)[0]
    for axis, of_weight in ((0, Replicate()), (2, Shard(0))):
        many = call._replace(
            grad=distribute_tensor(grad, mesh, [Shard(axis)]),
            slope=distribute_tensor(slope, mesh, [Shard(axis)]),
            weight=distribute_tensor(weight, mesh, [of_weight]),
            leak=distribute_tensor(leak, mesh),
            tolerance=distribute_tensor(tolerance, mesh),
        )
        found = ADJOINT(NATIVE, many)[0]
        assert found.placements == (Shard(axis),)
        close(found, expected, f"adjoint {axis}")


def test_ops_that_run_inside_others_or_on_a_gpu_alone() -> None:
    ranks.run(2, _epilogue_alone)
    ranks.run(2, _adjoint_alone)


def _ring() -> None:
    mesh = init_device_mesh("cpu", (2,))
    inputs, values = torch.randn(3, 6, 8), torch.rand(8)
    expected = ours.reservoir_scan(inputs, ours.RingWeight(values))[0]
    split, whole = distribute_tensor(inputs, mesh, [Shard(0)]), distribute_tensor(values, mesh)
    states, _, info = ours.reservoir_scan(split, ours.RingWeight(whole), return_info=True)
    assert states.placements == (Shard(0),)
    close(states, expected, "ring")
    # Of this rank's two sequences, or of its one.
    assert not isinstance(info.chunks, DTensor)
    offsets = distribute_tensor(torch.tensor([0, 2, 6], dtype=torch.int32), mesh)
    rows = distribute_tensor(inputs[0], mesh).requires_grad_()
    with pytest.raises(RuntimeError, match="reduce='mean' of packed sequences has no gradient"):
        ours.reservoir_scan(rows, ours.RingWeight(whole), cu_seqlens=offsets, reduce="mean")


def test_rings_and_what_a_rank_says_of_its_part() -> None:
    ranks.run(2, _ring)


def packed_attention(**others: object) -> Case:
    q, k = (9, 4, 6), (9, 2, 6)
    tensors = {"q": Given("thd", q), **{n: Given("thd", k) for n in ("k", "v", "v_first")},
               "cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS, "sinks": Given("h", (4,)),
               "lambda_v": Given("thd", (9, 2, 1)), "exclusive": Given("thd", (9, 4, 1)),
               "out_gate": Given("thd", (9, 4, 6))}  # fmt: skip
    return Case("value_residual_attention_varlen", tensors, {
        "max_seqlen_q": 9, "max_seqlen_k": 9, "return_lse": True, "return_mixed_value": True,
        "causal": True, **others})  # fmt: skip


def test_packed_sequences_are_split_by_heads_alone() -> None:
    hold((2,), [(packed_attention(), ("h",), True), (packed_attention(), ("t",), False)])


def cache(pages: int | None = None, **others: Given) -> dict[str, Given]:
    """The tensors of a call: two sequences of 8 tokens, or pages of 4, and one new token each."""
    axes, shape = ("bthd", (2, 8, 2, 6)) if pages is None else ("pthd", (pages, 4, 2, 6))
    tensors = dict.fromkeys(("q", "out_gate", "out"), Given("bthd", (2, 1, 4, 6), "constant"))
    tensors |= dict.fromkeys(("k_cache", "v_cache"), Given(axes, shape, "constant"))
    tensors |= dict.fromkeys(("k", "v"), Given("bthd", (2, 1, 2, 6), "constant"))
    return {**tensors, "sinks": Given("h", (4,), "constant"), **others}


def test_caches() -> None:
    """A contiguous one by sequences and heads, pages by heads. All are written alike."""
    lengths: dict[str, Any] = {"cache_seqlens": Given("b", (2,), "6")}
    calls = [(Case("attention_with_kvcache", tensors, options), (x,), True)
             for tensors, options, splits in (
                 (cache(**lengths), {"exclusive": 0.5}, "bh"),
                 (cache(), {"cache_seqlens": 3, "window": (3, 0)}, "bh"),
                 (cache(5, block_table=Given("b", (2, 2), "pages"), **lengths), {}, "h"))
             for x in splits]  # fmt: skip
    hold((2,), [(case._replace(options={**case.options, "return_lse": True}), split, still)
                for case, split, still in calls])  # fmt: skip
