"""Builds the CUDA library for this machine's GPU while its ceilings are measured."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_FAILED = "compiling the native library failed"
_TAIL = 600
_DEATH_SECONDS = 30.0


class Build:
    """`python -m build_support.native`, for one architecture, in the background."""

    def __init__(
        self,
        capability: tuple[int, int],
        command: tuple[str, ...] = (sys.executable, "-m", "build_support.native"),
    ) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.skipped = self._skip_reason()
        if self.skipped:
            return
        major, minor = capability
        # sm_90a has Hopper's own instructions, and runs on Hopper alone.
        architecture = f"{major}.{minor}" + ("a" if major == 9 else "")
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, "RESFORMER_CUDA": "1", "RESFORMER_CUDA_ARCHS": architecture},
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @staticmethod
    def _skip_reason() -> str:
        try:
            cuda = importlib.import_module("build_support.cuda")
        except ImportError:
            return "this checkout has no CUDA sources"
        return "" if cuda.find_nvcc() else "there is no nvcc"

    def finish(self, until: float) -> tuple[str, bool]:
        """Wait until then, by `time.monotonic()`: (the outcome, whether compiling failed)."""
        if self._process is None:
            return f"not built: {self.skipped}", False
        try:
            code = self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            return "not built: the time was up", False
        self._output.seek(0)
        said = self._output.read().decode(errors="replace").strip()
        self.stop()
        if code == 0:
            return "built", False
        return f"not built: {said[-_TAIL:]}", _FAILED in said

    def stop(self) -> None:
        """End the build and its compilers, if it still runs."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_DEATH_SECONDS)
        self._process = None
        self._output.close()
