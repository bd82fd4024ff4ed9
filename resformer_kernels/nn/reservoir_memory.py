"""A memory of all earlier steps: a fixed reservoir and a trained readout of its states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resformer_kernels._core.checks import check_flag, describe, integer, real
from resformer_kernels.attention.api import value_residual_attention
from resformer_kernels.nn.reservoir import Reservoir
from resformer_kernels.nn.state import KeepsState

READOUTS = ("linear", "mlp", "attention")


class AttentionReadout(nn.Module):
    """Attention of the step's query over the last `window` states, and a projection.

    States before the conversation are zeros, and so are their keys and values. A window can thus
    reach past the start, and a conversation fed in parts gives the same results as in one call.

    Args:
        units: N, the length of a state.
        query_dim: length of a query.
        out_features: length of the result.
        window: number of states attended over, including the newest.
        heads: attention heads; each has out_features / heads channels.
        backend: passed to `value_residual_attention`.
    """

    def __init__(
        self,
        units: int,
        query_dim: int,
        out_features: int,
        *,
        window: int = 32,
        heads: int = 4,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        units, query_dim = integer("units", units, 1), integer("query_dim", query_dim, 1)
        out_features, heads = integer("out_features", out_features, 1), integer("heads", heads, 1)
        if out_features % heads:
            raise ValueError(f"out_features {out_features} must be a multiple of heads {heads}")
        self.window, self.heads, self.backend = integer("window", window, 1), heads, backend
        self.q_proj = nn.Linear(query_dim, out_features)
        self.k_proj = nn.Linear(units, out_features, bias=False)
        self.v_proj = nn.Linear(units, out_features, bias=False)
        self.o_proj = nn.Linear(out_features, out_features)

    def forward(self, states: Tensor, queries: Tensor) -> Tensor:
        """(B, T, out_features).

        Args:
            states: (B, window - 1 + T, N); the last T are the newest states of the T steps.
            queries: (B, T, query_dim).
        """
        projected = self.q_proj(queries), self.k_proj(states), self.v_proj(states)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in projected)
        # Bottom-right alignment: query i has the position of key i + window - 1.
        out = value_residual_attention(
            q, k, v, causal=True, window=(self.window - 1, 0), softcap=0.0, backend=self.backend
        )
        return self.o_proj(out.flatten(2))


class ReservoirMemory(KeepsState):
    """A nonlinear readout, at each step, of a reservoir's state after all earlier steps.

    Step t reads h_{t-1}, the state after every earlier step and before its own, as the all-time
    memory beside a Transformer over the current sentence does (Liu and Xu, arXiv 2509.24074). The
    reservoir is fixed; the readout is trained. Memory is one state per stream (and `window` states
    for an attention readout), whatever the length of the history.

    A conversation can have several streams, such as one per speaker. Each has a state of its own,
    which only that stream's steps update and read. All streams run in one packed call.

    The states read go to the readout in the dtype of its parameters, so a memory in 16 bits has
    results in 16 bits; the state itself stays float32 (float64 in a memory in float64).

    Args:
        reservoir: a `Reservoir` of N units; groups with different leaks cover different spans of
            time. Must not be stateful: this module holds the state.
        out_features: length of the result.
        readout: "linear"; "mlp": LayerNorm, one hidden layer, GELU; "attention": over the last
            `window` states that steps read, queried by the step itself; or a module that maps
            states (B, T, N) to (B, T, out_features).
        hidden: hidden units of the MLP; None: out_features.
        query_dim: length of the attention's queries; None: the reservoir's input_dim.
        window, heads: arguments of `AttentionReadout`.
        dropout: dropout of the states before the readout.
        streams: S, the number of streams in a conversation.
        stateful: a call continues from the last one's final states, until `reset`. They move, cast
            and copy with the module; checkpoints do not hold them.
        keep_graph: the stored states keep their autograd graph, so that gradients cross calls,
            until `detach`. Copies of the module hold no graph.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        reservoir: Reservoir,
        out_features: int,
        *,
        readout: str | nn.Module = "mlp",
        hidden: int | None = None,
        query_dim: int | None = None,
        window: int = 32,
        heads: int = 4,
        dropout: float = 0.0,
        streams: int = 1,
        stateful: bool = False,
        keep_graph: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(reservoir, Reservoir):
            raise TypeError(f"reservoir must be a Reservoir, got {describe(reservoir)}")
        if reservoir.stateful:
            raise ValueError("reservoir must not be stateful: ReservoirMemory holds the state")
        if reservoir.feedback_dim:
            raise ValueError("reservoir must have no feedback: ReservoirMemory has no teacher")
        check_flag("stateful", stateful)
        check_flag("keep_graph", keep_graph)
        self.reservoir, self.out_features = reservoir, integer("out_features", out_features, 1)
        self.streams, self.stateful = integer("streams", streams, 1), stateful
        self.keep_graph = keep_graph
        self.dropout = nn.Dropout(real("dropout", dropout))
        units, out = reservoir.units, self.out_features
        width = out if hidden is None else integer("hidden", hidden, 1)
        self.readout: nn.Module
        if isinstance(readout, nn.Module):
            self.readout = readout
        elif readout == "linear":
            self.readout = nn.Linear(units, out)
        elif readout == "mlp":
            self.readout = nn.Sequential(
                nn.LayerNorm(units), nn.Linear(units, width), nn.GELU(), nn.Linear(width, out)
            )
        elif readout == "attention":
            asked = reservoir.input_dim if query_dim is None else query_dim
            self.readout = AttentionReadout(units, asked, out, window=window, heads=heads)
        else:
            raise ValueError(
                f"readout must be one of {', '.join(READOUTS)} or a module, got {describe(readout)}"
            )
        self.window = self.readout.window if isinstance(self.readout, AttentionReadout) else 1

    def forward(
        self,
        x: Tensor,
        *,
        queries: Tensor | None = None,
        streams: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The readout at each step of the steps before it.

        Args:
            x: the reservoir's input, (B, T, input_dim).
            queries: (B, T, query_dim) for the attention; None: x.
            streams: int64 (B, T), each step's stream, in [0, S); None: all in stream 0.
            lengths: int64 (B,), steps of each row without padding; None: T. Padding changes no
                state, and its results are meaningless.

        Returns:
            (B, T, out_features).

        Raises:
            ValueError, TypeError: a wrong shape or dtype, a stream or length out of range, or a
                batch size other than the stored state's.
        """
        self._check(x, streams, lengths)
        start, recent = self._start(x)
        read, last = self._states_before(x, start, streams, lengths)
        history = torch.cat((recent, read), 1)
        if self.stateful:
            self._keep(streams=last, recent=self._recent(history, lengths))
        parameters = self.readout.parameters()
        dtype = next((p.dtype for p in parameters if p.is_floating_point()), history.dtype)
        seen = self.dropout(history.to(dtype))
        if isinstance(self.readout, AttentionReadout):
            return self.readout(seen, (x if queries is None else queries).to(dtype))
        return self.readout(seen)

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each stream's state (B, S, N), and the last states that steps read (B, W - 1, N)."""
        batch, units = x.shape[0], self.reservoir.units
        if self.stateful and self._kept:
            stored = self._kept["streams"]
            if stored.shape[0] != batch:
                raise ValueError(
                    f"x must hold {stored.shape[0]} conversations, as the calls before, got "
                    f"{batch}: call reset() to start anew"
                )
            return stored, self._kept["recent"]
        dtype = self.reservoir.state_dtype
        return (
            x.new_zeros((batch, self.streams, units), dtype=dtype),
            x.new_zeros((batch, self.window - 1, units), dtype=dtype),
        )

    def _states_before(
        self, x: Tensor, start: Tensor, streams: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The state that each step reads, (B, T, N), and each stream's last state (B, S, N)."""
        batch, steps, units = x.shape[0], x.shape[1], self.reservoir.units
        if streams is None and lengths is None and self.streams == 1:
            after, last = self.reservoir(x, start[:, 0])
            return torch.cat((start, after), 1)[:, :steps], last[:, None]
        # Each stream is one packed sequence: steps are sorted by conversation and stream, keeping
        # their order in time. Padding goes after the last sequence, where nothing is computed.
        which = torch.arange(batch, device=x.device)[:, None] * self.streams
        which = which.expand(batch, steps) if streams is None else which + streams
        count = batch * self.streams
        if lengths is not None:
            real = torch.arange(steps, device=x.device) < lengths[:, None]
            which = which.where(real, count)
        which = which.flatten()
        order = torch.argsort(which, stable=True)
        ends = torch.bincount(which, minlength=count)[:count].cumsum(0)
        offsets = torch.cat((ends.new_zeros(1), ends))
        first = start.flatten(0, 1)
        after, last = self.reservoir(
            x.flatten(0, 1)[order], first, cu_seqlens=offsets.to(torch.int32)
        )
        before = torch.cat((first.new_zeros(1, units), after[:-1]))[: batch * steps]
        starts = offsets[:-1][offsets.diff() > 0]
        before = before.index_copy(0, starts, first[offsets.diff() > 0])
        read = torch.empty_like(before).index_copy(0, order, before)
        return read.unflatten(0, (batch, steps)), last.unflatten(0, (batch, self.streams))

    def _recent(self, history: Tensor, lengths: Tensor | None) -> Tensor:
        """The last window - 1 states that steps other than padding read."""
        recent, steps = self.window - 1, history.shape[1] - (self.window - 1)
        if lengths is None:
            return history[:, steps:]
        index = lengths[:, None] + torch.arange(recent, device=history.device)
        return history.gather(1, index[..., None].expand(-1, -1, history.shape[2]))

    def _check(self, x: Tensor, streams: Tensor | None, lengths: Tensor | None) -> None:
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.reservoir.input_dim:
            raise ValueError(f"x must be (B, T, {self.reservoir.input_dim}), got {describe(x)}")
        batch, steps = x.shape[:2]
        for name, value, shape, least, most in (
            ("streams", streams, (batch, steps), 0, self.streams - 1),
            ("lengths", lengths, (batch,), 0, steps),
        ):
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dtype is not torch.int64:
                raise TypeError(f"{name} must be an int64 tensor {shape}, got {describe(value)}")
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must be {shape}, got shape {tuple(value.shape)}")
            if value.numel() and not least <= int(value.min()) <= int(value.max()) <= most:
                raise ValueError(
                    f"{name} must lie in [{least}, {most}], got {int(value.min())} to "
                    f"{int(value.max())}"
                )

    @property
    def state(self) -> Tensor | None:
        """Each stream's state, (B, S, N); None at the start."""
        return self._kept.get("streams")

    def reset(self, conversations: Tensor | None = None) -> None:
        """Reset all conversations (None), or those selected by a bool mask (B,) or indices."""
        super().reset(conversations)
