"""The configurations of attention's Triton kernels that the compile check compiles.

Each case is a call of the op on meta tensors; its kernels are those that the launchers launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resformer_kernels._triton.cases import CompileCase, case_from_launch
from resformer_kernels._triton.launch import Launch, assumed_capability, recorded_launches
from resformer_kernels.attention import epilogue_op
from resformer_kernels.attention.op import BackwardCall
from resformer_kernels.attention.record import LEAVES, AttentionCall
from resformer_kernels.attention.triton import epilogue
from resformer_kernels.attention.triton.backward import backward
from resformer_kernels.attention.triton.forward import forward

_BATCH, _HEADS = 2, 8
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_EVERY_GRADIENT = 2 ** len(LEAVES) - 1


@dataclass(frozen=True)
class _Call:
    """A call of the op, as far as it decides what is compiled."""

    what: str
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    length: int = 4096
    group: int = 1
    causal: bool = True
    window: int = -1
    coefficient: str = "number"
    bias: str = "none"
    softcap: float = 0.0
    sinks: bool = False
    packed: bool = False
    exclusive: str = "none"
    gate: str = "none"
    main: bool = False

    @property
    def name(self) -> str:
        return f"D{self.head_dim} {_NAMES[self.dtype]} {self.what}"

    def record(self) -> AttentionCall:
        """The call, on meta tensors."""
        rows: tuple[int, ...] = (_BATCH, self.length)
        if self.packed:
            rows = (_BATCH * self.length,)

        def tensor(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        heads = _HEADS * self.group
        q = tensor(*rows, heads, self.head_dim)
        k, v, v_first = (tensor(*rows, _HEADS, self.head_dim) for _ in range(3))
        ones = (1,) * len(rows)
        shapes = {
            "head": (*ones, _HEADS, 1),
            "channel": (*ones, _HEADS, self.head_dim),
            "token": (*rows, _HEADS, 1),
            "full": v.shape,
        }
        own = first = None
        if self.coefficient != "number":
            own, first = (tensor(*shapes[self.coefficient], dtype=torch.float32) for _ in range(2))
        offsets = tensor(_BATCH + 1, dtype=torch.int32) if self.packed else None
        bias = None
        if self.bias == "mask":
            bias = tensor(_BATCH, 1, self.length, self.length, dtype=torch.bool)
        elif self.bias == "additive":
            bias = tensor(1, heads, self.length, self.length, dtype=torch.float32)
        elif self.bias == "per key":
            bias = tensor(1, 1, 1, self.length, dtype=torch.float32)
        elif self.bias == "per query":
            bias = tensor(1, 1, self.length, 1, dtype=torch.float32)
        gates = {
            "token": tensor(*rows, heads, 1, dtype=torch.float32),
            "full": tensor(*rows, heads, self.head_dim),
        }
        return AttentionCall(
            q=q,
            k=k,
            v=v,
            v_first=v_first,
            lambda_v=own,
            lambda_first=first,
            lambda_v_value=0.5,
            lambda_first_value=0.5,
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=self.length,
            max_seqlen_k=self.length,
            window_left=self.window,
            window_right=0 if self.causal else -1,
            scale=self.head_dim**-0.5,
            softcap=self.softcap,
            sinks=tensor(heads, dtype=torch.float32) if self.sinks else None,
            attn_bias=bias,
            return_lse=True,
            return_mixed_value=False,
            exclusive=gates["token"] if self.exclusive == "token" else None,
            exclusive_value=float(self.exclusive == "number"),
            out_gate=gates.get(self.gate),
            return_along=self.exclusive != "none",
            return_ungated=self.gate != "none",
        )

    def run(self) -> None:
        """Forward with V' mixed before it or in its loop, backward, and the epilogue alone."""
        call = self.record()
        forward(call, inline=False)
        out, lse, _, along, _ = forward(call, inline=True)
        kept = along if call.excludes else None
        backward(BackwardCall(out, None, None, call, out, lse, kept, _EVERY_GRADIENT))
        if not call.plain:
            of = epilogue_op.epilogue_of(call, out, call.value)
            epilogue.forward(of)
            epilogue.backward(epilogue_op.EpilogueBackwardCall(out, of, _EVERY_GRADIENT))


def _calls() -> Iterator[_Call]:
    for head_dim in (64, 128, 256):
        for what, causal in (("causal", True), ("full", False)):
            call = _Call(what, head_dim, causal=causal, main=True)
            yield call
            if head_dim == 128 and causal:
                yield replace(call, dtype=torch.float16)
    yield _Call("GQA 8", group=8)
    yield _Call("GQA 3", group=3, head_dim=64)
    yield _Call("window", window=512)
    yield _Call("packed", packed=True, coefficient="token")
    yield _Call("head dimension 80", head_dim=80, coefficient="head")
    yield _Call("coefficient per channel", coefficient="channel")
    yield _Call("coefficient per element", coefficient="full", head_dim=64)
    yield _Call("softcap and sinks", softcap=30.0, sinks=True)
    yield _Call("mask", bias="mask", causal=False, length=1024)
    yield _Call("bias", bias="additive", length=1024)
    yield _Call("bias per key", bias="per key", head_dim=64, causal=False)
    yield _Call("bias per query", bias="per query", head_dim=64, causal=False)
    yield _Call("causal", head_dim=64, dtype=torch.float32)
    for head_dim in (64, 128):
        what = "causal, exclusive, gate"
        yield _Call(what, head_dim, exclusive="token", gate="token", main=True)
    yield _Call("exclusive, gate per element", exclusive="token", gate="full")
    yield _Call("exclusive by a number", head_dim=64, exclusive="number")
    yield _Call("gate", head_dim=64, gate="full", causal=False)
    yield _Call(
        "exclusive, packed, GQA 8",
        exclusive="token",
        gate="token",
        group=8,
        packed=True,
        coefficient="token",
    )


def _kernel(launch: Launch) -> str:
    """Which kernel it is, in words."""
    name: str = launch.kernel.__name__.removesuffix("_kernel").replace("_", " ")
    if name == "forward" and launch.kwargs["values"].MIXES.value:
        return "forward with the mix"
    if name == "epilogue backward" and launch.kwargs["epilogue"].along.pointer is None:
        return "epilogue backward, alone"
    if name == "open tiles":
        along = "keys" if launch.kwargs["BY_ROWS"] else "rows"
        sizes = launch.kwargs["sizes"]
        return f"open {sizes.ROWS.value}x{sizes.KEYS.value} tiles along {along}"
    return name


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every kernel of forward, with either placement of the mix, and of backward.

    A kernel that two calls share is a case of the first alone.
    """
    seen: set[str] = set()
    with assumed_capability((capability // 10, capability % 10)):
        for call in _calls():
            with recorded_launches() as launches:
                call.run()
            for launch in launches:
                kernel = _kernel(launch)
                products = "gradient" in kernel or "forward" in kernel
                case = case_from_launch(
                    f"{kernel}, {call.name}",
                    launch,
                    capability=capability,
                    main=call.main,
                    expects_mma=products and call.dtype is not torch.float32,
                )
                identity = repr(replace(case, name="", main=False))
                if identity not in seen:
                    seen.add(identity)
                    yield case
