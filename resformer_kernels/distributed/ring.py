"""Ring attention: keys and values move from rank to rank, queries stay (Liu et al., arXiv
2310.01889), and partial results are merged by their log-sum-exp.

With S the scores over one piece, l_p = log sum exp S and y_p = softmax(S) V, the whole is

    l = log sum_p exp l_p,    y = sum_p exp(l_p - l) y_p

and backward, given y and l of the whole, needs of each piece its keys and values alone. A sink is
one more key that every query sees once: it is part of the first step of each row, which is over the
rank's own shard. V' is mixed before it moves, and again in backward. Values that were gathered
before (SVFormer's V_1) do not move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core.gradient import mask_of
from resformer_kernels._core.strides import unit_stride
from resformer_kernels.attention.op import BACKWARD, FORWARD, BackwardCall
from resformer_kernels.attention.record import LEAVES, AttentionCall
from resformer_kernels.distributed.moves import Ring, Shards, Visit
from resformer_kernels.distributed.ring_op import RingBackwardCall, RingCall
from resformer_kernels.distributed.split import Split
from resformer_kernels.distributed.steps import Hop, Step
from resformer_kernels.distributed.transport import Arriving
from resformer_kernels.mix.op import VALUES_BACKWARD, VALUES_FORWARD, MixBackwardCall
from resformer_kernels.mix.record import MixCall, absent_like


def forward(namespace: str, call: RingCall) -> tuple[Tensor, Tensor, Tensor]:
    """(y, LSE, V' of this rank, empty if not asked for) by the ops of `namespace`."""
    value = _mixed(namespace, call)
    y, lse = _forward(namespace, call, Shards(call.k, value, call.whole))
    mixed = call.q.new_empty(0)
    if call.return_mixed_value and value is not None:
        mixed = value.clone() if value is call.v else value
    return y.to(call.q.dtype), lse, mixed


def backward(namespace: str, given: RingBackwardCall) -> tuple[Tensor, ...]:
    """The gradients of the leaves, empty where they are not wanted."""
    call, wanted = given.call, given.wanted()
    value = _mixed(namespace, call)
    sums = _Backward(namespace, given, Shards(call.k, value, call.whole))
    sums.run()
    found: dict[str, Tensor | None] = {"q": sums.q, "k": sums.keys, "sinks": sums.sinks}
    total = sums.value if given.grad_mixed is None else sums.value + given.grad_mixed
    total = total.to(call.q.dtype)
    if call.whole is not None:
        found["whole"] = total
    elif call.v is None or call.v_first is None:
        found["v"] = total
    else:
        sources = ("v", "v_first", "lambda_v", "lambda_first")
        mask = tuple(int(wanted[name]) for name in sources)
        back = MixBackwardCall(total, _mix_call(call, call.v, call.v_first), mask)
        found |= dict(zip(sources, VALUES_BACKWARD(namespace, back), strict=True))
    return given.results(found)


def _mixed(namespace: str, call: RingCall) -> Tensor | None:
    """V' of this rank; None where it was gathered."""
    if call.v is None or call.v_first is None:
        return call.v
    mixed: Tensor = VALUES_FORWARD(namespace, _mix_call(call, call.v, call.v_first))
    return mixed


def _mix_call(call: RingCall, v: Tensor, v_first: Tensor) -> MixCall:
    coefficients = call.lambda_v, call.lambda_first
    return MixCall(
        (unit_stride(v), unit_stride(v_first)),
        tuple(absent_like(v) if x is None else x for x in coefficients),
        (call.lambda_v_value, call.lambda_first_value),
    )


def _call(ring: RingCall, found: Step, visit: Visit) -> AttentionCall:
    """The call of one step: its rows of q, and of the keys and values visited."""
    assert visit.keys is not None
    assert visit.values is not None
    q, keys = ring.q[:, found.queries], visit.keys[:, found.keys]
    return AttentionCall(
        *(q, keys, visit.values[:, found.keys], None, None, None, 1.0, 1.0, None, None),
        max_seqlen_q=q.shape[1],
        max_seqlen_k=keys.shape[1],
        window_left=found.left,
        window_right=found.right,
        scale=ring.scale,
        softcap=ring.softcap,
        sinks=ring.sinks,
        attn_bias=None,
        return_lse=True,
        return_mixed_value=False,
    )


class _Sinks:
    """Hands out the sinks of a call once a row: to the first step that a row takes part in."""

    def __init__(self, call: RingCall) -> None:
        self._call, self._rows = call, 0

    def of(self, visit: Visit, found: Step) -> RingCall:
        """The call for a step; its rows are all new, or none is."""
        first = visit.hop is None and found.queries.start >= self._rows
        if first:
            self._rows = found.queries.stop
        return self._call if first else self._call._replace(sinks=None)


def _forward(namespace: str, call: RingCall, shards: Shards) -> tuple[Tensor, Tensor]:
    """(y in float32, LSE) of this rank's queries over all keys."""
    q = call.q
    y = q.new_zeros((*q.shape[:-1], shards.value.shape[-1]), dtype=torch.float32)
    lse = y.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    sinks = _Sinks(call)

    def visit(at: Visit) -> None:
        for found in at.steps:
            out, part, *_ = FORWARD(namespace, _call(sinks.of(at, found), found, at))
            _merge(y[:, found.queries], lse[:, :, found.queries], out, part)

    Ring(Split.named(call.split), call.window).visit(shards, visit)
    return y, lse


def _merge(y: Tensor, lse: Tensor, out: Tensor, part: Tensor) -> None:
    """Merge the result over further keys, (out, part), into (y, lse)."""
    total = torch.logaddexp(lse, part)
    base = total.masked_fill(total == -torch.inf, 0)  # rows that have seen no key yet
    old, new = ((x - base).exp().transpose(1, 2)[..., None] for x in (lse, part))
    y.mul_(old).add_(new * out)
    lse.copy_(total)


class _Backward:
    """The gradients of one call, summed in float32."""

    def __init__(self, namespace: str, given: RingBackwardCall, shards: Shards) -> None:
        self.namespace, self.given, self.call, self.shards = namespace, given, given.call, shards
        self.ring = Ring(Split.named(self.call.split), self.call.window)
        self.q, self.keys, self.value = (
            torch.zeros_like(x, dtype=torch.float32)
            for x in (self.call.q, shards.keys, shards.value)
        )
        sinks = self.call.sinks
        self.sinks = None if sinks is None else torch.zeros_like(sinks)
        self._sunk = _Sinks(self.call)
        self._returning: list[tuple[Hop, Arriving, Arriving | None]] = []

    def run(self) -> None:
        """Fill the sums."""
        self.ring.visit(self.shards, self._visit)
        self._add_returned()

    def _visit(self, at: Visit) -> None:
        dk, dv = self._sums_of(at)
        for found in at.steps:
            assert dk is not None
            assert dv is not None
            self._step(at, found, dk, dv)
        self._add_returned()
        if at.hop is not None:
            hop, dtype, values = at.hop, self.call.q.dtype, self.shards.values
            back = self.ring.give_back("dk", hop, _cast(dk, dtype), self.shards.keys)
            if values is None:
                self._returning.append((hop, back, None))
            else:
                other = self.ring.give_back("dv", hop, _cast(dv, dtype), values)
                self._returning.append((hop, back, other))

    def _sums_of(self, at: Visit) -> tuple[Tensor | None, Tensor | None]:
        """Where the gradients of the keys and values of a visit are added up."""
        dv: Tensor | None
        if self.shards.whole is not None:
            dv = self.ring.stored(self.value, at.owner, None if at.hop is None else at.hop.piece)
        elif at.hop is None:
            dv = self.value
        else:
            dv = _zeros(at.values)
        return self.keys if at.hop is None else _zeros(at.keys), dv

    def _step(self, at: Visit, found: Step, dk: Tensor, dv: Tensor) -> None:
        call = _call(self._sunk.of(at, found), found, at)
        rows, lse = found.queries, self.given.grad_lse
        wanted = ("q", "k", "v") if call.sinks is None else ("q", "k", "v", "sinks")
        back = BackwardCall(
            grad_out=self.given.grad_y[:, rows].contiguous(),
            grad_lse=None if lse is None else lse[:, :, rows].contiguous(),
            grad_mixed=None,
            call=call,
            out=self.given.y[:, rows].contiguous(),
            lse=self.given.lse[:, :, rows].contiguous(),
            along=None,
            grad_mask=mask_of(name in wanted for name in LEAVES),
        )
        gradients = dict(zip(LEAVES, BACKWARD(self.namespace, back), strict=True))
        self.q[:, rows] += gradients["q"]
        dk[:, found.keys] += gradients["k"]
        dv[:, found.keys] += gradients["v"]
        if call.sinks is not None and self.sinks is not None:
            self.sinks += gradients["sinks"]

    def _add_returned(self) -> None:
        """Add what other ranks found for this rank's pieces."""
        while self._returning:
            hop, keys, values = self._returning.pop()
            rows = self.ring.deal.place(self.ring.me, hop.piece)
            for total, part in ((self.keys, keys), (self.value, values)):
                received = None if part is None else part.wait()
                if received is not None:
                    total[:, rows] += received


def _zeros(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.zeros_like(x, dtype=torch.float32)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
