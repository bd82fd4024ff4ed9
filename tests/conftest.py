"""Settings that every test shares."""

from __future__ import annotations

import os

# Before Triton is imported: its kernels then run in its interpreter, on the CPU. Tests that compile
# them start a process of their own, without this.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from resformer_kernels._core import extension
from resformer_kernels._triton.available import interpreted
from tests.backends import available
from tests.interpreter import quick

# Hypothesis draws some numbers out of the sources of the modules loaded so far, and those depend on
# the tests that ran before: without them every run draws the same examples.
if hasattr(providers, "_get_local_constants"):
    vars(providers)["_get_local_constants"] = vars(providers)["Constants"]

# A first call loads the library, and CI machines stall: time per example says nothing here.
# Interpreted kernels are slow, and fixtures that choose a backend hold for every example.
settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("explore", settings.get_profile("house"), derandomize=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--explore",
        action="store_true",
        help="draw new random examples (by default every run draws the same ones)",
    )
    parser.addoption(
        "--emulate-all",
        action="store_true",
        help="run every case of tests/gpu_on_cpu on a GPU that is not there, not a few",
    )
    parser.addoption(
        "--check-layouts",
        action="store_true",
        help="time the peers of every benchmark in layouts that are not registered (quiet machine)",
    )
    parser.addoption(
        "--seeds",
        type=int,
        default=1,
        help="schedules of each case of tests/gpu_on_cpu",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose how examples are drawn, and give each parallel worker one thread: two workers of two
    threads each only wait."""
    settings.load_profile("explore" if config.getoption("explore") else "house")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start long tests first, or one worker waits at the end while the other has one of them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed torch's own generator, so that no test depends on the tests before it."""
    torch.manual_seed(0)


def _require_native() -> None:
    reason = extension.unavailable_reason()
    if reason is None:
        return
    if os.environ.get("RESFORMER_REQUIRE_NATIVE") == "1" or os.environ.get("CI") in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def native() -> str:
    """The native backend's name; skips where it is not built, or fails where it must be."""
    _require_native()
    return "native"


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads for torch and the native kernels; workers of the suite have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A gloo process group of this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[str]:
    """The triton backend's name, whose kernels run in Triton's interpreter; skips without it."""
    pytest.importorskip("triton")
    if not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    with quick():
        yield "triton"


# AMX has kernels of its own for attention alone, which tests/attention/test_amx.py runs.
@pytest.fixture(params=[path for path in extension.CPU_PATHS if path != "avx512_amx"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each CPU path of the native library but AMX's in turn, forced; skips those this machine
    lacks."""
    _require_native()
    path: str = request.param
    if path not in extension.available_cpu_paths():
        pytest.skip(f"this machine or build has no {path} path")
    monkeypatch.setenv("RESFORMER_CPU", path)
    return path


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU without an interpreter."""
    return available(request)
