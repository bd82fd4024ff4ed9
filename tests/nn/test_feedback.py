"""Reservoirs under a teacher, and in closed loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resformer_kernels.nn import RLS, Reservoir, ReservoirMemory, Ridge, stability_report
from resformer_kernels.nn.readout import LinearReadout
from resformer_kernels.reservoir import segments
from resformer_kernels.tasks import LORENZ_EXPONENT, lorenz, valid_steps
from tests.nn.loops import FORMS, closed, draw, forced, make

every_form = pytest.mark.parametrize("form", FORMS)
OFFSETS = torch.tensor([0, 4, 4, 11, 12], dtype=torch.int32)


def linear(kind: str, outputs: int = 3, scale: float = 0.2) -> LinearReadout | nn.Linear:
    """A readout of 30 states with weights that are not small."""
    readout: LinearReadout | nn.Linear
    if kind == "Linear":
        readout = nn.Linear(30, outputs, dtype=torch.float64)
    elif kind == "Linear without bias":
        readout = nn.Linear(30, outputs, bias=False, dtype=torch.float64)
    else:
        readout = Ridge(30, outputs) if kind == "Ridge" else RLS(30, outputs)
    with torch.no_grad():
        readout.weight.copy_(scale * draw(outputs, 30, seed=5))
        if readout.bias is not None:
            readout.bias.copy_(draw(outputs, seed=6))
    return readout


LINEAR = ("Ridge", "RLS", "Linear", "Linear without bias")


@every_form
@pytest.mark.parametrize("inputs", [2, 0])
def test_a_teacher_takes_the_place_of_outputs(form: str, inputs: int) -> None:
    reservoir = make(inputs, **FORMS[form])
    u, y = draw(2, 12, inputs) if inputs else None, draw(2, 12, 3, seed=1)
    h, first = draw(2, 30, seed=2), draw(2, 3, seed=3)
    states, final = reservoir(u, teacher=y)
    torch.testing.assert_close(states, forced(reservoir, u, y))
    states, final = reservoir(u, h, teacher=y, initial_feedback=first)
    expected = forced(reservoir, u, y, h, first)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(final, expected[:, -1])
    last, _ = reservoir(u, h, teacher=y, initial_feedback=first, reduce="last")
    torch.testing.assert_close(last, final)
    # In single precision too, by the kernels.
    u = None if u is None else u.float()
    small = [x.float() for x in (h, y, first)]
    states, _ = copy.deepcopy(reservoir).float()(
        u, small[0], teacher=small[1], initial_feedback=small[2]
    )
    torch.testing.assert_close(states, expected.float(), atol=1e-5, rtol=1e-4)


@every_form
@pytest.mark.parametrize("inputs", [2, 0])
def test_packed_sequences_have_teachers_of_their_own(form: str, inputs: int) -> None:
    reservoir = make(inputs, stateful=True, **FORMS[form])
    u, y = draw(14, inputs) if inputs else None, draw(14, 3, seed=1)
    first = draw(4, 3, seed=2)
    options: dict[str, Any] = {"cu_seqlens": OFFSETS}
    states, final = reservoir(u, teacher=y, initial_feedback=first, **options)
    last = first.clone()
    for i, (begin, end) in enumerate(zip(OFFSETS.tolist(), OFFSETS.tolist()[1:], strict=False)):
        if end > begin:
            own = None if u is None else u[None, begin:end]
            expected = forced(reservoir, own, y[None, begin:end], first=first[i : i + 1])
            torch.testing.assert_close(states[begin:end], expected[0])
            torch.testing.assert_close(final[i], expected[0, -1])
            last[i] = y[end - 1]
    assert torch.equal(states[12:], torch.zeros(2, 30, dtype=torch.float64))
    assert reservoir.feedback is not None
    assert torch.equal(reservoir.feedback, last)
    nothing = make(inputs)(
        None if u is None else u[:0],
        teacher=y[:0],
        initial_feedback=first[:1],
        cu_seqlens=OFFSETS[[0, 0]],
    )
    assert nothing[0].shape == (0, 30)
    none = make(inputs)(None if u is None else u[:0], teacher=y[:0], cu_seqlens=OFFSETS[:1])
    assert none[1].shape == (0, 30)


@every_form
def test_calls_continue_with_the_last_teacher(form: str) -> None:
    u, y = draw(2, 40, 2), draw(2, 40, 3, seed=1)
    whole, _ = make(**FORMS[form])(u, teacher=y)
    reservoir = make(stateful=True, **FORMS[form])
    sizes = (1, 13, 0, 26)
    pairs = zip(u.split(sizes, 1), y.split(sizes, 1), strict=True)
    parts = [reservoir(a, teacher=b)[0] for a, b in pairs]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert reservoir.feedback is not None
    assert torch.equal(reservoir.feedback, y[:, -1])
    assert not {"state", "feedback"} & set(reservoir.state_dict())
    copied = copy.deepcopy(reservoir)
    after, _ = reservoir(u, teacher=y)
    assert torch.equal(copied(u, teacher=y)[0], after)
    reservoir.reset(torch.tensor([1]))
    assert not reservoir.feedback[1].any()
    # What is given comes first: a start of its own, and a teacher of its own.
    given, _ = reservoir(u, torch.zeros(2, 30, dtype=u.dtype), teacher=y)
    torch.testing.assert_close(given, whole)
    reservoir.state = copied.state
    assert reservoir.feedback is None
    reservoir.reset()
    torch.testing.assert_close(reservoir(u, teacher=y)[0], whole)
    reservoir(u.float().double(), teacher=y)
    narrow = copy.deepcopy(reservoir).bfloat16()
    assert {x.dtype for x in narrow._kept.values()} == {torch.float32}
    states, _ = narrow(u.bfloat16(), teacher=y.float())
    expected, _ = reservoir(u, teacher=y)
    torch.testing.assert_close(states, expected.float(), atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="inputs must hold 2 sequences"):
        reservoir(u[:1], teacher=y[:1])


def test_gradients_reach_inputs_and_teacher() -> None:
    u, y = draw(2, 6, 2).requires_grad_(), draw(2, 6, 3, seed=1).requires_grad_()
    first, probe = draw(2, 3, seed=3).requires_grad_(), draw(2, 6, 30, seed=2)
    reservoir = make()
    leaves = (u, y, first)
    states, _ = reservoir(u, teacher=y, initial_feedback=first)
    found = torch.autograd.grad((states * probe).sum(), leaves)
    expected = forced(reservoir, u, y, first=first)
    torch.testing.assert_close(found, torch.autograd.grad((expected * probe).sum(), leaves))
    assert not found[1][:, -1].any()
    # They cross calls where the graph is kept.
    kept = make(stateful=True, keep_graph=True)
    kept(u, teacher=y)
    (grad,) = torch.autograd.grad(kept(u.detach(), teacher=y.detach())[0].sum(), y)
    assert grad[:, -1].abs().max() > 0


def test_teachers_of_any_floating_dtype_are_taken() -> None:
    reservoir = make(dtype=torch.float32)
    u, y = draw(2, 6, 2).float(), draw(2, 6, 3, seed=1)
    expected, _ = reservoir(u, teacher=y.float())
    assert torch.equal(reservoir(u, teacher=y)[0], expected)
    assert reservoir(u.bfloat16(), teacher=y)[0].dtype == torch.float32
    half = y.half()
    assert torch.equal(reservoir(u, teacher=half)[0], reservoir(u, teacher=half.double())[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_stateful_reservoir_with_a_teacher_compiles_whole() -> None:
    torch.compiler.reset()
    options: dict[str, Any] = {"stateful": True, "dtype": torch.float32}
    module, expected = make(**options), make(**options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        u, y = draw(2, 6, 2, seed=seed).float(), draw(2, 6, 3, seed=seed + 5).float()
        torch.testing.assert_close(compiled(u, teacher=y), expected(u, teacher=y))
    packed = {"cu_seqlens": OFFSETS}
    u, y = draw(14, 2).float(), draw(14, 3).float()
    module.reset()
    expected.reset()
    found = compiled(u, teacher=y, **packed)
    torch.testing.assert_close(found, expected(u, teacher=y, **packed))


@every_form
@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("fold", [False, True])
def test_a_forecast_feeds_outputs_back(
    form: str, kind: str, fold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several pieces of time.
    monkeypatch.setattr(segments, "_SHORTEST", 4)
    monkeypatch.setattr(segments, "_ELEMENTS", 1)
    reservoir = make(3, 0, stateful=True, **FORMS[form])
    readout, start = linear(kind), draw(2, 30).tanh()
    outputs, last = reservoir.free_run(readout, start, 9, fold=fold)
    expected, state = closed(reservoir, readout, start, 9)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(last, state)
    torch.testing.assert_close(outputs[:, 0], readout(start))
    assert reservoir.state is None
    assert not outputs.requires_grad


@every_form
@pytest.mark.parametrize("inputs", [2, 0])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_a_forecast_goes_through_feedback_weights(
    form: str, inputs: int, given: bool, fold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_SHORTEST", 4)
    monkeypatch.setattr(segments, "_ELEMENTS", 1)
    reservoir, readout = make(inputs, **FORMS[form]), linear("Ridge")
    start, first = draw(2, 30).tanh(), draw(2, 3, seed=1) if given else None
    for steps in (1, 9):
        u = draw(2, steps, 2, seed=2) if inputs else None
        outputs, last = reservoir.free_run(
            readout, start, steps, inputs=u, initial_feedback=first, fold=fold
        )
        expected, state = closed(reservoir, readout, start, steps, u, first)
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(last, state)


def test_closing_the_loop_continues_a_teacher() -> None:
    reservoir, readout = make(stateful=True), linear("Ridge")
    u, y = draw(2, 20, 2), draw(2, 20, 3, seed=1)
    _, state = reservoir(u[:, :10], teacher=y[:, :10])
    outputs, last = reservoir.free_run(
        readout, state, 10, inputs=u[:, 10:], initial_feedback=reservoir.feedback
    )
    # Its own outputs as a teacher give the same states.
    states, final = reservoir(u[:, 10:], teacher=outputs)
    torch.testing.assert_close(readout(states), outputs)
    torch.testing.assert_close(final, last)


def test_what_is_no_linear_map_is_not_folded() -> None:
    start, reservoir = draw(2, 30).tanh().float(), make(3, 0, dtype=torch.float32)
    hooked = linear("Linear").float()
    hooked.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    weighted = nn.utils.parametrizations.weight_norm(linear("Linear").float())
    mlp = nn.Sequential(nn.Linear(30, 3), nn.Tanh())
    for readout in (hooked, weighted, mlp, lambda h: h[:, :3]):
        outputs, _ = reservoir.free_run(readout, start, 5)
        torch.testing.assert_close(
            outputs, closed(reservoir, readout, start, 5)[0], atol=1e-5, rtol=1e-4
        )
        with pytest.raises(TypeError, match="readout must be a Ridge, an RLS or a"):
            reservoir.free_run(readout, start, 5, fold=True)


def test_autocast_changes_no_step() -> None:
    start, reservoir = draw(2, 30).tanh().float(), make(3, 0, dtype=torch.float32)
    for fold in (False, True):
        expected = reservoir.free_run(linear("Ridge"), start, 5, fold=fold)
        with torch.autocast("cpu"):
            found = reservoir.free_run(linear("Ridge"), start, 5, fold=fold)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_16_bit_reservoirs_forecast() -> None:
    readout, start = linear("Ridge"), draw(2, 30).tanh().float()
    expected, _ = make(3, 0).float().free_run(readout, start, 8)
    for dtype in (torch.bfloat16, torch.float16):
        for fold in (False, True):
            found, _ = make(3, 0).to(dtype).free_run(readout, start, 8, fold=fold)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, atol=0.2, rtol=0.2)


def test_folding_makes_up_for_rounding() -> None:
    reservoir = make(3, 0, bias_scaling=1.0, dtype=torch.float32)
    readout, start = linear("Ridge"), draw(1, 30).tanh()
    weight, constant = reservoir._fold(readout, start.float())
    exact = reservoir.dense_weight().double() + reservoir.input_weight.double() @ readout.weight
    wanted = start.float().double() @ exact.T + reservoir.input_weight.double() @ readout.bias
    rounded = start.float().double() @ weight.double().T
    # As near as the constant's own rounding lets it be; without, a digit is lost.
    error = (rounded + constant[:, 0].double() - wanted).abs()
    assert (error <= 2**-24 * constant[:, 0].abs()).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_folded_forecast_of_lorenz_is_valid_as_long(seed: int) -> None:
    x = lorenz(200 + 4000 + 20 * 50 + 701, step=0.02, seed=seed)
    x = (x - x.mean(0)) / x.std()
    reservoir = Reservoir(
        200,
        3,
        seed=seed,
        sr=0.6,
        input_scaling=0.2,
        bias_scaling=1.0,
        input_connectivity=1.0,
    )
    states, _ = reservoir(x[None, :-1].float())
    assert isinstance(states, Tensor)
    readout = Ridge(200, 3, 1e-8).fit(states[0, 200:4200], x[201:4201])
    first = 4200 + 50 * torch.arange(20)
    valid = []
    for fold in (False, True):
        outputs, _ = reservoir.free_run(readout, states[0, first], 700, fold=fold)
        pairs = zip(first.tolist(), outputs, strict=True)
        steps = [valid_steps(found, x[at + 1 : at + 701]) for at, found in pairs]
        valid.append(0.02 * LORENZ_EXPONENT * sum(steps) / len(steps))
    assert valid[0] > 8.0
    assert valid[1] > valid[0] - 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state": draw(30)}, ValueError, r"state must be \(batch, 30\)"),
        ({"state": draw(2, 29)}, ValueError, r"state must be \(batch, 30\)"),
        ({"state": draw(2, 30).float()}, TypeError, "state must be torch.float64, got torch.fl"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"inputs": None}, ValueError, r"inputs must be given, \(2, 4, 2\)"),
        ({"inputs": draw(2, 3, 2)}, ValueError, r"inputs must be \(2, 4, 2\)"),
        ({"initial_feedback": draw(2, 2)}, ValueError, r"initial_feedback must be \(2, 3\)"),
        ({"fold": 1}, TypeError, "fold must be True or False"),
        ({"readout": lambda h: h}, ValueError, r"readout must map states \(2, 30\) to \(2, 3\)"),
        ({"readout": lambda _h: None}, ValueError, "readout must map states"),
        ({"readout": linear("Ridge", outputs=2)}, ValueError, "readout must map states"),
    ],
)
def test_bad_forecasts_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"readout": linear("Ridge"), "state": draw(2, 30), "steps": 4, "inputs": draw(2, 4, 2)}
    with pytest.raises(error, match=message):
        make().free_run(**(given | options))


def test_what_a_reservoir_has_no_use_for_is_refused() -> None:
    u, y = draw(2, 4, 2), draw(2, 4, 3)
    plain, fed, alone = make(2, 0), make(), make(0)
    for call, message in (
        (lambda: plain(u, teacher=y), "teacher is for a reservoir with feedback"),
        (lambda: plain(u, initial_feedback=y[:, 0]), "initial_feedback is for a reservoir with"),
        (lambda: fed(u), "teacher must be a tensor"),
        (lambda: fed(None, teacher=y), "inputs must be a tensor"),
        (lambda: fed(u, teacher=y[:, :3]), r"teacher must be \(2, 4, 3\)"),
        (lambda: fed(u, teacher=y[..., :2]), r"teacher must be \(2, 4, 3\)"),
        (lambda: fed(y, teacher=y), r"inputs must be \(batch, time, 2\)"),
        (lambda: fed(u, teacher=y, initial_feedback=y[:1, 0]), r"initial_feedback must be \(2, 3"),
        (lambda: alone(u, teacher=y), r"inputs must be \(batch, time, 0\)"),
        (
            lambda: plain.free_run(linear("Ridge", outputs=2), draw(2, 30), 4, inputs=u),
            "inputs is for a reservoir with feedback",
        ),
        (
            lambda: alone.free_run(linear("Ridge"), draw(2, 30), 4, inputs=u),
            "inputs is for a reservoir with inputs beside its feedback",
        ),
        (
            lambda: make(3, 0, activation="softmax", **FORMS["groups"]).free_run(
                linear("Ridge"), draw(2, 30), 4, fold=True
            ),
            "fold must be False where softmax",
        ),
        (lambda: ReservoirMemory(fed, 4), "reservoir must have no feedback"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    assert 0 < stability_report(fed).contraction < 1
    with pytest.raises(ValueError, match=r"inputs must be \(T, 5\)"):
        stability_report(fed, draw(10, 2))
