"""When `auto` takes torch's own attention, what it says of it, and what autograd makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from resformer_kernels import explain, value_residual_attention, value_residual_attention_varlen
from resformer_kernels._core import extension, processor
from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.select import prepare
from resformer_kernels.attention import sdpa
from resformer_kernels.cli import main
from tests.attention.test_ops import saved_elements

BF16 = torch.bfloat16
EMERALD = frozenset(("amx_tile", "amx_bf16", "avx512_fp16"))
GRANITE = EMERALD | {"amx_fp16"}


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiled library and without Triton."""
    monkeypatch.setattr(extension, "_reason", "it was not built")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with AMX tiles for bfloat16, whose user asks for no native path."""
    monkeypatch.setattr(MACHINE, "cpu_flags", EMERALD)
    monkeypatch.delenv("RESFORMER_CPU", raising=False)


def chosen(*shape: int, dtype: torch.dtype = BF16, grad: bool = False, **options: Any) -> str:
    """The backend that `auto` takes."""
    q = torch.empty(shape, dtype=dtype).requires_grad_(grad)
    return str(explain(value_residual_attention, q, q, q, **options).backend)


@pytest.mark.usefixtures("no_kernels")
def test_auto_takes_it_before_the_reference() -> None:
    q = rand(1, 5, 4, 512)
    found = explain(value_residual_attention, q, q, q, q, causal=True, exclusive=1.0)
    assert found.backend == "sdpa"
    assert found.reasons["reference"] == "sdpa is preferred"
    said = "\n".join(found.notes)
    for part in ("other bits", "mix_values first", "in PyTorch"):
        assert part in said
    for grows in ({"softcap": 3.0}, {"sinks": rand(4)}):
        refused = explain(value_residual_attention, q, q, q, **grows)
        assert refused.backend == "reference"
        assert next(iter(grows)) in refused.reasons["sdpa"]
    assert explain(value_residual_attention, *(q.double(),) * 3).backend == "reference"
    assert explain(value_residual_attention, *(q.to("meta"),) * 3).backend == "reference"
    starts = torch.tensor([0, 5], dtype=torch.int32)
    packing: dict[str, Any] = {f"cu_seqlens_{x}": starts for x in "qk"}
    packing |= {f"max_seqlen_{x}": 5 for x in "qk"}
    packed = explain(value_residual_attention_varlen, *(q[0],) * 3, **packing)
    assert packed.backend == "reference"
    assert "packed" in packed.reasons["sdpa"]


@pytest.mark.usefixtures("no_kernels")
def test_the_lse_goes_with_no_gradient() -> None:
    q = rand(1, 5, 4, 8).requires_grad_()
    with torch.no_grad():
        assert explain(value_residual_attention, q, q, q, return_lse=True).backend == "sdpa"
    with pytest.raises(RuntimeError, match="its LSE has no gradient"):
        value_residual_attention(q, q, q, return_lse=True, backend="sdpa")
    out, lse = value_residual_attention(q, q, q, return_lse=True)
    (out.sum() + lse.sum()).backward()
    assert q.grad is not None


def test_notes_say_what_is_written_and_copied() -> None:
    q, k, v = rand(1, 4, 2, 8), rand(1, 6, 2, 8), rand(1, 6, 2, 12)

    def said(*tensors: Tensor, **options: Any) -> str:
        return str(explain(value_residual_attention, *tensors, backend="sdpa", **options))

    assert "a mask of 4 x 6" in said(q, k, v, causal=True)
    assert "a mask of" not in said(k, k, v, causal=True)
    assert "a mask of 6 x 6" in said(k, k, v, window=(2, 0))
    assert "padded to one head_dim" in said(q, k, v)
    assert "q is copied once" in said(q.transpose(1, 3).contiguous().transpose(1, 3), k, v)


@pytest.mark.usefixtures("amx", "native")
def test_auto_takes_it_where_torch_multiplies_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    long = (1, 4096, 1, 64)
    assert chosen(*long) == "sdpa"
    assert chosen(*long, causal=True, exclusive=1.0) == "sdpa"
    assert chosen(*long, grad=True) == "sdpa"
    assert chosen(1, 2048, 1, 128, grad=True) == "sdpa"
    assert chosen(1, 2048, 1, 64, grad=True) == "native"
    assert chosen(1, 512, 1, 64) == "sdpa"
    # What is faster on ours, or was not measured.
    assert chosen(1, 511, 1, 64) == "native"
    assert chosen(1, 512, 1, 32) == "native"
    assert chosen(*long, window=(512, 0)) == "native"
    assert chosen(*long, causal=True, attn_bias=torch.ones(4096).bool()) == "native"
    # What torch cannot do, and what has no tiles.
    assert chosen(*long, dtype=torch.float32) == "native"
    assert chosen(*long, dtype=torch.float16) == "native"
    q = torch.empty(long, dtype=BF16)
    capped = explain(value_residual_attention, q, q, q, softcap=3.0)
    assert capped.backend == "native"
    assert "softcap" in capped.reasons["sdpa"]
    found = explain(value_residual_attention, q, q, q)
    assert found.reasons["native"] == "sdpa is preferred"
    assert "AMX tiles" in found.notes[0]
    monkeypatch.setattr(MACHINE, "cpu_flags", GRANITE)
    assert chosen(*long, dtype=torch.float16) == "sdpa"
    monkeypatch.setenv("RESFORMER_CPU", "portable")
    assert chosen(*long) == "native"


@pytest.mark.usefixtures("amx")
def test_info_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["info", "--json"]) == 0
    assert "auto takes torch's attention (sdpa) for bfloat16 from 512" in capsys.readouterr().out
    monkeypatch.setenv("RESFORMER_CPU", "portable")
    assert "RESFORMER_CPU asks" in str(sdpa.amx_note(MACHINE))
    monkeypatch.setattr(MACHINE, "cpu_flags", frozenset())
    assert sdpa.amx_note(MACHINE) is None
    monkeypatch.setattr(MACHINE, "cpu_flags", None)
    MACHINE.torch_multiplies_on_amx(BF16)
    assert MACHINE.cpu_flags == processor.flags()


def test_mixing_saves_nothing_more_than_plain_attention() -> None:
    q, k, v, v_first = (torch.randn(2, 64, 2, 16, requires_grad=True) for _ in range(4))
    gate = torch.randn(2, 64, 2, 16, requires_grad=True)
    plain, out = saved_elements(q, k, v, backend="sdpa")
    assert plain == out.numel() + 2 * 64 * 2
    for own in (0.5, torch.randn(2, 64, 2, 1, requires_grad=True)):
        for more in ({}, {"exclusive": 1.0}, {"exclusive": 1.0, "out_gate": gate}):
            mixed, _ = saved_elements(q, k, v, v_first, lambda_v=own, backend="sdpa", **more)
            assert mixed == plain


def test_results_alias_no_input_and_inputs_are_untouched() -> None:
    q, k, v = (rand(2, 9, 2, 8 + i)[..., i:].clone().requires_grad_() for i in range(3))
    before = [x.detach().clone() for x in (q, k, v)]
    out, value = value_residual_attention(
        q, k, v, scale=-1.0, return_mixed_value=True, backend="sdpa"
    )
    assert value.data_ptr() != v.data_ptr()
    assert torch.equal(value, v)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch loads its own decompositions
def test_transforms_say_what_is_not_there() -> None:
    q = rand(2, 9, 2, 8).requires_grad_()

    def attend(x: Tensor) -> Tensor:
        found: Tensor = value_residual_attention(x, x, x, backend="sdpa")
        return found

    (dq,) = torch.autograd.grad(attend(q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        dq.sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support torch\.func\.vmap"):
        torch.func.vmap(attend)(torch.stack([q, q]))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode"):
        attend(forward_ad.make_dual(q.detach(), q.detach()))


def test_under_autocast_it_is_cast_once() -> None:
    q, k = rand(1, 6, 2, 8), rand(1, 6, 2, 8)
    bias = rand(2, 6, 6).requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        out = value_residual_attention(q, k, k, attn_bias=bias, backend="sdpa")
    wanted = value_residual_attention(
        *(x.to(BF16) for x in (q, k, k)), attn_bias=bias, backend="sdpa"
    )
    assert torch.equal(out, wanted)
    with torch.autocast("cpu", dtype=BF16):
        out.float().sum().backward()
    assert bias.grad is not None
    assert bias.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiles_whole_with_dynamic_length() -> None:
    torch.compiler.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        out: Tensor = value_residual_attention(
            q, k, v, v, causal=True, exclusive=0.5, out_gate=gate, backend="sdpa"
        )
        return out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 17):
        shapes = ((4, 8), (2, 8), (2, 6), (4, 6))
        leaves = [rand(2, length, *shape).requires_grad_() for shape in shapes]
        found, wanted = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.parametrize("grad_mask", [0b1111001111, 0b100, 0b10000000])
def test_opcheck(grad_mask: int) -> None:
    q, v, bias = rand(2, 9, 4, 8), rand(2, 7, 2, 6), rand(1, 4, 9, 7)
    given: dict[str, Any] = {"attn_bias": bias, "exclusive": rand(4, 1), "out_gate": rand(4, 1)}
    call = prepare(
        value_residual_attention, q, rand(2, 7, 2, 8), v, v + 1, rand(2, 1), 0.5, **given
    ).call
    arguments = call._replace(return_lse=True, return_ungated=True, return_mixed_value=True)
    ops = getattr(torch.ops, sdpa.NAMESPACE)
    forward = ops.value_residual_attention_forward.default
    torch.library.opcheck(forward, tuple(arguments))
    out, lse, value, _, y = forward(*arguments)
    there = sum(1 << i for i, leaf in enumerate(call.leaves) if leaf is not None)
    rest = (rand(*out.shape), None, rand(*value.shape), *arguments, y, lse, None)
    backward = ops.value_residual_attention_backward.default
    torch.library.opcheck(backward, (*rest, grad_mask & there))
