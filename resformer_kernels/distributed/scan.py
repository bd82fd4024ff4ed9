"""`linear_scan` on a sequence that is split across ranks.

A piece is an affine map of the state that enters it, h -> P h + H: P is the product of its gates
and H its last state from zero. Every rank finds P and H of its two pieces, one all-gather brings
those of all ranks, each rank composes them in the order of time, and scans its pieces from the
states that enter them. The backward does the same against time, with the adjoint of the op.

Bytes: one process moves the gates, tokens and states once, 12 bytes a value in float32 (backward
20). That the entering state is known only after all gates and tokens were read makes a second pass
over them part of the bound: 20 (backward 28). Here H is the gradient of an initial state, which
reads two tensors and writes none, and P, which no op returns beside it, reads the gates once more:
24 (backward 28: P is kept). Constant gates need no pass for P: 12 (backward 16), the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core import gradient
from resformer_kernels._core.op import NATIVE, TRITON, Op, vmap_error
from resformer_kernels._core.select import select
from resformer_kernels._core.strides import unit_stride
from resformer_kernels.distributed.split import Split
from resformer_kernels.scan import op, reference
from resformer_kernels.scan.op import WANTS_INITIAL
from resformer_kernels.scan.record import SCAN, ScanCall, state_dtype

_NAMESPACES = {"native": NATIVE, "triton": TRITON, "reference": ""}
LEAVES = ("gates", "tokens", "initial_state")


class SplitScanCall(NamedTuple):
    """A scan of this rank's part; names as in `ScanCall`. `split` names who holds what."""

    split: str
    gates: Tensor
    tokens: Tensor
    initial_state: Tensor | None
    reverse: bool


class SplitBackwardCall(NamedTuple):
    """`states` as in the op of one process; `starts` and `products` are results of the forward op.
    Only the reference asks for tokens. Bit i of grad_mask: leaf i of LEAVES wants a gradient."""

    grad_states: Tensor | None
    grad_final: Tensor | None
    split: str
    gates: Tensor
    states: Tensor
    starts: Tensor
    products: Tensor
    tokens: Tensor | None
    reverse: bool
    grad_mask: int


def _forward_fake(call: SplitScanCall) -> tuple[Tensor, ...]:
    tokens, ranks = call.tokens, Split.named(call.split).ranks.count
    batch, _, channels = tokens.shape
    wide = state_dtype(tokens.dtype)
    shapes = ((batch, channels), (2 * batch, channels), (ranks, 2, batch, channels))
    return tokens.new_empty(tokens.shape), *(tokens.new_empty(x, dtype=wide) for x in shapes)


