"""The stability report on reservoirs with known behaviour."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from resformer_kernels.nn import Reservoir, stability_report


def test_a_linear_ring_contracts_by_its_weight() -> None:
    reservoir = Reservoir(20, 1, activation="identity", topology="ring", sr=0.8, lr=1.0)
    report = stability_report(reservoir)
    assert report.contraction == pytest.approx(0.8, abs=0.02)
    assert report.spectral_radius == pytest.approx(0.8)
    assert report.linear_radius == pytest.approx(0.8)
    assert report.linear_norm == pytest.approx(0.8)
    assert report.forgetting_steps == pytest.approx(62, rel=0.1)
    assert report.eigenvalues.shape == (20,)
    assert report.forgets
    assert not report.bounded
    assert "forgets its start" in str(report)


def test_the_drive_decides_whether_a_reservoir_forgets() -> None:
    reservoir = Reservoir(60, 1, sr=1.6, input_connectivity=1.0, seed=2, rc_connectivity=0.5)
    silent = stability_report(reservoir, torch.zeros(500, 1))
    driven = stability_report(reservoir, 6 * torch.randn(500, 1))
    assert not silent.forgets
    assert silent.forgetting_steps == float("inf")
    assert "does not forget" in str(silent)
    assert driven.forgets
    assert driven.bounded


def test_leaks_of_groups_enter_the_spectrum() -> None:
    reservoir = Reservoir(20, 1, groups=2, lr=(1.0, 0.1), sr=0.5, rc_connectivity=1.0)
    report = stability_report(reservoir)
    assert report.spectral_radius == pytest.approx(0.5, 1e-5)
    assert 0.9 < report.linear_radius <= 0.95
    assert report.contraction == pytest.approx(report.linear_radius, abs=0.05)


def test_unbounded_and_growing_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="states may grow"):
        reservoir = Reservoir(20, 1, activation="identity", topology="ring", sr=1.2)
    with pytest.warns(UserWarning, match="does not contract"):
        report = stability_report(reservoir, torch.zeros(100, 1))
    assert report.contraction == pytest.approx(1.2, abs=0.01)
    with pytest.warns(UserWarning, match="does not contract"):
        assert stability_report(reservoir, torch.ones(1000, 1)).contraction == float("inf")


def test_the_kept_state_is_left_alone_and_inputs_are_checked() -> None:
    reservoir = Reservoir(20, 1, stateful=True)
    reservoir(torch.ones(3, 4, 1))
    before = reservoir.state
    stability_report(reservoir)
    assert reservoir.state is before
    with pytest.raises(ValueError, match=r"inputs must be \(T, 1\)"):
        stability_report(reservoir, torch.ones(1, 5, 1))


def test_a_drive_that_is_not_finite_is_refused() -> None:
    drive = torch.zeros(20, 1)
    drive[7] = torch.nan
    with pytest.raises(ValueError, match=r"inputs is not finite: nan at \(7, 0\)"):
        stability_report(Reservoir(20, 1), drive)
    for name, place in (("_values", "dense_weight()"), ("input_weight", "input_weight")):
        broken = Reservoir(20, 1)
        broken.get_buffer(name)[3, 0] = torch.inf
        with pytest.raises(
            ValueError, match=re.escape(f"reservoir.{place} is not finite: inf at (3, 0)")
        ):
            stability_report(broken)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_give_nearly_the_same_report(dtype: torch.dtype) -> None:
    expected = stability_report(Reservoir(20, 1), seed=3)
    torch.set_default_dtype(dtype)
    try:
        made = stability_report(Reservoir(20, 1), seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (made, stability_report(Reservoir(20, 1).to(dtype), seed=np.int64(3))):
        assert found.contraction == pytest.approx(expected.contraction, rel=0.05)
        assert found.spectral_radius == pytest.approx(expected.spectral_radius, rel=0.01)
