"""Blocks that run again in backward, wrapped and selective, compiled, and under FSDP2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from resformer_kernels.models import VARIANTS, LanguageModel
from tests.distributed import ranks
from tests.distributed.models import (
    ATTENTION,
    HALVES,
    Named,
    assert_same,
    batch,
    gradients,
    keep_attention,
    language_model,
    part,
    shard,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # torch's tracer asks for the gradient of what the block before returned.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)

all_variants = pytest.mark.parametrize("variant", VARIANTS)


class Calls(TorchDispatchMode):
    """Counts the calls of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def wrapped(model: LanguageModel, kind: str = "whole") -> LanguageModel:
    """The model, its blocks in torch's wrapper: run again "whole", "selective" or "reentrant"."""
    options: dict[str, Any] = {}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
    elif kind == "reentrant":
        options["checkpoint_impl"] = CheckpointImpl.REENTRANT
    for n, block in enumerate(model.blocks):
        model.blocks[n] = checkpoint_wrapper(block, **options)
    return model


def run(model: nn.Module, rows: Callable[[Tensor], Tensor] = lambda x: x) -> Named:
    """The loss and every gradient, under the names of the unwrapped model."""
    loss = model(*map(rows, batch()))
    loss.backward()
    found = {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(model).items()}
    return {"loss": loss.detach(), **found}


@all_variants
@pytest.mark.parametrize("kind", ["whole", "selective", "reentrant"])
def test_wrapped_blocks_give_the_same_gradients(variant: str, kind: str) -> None:
    expected = run(language_model(variant))
    with Calls() as calls:
        found = run(wrapped(language_model(variant), kind))
    assert_same(found, expected, relative=1e-6)
    # A policy that keeps attention's results spares its second run.
    assert calls.found[ATTENTION] == (4 if kind == "selective" else 8)


@pytest.mark.parametrize("variant", ["learnable", "dense", "svformer", "fused-kv-lite"])
def test_a_block_that_runs_again_sees_the_same_values(variant: str) -> None:
    """Nothing is added to the values, or kept, by the first run or by the second."""
    model = wrapped(language_model(variant))
    seen: dict[int, list[Tensor]] = {}

    def look(block: Any, given: Any) -> None:
        _x, _cos, _sin, _tokens, keys, *earlier = given
        assert len(earlier) == (block.layer if variant == "dense" else min(block.layer, 1))
        arrived = [x.detach() for x in (*earlier, keys) if x is not None]
        seen.setdefault(block.layer, []).append(torch.stack(arrived))

    for wrapper in list(model.blocks)[1:]:
        next(wrapper.children()).register_forward_pre_hook(look)
    for _ in range(2):
        run(model)
        model.zero_grad()
    assert list(seen) == [1, 2, 3]
    for layer, runs in seen.items():
        assert len(runs) == 4, layer
        assert all(torch.equal(x, runs[0]) for x in runs), layer


def _sharded(variant: str, kind: str, options: dict[str, Any]) -> Named:
    model = wrapped(language_model(variant), kind)
    shard(model, model.blocks, **options)
    return run(model, part)


@all_variants
def test_selective_checkpoints_under_fsdp2(variant: str) -> None:
    expected = run(language_model(variant))
    found = ranks.run(2, _sharded, variant, "selective", {})[0]
    assert_same({**found, "loss": expected["loss"]}, expected)


def test_selective_checkpoints_under_mixed_precision() -> None:
    expected, found = (
        ranks.run(2, _sharded, "learnable", kind, {"mp_policy": HALVES})[0]
        for kind in ("whole", "selective")
    )
    assert_same(found, expected, relative=1e-3)


def compiled(model: LanguageModel, backend: Any = "aot_eager") -> LanguageModel:
    """The model, each of its blocks compiled on its own."""
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    return model


# tests/models compiles every variant's whole model in one graph.
@pytest.mark.parametrize(
    "variant", ["learnable", "dense", "svformer", "value-embedding", "fused-kv-lite"]
)
def test_checkpointed_blocks_compile_whole(variant: str) -> None:
    """Every kind of block is one graph, forward and backward, with a selective checkpoint in it."""
    layers = {"num_layers": 3 if variant == "dense" else 2, "window_pattern": "L"}
    expected = run(language_model(variant, **layers))
    model = compiled(wrapped(language_model(variant, **layers), "selective"))
    assert_same(run(model), expected)


def test_as_many_graphs_as_kinds_of_blocks() -> None:
    """However deep the model: the first block, those with a window, and those without."""
    counter = CompileCounterWithBackend("eager")
    model = compiled(language_model("learnable", num_layers=12), counter)
    model(*batch()).backward()
    assert counter.frame_count == 3


def _compiled_and_sharded() -> Named:
    layers = {"num_layers": 2, "window_pattern": "L"}
    model = compiled(wrapped(language_model("learnable", **layers), "selective"))
    shard(model, model.blocks)
    return run(model, part)


def test_checkpointed_compiled_blocks_under_fsdp2() -> None:
    """In torchtitan's order: checkpoint, compile, shard."""
    expected = run(language_model("learnable", num_layers=2, window_pattern="L"))
    found = ranks.run(2, _compiled_and_sharded)[0]
    assert_same({**found, "loss": expected["loss"]}, expected)