def _backward_fake(call: SplitBackwardCall) -> tuple[Tensor, ...]:
    starts = call.starts
    leaves = (call.gates, call.states, starts.new_empty(starts.shape[0] // 2, starts.shape[1]))
    wanted = [bool(call.grad_mask >> bit & 1) for bit in range(len(LEAVES))]
    return tuple(x.new_empty(x.shape if y else (0,)) for x, y in zip(leaves, wanted, strict=True))


# Ops, so that torch.compile sees one step where ranks exchange: a graph may reorder exchanges.
FORWARD = Op(
    "split_scan_forward",
    SplitScanCall,
    "(Tensor states, Tensor final_state, Tensor starts, Tensor products)",
    function=SCAN,
    fake=_forward_fake,
    composed="resformer_kernels.distributed.scan:forward",
)
BACKWARD = Op(
    "split_scan_backward",
    SplitBackwardCall,
    "(Tensor dgates, Tensor dtokens, Tensor dinitial_state)",
    function=SCAN,
    fake=_backward_fake,
    composed="resformer_kernels.distributed.scan:backward",
)


def serve(
    split: Split, backend: str, backends: Sequence[Any], call: ScanCall
) -> tuple[Tensor, Tensor]:
    """(states of this rank's tokens, final state of the whole sequence)."""
    if call.cu_seqlens is not None:
        raise RuntimeError(
            f"{SCAN} with cu_seqlens cannot run under context_parallel: pass sequences of one "
            "length, (batch, time, channels)"
        )
    split.check("tokens", call.tokens.shape[1])
    chosen = select(SCAN, backend, backends, call)
    given = SplitScanCall(split.name, call.gates, call.tokens, call.initial_state, call.reverse)
    leaves = (call.gates, call.tokens, call.initial_state)
    if torch.compiler.is_compiling():
        given = gradient.distinct(given)
    else:
        gradient.refuse_forward_mode(SCAN, leaves)
    namespace = _NAMESPACES[chosen.NAME]
    if gradient.wants_gradient(leaves):
        states, final, _, _ = _Scan.apply(namespace, *given)
    else:
        states, final, _, _ = _forward(namespace, given)
    return states, final


def _forward(namespace: str, call: SplitScanCall) -> tuple[Tensor, ...]:
    return tuple(FORWARD(namespace, call)) if namespace else forward("", call)


class _Scan(torch.autograd.Function):
    """apply(namespace, *call) -> (states, final state, starts, products)."""

    @staticmethod
    @gradient.signed
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        namespace, *call = arguments
        return _forward(namespace, SplitScanCall(*call))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.namespace, ctx.split, gates, tokens, initial_state, ctx.reverse = inputs
        states, _final, starts, products = output
        kept = states if ctx.needs_input_grad[2] else _unread(states)
        given = None if ctx.namespace else tokens
        ctx.save_for_backward(gates, kept, starts, products, given)
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.mark_non_differentiable(starts, products)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_final: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        needs = gradient.wanted(ctx, SplitScanCall, LEAVES)
        operands = (ctx.split, *ctx.saved_tensors, ctx.reverse, gradient.mask_of(needs))
        call = SplitBackwardCall(grad_states, grad_final, *operands)
        if ctx.namespace:
            found = gradient.run_backward(BACKWARD, ctx.namespace, call)
        else:
            leaves = (grad_states, grad_final, *ctx.saved_tensors)
            found = gradient.once(SCAN, lambda *_: backward("", call), leaves)
        d_gates, d_tokens, d_initial = found
        if needs[2]:
            d_initial = d_initial.to(ctx.initial_dtype)
        gradients = (d_gates, d_tokens, d_initial)
        return gradient.in_place_of(SplitScanCall, LEAVES, gradients, needs)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(SCAN))


class _Local(NamedTuple):
    """This rank's scans: its two pieces of every sequence are packed, row after row."""

    split: Split
    namespace: str
    """Of the ops; empty: the reference, which has none."""
    batch: int
    reverse: bool
    offsets: Tensor
    """cu_seqlens of the pieces, (2 B + 1,)."""

    @staticmethod
    def of(namespace: str, name: str, x: Tensor, reverse: bool) -> _Local:
        """For x, (B, T of the rank, N)."""
        split = Split.named(name)
        batch, held, _ = x.shape
        rows = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * held
        offsets = torch.stack([rows, rows + split.mine[0].length], 1).flatten()
        return _Local(split, namespace, batch, reverse, offsets[: 2 * batch + 1])

    def packed(self, gates: Tensor, tokens: Tensor) -> ScanCall:
        """A scan of the packed pieces."""
        return ScanCall(_packed(gates), _packed(tokens), None, self.reverse, self.offsets)

    def pieces(self, x: Tensor) -> Tensor:
        """(2, B, N) of (2 B, N)."""
        return x.unflatten(0, (self.batch, 2)).transpose(0, 1)

    def rows(self, entering: dict[tuple[int, int], Tensor]) -> Tensor:
        """What enters this rank's pieces, (2 B, N)."""
        mine = [entering[self.split.ranks.rank, i] for i in (0, 1)]
        return torch.stack(mine, 1).flatten(0, 1)

    def order(self) -> list[tuple[int, int]]:
        """(rank, index) of all pieces, in the order of the recurrence."""
        every = list(self.split.deal.in_order)
        return every[::-1] if self.reverse else every

    def forward(self, call: ScanCall) -> tuple[Tensor, Tensor]:
        """(states, final states)."""
        if not self.namespace:
            return reference.run(call)
        states, final = op.FORWARD(self.namespace, call)
        return states, final

    def backward(self, call: op.BackwardCall, tokens: Tensor | None) -> tuple[Tensor, ...]:
        """Gradients of tokens, gates and initial states; the reference asks for tokens."""
        if self.namespace:
            return tuple(op.BACKWARD(self.namespace, call))
        assert tokens is not None
        assert call.initial_state is not None
        with torch.enable_grad():
            leaves = [x.detach() for x in (tokens, call.gates, call.initial_state)]
            x, gates, start = (leaf.requires_grad_() for leaf in leaves)
            outputs = reference.run(ScanCall(gates, x, start, call.reverse, call.cu_seqlens))
        given = [
            torch.zeros_like(output) if grad is None else grad
            for output, grad in zip(outputs, (call.grad_states, call.grad_final), strict=True)
        ]
        return torch.autograd.grad(outputs, (x, gates, start), given)

    def ends(self, call: ScanCall) -> Tensor:
        """The final states (2 B, N) of pieces that start from zero."""
        tokens = call.tokens
        starts = _wide_zeros(tokens, 2 * self.batch)
        if not self.namespace or tokens.shape[0] == 0:
            return self.forward(call._replace(initial_state=starts))[1]
        # All but the last step of a piece, against time and with the conjugate gates of the steps
        # after them, have that state less the last token as their initial state's gradient. The
        # last step is a sequence of its own, which nothing reads. Gates by step are complex
        # seldom: only those are copied.
        rows = tokens.shape[0]
        given, gates = (slice(1, None), slice(-1)) if self.reverse else (slice(-1), slice(1, None))
        shifted = call.gates if call.gates.dim() == 1 else call.gates[gates]
        first, after = self.offsets[:-1], self.offsets[1:]
        bounds = torch.stack([first, torch.maximum(first, after - 1)], 1).flatten()
        bounds = torch.cat([bounds, after[-1:]]).clamp(max=rows - 1)
        reduced = op.BackwardCall(
            grad_states=tokens[given],
            grad_final=None,
            gates=shifted.conj().resolve_conj(),
            states=_unread(tokens[given]),
            initial_state=_wide_zeros(tokens, 4 * self.batch),
            reverse=not self.reverse,
            cu_seqlens=bounds,
            grad_mask=WANTS_INITIAL,
        )
        before = self.backward(reduced, None)[2][::2]
        at = (first if self.reverse else after - 1).clamp(0, rows - 1)
        last = tokens.index_select(0, at)
        return before + last.where((after > first)[:, None], 0)

    def products(self, call: ScanCall) -> Tensor:
        """The products of each piece's gates, (2 B, N)."""
        ones = _wide_zeros(call.tokens, 2 * self.batch) + 1
        states = _unread(call.tokens)
        operands = (call.gates, states, ones, self.reverse, self.offsets, WANTS_INITIAL)
        found = self.backward(op.BackwardCall(None, ones, *operands), call.tokens)[2]
        return found.conj().resolve_conj()


def _packed(x: Tensor) -> Tensor:
    """(B T, N) of (B, T, N); gates that are constant stay."""
    return unit_stride(x.flatten(0, 1) if x.dim() == 3 else x)


def _wide_zeros(tokens: Tensor, rows: int) -> Tensor:
    return tokens.new_zeros((rows, tokens.shape[-1]), dtype=state_dtype(tokens.dtype))


def _unread(like: Tensor) -> Tensor:
    """What stands for states where no gradient of the gates is wanted."""
    return like.new_empty(like.shape[-1:]).expand(like.shape)


def _gathered(split: Split, name: str, x: Tensor) -> Tensor:
    # Libraries of collectives know no complex numbers.
    if x.is_complex():
        return torch.view_as_complex(split.ranks.gather(name, torch.view_as_real(x)))
    return split.ranks.gather(name, x)


def _of_all_pieces(local: _Local, call: ScanCall) -> tuple[Tensor, Tensor]:
    """(final states from zero, products of the gates) of every piece, (ranks, 2, B, N) both."""
    split, ends = local.split, local.pieces(local.ends(call))
    if call.gates.dim() != 1:
        mine = torch.cat([ends, local.pieces(local.products(call))])
        gathered = _gathered(split, "carries", mine)
        return gathered[:, :2], gathered[:, 2:]
    # Every rank knows these; wide, as a power by logarithms loses digits.
    wide = torch.complex128 if call.gates.is_complex() else torch.float64
    lengths = [[piece.length for piece in pieces] for pieces in split.deal.pieces]
    gates = call.gates.to(wide)
    powers = torch.stack([torch.stack([gates**n for n in pair]) for pair in lengths])
    ends = _gathered(split, "carries", ends)
    return ends, powers.to(ends.dtype)[:, :, None].expand(ends.shape)


def _carry(
    carry: Tensor, ends: Tensor, products: Tensor, order: Sequence[tuple[int, int]]
) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """(what enters each piece, what leaves the last one) where `carry` enters the first."""
    entering = {}
    for at in order:
        entering[at] = carry
        # A product that overflows leaves a state of zero as it is.
        carry = ends[at] + (products[at] * carry).where(carry != 0, 0)
    return entering, carry


def forward(namespace: str, given: SplitScanCall) -> tuple[Tensor, ...]:
    """The op `split_scan_forward`: (states, final state, what enters this rank's pieces, products
    of all pieces' gates), by the ops of `namespace`."""
    tokens, initial_state = given.tokens, given.initial_state
    local = _Local.of(namespace, given.split, tokens, given.reverse)
    call = local.packed(given.gates, tokens)
    ends, products = _of_all_pieces(local, call)
    start = _wide_zeros(tokens, local.batch)
    start = start if initial_state is None else initial_state.to(start.dtype)
    entering, final = _carry(start, ends, products, local.order())
    starts = local.rows(entering)
    states, _ = local.forward(call._replace(initial_state=starts))
    return states.view(tokens.shape), final.clone(), starts, products.contiguous()


def backward(namespace: str, given: SplitBackwardCall) -> tuple[Tensor, ...]:
    """The op `split_scan_backward`: the gradients of LEAVES, empty where not wanted, the initial
    state's not rounded."""
    states, starts, tokens = given.states, given.starts, given.tokens
    local = _Local.of(namespace, given.split, states, given.reverse)
    wants = [bool(given.grad_mask >> bit & 1) for bit in range(len(LEAVES))]
    call = op.BackwardCall(
        grad_states=None if given.grad_states is None else _packed(given.grad_states),
        grad_final=None,
        gates=_packed(given.gates),
        states=_packed(states),
        initial_state=starts,
        reverse=local.reverse,
        cu_seqlens=local.offsets,
        grad_mask=WANTS_INITIAL,
    )
    tokens = None if tokens is None else _packed(tokens)
    begins = torch.zeros_like(starts)
    if call.grad_states is not None:
        begins = local.backward(call, tokens)[2]
    final = starts.new_zeros((local.batch, starts.shape[-1]))
    final = final if given.grad_final is None else given.grad_final
    gathered = _gathered(local.split, "adjoints", torch.cat([local.pieces(begins), final[None]]))
    # Every rank has the final state, and uses of it; all count.
    total, order = gathered[:, 2].sum(0), local.order()
    entering, initial = _carry(total, gathered[:, :2], given.products.conj(), order[::-1])
    call = call._replace(
        grad_final=local.rows(entering), grad_mask=gradient.mask_of((wants[1], wants[0]))
    )
    nothing = starts.new_empty((0,))
    d_tokens = d_gates = nothing
    if call.grad_mask:
        d_tokens, d_gates, _ = local.backward(call, tokens)
    # Gradients of what every rank holds are parts of a sum: this one is the first rank's.
    if order[0][0] != local.split.ranks.rank:
        initial = torch.zeros_like(initial)
    return (
        d_gates.reshape(given.gates.shape) if wants[0] else nothing.to(given.gates.dtype),
        d_tokens.reshape(states.shape) if wants[1] else nothing.to(states.dtype),
        initial.clone() if wants[2] else nothing,
    )
