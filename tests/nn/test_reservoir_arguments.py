"""What a reservoir takes as numbers, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from resformer_kernels.nn import Ridge
from tests.nn.test_reservoir import drive, make


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": 0}, "units must be at least 1, got 0"),
        ({"groups": 4}, "units 30 must be a multiple of groups 4"),
        ({"groups": 3, "topology": "ring"}, "groups 1 unless"),
        ({"topology": "star"}, "topology must be one of"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"layout": "coo"}, "layout must be one of"),
        ({"layout": "csr", "topology": "ring"}, "layout 'csr' is for"),
        ({"rc_connectivity": 0.0}, r"rc_connectivity must lie in \(0, 1\]"),
        ({"input_connectivity": 1.5}, "input_connectivity must lie"),
        ({"lr": 1.5}, r"lr must lie in \[0, 1\]"),
        ({"lr": (0.1, 0.2)}, "lr must have 1 or 30 numbers, got 2"),
        ({"sr": -1.0}, "sr must be at least 0"),
        ({"input_scaling": (1.0, 1.0, 1.0)}, "input_scaling must have 1 or 2 numbers"),
        ({"units": 3, "rc_connectivity": 0.01}, "leaves a reservoir of 3 units without cycles"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_numbers_of_numpy_and_tensors_are_taken() -> None:
    plain = make(
        lr=[0.5] * 30, sr=0.75, input_scaling=[0.25, 0.5], bias_scaling=0.5, rc_connectivity=0.5
    )
    for number, array in ((np.float32, np.array), (torch.tensor, torch.tensor)):
        options: dict[str, Any] = {
            "lr": array([0.5] * 30),
            "sr": number(0.75),
            "input_scaling": array([0.25, 0.5]),
            "bias_scaling": number(0.5),
            "rc_connectivity": number(0.5),
            "seed": np.random.default_rng(0).integers(1, 2),
            "groups": torch.tensor(1),
        }
        reservoir = make(np.int64(30), **options)
        assert type(reservoir.units) is int
        for found, wanted in zip(reservoir.buffers(), plain.buffers(), strict=True):
            assert torch.equal(found, wanted)
    mixed = make(lr=[np.float64(1), 0.3, torch.tensor(0.1)], groups=np.int32(3), sr=range(3))
    assert mixed.leak.shape == (30,)
    state = torch.rand(2, 30)
    assert mixed.free_run(lambda h: h[:, :2], state, np.int64(2))[0].shape == (2, 2, 2)
    mixed.stream(Ridge(30, 2), drive(), drive(), washout=np.int64(2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"units": 30.0}, TypeError, r"units must be an int, got 30\.0"),
        ({"units": True}, TypeError, "units must be an int"),
        ({"seed": 0.5}, TypeError, r"seed must be an int, got 0\.5"),
        ({"lr": "0.5"}, TypeError, r"lr must be a number, got '0\.5'"),
        ({"lr": [[0.5]]}, TypeError, "lr must be a number"),
        ({"sr": float("nan")}, ValueError, "sr must be finite, got nan"),
        ({"sr": torch.tensor(1.0, requires_grad=True)}, TypeError, "sr gets no gradient"),
        ({"input_scaling": [1.0, float("inf")]}, ValueError, "input_scaling must be finite"),
        ({"bias_scaling": float("nan")}, ValueError, "bias_scaling must be finite"),
        ({"bias_scaling": [1.0, 2.0]}, ValueError, "bias_scaling must have 1 numbers, got 2"),
        ({"keep_graph": 1}, TypeError, "keep_graph must be True or False"),
    ],
)
def test_what_is_no_number_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)
