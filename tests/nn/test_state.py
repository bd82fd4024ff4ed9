"""What modules keep between calls: it moves, casts and copies with them, and holds no graph."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resformer_kernels.models import ReservoirClassifier
from resformer_kernels.nn import Reservoir, ReservoirMemory, Ridge

FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "csr": {"layout": "csr"},
    "ring": {"topology": "ring"},
    "diagonal": {"topology": "diagonal"},
    "groups": {"groups": 3, "rc_connectivity": 0.5},
}
MEMORIES: dict[str, dict[str, Any]] = {
    "linear": {"readout": "linear"},
    "mlp": {},
    "attention": {"readout": "attention", "window": 4},
    "streams": {"streams": 2},
}


def reservoir(form: str, **options: Any) -> Reservoir:
    return Reservoir(30, 3, bias_scaling=0.1, lr=0.5, **FORMS[form], **options)


def memory(form: str, **options: Any) -> ReservoirMemory:
    return ReservoirMemory(reservoir("dense"), 4, **MEMORIES[form], **options)


class Nested(nn.Module):
    """A stateful memory inside other modules, after a trained layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.classifier = ReservoirClassifier(
            2, encoder=nn.Identity(), features=3, memories=[memory("mlp", **options)], dropout=0.0
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.first(x))
        return found


STATEFUL: dict[str, Callable[..., nn.Module]] = {
    **{f"reservoir, {f}": lambda f=f, **o: reservoir(f, stateful=True, **o) for f in FORMS},
    **{f"memory, {f}": lambda f=f, **o: memory(f, stateful=True, **o) for f in MEMORIES},
    "classifier": lambda **o: Nested(stateful=True, **o),
}
every_module = pytest.mark.parametrize("name", STATEFUL)


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return STATEFUL[name](**options).eval()


def drive(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 9, 3, generator=torch.Generator().manual_seed(seed))


def result(module: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    found = module(x)
    return found[0] if isinstance(found, tuple) else found


def after(name: str, **options: Any) -> nn.Module:
    """The module after a call through which gradients run."""
    module = made(name, **options)
    result(module, drive().requires_grad_()).sum()
    return module


def kept(module: nn.Module) -> list[Tensor]:
    return [x for m in module.modules() for x in getattr(m, "_kept", {}).values()]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "average": lambda module: AveragedModel(module).module,
}


@every_module
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("keep_graph", [False, True])
def test_copies_continue_from_the_same_state(name: str, how: str, keep_graph: bool) -> None:
    module = after(name, keep_graph=keep_graph)
    copied = COPIES[how](module)
    assert kept(copied)
    assert not any(x.requires_grad for x in kept(copied))
    assert torch.equal(result(copied, drive(1)), result(module, drive(1)))
    # Each goes on from its own state.
    result(copied, drive(2))
    assert not torch.equal(result(copied, drive(3)), result(module, drive(3)))


@every_module
def test_a_saved_module_continues(name: str) -> None:
    module, file = after(name), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(result(loaded, drive(1)), result(module, drive(1)))


@every_module
def test_state_is_cast_and_moved_with_the_module(name: str) -> None:
    module = after(name)
    single = result(copy.deepcopy(module), drive(1))
    module.double()
    assert all(x.dtype == torch.float64 for x in kept(module))
    double = result(module, drive(1).double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-4)
    for narrow in (torch.float16, torch.bfloat16):
        module = after(name)
        before = kept(module)
        module.to(narrow)
        assert all(torch.equal(x, y) for x, y in zip(kept(module), before, strict=True))
        found = result(module, drive(1).to(narrow)).float()
        torch.testing.assert_close(found, single, atol=0.1, rtol=0.1)
    module.to("meta")
    assert all(x.is_meta for x in kept(module))
    # Nothing is left of it.
    module.to_empty(device="cpu")
    assert not kept(module)


@every_module
def test_state_holds_no_graph_unless_asked(name: str) -> None:
    x = drive().requires_grad_()
    module = made(name)
    result(module, x)
    assert not any(state.requires_grad for state in kept(module))
    found = result(module, drive())
    assert (
        not found.requires_grad or torch.autograd.grad(found.sum(), x, allow_unused=True)[0] is None
    )
    module = made(name, keep_graph=True)
    result(module, x)
    (grad,) = torch.autograd.grad(result(module, drive()).sum(), x)
    assert grad[:, -1].abs().max() > 0


