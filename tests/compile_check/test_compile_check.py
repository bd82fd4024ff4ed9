"""`resformer-kernels compile-check`, on kernels with one thing wrong each and on the package's own.

It runs in processes of its own: this one may have loaded Triton as an interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resformer_kernels._triton import available, faults
from resformer_kernels._triton.arch import label
from resformer_kernels.cli import compile_check, main
from resformer_kernels.cli.compile import check
from resformer_kernels.cli.compile.artifacts import Compiled
from tests.compile_check.triton.cases import OVERWRITES

SOURCE = Path(__file__).with_name("kernels.py").read_text().splitlines()

pytestmark = pytest.mark.skipif(
    available.version_reason() is not None, reason=str(available.version_reason())
)

ON_THE_TESTS_KERNELS = """
import sys
from resformer_kernels.cli.compile import check as _triton_check
from resformer_kernels.cli import main
if __name__ == "__main__":
    _triton_check.case_modules = lambda: ["tests.compile_check.triton.cases"]
    sys.exit(main(["compile-check", *sys.argv[1:]]))
"""


def run(program: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python program, without the interpreter of Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=540,
        env=environment,
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    """Output of the command for every case of `triton/cases.py`, by architecture and name."""
    program = tmp_path_factory.mktemp("compile_check") / "program.py"
    program.write_text(ON_THE_TESTS_KERNELS)
    chosen = [word for arch in ("80", "90", "100", "942") for word in ("--arch", arch)]
    done = run([str(program)], "--json", "--jobs", "1", *chosen)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 4 * 21 + 2 * 2
    return {(case["capability"], case["name"]): case for case in found}


@pytest.mark.parametrize(
    ("capability", "matrix"),
    [(80, ["mma.sync"]), (90, ["wgmma"]), (100, ["tcgen05"]), (942, ["mfma"])],
)
def test_a_good_kernel_passes_and_is_described(
    outcomes: dict[tuple[int, str], dict[str, Any]], capability: int, matrix: list[str]
) -> None:
    case = outcomes[capability, "good"]
    assert case["ok"]
    assert case["matrix"] == matrix
    assert case["op"] == "compile_check"
    assert case["threads"] == (256 if capability == 942 else 128)
    assert 32 < case["registers"] <= 255
    # A tile of each operand at least, as many as there are stages at most.
    assert 2 * 64 * 64 * 2 <= case["shared_bytes"] < 3 * 2 * 64 * 64 * 2 + 1024
    assert case["local_accesses"] == case["local_bytes"] == 0


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_what_is_wrong_is_named(
    outcomes: dict[tuple[int, str], dict[str, Any]], capability: int
) -> None:
    def problem(name: str) -> str:
        return "; ".join(outcomes[capability, name]["problems"])

    assert "bytes of local memory a thread" in problem("spills, main")
    assert problem("spills, not main") == ""
    spilling = outcomes[capability, "spills, not main"]
    assert spilling["local_accesses"] > 100
    assert spilling["local_bytes"] > 500
    assert "bytes of shared memory, over the limit of" in problem("too much shared memory")
    assert problem("small tile") == ("no wgmma" if capability == 90 else "")
    assert problem("float32") == ("no wgmma" if capability == 90 else "no matrix instruction")
    assert problem("refused by Triton").startswith("does not compile: ValueError(")
    if capability == 90:
        assert "serialises its wgmma instructions" in problem("serialised")
        assert "Insufficient registers" in problem("refused by the assembler")
    assert problem("kills its process") == "the compiler's process died"
    assert problem("aligned") == problem("unaligned") == ""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_forms_that_compilers_are_known_to_compile_wrongly_are_named(
    outcomes: dict[tuple[int, str], dict[str, Any]], capability: int
) -> None:
    def named(name: str) -> list[str]:
        problems = outcomes[capability, name]["problems"]
        return [x.issue for x in faults.FAULTS if any(x.issue in each for each in problems)]

    hopper, blackwell = faults.NARROW_ON_HOPPER.issue, faults.NARROW_ON_BLACKWELL.issue
    transposed = faults.TRANSPOSED_PRODUCT.issue
    assert named("transposed product") == ([transposed] if capability == 90 else [])
    assert named("narrow") == {80: [], 90: [hopper], 100: [blackwell]}[capability]
    assert named("narrow, one stage") == ([hopper] if capability == 90 else [])
    assert named("narrow, eight warps") == []


def test_loads_are_further_ahead_with_another_stage(
    outcomes: dict[tuple[int, str], dict[str, Any]],
) -> None:
    assert outcomes[90, "good"]["ahead"] is None
    for capability in (90, 100):
        two, three = (outcomes[capability, f"{stages} stages"] for stages in (2, 3))
        assert two["ok"]
        assert three["ok"]
        # (products, instructions); on sm_100 one warp issues the products, the others none.
        assert two["ahead"][0] == 0
        assert three["ahead"][0] == (1 if capability == 90 else 0)
        assert three["ahead"][1] > 4 * two["ahead"][1]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_threads_that_may_part_before_a_barrier_are_named(
    outcomes: dict[tuple[int, str], dict[str, Any]], capability: int
) -> None:
    for name, same, barrier, early in OVERWRITES:
        problems = outcomes[capability, name]["problems"]
        assert len(problems) == (same and not barrier), problems
        for problem in problems:
            found = re.fullmatch(
                r"what kernels.py:(\d+) loads decides over a barrier, and kernels.py:(\d+) stores "
                r"to the same tensor with no barrier between: threads may part",
                problem,
            )
            assert found is not None, problem
            load, store = (SOURCE[int(line) - 1].strip() for line in found.groups())
            assert load == "before = tl.load(best)"
            assert store == "tl.store(zeroed, 0.0)"
            assert (int(found[1]) > int(found[2])) == early


LAUNCHES = """
import torch
from tests.compile_check import kernels
from resformer_kernels._triton.cases import case_from_launch
from resformer_kernels._triton.launch import recorded_launches

