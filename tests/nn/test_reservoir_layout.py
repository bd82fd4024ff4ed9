"""A reservoir that chooses how W is multiplied: what it takes, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from resformer_kernels import explain
from resformer_kernels.distributed import context_parallel
from resformer_kernels.nn import Reservoir, Ridge

pytestmark = pytest.mark.usefixtures("native")
UNITS = 256


def made(layout: str = "auto", **options: Any) -> Reservoir:
    return Reservoir(UNITS, 2, seed=1, lr=0.5, layout=layout, **options)


def drive(batch: int = 4, steps: int = 20) -> Tensor:
    return torch.randn(batch, steps, 2, generator=torch.Generator().manual_seed(0))


def taken(reservoir: Reservoir, inputs: Tensor, **options: Any) -> str:
    """What a call multiplies by, as `explain` says."""
    notes = " ".join(explain(reservoir, inputs, **options).notes)
    return "csr" if "multiplied as CSR" in notes else "dense"


def states(reservoir: Reservoir, inputs: Tensor) -> Tensor:
    found, _ = reservoir(inputs)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "csr"),
        ({"rc_connectivity": 0.2}, "dense"),
        ({"units": 512, "rc_connectivity": 0.2}, "csr"),
        ({"units": 512, "rc_connectivity": 0.3}, "dense"),
        ({"units": 200}, "dense"),
        ({"layout": "dense"}, "dense"),
        ({"layout": "csr"}, "csr"),
        ({"activation": "softmax"}, "dense"),
        ({"dtype": torch.float64}, "dense"),
        ({"dtype": torch.bfloat16}, "dense"),
        ({"groups": 2}, "dense"),
        ({"topology": "ring"}, "dense"),
        ({"backend": "reference"}, "dense"),
    ],
)
def test_the_rule_reads_units_and_entries(options: dict[str, Any], expected: str) -> None:
    reservoir = Reservoir(**({"units": UNITS, "input_dim": 2} | options))
    assert reservoir.running_layout == expected
    assert f"running_layout={expected!r}" in repr(reservoir)
    assert reservoir.layout == ("csr" if options.get("layout") == "csr" else "dense")
    inputs = drive().to(reservoir.state_dtype)
    assert taken(reservoir, inputs) == expected


def test_calls_that_gain_nothing_are_dense() -> None:
    reservoir, inputs = made(), drive()
    assert taken(reservoir, inputs) == "csr"
    assert taken(reservoir, inputs[:3]) == "dense"
    assert taken(reservoir, drive(1, 512)) == "csr"
    offsets = torch.tensor([0, 3, 9, 12, 20], dtype=torch.int32)
    assert taken(reservoir, inputs[0], cu_seqlens=offsets) == "csr"
    assert taken(reservoir, inputs[0], cu_seqlens=offsets[[0, 1, 2, 4]]) == "dense"
    assert taken(made(mode="chunked"), inputs[:1]) == "csr"
    assert taken(made(mode="sequential"), drive(1, 512)) == "dense"
    start = torch.zeros(4, UNITS, requires_grad=True)
    assert taken(reservoir, inputs, initial_state=start) == "dense"


def test_states_are_those_of_each_layout() -> None:
    inputs = drive()
    found = states(made(), inputs)
    assert torch.equal(found, states(made("csr"), inputs))
    torch.testing.assert_close(found, states(made("dense"), inputs), atol=3e-6, rtol=0)
    exact = states(made("dense").double(), inputs.double())
    assert (found - exact).abs().max() < 3e-6


def test_training_is_that_of_a_dense_weight() -> None:
    reservoir, dense = made(), made("dense")
    inputs = drive().requires_grad_()
    assert torch.equal(states(reservoir, inputs), states(dense, inputs))
    # W itself may be trained from outside.
    grads = []
    for module in (reservoir, dense):
        weight = module._values.clone().requires_grad_()
        out = torch.func.functional_call(module, {"_values": weight}, (drive(),))[0]
        grads.append(torch.autograd.grad(out.square().sum(), weight)[0])
    assert torch.equal(*grads)


def test_checkpoints_are_those_of_a_dense_weight() -> None:
    reservoir, dense, other = made(), made("dense"), Reservoir(UNITS, 2, seed=5, lr=0.5)
    assert list(reservoir.state_dict()) == list(dense.state_dict())
    inputs = drive()
    expected = states(reservoir, inputs)
    assert not torch.equal(states(other, inputs), expected)
    for assign in (False, True):
        other.load_state_dict(dense.state_dict(), assign=assign)
        assert torch.equal(states(other, inputs), expected)
    dense.load_state_dict(reservoir.state_dict())
    # A weight with more entries is dense from then on.
    full = Reservoir(UNITS, 2, rc_connectivity=0.5, lr=0.5)
    other.load_state_dict(full.state_dict())
    assert other.running_layout == "dense"
    assert torch.equal(states(other, inputs), states(full, inputs))


def written_in_place(w: Tensor) -> None:
    w.mul_(0.5)


def written_by_data(w: Tensor) -> None:
    w.data[3, 4] += 1.0


def written_by_numpy(w: Tensor) -> None:
    w.numpy()[:9] = 0.0


def moved_entries(w: Tensor) -> None:
    w.copy_(w.roll(1, 0))


@pytest.mark.parametrize(
    "write", [written_in_place, written_by_data, written_by_numpy, moved_entries]
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_weight_that_was_written_to_is_seen(write: Any, inference: bool) -> None:
    reservoir, inputs = made(), drive()
    states(reservoir, inputs)
    with torch.inference_mode(inference):
        write(reservoir._values)
    W = reservoir._values.to_sparse()
    expected = Reservoir(W=W, Win=reservoir.input_weight, lr=0.5, layout="csr")
    assert torch.equal(states(reservoir, inputs), states(expected, inputs))


def test_copies_find_the_entries_anew() -> None:
    reservoir, inputs = made(stateful=True), drive()
    states(reservoir, inputs)
    file = io.BytesIO()
    torch.save(reservoir, file)
    file.seek(0)
    copies = [
        copy.deepcopy(reservoir),
        pickle.loads(pickle.dumps(reservoir)),
        torch.load(file, weights_only=False),
    ]
    expected = states(reservoir, inputs)
    for copied in copies:
        assert copied._entries is None
        assert torch.equal(states(copied, inputs), expected)
    reservoir.to(torch.bfloat16)
    assert reservoir.running_layout == "dense"
    reservoir.to("meta")
    assert reservoir.running_layout == "dense"
    assert "running_layout='dense'" in repr(reservoir)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_reservoir_is_dense() -> None:
    torch.compiler.reset()
    inputs = drive()
    compiled = torch.compile(made(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs)[0], states(made("dense"), inputs))
    exported = torch.export.export(made(), (inputs,), strict=True).module()
    assert torch.equal(exported(inputs)[0], states(made("dense"), inputs))


def test_a_stream_and_a_folded_forecast_run() -> None:
    readouts = []
    for layout in ("auto", "csr"):
        reservoir, readout = made(layout), Ridge(UNITS, 2, 1e-3)
        inputs = drive(1, 700)
        state = reservoir.stream(readout, inputs[:, :-1], inputs[:, 1:])
        readout.solve()
        readouts.append((readout.weight, reservoir.free_run(readout, state, 9, fold=True)[0]))
    for mine, theirs in zip(*readouts, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("one_process")
def test_it_runs_across_ranks() -> None:
    mesh = init_device_mesh("cpu", (1,))
    inputs = drive(1, 600)
    for layout in ("auto", "csr"):
        with context_parallel(mesh, length=600):
            found = states(made(layout), inputs)
        torch.testing.assert_close(found, states(made(layout), inputs), atol=3e-6, rtol=0)