@every_module
def test_state_made_in_inference_mode_is_trained_after(name: str) -> None:
    module, x = made(name), drive().requires_grad_()
    with torch.inference_mode():
        result(module, drive())
        for part in module.modules():
            if isinstance(part, (Reservoir, ReservoirMemory)):
                part.reset(torch.tensor([1]))
                part.detach()
    result(module, x).sum().backward()
    assert x.grad is not None
    expected, y = made(name), drive().requires_grad_()
    result(expected, drive())
    for part in expected.modules():
        if isinstance(part, (Reservoir, ReservoirMemory)):
            part.reset(torch.tensor([1]))
    result(expected, y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@every_module
def test_state_is_neither_saved_nor_a_buffer(name: str) -> None:
    fresh, module = made(name), after(name)
    assert list(module.state_dict()) == list(fresh.state_dict())
    assert len(list(module.buffers())) == len(list(fresh.buffers()))
    # An average of models with and without a state.
    average = AveragedModel(fresh, use_buffers=True)
    average.update_parameters(module)
    module.load_state_dict(fresh.state_dict())
    assert kept(module)


@every_module
def test_state_belongs_to_the_module_alone(name: str) -> None:
    module = after(name)
    before = [x.clone() for x in kept(module)]
    states = [x.untyped_storage().nbytes() for x in kept(module)]
    assert states == [x.numel() * x.element_size() for x in kept(module)]
    found = copy.deepcopy(module)(drive(1))
    if isinstance(found, tuple):
        module.reset()  # type: ignore[operator]
        _, final = module(drive())
        final.zero_()
    assert all(torch.equal(x, y) for x, y in zip(kept(module), before, strict=True))


@every_module
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_stateful_modules_compile_whole(name: str) -> None:
    if name == "reservoir, csr":
        pytest.skip("torch.compile does not trace sparse tensors")
    torch.compiler.reset()
    module, expected = made(name), made(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        found = result(compiled, drive(seed))
        torch.testing.assert_close(found, result(expected, drive(seed)))
    with torch.inference_mode():
        result(compiled, drive(4))
    result(expected, drive(4))
    torch.testing.assert_close(kept(module), kept(expected))
    x = drive().requires_grad_()
    result(compiled, x).sum().backward()
    assert x.grad is not None


@every_module
def test_functional_calls_continue(name: str) -> None:
    module, expected = made(name), made(name)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for seed in range(2):
        found = torch.func.functional_call(module, weights, (drive(seed),))
        found = found[0] if isinstance(found, tuple) else found
        assert torch.equal(found, result(expected, drive(seed)))


def test_a_given_state_is_copied() -> None:
    module = reservoir("dense", stateful=True)
    start = torch.rand(2, 30, requires_grad=True)
    module.state = start
    assert module.state is not None
    assert not module.state.requires_grad
    expected, _ = reservoir("dense")(drive(), start.detach())
    assert torch.equal(module(drive())[0], expected)
    module.state = None
    assert module.nbytes == 0


def test_sums_and_solutions_stay_with_a_readout() -> None:
    x, y = drive(batch=20), drive(1, batch=20)[..., :2]
    expected = Ridge(3, 2, (1e-3, 1.0)).fit(x.double(), y.double())
    readout = Ridge(3, 2, (1e-3, 1.0))
    with torch.inference_mode():
        readout.update(x[:5], y[:5])
    copied = copy.deepcopy(readout).float().double()
    for part in (readout, copied):
        part.update(x[5:], y[5:]).solve().take(1)
        torch.testing.assert_close(part.weight, expected.take(1).weight)
    narrow = pickle.loads(pickle.dumps(readout)).bfloat16()
    assert all(kept.dtype == torch.float64 for kept in narrow._kept.values())
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    narrow.double().take(0)
    torch.testing.assert_close(narrow.weight, expected.take(0).weight)
    torch.testing.assert_close(readout.errors(x, y), expected.errors(x, y))
    z = x.clone().requires_grad_()
    with torch.inference_mode():
        readout.fit(x, y)
    readout(z).sum().backward()
    assert z.grad is not None
