"""Checkpoints of modules: made on the meta device and filled, and weights of another length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    RotaryEmbedding,
    ValueResidualAttention,
)
from resformer_kernels.nn.value_mix import ValueSources
from tests.models.small import SMALL

FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "csr": {"layout": "csr"},
    "ring": {"topology": "ring"},
    "diagonal": {"topology": "diagonal"},
    "groups": {"groups": 3, "rc_connectivity": 0.5},
    "bias": {"bias_scaling": 0.2, "lr": [0.3] * 30},
    "relu": {"activation": "relu"},
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def reservoir(form: str, seed: int = 1) -> Reservoir:
    return Reservoir(30, 3, seed=seed, **FORMS[form])


def memory(readout: str, form: str = "csr", seed: int = 1) -> ReservoirMemory:
    return ReservoirMemory(reservoir(form, seed), 4, readout=readout)


def classifier() -> ReservoirClassifier:
    encoder = SentenceEncoder(SMALL, 3)
    return ReservoirClassifier(2, encoder=encoder, memories=[memory("mlp"), memory("attention")])


def fitted() -> Ridge:
    return Ridge(3, 2).fit(drawn(40, 3), drawn(40, 2))


def sources() -> ValueSources:
    values = drawn(3, 2, 9, 2, 4)
    return ValueSources(values[0], (values[1], values[2]), drawn(2, 9, 8), tokens())


Run = Callable[[Any], Tensor]
MODULES: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    **{f"reservoir, {f}": (partial(reservoir, f), lambda m: m(drawn(2, 9, 3))[0]) for f in FORMS},
    **{
        f"memory, {r}": (partial(memory, r), lambda m: m(drawn(2, 9, 3)))
        for r in ("linear", "mlp", "attention")
    },
    "readout": (lambda: AttentionReadout(5, 3, 8), lambda m: m(drawn(2, 40, 5), drawn(2, 9, 3))),
    "ridge": (fitted, lambda m: m(drawn(2, 9, 3))),
    "rotary": (lambda: RotaryEmbedding(8, 16), lambda m: torch.cat(m(5, 2))),
    "attention": (
        lambda: ValueResidualAttention(8, 2),
        lambda m: m(drawn(2, 9, 8), drawn(2, 9, 2, 4))[0],
    ),
    "scalars": (lambda: LearnedMix(lambda_v=0.3), lambda m: m(sources()).lambda_v),
    "pairs": (lambda: LearnedMix(2, lambda_v=0.3), lambda m: m(sources()).lambda_v),
    "dense mix": (lambda: DenseMix(3), lambda m: m(sources()).v),
    "embedding mix": (lambda: EmbeddingMix(50, 2, 4, gate_channels=3), lambda m: m(sources()).v),
    **{
        v: (lambda v=v: LanguageModel(replace(SMALL, variant=v)), lambda m: m(tokens()))  # type: ignore[misc]
        for v in VARIANTS
    },
    "encoder": (lambda: SentenceEncoder(SMALL), lambda m: m(tokens())),
    "classifier": (classifier, lambda m: m(tokens()[None])),
}


def assign(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state, assign=True)


def empty_then_copy(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.to_empty(device="cpu")
    module.load_state_dict(state)


def copy_then_move(module: nn.Module, state: dict[str, Tensor]) -> None:
    """As accelerate does: each tensor is put in its place, and no method of the module is called.
    Buffers that the checkpoint does not hold stay where they are."""
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor)
        else:
            owner._buffers[leaf] = tensor


FILLS = {"assign": assign, "empty": empty_then_copy, "in place": copy_then_move}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", MODULES)
def test_made_on_the_meta_device_and_filled(name: str, fill: str) -> None:
    make, run = MODULES[name]
    if (name, fill) == ("rotary", "in place"):
        pytest.skip("it has nothing to fill, and is told of no device")
    torch.manual_seed(0)
    source = make().eval()
    with torch.device("meta"):
        module = make().eval() if name != "ridge" else Ridge(3, 2)
    assert all(x.is_meta for x in (*module.parameters(), *module.buffers()))
    FILLS[fill](module, source.state_dict())
    assert torch.equal(run(module), run(source))
    if fill != "in place":
        assert not any(x.is_meta for x in (*module.parameters(), *module.buffers()))
        module.double()
        assert all(x.dtype != torch.float32 for x in module.buffers())


def test_default_devices_change_no_draw() -> None:
    for form in FORMS:
        with torch.device("cpu"):
            expected = reservoir(form).state_dict()
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in reservoir(form).state_dict().items()}
        assert shapes == {name: x.shape for name, x in expected.items()}


def test_a_readout_filled_on_the_meta_device_can_be_fitted() -> None:
    with torch.device("meta"):
        readout = Ridge(3, 2)
    readout.load_state_dict(fitted().state_dict(), assign=True)
    readout.update(drawn(40, 3), drawn(40, 2)).solve()
    assert torch.equal(readout.weight, fitted().weight)


class Nested(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList([memory("mlp", seed=seed), reservoir("csr", seed + 1)])


@pytest.mark.parametrize("with_assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_csr_weights_of_another_length_load(with_assign: bool, strict: bool) -> None:
    source, other = Nested(0), Nested(5)
    state = source.state_dict()
    assert state["parts.1._values"].shape != other.state_dict()["parts.1._values"].shape
    other.load_state_dict(state, assign=with_assign, strict=strict)
    for a, b in zip(source.parts, other.parts, strict=True):
        mine = a.reservoir if isinstance(a, ReservoirMemory) else a
        theirs = b.reservoir if isinstance(b, ReservoirMemory) else b
        assert isinstance(mine, Reservoir)
        assert isinstance(theirs, Reservoir)
        assert torch.equal(mine(drawn(2, 9, 3))[0], theirs(drawn(2, 9, 3))[0])
        assert torch.equal(mine.dense_weight(), theirs.dense_weight())
    # Copied, not shared, unless assigned.
    same = state["parts.1._values"].data_ptr() == other.state_dict()["parts.1._values"].data_ptr()
    assert same == with_assign


def test_a_copied_csr_weight_keeps_the_dtype_of_its_module() -> None:
    source, other = reservoir("csr", 0), reservoir("csr", 5).double()
    other.load_state_dict(source.state_dict())
    assert other._values.dtype == torch.float64
    assert other._columns.dtype == torch.int64
    torch.testing.assert_close(other.dense_weight().float(), source.dense_weight())


def changed(state: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in (state | {name: value}).items() if v is not None}


@pytest.mark.parametrize("with_assign", [False, True])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("units", None, r"its W has 31 units, this reservoir 30"),
        ("_columns", lambda x: x[:-1], "CSR weight under '' does not fit"),
        ("_columns", lambda x: x.clone().fill_(30), "CSR weight under '' does not fit"),
        ("_columns", lambda x: x.double(), "CSR weight under '' does not fit"),
        ("_rows", lambda x: x.flip(0), "CSR weight under '' does not fit"),
        ("_values", lambda _: None, "it holds tensors _rows, _columns of _rows, _columns, _values"),
        ("_values", lambda x: x[None], "CSR weight under '' does not fit"),
        ("_values", lambda _: 3, "it holds tensors _rows, _columns of"),
        ("input_weight", lambda x: x[:, :2], "size mismatch for input_weight"),
    ],
)
def test_csr_weights_that_do_not_fit_are_refused(
    name: str, change: Any, message: str, with_assign: bool
) -> None:
    state = reservoir("csr", 5).state_dict()
    if name == "units":
        state = Reservoir(31, 3, layout="csr").state_dict()
    else:
        state = changed(state, name, change(state[name]))
    module = reservoir("csr", 0)
    before = {key: x.clone() for key, x in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, assign=with_assign)
    if name not in ("units", "input_weight"):
        for key in ("_rows", "_columns", "_values"):
            assert torch.equal(module.state_dict()[key], before[key])
    assert module.dense_weight().shape == (30, 30)
    assert module(drawn(2, 9, 3))[0].isfinite().all()


def test_layouts_are_not_mixed_up() -> None:
    with pytest.raises(
        RuntimeError, match=r"Missing key.*_rows.*_columns|it holds tensors _values of"
    ):
        reservoir("csr").load_state_dict(reservoir("dense").state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for _values"):
        reservoir("dense").load_state_dict(reservoir("csr").state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        reservoir("csr").load_state_dict({})
    reservoir("csr").load_state_dict({}, strict=False)
