"""Every module of `nn` and `models` in torch's wrappers: FSDP2, DDP, moving averages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from resformer_kernels.models import (
    VARIANTS,
    LanguageModel,
    ReservoirClassifier,
    SentenceEncoder,
)
from resformer_kernels.nn import (
    AttentionReadout,
    DenseMix,
    EmbeddingMix,
    LearnedMix,
    Reservoir,
    ReservoirMemory,
    Ridge,
    ValueMix,
    ValueResidualAttention,
)
from resformer_kernels.nn.reservoir_memory import READOUTS
from tests.models.small import SMALL

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        # A layer returns its values as a view of its projection; nothing writes to them.
        "ignore:FSDP2-wrapped module .* returned a view tensor",
        "ignore:No device id is provided:UserWarning",
    ),
]


def inputs() -> Tensor:
    x = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_()


def tokens() -> Tensor:
    return torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))


class OverValues(nn.Module):
    """An attention layer whose input and earlier values are made of its argument."""

    def __init__(self, mix: ValueMix) -> None:
        super().__init__()
        self.layer = ValueResidualAttention(12, 2, v_mix=mix)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.layer(
            x.repeat(1, 1, 4), x.repeat(1, 1, 4).unflatten(2, (2, 6)), token_ids=tokens()
        )
        return out


def language_model(variant: str) -> LanguageModel:
    return LanguageModel(replace(SMALL, variant=variant, stream_scales=True))


def memory(readout: str) -> ReservoirMemory:
    return ReservoirMemory(Reservoir(30, 3), 4, readout=readout, stateful=True)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{v: (partial(language_model, v), tokens) for v in VARIANTS},
    "sentence encoder": (lambda: SentenceEncoder(SMALL), tokens),
    "classifier": (
        lambda: ReservoirClassifier(2, encoder=nn.Identity(), features=3, memories=[memory("mlp")]),
        inputs,
    ),
    **{f"memory {r}": (partial(memory, r), inputs) for r in READOUTS},
    "one pair": (lambda: OverValues(LearnedMix(lambda_v=0.3)), inputs),
    "a pair per head": (lambda: OverValues(LearnedMix(2, lambda_v=0.3)), inputs),
    "dense mix": (lambda: OverValues(DenseMix(2)), inputs),
    "embedding mix": (lambda: OverValues(EmbeddingMix(50, 2, 6, gate_channels=4)), inputs),
}
"""Modules with parameters, by name: how to make one, and what it takes."""

every_module = pytest.mark.parametrize("name", MODULES)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name][0]().eval()


def outputs(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The result and every gradient of a forward and a backward."""
    result: Tensor = module(MODULES[name][1]())
    result.square().sum().backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    return {"result": result.detach(), **whole}


@pytest.mark.usefixtures("one_process")
@every_module
def test_fully_sharded_with_its_mixes_apart(name: str) -> None:
    expected = outputs(name, made(name))
    module, mesh = made(name), init_device_mesh("cpu", (1,))
    for part in module.modules():
        if isinstance(part, (ValueMix, AttentionReadout)):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    torch.testing.assert_close(outputs(name, module), expected)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fully_sharded_block_by_block(variant: str, checkpointing: bool) -> None:
    expected = outputs(variant, made(variant))
    module, mesh = made(variant), init_device_mesh("cpu", (1,))
    assert isinstance(module, LanguageModel)
    module.config = replace(module.config, checkpointing=checkpointing)
    for block in module.blocks:
        fully_shard(block.attention, mesh=mesh)  # type: ignore[arg-type]
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    torch.testing.assert_close(outputs(variant, module), expected)


@pytest.mark.usefixtures("one_process")
def test_fully_sharded_without_parameters() -> None:
    mesh = init_device_mesh("cpu", (1,))
    reservoir = Reservoir(30, 3, layout="csr", stateful=True)
    readout = Ridge(30, 1).fit(reservoir(inputs())[0], inputs()[..., :1])
    reservoir.reset()
    expected = readout(reservoir(inputs())[0])
    reservoir.reset()
    for module in (readout, reservoir):
        fully_shard(module, mesh=mesh)
    torch.testing.assert_close(readout(reservoir(inputs())[0]), expected)


@pytest.mark.usefixtures("one_process")
@every_module
def test_in_data_parallel(name: str) -> None:
    expected = outputs(name, made(name))
    wrapped = DistributedDataParallel(made(name), find_unused_parameters=True)
    found = outputs(name, wrapped)
    assert found.pop("result").equal(expected.pop("result"))
    torch.testing.assert_close({n.removeprefix("module."): g for n, g in found.items()}, expected)


@every_module
@pytest.mark.parametrize("use_buffers", [False, True])
def test_moving_averages_after_steps(name: str, use_buffers: bool) -> None:
    module = made(name)
    average = AveragedModel(module, use_buffers=use_buffers)
    outputs(name, module)
    late = AveragedModel(module, use_buffers=use_buffers)
    for copied in (average, late):
        copied.update_parameters(module)
        for mean, own in zip(copied.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(mean, own)
    torch.testing.assert_close(late(MODULES[name][1]()), module(MODULES[name][1]()))
