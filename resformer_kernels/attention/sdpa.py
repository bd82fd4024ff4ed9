"""The backend of torch's own attention: `mix_values`, torch's kernel, then our epilogue.

It serves what no kernel of ours does: devices (ROCm by `auto`, MPS, XPU), systems without a
compiled library, wide heads on a GPU; and on a CPU whose AMX tiles torch multiplies on, what is
faster there by measured figures. V' is made before torch's kernel and again in backward: it is not
saved. On a CPU torch's forward and backward kernels are called as they are. Elsewhere, where which
kernel torch takes is its own affair, and for the gradient of a bias, backward runs forward again
and asks autograd. What torch leaves undefined is done here: a query that may attend to nothing.

The launchers stand behind attention's ops, in a namespace of their own: opaque to torch.compile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels._core.gradient import recording, wants_gradient
from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels.attention import epilogue_op, op
from resformer_kernels.attention.record import LEAVES, AttentionCall
from resformer_kernels.attention.shared import allowed_positions, mixed

NAME = "sdpa"
NAMESPACE = "resformer_sdpa"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SOURCES = ("v", "v_first", "lambda_v", "lambda_first")

# Measured: times of the benchmark's peers (a mix in PyTorch and torch's attention) over ours, with
# bfloat16 on AMX, two threads of an Emerald Rapids, from
# benchmarks/results/intel-r-xeon-r-processor-2-threads-avx512-amx.json. Forward: T=256 1.03, 512
# 0.66, 1024 0.66, 2048 0.55, 8192 0.47. Forward and backward: D64 T=1024 1.15, 2048 1.01, 4096
# 0.90 to 1.00; D128 T=2048 0.64. Assumed: that this backend and float16 on its own tiles do alike.
_AMX_HEAD_DIM = 64
"""The least head_dim, of keys and values alike, that was measured."""
_AMX_FORWARD, _AMX_TRAINING, _AMX_TRAINING_WIDE = 512, 4096, 2048
"""Queries and keys from which on torch is faster: forward alone, with gradients, the same of a
head_dim of 128 or more."""


def unsupported_reason(call: AttentionCall, _hardware: Hardware) -> str | None:
    """Why torch's attention cannot serve this call; None when it can."""
    bias, on_cpu = call.attn_bias, call.q.device.type == "cpu"
    if call.q.device.type == "meta":
        return "it has no kernels for the meta device"
    if call.q.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, these are {call.q.dtype}"
    if call.packed:
        return "it does not take packed sequences"
    if call.softcap > 0:
        return "it does not take softcap"
    if call.sinks is not None:
        return "it does not take sinks"
    if bias is not None and not on_cpu and bias.dtype not in (torch.bool, call.q.dtype):
        return f"it takes attn_bias as bool or {call.q.dtype} here, this is {bias.dtype}"
    if call.return_lse and not on_cpu:
        return "torch returns the LSE on a CPU alone"
    if call.return_lse and wants_gradient(call.leaves):
        return "its LSE has no gradient: call it under torch.no_grad(), or without return_lse"
    return None


def preferred(call: AttentionCall, hardware: Hardware) -> bool:
    """Whether `auto` takes this backend before the native one: torch multiplies on AMX tiles here,
    the native path does not, and the call is of a form and size that was measured to gain."""
    if call.q.dtype is torch.float32 or call.q.device.type != "cpu" or call.packed:
        return False
    if not hardware.torch_multiplies_on_amx(call.q.dtype) or hardware.native_path_asked():
        return False
    head_dim = call.q.shape[-1]
    if head_dim < _AMX_HEAD_DIM or call.value.shape[-1] != head_dim:
        return False
    # Its kernel computes every pair that a mask closes; ours skips them.
    if _positions_need_mask(call) or (call.attn_bias is not None and _is_causal(call)):
        return False
    least = _AMX_FORWARD
    if wants_gradient(call.leaves):
        least = _AMX_TRAINING_WIDE if head_dim >= 2 * _AMX_HEAD_DIM else _AMX_TRAINING
    return call.max_seqlen_q >= least and call.max_seqlen_k >= least