x = torch.empty(4096 + 8 + 1, device="meta", dtype=torch.bfloat16)
cases = []
for source in (x[:4096], x[8:4104], x[1:4097], x[:4001], x[:1]):
    with recorded_launches() as launches:
        kernels.launch_copy(source)
    assert launches[0].grid == (-(-source.numel() // 1024),)
    cases.append(case_from_launch("copy", launches[0], capability=90, main=True))
aligned, offset, unaligned, odd, one = cases
divisible = [["tt.divisibility", 16]]
types = {"source": "*bf16", "target": "*bf16", "n": "i32", "BLOCK": "constexpr"}
assert aligned.signature == types and aligned.constants == {(3,): 1024}
assert aligned.attrs == {(0,): divisible, (1,): divisible}, aligned.attrs
assert unaligned.attrs == {(1,): divisible}, unaligned.attrs
# Numbers are worth no compilation of their own.
for other in (offset, odd, one):
    assert (other.signature, other.constants, other.attrs) == (types, {(3,): 1024}, aligned.attrs)
with recorded_launches() as launches:
    kernels.launch_matmul(64, 64, 64, num_warps=8, num_stages=2, maxnreg=128)
case = case_from_launch("matmul", launches[0], capability=90, expects_mma=True)
assert (case.num_warps, case.num_stages, dict(case.options)) == (8, 2, {"maxnreg": 128})
assert case.expects_mma and not case.main
# A launch that is not recorded still asks for a GPU.
try:
    kernels.launch_wrong()
except RuntimeError as error:
    assert "0 active drivers" in str(error), error
else:
    raise AssertionError("nothing was raised")
"""


def test_a_recorded_launch_is_specialised_as_a_launch_would_be() -> None:
    done = run(["-c", LAUNCHES])
    assert done.returncode == 0, done.stderr


def test_the_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["compile-check"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_usage_errors_exit_with_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["compile-check", "--op", "nope"]) == 2
    assert "no Triton kernels in ['nope']" in capsys.readouterr().err
    monkeypatch.setattr(check, "case_modules", list)
    assert main(["compile-check"]) == 2
    assert "no case matches" in capsys.readouterr().err


def test_markdown_has_a_column_for_each_architecture() -> None:
    def case(name: str, capability: int, **found: Any) -> Compiled:
        return Compiled("attention", name, capability, **found)

    good = {"registers": 168, "threads": 256, "shared_bytes": 96 * 1024, "main": True}
    text = compile_check.as_markdown(
        [
            case("forward", 80, **good, matrix=("mma.sync",)),
            case("forward", 90, **good, matrix=("wgmma",)),
            case("backward", 90, registers=255, threads=128, local_bytes=24, local_accesses=3),
            case("broken", 80, problems=("does not compile: why",)),
        ]
    )
    assert text.splitlines() == [
        "| kernel | sm_80 | sm_90 |",
        "| --- | --- | --- |",
        "| attention: forward (main) | 168 registers × 256, 96 KiB, mma.sync "
        "| 168 registers × 256, 96 KiB, wgmma |",
        "| attention: backward |  | 255 registers × 128, 24 B local |",
        "| attention: broken | does not compile: why |  |",
    ]


def test_brief_has_every_main_configuration_and_every_kernel() -> None:
    def job(name: str, capability: int, *, main: bool = False) -> check.Job:
        return check.Job("package.op.triton.cases", capability, 0, name, main)

    wanted = [
        job("forward, D64", 80),
        job("forward, D128", 80, main=True),
        job("forward, D256", 80, main=True),
        job("mask, D64", 80),
        job("mask, D128", 80),
        job("forward, D64", 90),
    ]
    kept = compile_check.brief(wanted)
    assert kept == [wanted[1], wanted[2], wanted[3], wanted[5]]


FEWER = {
    "attention": ("--filter", "D64 bfloat16 causal"),
    "kvcache": ("--filter", "D64 bfloat16"),
    "reservoir": ("--filter", "dense chunked float32"),
}
"""What is compiled for sm_120, whose tiles are its own for D64; the rest is compiled by hand."""


# Registers and wgmma are tightest on sm_90, where every configuration is compiled. sm_86 has the
# shared memory of sm_120, and kernels of mix and scan fit into any: they tell no more elsewhere
# than on sm_80. The rest would take minutes more: run `compile-check` by hand for that.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "arch"),
    [
        pytest.param(op, arch, id=f"{op}-{label(int(arch[0]))}")
        for op in (check.op_of(module) for module in check.case_modules())
        for arch in [
            ("90",),
            *((each, "--brief") for each in ("80", "100", "942")),
            ("120", "--brief", *FEWER.get(op, ())),
        ]
        if op not in ("mix", "scan") or arch[0] not in ("100", "120")
    ],
)
def test_the_packages_own_kernels(op: str, arch: tuple[str, ...]) -> None:
    arguments = ("--op", op, "--jobs", "1", "--arch", *arch)
    done = run(["-m", "resformer_kernels.cli", "compile-check"], *arguments)
    if op == "reservoir" and "942" in arch:
        # Triton's compiler for AMD does not take a choice between pointers.
        assert done.returncode == 2
        assert "no case matches" in done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
