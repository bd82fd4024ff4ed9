"""Models of transformers under `context_parallel`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from resformer_kernels.distributed import context_parallel, traffic
from tests.distributed import ranks
from tests.integrations.tiny import QUIET, convert_to_resformer, stock, transformers

pytestmark = [*QUIET]
LENGTH = 30


def _ids() -> Tensor:
    return torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def _built(family: str, variant: str) -> Any:
    torch.manual_seed(0)
    model = stock(family)
    model.config._attn_implementation = "resformer"
    return convert_to_resformer(model, variant)


def _compared(family: str, variant: str, balanced: bool) -> dict[str, Any]:
    model = _built(family, variant)
    ids = _ids()
    expected = model(ids).logits
    expected.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with context_parallel(dist.group.WORLD, length=LENGTH, balanced=balanced) as sequence:
        with traffic() as moved:
            logits = model(sequence.shard(ids, 1)).logits
        logits.square().sum().backward()
        whole = sequence.gather(logits.detach(), 1)
    worst = 0.0
    for name, parameter in model.named_parameters():
        if name in grads:
            assert parameter.grad is not None, name
            dist.all_reduce(parameter.grad)
            error = (parameter.grad - grads[name]).abs().max()
            worst = max(worst, (error / (grads[name].abs().max() + 1e-3)).item())
    error = (whole - expected).abs().max() / expected.abs().max()
    return {"logits": error.item(), "grads": worst, "calls": dict(moved.calls)}


CASES = [("Llama", "learnable"), ("Llama", "svformer"), ("ModernBert", "identity")]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_converted_models_need_no_change(family: str, variant: str) -> None:
    for balanced in (True, False):
        for found in ranks.run(2, _compared, family, variant, balanced):
            assert found["logits"] < 1e-5
            assert found["grads"] < 1e-4
            if variant == "svformer":
                # The first layer's own values move; all others are gathered once.
                assert found["calls"]["v_first"] == 1
                assert found["calls"]["v"] * 4 == found["calls"]["k"]


def _refused() -> dict[str, str]:
    model = _built("Llama", "learnable")
    sdpa = _built("Llama", "learnable")
    sdpa.config._attn_implementation = "sdpa"
    plain = stock("Llama")
    plain.config._attn_implementation = "resformer"
    found = {}
    with context_parallel(dist.group.WORLD, length=LENGTH) as sequence:
        ids = sequence.shard(_ids(), 1)
        padding = torch.ones_like(ids)
        padding[0, 0] = 0
        cache = transformers.DynamicCache(config=model.config)
        for name, call in {
            "implementation": lambda: sdpa(ids),
            "stock": lambda: plain(ids),
            "padding": lambda: model(ids, attention_mask=padding),
            "cache": lambda: model(ids, past_key_values=cache),
        }.items():
            try:
                call()
            except (RuntimeError, ValueError) as error:
                found[name] = str(error)
    return found


def test_what_cannot_run_is_refused_by_name() -> None:
    for found in ranks.run(2, _refused):
        for name, words in {
            "implementation": "attn_implementation must be 'resformer' under context_parallel",
            "stock": "LlamaAttention cannot run under context_parallel",
            "padding": "attn_bias cannot be used under context_parallel",
            "cache": "past_key_values must be None under context_parallel",
        }.items():
            assert words in found[name], (name, found.get(name))
