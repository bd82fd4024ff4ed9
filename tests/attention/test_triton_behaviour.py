"""What the Triton backend of attention promises beside the contract: bits, tiles and reasons."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from resformer_kernels import explain, value_residual_attention
from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.select import prepare
from resformer_kernels._triton.arch import architecture
from resformer_kernels.attention import triton
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.triton import configs
from resformer_kernels.testing import AttentionCase, attention_inputs
from resformer_kernels.testing.poison import poisoned
from tests.attention.variants import Variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])

EVERYTHING = AttentionCase(
    q_len=21, k_len=150, lambda_v="token_head", lambda_first="channel", sinks=True, causal=True,
    return_lse=True, return_mixed_value=True,
)  # fmt: skip
PACKED = AttentionCase(
    lengths=((17, 70), (0, 3), (9, 40)), tail=2, slack=3, lambda_v="full", lambda_first="token",
    window=(30, 2), return_lse=True,
)  # fmt: skip
MASKED = AttentionCase(q_len=40, k_len=70, bias="mask", lambda_v="scalar", softcap=4.0)

EXCLUDING = dataclasses.replace(EVERYTHING, exclusive="token_head", out_gate="channel")
PACKED_EXCLUDING = dataclasses.replace(PACKED, exclusive="head", out_gate="token_head")
CASES = {
    "every": EVERYTHING, "packed": PACKED, "masked": MASKED, "excluding": EXCLUDING,
    "packed excluding": PACKED_EXCLUDING,
}  # fmt: skip
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def all_bits(case: AttentionCase) -> list[Tensor]:
    """Outputs and gradients, computed with uninitialised memory poisoned."""
    inputs = attention_inputs(case)
    leaves = [x.requires_grad_() for x in inputs.tensors.values() if x.is_floating_point()]
    with poisoned():
        outputs = inputs.function(**inputs.tensors, **inputs.options, backend="triton")
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        gradients = torch.autograd.grad(outputs, leaves, inputs.grads)
    return [x.detach() for x in (*outputs, *gradients)]


def assert_same_bits(some: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(some, others, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=False)


@pytest.mark.usefixtures("interpreter")
@by_dtype
@by_case
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_where_values_are_mixed_changes_no_bits(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    case: AttentionCase,
    capability: tuple[int, int],
) -> None:
    from resformer_kernels._triton.launch import assumed_capability

    if case is not EVERYTHING and dtype is torch.float16:
        pytest.skip("as bfloat16")
    found = []
    for placement in ("inline", "prologue"):
        monkeypatch.setenv(configs.VARIABLE, placement)
        with assumed_capability(capability):
            found.append(all_bits(dataclasses.replace(case, dtype=dtype)))
    assert_same_bits(*found)


def test_both_placements_sum_the_same_tiles_of_keys() -> None:
    for capability in ((8, 0), (9, 0), (10, 0)):
        for dtype in DTYPES:
            for head_dim in (16, 64, 128, 256):
                for mask in ("full", "causal", "window", "transformed"):
                    inline, before = (
                        configs.choose(capability, direction, dtype, head_dim, mask)
                        for direction in ("forward_inline", "forward")
                    )
                    assert inline.keys == before.keys


@pytest.mark.usefixtures("interpreter")
@by_dtype
@pytest.mark.parametrize("case", [EVERYTHING, PACKED, EXCLUDING], ids=["every", "packed", "excl"])
def test_descriptors_change_no_bits(dtype: torch.dtype, case: AttentionCase) -> None:
    from resformer_kernels._triton.launch import launch
    from resformer_kernels.attention.triton import forward

    case = dataclasses.replace(case, dtype=dtype)
    found = []
    for capability in ((8, 0), (9, 0)):
        with (
            Variant(32, 32, capability).in_force(),
            mock.patch.object(forward, "launch", wraps=launch) as launched,
        ):
            found.append(all_bits(case))
        given = [call.kwargs for call in launched.call_args_list if "k_descriptor" in call.kwargs]
        assert given
        assert all((x["k_descriptor"] is not None) == (capability >= (9, 0)) for x in given)
    assert_same_bits(*found)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("layout", ["heads_first", "sliced", "strided"])
def test_strides_change_no_bits(layout: str) -> None:
    """Where a layout allows no descriptor, plain loads give what descriptors give."""
    case = dataclasses.replace(EVERYTHING, dtype=torch.bfloat16)
    moved = dataclasses.replace(case, layout=layout, grad_layout=layout)
    with Variant(32, 32).in_force():
        assert_same_bits(all_bits(case), all_bits(moved))
    inputs = attention_inputs(moved)
    notes = explain(inputs.function, **inputs.tensors, **inputs.options, backend="triton").notes
    assert len(notes) == (4 if layout == "strided" else 0)


@pytest.mark.usefixtures("interpreter")
@by_case
def test_same_bits_run_to_run(case: AttentionCase) -> None:
    assert_same_bits(all_bits(case), all_bits(case))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("output", [1, 2], ids=["lse", "mixed"])
def test_each_output_has_a_gradient_of_its_own(output: int) -> None:
    inputs = attention_inputs(EVERYTHING)
    leaves = [x.requires_grad_() for x in inputs.tensors.values()]

    def gradients(backend: str) -> tuple[Tensor | None, ...]:
        outputs = inputs.function(**inputs.tensors, **inputs.options, backend=backend)
        return torch.autograd.grad(outputs[output], leaves, inputs.grads[output], allow_unused=True)

    for got, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        wanted = torch.zeros_like(got) if expected is None and got is not None else expected
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("placement", ["inline", "prologue"])
@pytest.mark.parametrize("where", ["v", "v_first", "lambda_v"])
def test_what_a_padding_mask_hides_may_be_anything_but_in_values(
    monkeypatch: pytest.MonkeyPatch, placement: str, where: str
) -> None:
    """A NaN at a key that is masked, not absent, is 0 * NaN in the reference: so it is here."""
    monkeypatch.setenv(configs.VARIABLE, placement)
    inputs = attention_inputs(AttentionCase(lambda_v="token", dtype=torch.float32))
    inputs.tensors[where][0, 5] = torch.nan
    mask = torch.ones(2, 1, 1, 33, dtype=torch.bool)
    mask[0, ..., 5] = False
    got, expected = (
        inputs.function(**inputs.tensors, **inputs.options, attn_bias=mask, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("interpreter")
def test_a_wrong_placement_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(configs.VARIABLE, "outside")
    inputs = attention_inputs(AttentionCase(q_len=2, k_len=2))
    told = "RESFORMER_MIX must be 'inline' or 'prologue', got 'outside'"
    with pytest.raises(RuntimeError, match=told):
        inputs.function(**inputs.tensors, backend="triton")


def test_few_rows_mix_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(configs.VARIABLE, raising=False)
    for capability in ((8, 0), (9, 0), (10, 0)):
        assert configs.mixes_inline(capability, 128, 1)
        assert not configs.mixes_inline(capability, 128, 1 << 20)
    monkeypatch.setenv(configs.VARIABLE, "inline")
    assert configs.mixes_inline((9, 0), 128, 1 << 20)
    monkeypatch.setenv(configs.VARIABLE, "prologue")
    assert not configs.mixes_inline((9, 0), 128, 1)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm80"), ((8, 7), "sm80"), ((8, 6), "sm86"), ((8, 9), "sm86"), ((9, 0), "sm90"),
     ((10, 0), "sm100"), ((10, 3), "sm100"), ((11, 0), "sm100"), ((12, 0), "sm120"),
     ((13, 0), "sm120"), ((94, 2), "gfx9"), ((95, 0), "gfx9")],
)  # fmt: skip
def test_each_architecture_has_a_table(capability: tuple[int, int], name: str) -> None:
    assert architecture(capability).name == name
    assert name in configs.table()


@pytest.mark.parametrize(("head_dim", "row"), [(1, "64"), (64, "64"), (65, "128"), (256, "256")])
@pytest.mark.parametrize("direction", ["forward", "keys", "queries", "bias"])
def test_a_row_serves_head_dimensions_up_to_its_own(
    head_dim: int, row: str, direction: str
) -> None:
    for dtype, precision in zip(DTYPES, ("float32", "half", "half"), strict=True):
        by_mask = configs.table()["sm90"][direction][precision][row]
        for mask in ("full", "causal", "window", "transformed"):
            got = configs.choose((9, 0), direction, dtype, head_dim, mask)
            assert list(got) == by_mask.get(mask, by_mask["full"])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("options", "kind"),
    [({}, "full"), ({"causal": True}, "causal"), ({"window": (3, 4)}, "window"),
     ({"window": (3, -1), "causal": True}, "window"), ({"window": (-1, 4)}, "causal"),
     ({"softcap": 5.0, "causal": True}, "transformed"), ({"bias": "per_key"}, "transformed")],
)  # fmt: skip
def test_tiles_are_chosen_by_the_kind_of_mask(options: dict[str, Any], kind: str) -> None:
    case = AttentionCase(q_len=3, k_len=5, dtype=torch.bfloat16, head_dim=20, **options)
    with mock.patch.object(configs, "choose", wraps=configs.choose) as choose:
        all_bits(case)
    asked = {tuple(call.args) for call in choose.call_args_list if call.args[1] != "bias"}
    half, found = torch.bfloat16, {(direction, mask) for _, direction, _, _, mask in asked}
    assert all(dtype is half and dim == 32 for _, _, dtype, dim, _ in asked)
    assert {direction for direction, _ in found} >= {"keys", "queries"}
    assert {mask for _, mask in found} == {kind}


def call_of(**changes: Any) -> AttentionCall:
    inputs = attention_inputs(AttentionCase(**changes))
    call: AttentionCall = prepare(value_residual_attention, **inputs.tensors).call
    return call


def on_device(device: str) -> Any:
    """A call whose tensors lie on a device that is not here."""
    call = call_of()
    return call._replace(q=types.SimpleNamespace(device=torch.device(device), dtype=call.q.dtype))  # type: ignore[arg-type]


def reason(call: AttentionCall) -> str:
    found = triton.unsupported_reason(call, MACHINE)
    assert found is not None
    return found


@pytest.mark.usefixtures("interpreter")
def test_what_the_kernels_cannot_serve() -> None:
    assert triton.unsupported_reason(call_of(head_dim=256, value_dim=256), MACHINE) is None
    assert "up to 256, these have 257" in reason(call_of(head_dim=257))
    assert "up to 256, these have 300" in reason(call_of(value_dim=300))
    assert "float32, bfloat16 and float16, these are torch.float64" in reason(
        call_of(dtype=torch.float64)
    )


def test_where_triton_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "on the CPU (TRITON_INTERPRET=1 emulates)" in reason(call_of())
    assert "Apple's MPS" in reason(on_device("mps"))
    assert "these are on meta" in reason(on_device("meta"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "capability 8.0 or newer, cuda:0 has 7.5" in reason(on_device("cuda:0"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = types.SimpleNamespace(gcnArchName="gfx90a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    assert "gfx942 and gfx950 alone" in reason(on_device("cuda:0"))


def test_an_absent_or_old_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    old = types.ModuleType("triton")
    old.__version__ = "3.5.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", old)
    assert "Triton 3.6 or newer, 3.5.0 is installed" in reason(call_of())
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot serve.*not installed"):
        value_residual_attention(*call_of()[:3], backend="triton")


@pytest.mark.parametrize(("q_len", "k_len"), [(2**22, 0), (2**22, 1), (1, 0), (70, 2**20)])
@pytest.mark.parametrize("by_rows", [True, False])
def test_sections_of_heads_are_within_the_grid(q_len: int, k_len: int, by_rows: bool) -> None:
    from resformer_kernels.attention.triton.tiles import work_of

    shapes = ((3, q_len, 4, 16), (3, k_len, 2, 16), (3, k_len, 2, 16))
    q, k, v = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes)
    call = prepare(value_residual_attention, q, k, v, causal=True).call
    work = work_of(call, configs.Config(16, 16, 4, 2), by_rows=by_rows)
    # Programs divide by that product, in 32 bits.
    assert work.tiles == 0 or 1 <= work.section * work.tiles <= 3 * 2 * work.tiles < 2**31
