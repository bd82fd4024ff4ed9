"""Modules in 16 bits, in float64, and made in another default dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from resformer_kernels.models import VARIANTS, LanguageModel, ReservoirClassifier, SentenceEncoder
from resformer_kernels.nn import Reservoir, ReservoirMemory, Ridge
from tests.models.small import SMALL
from tests.nn.test_reservoir import FORMS, drive, make

NARROW = {torch.bfloat16: 0.02, torch.float16: 0.003}
"""The error that rounding the weights makes, at most."""


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("form", FORMS)
def test_weights_in_16_bits_drive_a_state_in_32(form: str, dtype: torch.dtype) -> None:
    u = drive().to(dtype)
    exact = make(bias_scaling=0.2, **FORMS[form])
    narrow = make(bias_scaling=0.2, **FORMS[form]).to(dtype)
    assert all(x.dtype == dtype for x in narrow.buffers() if x.is_floating_point())
    x = u.clone().requires_grad_()
    states, final = narrow(x)
    assert states.dtype == final.dtype == narrow.state_dtype == torch.float32
    torch.testing.assert_close(states, exact(u)[0], atol=NARROW[dtype] * 5, rtol=0)
    states.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    # The reservoir of the rounded weights, in float64.
    rounded = narrow.double()
    torch.testing.assert_close(states.double(), rounded(u.double())[0], atol=1e-5, rtol=1e-4)
    narrow = make(stateful=True, **FORMS[form]).to(dtype)
    readout = Ridge(30, 2, 1e-2)
    narrow.stream(readout, u, u, washout=3)
    state = narrow.stream(readout, u, u)
    outputs, last = narrow.free_run(readout.solve(), state, 4)
    assert outputs.dtype == last.dtype == torch.float32
    assert outputs.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
@pytest.mark.parametrize("form", FORMS)
def test_made_in_another_default_dtype(form: str, dtype: torch.dtype) -> None:
    expected = make(**FORMS[form], activation="relu").to(dtype)
    torch.set_default_dtype(dtype)
    try:
        reservoir = make(**FORMS[form], activation="relu")
        states, _ = reservoir(torch.ones(2, 5, 2))
    finally:
        torch.set_default_dtype(torch.float32)
    for found, wanted in zip(reservoir.buffers(), expected.buffers(), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted)
    assert states.isfinite().all()


READOUTS = ("linear", "mlp", "attention", "own", "none")


def memory(readout: str, **options: bool) -> ReservoirMemory:
    torch.manual_seed(0)
    given = {"own": nn.Linear(30, 4), "none": nn.Identity()}.get(readout, readout)
    return ReservoirMemory(make(), 4, readout=given, streams=2, **options)


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
@pytest.mark.parametrize("readout", READOUTS)
def test_memories_in_any_dtype(readout: str, dtype: torch.dtype) -> None:
    streams = torch.arange(25).expand(2, -1) % 2
    expected = memory(readout)(drive(), streams=streams).detach()
    module = memory(readout, stateful=True).to(dtype)
    x = drive().to(dtype).requires_grad_()
    found = module(x, streams=streams)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == (wide if readout == "none" else dtype)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert module.state is not None
    assert module.state.dtype == wide
    assert module(x, streams=streams).isfinite().all()


def test_a_memory_under_autocast() -> None:
    module = memory("mlp")
    with torch.autocast("cpu", torch.bfloat16):
        found = module(drive())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), module(drive()), atol=0.05, rtol=0.05)


@pytest.fixture(params=[torch.float64, *NARROW])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_models_made_in_another_default_dtype(default_dtype: torch.dtype) -> None:
    tokens = torch.randint(1, 50, (2, 9))
    for variant in VARIANTS:
        module = LanguageModel(replace(SMALL, variant=variant))
        assert module(tokens).dtype == default_dtype
        module(tokens, tokens).backward()
    encoder = SentenceEncoder(SMALL, 3)
    memories = [ReservoirMemory(Reservoir(30, 3), 4, readout=r) for r in ("mlp", "attention")]
    classifier = ReservoirClassifier(2, encoder=encoder, memories=memories)
    logits: Tensor = classifier(tokens[None])
    assert logits.dtype == default_dtype
    assert logits.isfinite().all()
    x = torch.randn(50, 3)
    readout = Ridge(3, 1).fit(x, x[:, :1])
    assert readout.weight.dtype == torch.float64
    assert readout(x).dtype == default_dtype


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
def test_a_classifier_cast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    memories = [ReservoirMemory(make(), 4, readout=r) for r in ("linear", "mlp", "attention")]
    classifier = ReservoirClassifier(
        3, encoder=nn.Identity(), features=2, memories=memories, extra_features=2
    ).eval()
    expected = classifier(drive(), extra=drive(), heard=drive())
    x = drive().to(dtype)
    found = classifier.to(dtype)(
        x, extra=x, heard=drive().to(torch.promote_types(dtype, torch.float32))
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
