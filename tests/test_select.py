"""Choosing a backend, and saying why."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from resformer_kernels import explain, value_residual_attention
from resformer_kernels._core import extension
from resformer_kernels._core import select as _select
from resformer_kernels._core.select import select


class Fake:
    def __init__(self, name: str, reason: str | None = None, large: bool = False) -> None:
        self.NAME = name
        self.reason = reason
        self.large = large

    def unsupported_reason(self, _call: Any, _hardware: Any) -> str | None:
        return self.reason

    def is_large(self, _call: Any) -> bool:
        return self.large

    def run(self, call: Any) -> Any:
        return call


def test_auto_takes_the_first_that_can() -> None:
    first, second = Fake("first", "is busy"), Fake("second")
    assert select("op", "auto", [first, second, Fake("reference")], None) is second


def test_a_name_never_falls_back() -> None:
    backends = [Fake("first", "is busy"), Fake("reference")]
    with pytest.raises(RuntimeError, match="backend='first' cannot serve this call: is busy"):
        select("op", "first", backends, None)
    assert select("op", "reference", backends, None) is backends[1]


class ByName(Fake):
    def reason_against_auto(self, _call: Any, _hardware: Any) -> str | None:
        return "nobody tried it"


def test_auto_leaves_out_what_its_name_takes() -> None:
    backends = [ByName("first"), Fake("reference")]
    assert select("op", "auto", backends, None) is backends[1]
    assert select("op", "first", backends, None) is backends[0]
    with pytest.raises(RuntimeError, match="first: nobody tried it"):
        select("op", "auto", backends[:1], None)
    with pytest.raises(RuntimeError, match="cannot serve this call: is ill"):
        select("op", "first", [ByName("first", "is ill")], None)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'auto' or one of 'first', 'reference', got 'second'"):
        select("op", "second", [Fake("first"), Fake("reference")], None)


def test_nothing_serves() -> None:
    with pytest.raises(RuntimeError, match="first: is busy; second: is ill"):
        select("op", "auto", [Fake("first", "is busy"), Fake("second", "is ill")], None)


def test_falling_back_on_a_large_input_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_select, "_announced", set())
    backends = [Fake("first", "is busy"), Fake("reference", large=True)]
    with pytest.warns(UserWarning, match=r"op runs on the slow reference.*first: is busy"):
        select("op", "auto", backends, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select("op", "auto", backends, None)
        select("op", "auto", [Fake("other", "is ill"), Fake("reference")], None)
        select("other", "reference", backends, None)


def test_a_large_float64_input_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_select, "_announced", set())
    q = torch.zeros(1, 4096, 1, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="slow reference") as caught:
        value_residual_attention(q, q, q)
    assert [warning.filename for warning in caught] == [__file__]


def test_explain_gives_every_reason() -> None:
    q = torch.randn(1, 3, 2, 4)
    found = explain(value_residual_attention, q.double(), q.double(), q.double())
    assert found.backend == "reference"
    assert "float64" in found.reasons["native"]
    assert "not native" in str(found)
    named = explain(value_residual_attention, q, q, q, backend="reference")
    assert named.backend == "reference"
    assert "native" in named.reasons


def test_explain_takes_public_ops_alone() -> None:
    with pytest.raises(TypeError, match="function must be a public op"):
        explain(torch.add, 1, 2)


def test_explain_validates() -> None:
    q = torch.randn(1, 3, 2, 4)
    with pytest.raises(ValueError, match="window"):
        explain(value_residual_attention, q, q, q, window=(-3, 0))
    with pytest.raises(ValueError, match="backend"):
        explain(value_residual_attention, q, q, q, backend="none such")


def test_a_library_that_does_not_load_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    broken = tmp_path / "libresformer_cpu.so"
    monkeypatch.setattr(extension, "_reason", extension._NOT_TRIED)
    monkeypatch.setattr(extension, "LIBRARY", broken)
    q = torch.randn(1, 3, 2, 4)
    assert "is not built" in explain(value_residual_attention, q, q, q).reasons["native"]
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(extension, "_reason", extension._NOT_TRIED)
    with pytest.raises(RuntimeError, match="does not load"):
        value_residual_attention(q, q, q, backend="native")


def test_cpu_paths(cpu_path: str) -> None:
    assert extension.cpu_path() == cpu_path


def test_unknown_cpu_path(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 3, 2, 4)
    monkeypatch.setenv("RESFORMER_CPU", "mmx")
    with pytest.raises(RuntimeError, match=r"RESFORMER_CPU.*mmx"):
        value_residual_attention(q, q, q, backend=native)
