"""C++ reads an op's arguments by position: names and order are those of the op's record."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import resformer_kernels
from resformer_kernels._core.op import OPS, field_names

CSRC = Path(resformer_kernels.__file__).resolve().parents[1] / "csrc"
_REGISTERED = re.compile(r'm\.impl\("(\w+)",\s*TORCH_BOX\(&(?:\w+::)*(\w+)\)\)')
_NAME = re.compile(r"(\w+)\W*$")


def signatures() -> list[tuple[str, str, list[str]]]:
    """(file, op, parameter names) of every op that a C++ file registers."""
    found = []
    for path in sorted(CSRC.rglob("*_c*.c*")):
        text = path.read_text()
        for op, function in _REGISTERED.findall(text):
            if op in OPS:
                found.append((path.name, op, parameters(text, function)))
    return found


def parameters(text: str, function: str) -> list[str]:
    """The names of a function's parameters; an unused one stands in a comment."""
    definition = re.search(rf"\b{function}\(([^()]*)\) {{", text)
    assert definition is not None, function
    names = [_NAME.search(part.strip()) for part in definition[1].split(",")]
    return [name[1] for name in names if name is not None]


SIGNATURES = signatures()


def test_every_op_that_is_not_made_in_python_is_registered() -> None:
    compiled = {op for _, op, _ in SIGNATURES}
    assert compiled == {name for name, op in OPS.items() if op.composed is None}


@pytest.mark.parametrize(
    ("op", "names"),
    [(op, names) for _, op, names in SIGNATURES],
    ids=[f"{file}-{op}" for file, op, _ in SIGNATURES],
)
def test_parameters_are_the_fields_of_the_record(op: str, names: list[str]) -> None:
    assert names == field_names(OPS[op].record)


def test_a_swapped_parameter_is_found() -> None:
    text = "Tensor f(const Tensor& a, int64_t /*b*/) {"
    assert parameters(text, "f") == ["a", "b"]
    assert parameters(text.replace("& a", "& b").replace("*b", "*a"), "f") == ["b", "a"]
