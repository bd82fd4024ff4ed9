"""`resformer-kernels info` and the command line around it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import resformer_kernels
from resformer_kernels._core import extension
from resformer_kernels.cli import COMMANDS, INTERRUPTED, info, main, support

needs_native = pytest.mark.skipif(
    extension.unavailable_reason() is not None, reason=str(extension.unavailable_reason())
)


def read_json(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    report: dict[str, dict[str, str]] = json.loads(capsys.readouterr().out)
    return report


def test_tables_name_what_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in ("Versions", torch.__version__, "Native kernels", "reference"):
        assert expected in printed


def test_json_lists_a_backend_for_every_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["torch threads"].split()[0] == str(torch.get_num_threads())
    served = {row["dtype"]: row["backend"] for row in report["served"] if row["device"] == "cpu"}
    assert set(served) == {"float32", "bfloat16", "float16", "float64"}
    assert served["float64"] == "reference"


@needs_native
def test_default_path_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RESFORMER_CPU", raising=False)
    main(["info", "--json"])
    path, _, why = read_json(capsys)["native"]["CPU path"].partition(": ")
    assert path == extension.cpu_path()
    assert "this processor" in why


@needs_native
def test_forced_path_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESFORMER_CPU", "portable")
    assert main(["info", "--json"]) == 0
    native = read_json(capsys)["native"]
    assert native["CPU path"].startswith("portable: RESFORMER_CPU asks for it")
    assert native["RESFORMER_CPU"] == "portable"


@needs_native
def test_a_path_that_cannot_run_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESFORMER_CPU", "sse9")
    assert main(["info"]) == 1
    assert "sse9" in capsys.readouterr().out


def test_without_the_library_the_reason_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "_reason", "it was not built")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["native"]["library"] == "not in use: it was not built"
    backends = {(row["op"], row["dtype"]): row["backend"] for row in report["served"]}
    assert backends.pop(("value_residual_attention", "bfloat16")) == "sdpa"
    assert set(backends.values()) == {"sdpa", "reference"}
    assert {op for (op, _), name in backends.items() if name == "sdpa"} == {
        "value_residual_attention"
    }


@pytest.mark.parametrize("width", [80, 120])
def test_a_reason_is_told_once_and_nothing_is_cut(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    assert printed.count("TRITON_INTERPRET=1") == 1
    assert printed.count("mix_value_embedding") == 1 + torch.cuda.is_available()


def test_matrix_has_every_public_op_with_its_forms(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["info", "--matrix", "--json"]) == 0
    answers = [support.Answer(**row) for row in json.loads(capsys.readouterr().out)]
    assert list(dict.fromkeys(answer.op for answer in answers)) == list(info._SAMPLES)
    assert {answer.device for answer in answers} == {"cpu", "cuda"}
    refused = {a.feature for a in answers if a.backend == "native" and "float8" in a.feature}
    assert refused == {"float8 cache"}
    assert all(answer.reason is None for answer in answers if answer.backend == "reference")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["info", "--matrix"]) == 0
    printed = capsys.readouterr().out
    assert "packed sequences" in printed
    assert "flash_attn, CUDA" in printed


def test_matrix_does_not_depend_on_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = list(support.answers())
    monkeypatch.setattr(extension, "_reason", "it was not built")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert list(support.answers()) == everywhere


def test_every_public_op_is_reported() -> None:
    ops = {
        name
        for name in resformer_kernels.__all__
        if hasattr(getattr(resformer_kernels, name), "__resformer_explainable__")
    }
    # A packed form is served by what serves the padded one, a plan by what serves its calls.
    others = {name for name in ops if name.endswith("_varlen") or name.startswith("plan_")}
    assert ops - others == set(info._SAMPLES)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    for name in COMMANDS:
        assert name in printed


@pytest.mark.parametrize("arguments", [[], ["nope"], ["info", "--nope"]])
def test_usage_errors_exit_with_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: resformer-kernels" in capsys.readouterr().err


def test_interrupt_exits_as_the_shell_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert main(["info"]) == INTERRUPTED


def test_module_runs_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "resformer_kernels.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("resformer-kernels ")