def amx_note(hardware: Hardware) -> str | None:
    """What `info` says where torch multiplies on AMX tiles; None where it does not."""
    dtypes = (torch.bfloat16, torch.float16)
    found = [str(x).split(".")[1] for x in dtypes if hardware.torch_multiplies_on_amx(x)]
    if not found:
        return None
    if hardware.native_path_asked():
        return "left to torch's own ops: RESFORMER_CPU asks for a native path"
    return (
        f"auto takes torch's attention (sdpa) for {' and '.join(found)} from {_AMX_FORWARD} tokens "
        f"on, {_AMX_TRAINING} with gradients ({_AMX_TRAINING_WIDE} of head_dim 128), without a "
        "window: native kernels use no AMX. RESFORMER_CPU keeps them"
    )


def notes(call: AttentionCall) -> list[str]:
    """What runs beside torch's kernel, and where bits may vary."""
    on_cpu = call.q.device.type == "cpu"
    found = []
    if preferred(call, MACHINE):
        found.append(
            f"torch multiplies {call.q.dtype} on this processor's AMX tiles, which native kernels "
            "do not use: RESFORMER_CPU keeps those"
        )
    found.append("torch chooses the kernel: another device or version of torch may give other bits")
    if not on_cpu:
        found.append(
            "bits of gradients may vary from run to run, unless torch.use_deterministic_algorithms"
        )
    if call.mixes:
        found.append("V' is made by mix_values first, and again in backward")
    masked = call.attn_bias is not None and _is_causal(call)
    if masked or _positions_need_mask(call):
        size = f"{call.max_seqlen_q} x {call.max_seqlen_k}"
        found.append(f"a mask of {size} says what positions allow: no pair of them is skipped")
    if on_cpu and call.q.shape[-1] != call.value.shape[-1]:
        found.append("q, k and V' are padded to one head_dim")
    bias = call.attn_bias
    if bias is not None and wants_gradient([bias]):
        found.append("attn_bias wants a gradient: backward writes the scores of every pair")
    elif not on_cpu and wants_gradient(call.leaves):
        found.append("backward runs forward again")
    if not call.plain:
        found.append("exclusive and out_gate are a pass over its output, in PyTorch")
    return [*found, *op.copy_notes(call)]


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
    return op.run(NAMESPACE, call, _keeping)


def _keeping(call: AttentionCall) -> AttentionCall:
    """Has forward keep y in place of out where something follows the softmax."""
    return call._replace(return_ungated=True)


def _upright(call: AttentionCall) -> tuple[AttentionCall, float]:
    """The call with a positive scale, and what q was multiplied by for that: -1, 0 or 1. Torch's
    kernels put -inf where they close a pair before they scale, or take the maximum before."""
    if call.scale > 0:
        return call, 1.0
    sign = -1.0 if call.scale < 0 else 0.0
    return call._replace(q=call.q * sign, scale=-call.scale if call.scale < 0 else 1.0), sign


def forward(call: AttentionCall) -> tuple[Tensor, ...]:
    """The results of the op; `ungated` is y. The LSE is NaN where torch returns none."""
    value = mixed(call)
    y, lse = _attend(_upright(call)[0], value)
    out = y
    if not call.plain:
        out = epilogue_op.forward(NAMESPACE, epilogue_op.epilogue_of(call, y, value))
    nothing = y.new_empty((0,), dtype=torch.float32)
    if not call.return_mixed_value:
        value = value.new_empty((0,))
    elif not call.mixes:
        value = value.clone(memory_format=torch.contiguous_format)
    return (
        out,
        lse if call.return_lse else nothing.clone(),
        value,
        nothing,
        y if call.return_ungated else y.new_empty((0,)),
    )


