"""Which versions of Triton are used on which GPU, by feeding both to the table of known faults."""

from __future__ import annotations

import pytest
from torch.torch_version import TorchVersion

from resformer_kernels._triton import available, faults

H100, B200, B300 = (9, 0), (10, 0), (10, 3)


@pytest.mark.parametrize(
    "version", ["3.6.0", "3.7.1", "3.7.1+git1a2b3c", "3.8.0", "3.9.0", "4.0.0"]
)
@pytest.mark.parametrize("capability", [None, (8, 0), H100, B200, (12, 0)])
def test_versions_whose_faults_are_avoided_are_used(
    version: str, capability: tuple[int, int] | None
) -> None:
    assert available.refusal(version, capability) is None


@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git1a2b3c", "3.7.0", "3.7.1", "3.8.0"])
def test_versions_that_compile_products_wrongly_are_refused(version: str) -> None:
    reason = available.refusal(version, B300)
    assert reason == (
        f"Triton {version} compiles wrongly for compute capability 10.3 (two products into one "
        "accumulator are wrong: triton-lang/triton 10821); 3.9 is the oldest known to do without"
    )
    assert available.refusal("3.9.0", B300) is None


def test_copies_that_products_read_too_early() -> None:
    refused = available.refusal("3.7.0", B200)
    assert refused is not None
    assert "pytorch/pytorch 181248); 3.7.1 is the oldest known to do without" in refused
    for version, told in (("3.6.0", 1), ("3.7.0", 1), ("3.7.1", 0), ("3.9.0", 0)):
        for capability in (H100, B200):
            assert len(faults.notes(version, capability)) == told
        assert faults.notes(version, B300) == faults.notes(version, (8, 0)) == []


@pytest.mark.parametrize("version", ["3.5.1", "2.0.0"])
def test_versions_before_the_oldest_are_refused(version: str) -> None:
    expected = f"it needs Triton 3.6 or newer, {version} is installed"
    assert available.refusal(version, None) == available.refusal(version, H100) == expected


def test_the_bounds_of_a_fault_hold_at_their_ends() -> None:
    fault = faults.NARROW_ON_BLACKWELL
    versions = {"3.5.1": False, "3.6.0": True, "3.6.9": True, "3.7.0": False, "3.8.0": False}
    for version, expected in versions.items():
        assert fault.has(TorchVersion(version), B200) is expected
        assert not fault.has(TorchVersion(version), H100)
    assert faults.NARROW_ON_HOPPER.has(TorchVersion("99.0"), H100)
