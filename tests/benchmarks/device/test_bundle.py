"""The bundle for a device: kernels compiled here that a launch there finds, and the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device import bundle
from benchmarks.device.common import Settings
from benchmarks.device.record import DeviceRun, fresh, sources_digest
from resformer_kernels._core import extension
from resformer_kernels._triton import available

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(available.version_reason() is not None, reason="no Triton")

FOUND = """
import shutil, sys
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from benchmarks.device import ahead, bundle
from resformer_kernels._triton.launch import _compile

class Sm90:
    # What a launch asks a driver before it looks for the kernel.
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

(problem,) = ahead.problems("smoke linear_scan")
launches = ahead.launches(problem, (9, 0))
folder = Path(sys.argv[1])
kernels = {}
for number, case in enumerate(ahead.cases(launches, (9, 0))):
    at, rest = bundle.compiled(case, 90, folder / "made")
    # As another build of Triton would have named it.
    (folder / "made" / at).rename(folder / "made" / f"OTHER{number}")
    kernels[f"OTHER{number}"] = rest
bundle.pack(folder / "made", list(kernels), folder / "kernels.tar.xz")
shutil.rmtree(folder / "made")
count = bundle.unpack_kernels(folder / "kernels.tar.xz", kernels, folder / "there")
assert count == len(kernels) > 1, count

hits = []
def listen(*, cache_hit, src, **about): hits.append((src.name, cache_hit))
triton.knobs.compilation.listener = listen
triton.knobs.cache.dir = str(folder / sys.argv[2])
driver.set_active(Sm90())
for launch in launches:
    _compile(launch.kernel, launch.kwargs, torch.device("cuda", 0))
print(sorted({hit for _, hit in hits}), len(hits))
"""


def compiling(program: str, *arguments: str) -> str:
    """The output of a program for which Triton compiles."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *([] if program.endswith(".py") else ["-c"]), program, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    return f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


@needs_triton
@pytest.mark.parametrize(("cache", "found"), [("there", "[True]"), ("empty", "[False]")])
def test_a_launch_finds_the_kernels_of_a_bundle(tmp_path: Path, cache: str, found: str) -> None:
    said = compiling(FOUND, str(tmp_path), cache)
    assert said.startswith("exit code 0"), said
    assert f"\n{found} " in said


@pytest.mark.slow
@needs_triton
def test_the_script_prepares_one(tmp_path: Path) -> None:
    script, out = str(ROOT / "scripts" / "prepare_device_bundle.py"), tmp_path / "bundle"
    wheel = tmp_path / "package_of_a_test-1.0-py3-none-any.whl"
    make_wheel(wheel)
    options = ["--no-configurations", "--no-library", "--jobs", "1", "--out", str(out)]
    options += ["--filter", "smoke linear_scan", "--wheel", str(wheel)]
    said = compiling(script, *options)
    assert said.startswith("exit code 0"), said
    assert "device-check --bundle" in said
    about = bundle.manifest(out)
    assert len(about["kernels"]) > 1
    assert about["sources"] == sources_digest()
    assert "device-check --bundle" in (out / "RUN.txt").read_text()
    run = fresh(Settings("cpu", tiny=True))
    found = bundle.unpack(out, run)
    assert not found.library
    assert f"{len(about['kernels'])} put where" in run.notes["bundle, kernels"]
    assert list(Path(found.environment["TRITON_CACHE_DIR"]).rglob("*.cubin"))
    program = "import package_of_a_test; print(package_of_a_test.NUMBER)"
    environment = {**os.environ, **found.environment}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "42\n"
    assert str(wheel.name) in run.notes["bundle, wheels"]
    # Again over itself, and too large; what is no bundle is not replaced.
    said = compiling(script, *options, "--limit-mib", "0.5")
    assert said.startswith("exit code 1")
    assert "over the limit of 0.5 MiB" in said
    assert "no bundle" in compiling(script, "--out", str(ROOT / "benchmarks"))
    assert "no such wheel" in compiling(script, "--wheel", "none.whl")


def make_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as made:
        about = "package_of_a_test-1.0.dist-info"
        made.writestr("package_of_a_test.py", "NUMBER = 42\n")
        made.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: package-of-a-test\nVersion: 1.0\n"
        )
        made.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        made.writestr(f"{about}/RECORD", "")


def described(folder: Path, **other: Any) -> Path:
    """A bundle without kernels."""
    folder.mkdir()
    (folder / bundle.WHEELS).mkdir()
    about: dict[str, Any] = {
        "format": bundle.FORMAT,
        "capability": 90,
        "sources": sources_digest(),
        "compiler": bundle.compiler(90),
        "kernels": {},
        "shortlist": {"forward half D128 causal": [[128, 64, 8, 3]]},
        **other,
    }
    (folder / bundle.MANIFEST).write_text(json.dumps(about))
    with tarfile.open(folder / bundle.KERNELS, "w:xz"):
        pass
    return folder


@pytest.fixture
def run() -> DeviceRun:
    return fresh(Settings("cpu", tiny=True))


@needs_triton
def test_another_triton_leaves_the_kernels_out_and_says_so(tmp_path: Path, run: DeviceRun) -> None:
    compiler = {**bundle.compiler(90), "version": "3.5.0"}
    found = bundle.unpack(described(tmp_path / "a", compiler=compiler), run)
    assert "TRITON_CACHE_DIR" not in found.environment
    assert "left out: compiled by another Triton: version" in run.notes["bundle, kernels"]
    # Its configurations are of use all the same.
    assert run.shortlist["forward half D128 causal"] == [[128, 64, 8, 3]]


@needs_triton
def test_what_is_no_bundle_or_of_other_sources_is_refused(tmp_path: Path, run: DeviceRun) -> None:
    with pytest.raises(bundle.Unusable, match="is no bundle"):
        bundle.unpack(tmp_path, run)
    with pytest.raises(bundle.Unusable, match="prepared from sources 0123, these are"):
        bundle.unpack(described(tmp_path / "a", sources="0123"), run)
    with pytest.raises(bundle.Unusable, match="in format 0"):
        bundle.unpack(described(tmp_path / "b", format=0), run)


@needs_triton
def test_an_archive_reaches_nothing_outside(tmp_path: Path, run: DeviceRun) -> None:
    folder = described(tmp_path / "a", kernels={"..": "rest"})
    outside = tmp_path / "x.json"
    outside.write_text("{}")
    with tarfile.open(folder / bundle.KERNELS, "w:xz") as made:
        made.add(outside, "../b/x.json")
    with pytest.raises(bundle.Unusable, match="which no bundle does"):
        bundle.unpack(folder, run)


@needs_triton
def test_a_library_that_does_not_load_is_left_out(
    tmp_path: Path, run: DeviceRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "package" / extension.CUDA_LIBRARY.name
    target.parent.mkdir()
    monkeypatch.setattr(extension, "CUDA_LIBRARY", target)
    folder = described(tmp_path / "a")
    (folder / target.name).write_text("no library")
    assert not bundle.unpack(folder, run).library
    assert "does not load" in run.notes["bundle, CUDA library"]
    assert not target.exists()


@needs_triton
def test_a_library_that_loads_is_copied(
    tmp_path: Path, run: DeviceRun, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native == "native"
    target = tmp_path / "package" / extension.CUDA_LIBRARY.name
    target.parent.mkdir()
    monkeypatch.setattr(extension, "CUDA_LIBRARY", target)
    folder = described(tmp_path / "a")
    # Any library of torch's ops will do.
    shutil.copy(extension.LIBRARY, folder / target.name)
    assert bundle.unpack(folder, run).library
    assert target.exists()