def backward(given: op.BackwardCall) -> tuple[Tensor, ...]:
    """The gradient of each leaf of `LEAVES`, empty where it is not wanted."""
    call = given.call
    wanted = [name for bit, name in enumerate(LEAVES) if given.grad_mask >> bit & 1]
    sources = {
        name: getattr(call, name).detach().requires_grad_() for name in _SOURCES if name in wanted
    }
    with torch.set_grad_enabled(call.mixes):
        value = mixed(call._replace(**sources))
    fixed = value.detach()
    found: dict[str, Tensor] = {}
    grad, more = given.grad_out, [given.grad_mixed]
    if not call.plain:
        of = epilogue_op.epilogue_of(call, given.out, fixed)
        needs = (True, call.excludes and bool(sources), "exclusive" in wanted, "out_gate" in wanted)
        mask = sum(1 << bit for bit, needed in enumerate(needs) if needed)
        grad, own, found["exclusive"], found["out_gate"] = epilogue_op.backward(
            NAMESPACE, epilogue_op.EpilogueBackwardCall(grad, of, mask)
        )
        more.append(own if needs[1] else None)
    upright, sign = _upright(call)
    dq, found["k"], d_value, *d_bias = _gradients(
        upright, fixed, given, grad.contiguous(), "attn_bias" in wanted
    )
    found["q"] = dq if sign > 0 else dq * sign
    found |= dict(zip(("attn_bias",), d_bias, strict=False))
    for part in more:
        d_value = d_value if part is None else d_value + part
    if sources and call.mixes:
        found |= zip(sources, torch.autograd.grad(value, [*sources.values()], d_value), strict=True)
    else:
        found |= dict.fromkeys(sources, d_value)
    return tuple(
        found[name] if name in wanted else op.absent_gradient(call, bit)
        for bit, name in enumerate(LEAVES)
    )


class _Mask(NamedTuple):
    """What torch's kernel is told of positions and bias."""

    mask: Tensor | None
    """Bool or additive, broadcastable to (B, Hq, Tq, Tk); a query without keys sees all."""
    is_causal: bool
    empty: Tensor | None
    """(B or 1, Hq or 1, Tq or 1): which queries may attend to nothing."""


def _positions_need_mask(call: AttentionCall) -> bool:
    """Whether the window is neither absent nor torch's own causal order."""
    left, right = call.window_left, call.window_right
    rows, keys = call.max_seqlen_q, call.max_seqlen_k
    unbounded = (left < 0 or left >= keys - 1) and (right < 0 or right >= rows - 1)
    return not unbounded and not _is_causal(call)


def _is_causal(call: AttentionCall) -> bool:
    """Whether the window is what torch calls causal, which aligns the first query and key."""
    left, keys = call.window_left, call.max_seqlen_k
    from_first = left < 0 or left >= keys - 1
    return call.window_right == 0 and from_first and call.max_seqlen_q == keys


def _mask(call: AttentionCall) -> _Mask:
    bias, rows, keys = call.attn_bias, call.max_seqlen_q, call.max_seqlen_k
    is_causal, positions = _is_causal(call), _positions_need_mask(call)
    if bias is None and not positions:
        return _Mask(None, is_causal, None)
    allowed = None
    if positions or is_causal:
        allowed = allowed_positions(call, rows, keys, call.q.device)[None, None]
    if bias is None or bias.dtype is torch.bool:
        if bias is not None:
            allowed = bias if allowed is None else allowed & bias
        assert allowed is not None
        empty = ~allowed.any(-1)
        return _Mask(allowed | empty[..., None], False, empty)
    masked = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
    empty = (masked == -torch.inf).all(-1)
    return _Mask(masked.masked_fill(empty[..., None], 0.0), False, empty)


def _padded(x: Tensor, width: int) -> Tensor:
    """(B, H, T, width) of (B, T, H, D), zeros after D."""
    heads_first = x.transpose(1, 2)
    return heads_first if x.shape[-1] == width else F.pad(heads_first, (0, width - x.shape[-1]))


