"""What the executor has to find, it finds: kernels of this package that are broken on purpose.

`--seeds N` runs the true kernels under N schedules, which must all be clean.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from resformer_kernels._triton import available
from tests.gpu_on_cpu.edits import At, Change, change, drop, drop_all, edited, move
from tests.gpu_on_cpu.mutants import MUTANTS, Mutant, Result, caught
from tests.gpu_on_cpu.snippets import SCHEDULES
from tests.gpu_on_cpu.subjects import SUBJECTS, Subject
from tests.gpu_on_cpu.worker import ROOT

needs_triton = pytest.mark.skipif(
    available.version_reason() is not None, reason=str(available.version_reason())
)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> list[Result]:
    """Of all subjects and mutants, from a process that may compile."""
    true_seeds = max(request.config.getoption("seeds"), len(SCHEDULES))
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu_on_cpu.mutants", "--json"]
    command += ["--true-seeds", str(true_seeds)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [Result(**json.loads(line)) for line in done.stdout.splitlines()]


def needs(subject: Subject) -> None:
    """Skips where its compiler is not here."""
    if not subject.is_here:
        pytest.skip("needs nvcc")


@needs_triton
@pytest.mark.parametrize("name", [name for name, x in SUBJECTS.items() if x.is_true])
def test_true_kernels_are_clean(name: str, results: list[Result]) -> None:
    needs(SUBJECTS[name])
    found = [x for x in results if x.subject == name and not x.mutant]
    assert len(found) >= len(SCHEDULES)
    assert not [x for x in found if x.fault]
    if pipeline := SUBJECTS[name].pipeline:
        assert {x.iterations >= pipeline.stages + 2 for x in found} == {True}


@needs_triton
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda x: x.name)
def test_broken_kernels_are_caught(mutant: Mutant, results: list[Result]) -> None:
    needs(SUBJECTS[mutant.subject])
    found = [x for x in results if x.mutant == mutant.name]
    assert len(found) == len(SCHEDULES)
    missed = [x.fault or "no fault" for x in found if not caught(x, mutant)]
    assert not missed, "\n".join(missed)


def test_a_fault_counts_by_its_kind_kernel_and_instruction() -> None:
    mutant = next(x for x in MUTANTS if x.kinds == "misaligned")
    words = "{}: address 4 is no multiple of 16\n  kernel {}\n  by block 0, `{}`"
    load = "@%p2 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1]"
    for kind, kernel, instruction, right in (
        ("misaligned", "forward_kernel", load, True),
        ("bounds", "forward_kernel", load, False),
        ("misaligned", "mix_kernel", load, False),
        ("misaligned", "forward_kernel", "st.shared.v4.b32 [%r1], %r2", False),
    ):
        fault = words.format(kind, kernel, instruction)
        assert caught(Result(mutant.name, mutant.subject, 0, fault), mutant) == right, fault
    assert not caught(Result(mutant.name, mutant.subject, 0, ""), mutant)


PTX = """\
.file 1 "nowhere.py"
.visible .entry other(
)
{
bar.sync 0;
ret;
}
.visible .entry kernel(
)
{
bar.sync 0;
$L__BB1_1:
st.shared.b32 [%r1], %r2;
bar.sync 1;
@%p1 bra $L__BB1_1;
bar.sync 2;
ret;
}
"""
STORE = At(r"st\.shared")


@pytest.mark.parametrize(
    ("done", "left"),
    [
        (drop(At("bar")), "1 2"),
        (drop(At("bar", last=True)), "0 1"),
        (drop(At("bar", number=1)), "0 2"),
        (drop(At("bar", after=STORE)), "0 2"),
        (drop(At("bar", before=STORE, last=True)), "1 2"),
        (drop(At("bar", loop=r"st\.shared")), "0 2"),
        (drop_all("bar", STORE, At("ret")), "0"),
        (change(STORE.next("bar"), "sync", r"arrive"), "0 2"),
        (move(At("bar", last=True), before=STORE), "0 2 1"),
        (move(At("bar"), before=At("ret")), "1 2 0"),
    ],
)
def test_a_change_finds_its_place(done: Change, left: str) -> None:
    text = edited(PTX, "kernel", done)
    head, kernel = text.split(".entry kernel")
    assert ".entry other(\n)\n{\nbar.sync 0;" in head
    assert re.findall(r"bar\.sync (\d)", kernel) == left.split()


@pytest.mark.parametrize(
    "done",
    [
        drop(At("wgmma")),
        drop(At("bar", number=3)),
        drop(At("bar", loop="wgmma")),
        drop(At("bar", source="tl.load")),
        change(STORE, "global", "shared"),
        drop_all("wgmma", STORE, At("ret")),
    ],
)
def test_a_change_that_finds_nothing_is_an_error(done: Change) -> None:
    with pytest.raises(LookupError):
        edited(PTX, "kernel", done)