def _additive(call: AttentionCall, mask: Tensor | None) -> Tensor | None:
    """A mask as torch's CPU kernels take it."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=call.q.dtype).masked_fill(~mask, -torch.inf)


def _attend(call: AttentionCall, value: Tensor) -> tuple[Tensor, Tensor]:
    """(y (B, Tq, Hq, Dv), contiguous, LSE (B, Hq, Tq)) of V'."""
    batch, rows, heads, head_dim = call.q.shape
    of_rows = (batch, heads, rows)
    if 0 in (*call.q.shape, call.max_seqlen_k):
        y = value.new_zeros(batch, rows, heads, value.shape[-1])
        return y, y.new_full(of_rows, -torch.inf, dtype=torch.float32)
    mask = _mask(call)
    if call.q.device.type != "cpu":
        y = _by_torch(call, value, mask)
        return y, y.new_full(of_rows, torch.nan, dtype=torch.float32)
    width = max(head_dim, value.shape[-1])
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_padded(x, width) for x in (call.q, call.k, value)),
        is_causal=mask.is_causal,
        attn_mask=_additive(call, mask.mask),
        scale=call.scale,
    )
    y = y[..., : value.shape[-1]]
    if mask.empty is not None:
        y = y.masked_fill(mask.empty[..., None], 0.0)
        lse = lse.masked_fill(mask.empty, -torch.inf)
    return y.transpose(1, 2).contiguous(), lse.contiguous()


def _by_torch(call: AttentionCall, value: Tensor, mask: _Mask) -> Tensor:
    """y (B, Tq, Hq, Dv) by the public function, which autograd follows."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, value))
    # Under autocast it would cast again.
    with torch.autocast(call.q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            *(q, k, v),
            attn_mask=mask.mask,
            is_causal=mask.is_causal,
            scale=call.scale,
            enable_gqa=call.group > 1,
        )
    if mask.empty is not None:
        y = y.masked_fill(mask.empty[..., None], 0.0)
    return y.transpose(1, 2).contiguous()


def _gradients(
    call: AttentionCall, value: Tensor, given: op.BackwardCall, grad: Tensor, of_bias: bool
) -> list[Tensor]:
    """The gradients of q, k, V' and, if asked for, the bias, of that of y."""
    if 0 in (*call.q.shape, call.max_seqlen_k):
        leaves = (call.q, call.k, value, call.attn_bias)
        return [x.new_zeros(x.shape) for x in leaves[: 3 + of_bias] if x is not None]
    if call.q.device.type == "cpu" and not of_bias:
        return _directly(call, value, given.out, given.lse, grad)
    return _again(call, value, grad, of_bias)


def _again(call: AttentionCall, value: Tensor, grad: Tensor, of_bias: bool) -> list[Tensor]:
    """The gradients by running forward again, under autograd."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in (call.q, call.k, value)]
    call = call._replace(q=q, k=k)
    if call.attn_bias is not None and of_bias:
        leaves.append(call.attn_bias.detach().requires_grad_())
        call = call._replace(attn_bias=leaves[-1])
    with recording():
        y = _by_torch(call, v, _mask(call))
        return [x.contiguous() for x in torch.autograd.grad(y, leaves, grad)]


def _directly(
    call: AttentionCall, value: Tensor, out: Tensor, lse: Tensor, grad: Tensor
) -> list[Tensor]:
    """The gradients of q, k and V' by torch's CPU kernel."""
    mask = _mask(call)
    if mask.empty is not None:
        # Its rows were zeros whatever torch had found. Weights of 0 there: others may overflow.
        grad = grad.masked_fill(mask.empty.transpose(1, 2)[..., None], 0.0)
        lse = lse.masked_fill(mask.empty, torch.finfo(lse.dtype).max)
    width = max(call.q.shape[-1], value.shape[-1])
    tensors = [_padded(x, width) for x in (grad, call.q, call.k, value, out)]
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(*tensors, lse, 0.0, mask.is_causal),
        attn_mask=_additive(call, mask.mask),
        scale=call.scale,
    )
    sizes = (call.q.shape[-1], call.q.shape[-1], value.shape[-1])
    return [
        x[..., :size].transpose(1, 2).contiguous() for x, size in zip(parts, sizes, strict=True)
    ]


_libraries = [
    op.FORWARD.define(NAMESPACE, f"{__name__}:forward", ("CompositeExplicitAutograd",)),
    op.BACKWARD.define(NAMESPACE, f"{__name__}:backward", ("CompositeExplicitAutograd",)),
]
