"""Kernels of this package, broken on purpose in ways that only a GPU shows.

Each mutant is a change of a kernel's PTX, and what the executor has to say of it: the kind of fault
and an instruction. `python -m tests.gpu_on_cpu.mutants [--seeds N]` prints what it said, and under
how many schedules; the true kernels must be clean under the same ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.gpu_on_cpu.edits import At, Change, change, drop, drop_all, edited, move
from tests.gpu_on_cpu.executor import POLICIES, WHEN, Schedule
from tests.gpu_on_cpu.snippets import SCHEDULES
from tests.gpu_on_cpu.subjects import SUBJECTS, faults


@dataclass(frozen=True)
class Mutant:
    """A broken kernel."""

    name: str
    subject: str
    """One of SUBJECTS."""
    kinds: str
    """Kinds of fault that are right, as a pattern."""
    said: str
    """Pattern of what the fault names: its instruction, the other one, or one where a warp
    stands."""
    changes: tuple[Change, ...]

    def edit(self, ptx: str) -> str:
        """The module with its kernel broken."""
        return edited(ptx, SUBJECTS[self.subject].kernel, *self.changes)


_BAR, _MMA, _COPY = r"bar\.sync", r"wgmma\.mma_async", r"cp\.async\.cg"
_A80, _A90, _STEPS, _CHUNKS, _SCAN = (
    "attention 80",
    "attention 90",
    "steps 90",
    "chunks 80",
    "scan 90",
)
_WAIT = At(r"cp\.async\.wait_group", loop=r"mma\.sync")
_TRY = At(r"mbarrier\.try_wait", loop=_MMA)
_EXPECT = At(r"mbarrier\.arrive\.expect_tx", loop=_MMA)
_OUT = At(r"st\.shared\.v4", last=True)
_ARRIVE = At(r"atom\.global\.gpu\.release\.add")
_SEE = r"ld\.global\.gpu\.acquire"
_STALE = r"`(@%p\d+ )?(ld\.global|cp\.async)(.|\n)*`(@%p\d+ )?st\.global"
_LAST_TRY = At(r"mbarrier\.try_wait", last=True)
_GUARD = r"@%p\d+ "

MUTANTS = (
    # Barriers of the block.
    Mutant(
        "no barrier between shared stores and loads",
        *(_A80, "race|unwritten", r"`(ldmatrix|ld\.shared)"),
        (drop(At(_BAR, after=_OUT)),),
    ),
    Mutant(
        "no barrier after a wait for copies",
        *(_A80, "race|unwritten", "`ldmatrix"),
        (drop(At(_BAR, after=_WAIT)),),
    ),
    Mutant(
        "no barrier before a copy over a tile",
        *(_A80, "race", f"`{_COPY}"),
        (drop(At(_BAR, after=At(r"mma\.sync", loop=r"mma\.sync", last=True))),),
    ),
    Mutant(
        "a barrier for odd lanes",
        *(_A80, "barrier", "`@odd bar.sync"),
        (
            change(
                At(_BAR),
                r"bar\.sync\s+0;",
                "{ .reg .pred odd; .reg .b32 lane; mov.u32 lane, %laneid; and.b32 lane, lane, 1;\n"
                "setp.ne.b32 odd, lane, 0; @odd bar.sync 0; }",
            ),
        ),
    ),
    # Asynchronous copies and their mbarriers.
    Mutant(
        "a wait that leaves one group too many",
        *(_A80, "race|unwritten", "`ldmatrix"),
        (change(_WAIT, "2;", "3;"),),
    ),
    Mutant(
        "a wait for the wrong parity",
        *(_A90, "race|unwritten|deadlock", rf"`({_MMA}|mbarrier\.try_wait)"),
        (
            change(
                _TRY,
                r"(.*), (%r\d+);",
                r"{ .reg .b32 wrong; xor.b32 wrong, \2, 1; \1, wrong; }",
            ),
        ),
    ),
    Mutant(
        "an mbarrier of two arrivals",
        *(_A90, "deadlock", r"`mbarrier\.try_wait"),
        (change(At(r"mbarrier\.init"), ", 1;", ", 2;"),),
    ),
    Mutant(
        "16 bytes too many expected",
        *(_A90, "deadlock", r"`mbarrier\.try_wait"),
        (change(_EXPECT, "16384", "16400"),),
    ),
    Mutant(
        "16 bytes too few expected",
        *(_A90, "deadlock|barrier", r"`mbarrier\.try_wait|cp\.async\.bulk"),
        (change(_EXPECT, "16384", "16368"),),
    ),
    Mutant(
        "bytes expected by all threads",
        *(_A90, "barrier", r"`mbarrier\.arrive\.expect_tx"),
        (change(_EXPECT, _GUARD, ""),),
    ),
    Mutant(
        "an mbarrier that ends while others look at it",
        *(_A90, "race|barrier", r"`@%p\d+ mbarrier\.inval|`mbarrier\.try_wait"),
        (drop_all(_BAR, _LAST_TRY, At(r"mbarrier\.inval", last=True)),),
    ),
    Mutant(
        "an mbarrier used before all know of it",
        *(_A90, "race|barrier", r"`mbarrier\.try_wait"),
        (
            # The barrier that the queries need as well.
            move(At(_BAR, after=At(r"mbarrier\.init")), before=At(r"mbarrier\.init")),
            drop_all(_BAR, At(r"mbarrier\.init"), _TRY),
        ),
    ),
    # Products of warpgroups.
    Mutant(
        "no fence before the async proxy reads",
        *(_A90, "proxy", f"`{_MMA}"),
        (drop(At(r"fence\.proxy\.async")),),
    ),
    Mutant(
        "sums read while in flight",
        *(_A90, "in_flight", r"`max\.f32(.|\n)*`" + _MMA),
        (change(At(r"wgmma\.wait_group", loop=_MMA), "0;", "1;"),),
    ),
    Mutant(
        "no fence before sums are taken",
        *(_A90, "in_flight", f"`{_MMA}"),
        (drop(At(r"wgmma\.fence", loop=_MMA, number=1)),),
    ),
    Mutant(
        "a descriptor of another swizzle",
        *(_A90, "malformed", f"`{_MMA}"),
        (
            change(
                At(r"or\.b64", last=True, before=At(_MMA)),
                r"(or\.b64\s+)(%rd\d+)(.*)",
                r"\1\2\3\nxor.b64 \2, \2, 0xc000000000000000;",
            ),
        ),
    ),
    # Bounds and alignment.
    Mutant(
        "a load without its mask",
        *(_A80, "bounds", r"`ld\.global\.v4"),
        (change(At(r"ld\.global\.v4", last=True, before=At(r"st\.shared")), _GUARD, ""),),
    ),
    Mutant(
        "a store without its mask",
        *(_A80, "bounds", r"`st\.global\.v4"),
        (change(At(r"st\.global\.v4", last=True), _GUARD, ""),),
    ),
    Mutant(
        "a vector four bytes on",
        *(_A80, "misaligned", r"`@%p\d+ ld\.global\.v4"),
        (change(At(r"ld\.global\.v4"), r"\+ 0", "+ 4"),),
    ),
    # Blocks that wait for one another.
    Mutant(
        "an arrival that releases nothing",
        *(_STEPS, "race", _STALE),
        (change(_ARRIVE, "release", "relaxed"),),
    ),
    Mutant(
        "arrivals seen without an acquire",
        *(_STEPS, "race", _STALE),
        (change(At(_SEE), "acquire", "relaxed"), change(At(_SEE), "acquire", "relaxed")),
    ),
    Mutant(
        "an arrival before the other warps' stores",
        *(_STEPS, "race", _STALE),
        (move(At(_BAR, last=True, before=_ARRIVE), before=At(_SEE)),),
    ),
    Mutant(
        "an arrival for its block alone",
        *(_STEPS, "race", r"`@%p\d+ atom\.global\.cta\.release"),
        (change(_ARRIVE, "gpu", "cta"),),
    ),
    Mutant(
        "a state for its block alone",
        *("cuda 90", "race", r"`(ld|st)\.relaxed\.(gpu|cta)"),
        (change(At(r"st\.relaxed\.gpu"), "gpu", "cta"),),
    ),
    Mutant(
        "a state told in two halves",
        *(_SCAN, "race", r"`@%p\d+ ld\.volatile|exch\.b32"),
        (
            change(
                At(r"atom\.global\.gpu\.relaxed\.exch\.b64", last=True),
                r"(@\S+ \S+)\.b64 %\w+, \[ (%\w+) \+ 0 \], (%\w+);",
                r"{ .reg .b32 low, high, old; mov.b64 {low, high}, \3;"
                "\n"
                r"\1.b32 old, [ \2 + 4 ], high;"
                "\n"
                r"\1.b32 old, [ \2 + 0 ], low; }",
            ),
        ),
    ),
    Mutant(
        "a wait for blocks that have no room",
        *("scan 90, one multiprocessor", "deadlock", r"blocks wait for room(.|\n)*ld\.volatile"),
        (
            change(
                At(r"atom\.global\.gpu\.relaxed\.add"),
                r"(@\S+) \S+ (%\w+), .*",
                r"{ .reg .b32 last, own; mov.u32 last, %nctaid.x; mov.u32 own, %ctaid.x;"
                "\n"
                r"sub.u32 last, last, own; sub.u32 last, last, 1; \1 cvt.u64.u32 \2, last; }",
            ),
        ),
    ),
    Mutant(
        "a cooperative grid of a block too many", "cuda 90, one more", "limits", "cooperative", ()
    ),
    # Found in this package once.
    Mutant(
        "a number loaded after one thread may have stored it",
        *(_CHUNKS, "race", r"`ld\.global\.cg(.|\n)*sweeps\.py"),
        (
            move(
                At(r"ld\.global", source=r"before = tl\.load\(sweeps\.before"),
                before=At(r"mul\.f32", source=r"nearer = largest"),
            ),
        ),
    ),
    Mutant(
        "an account changed while other warps read it",
        *(_CHUNKS, "race", r"`(@%p\d+ )?(ld|st)\.global(.|\n)*sweeps\.py"),
        (
            drop_all(
                _BAR,
                At(r"ld\.global", source=r"ended = tl\.load\(own"),
                At(r"st\.global", source=r"tl\.store\(own, tl\.full"),
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Result:
    """What came of a mutant, or of a true kernel, under one schedule."""

    mutant: str
    """"" for the true kernel."""
    subject: str
    schedule: int
    fault: str
    """Words of the fault; "" where there was none."""
    iterations: float = 0
    """Of the pipelined loop, in a run that ended well."""

    @property
    def kind(self) -> str:
        """Kind of the fault."""
        return self.fault.partition(":")[0]


def caught(result: Result, mutant: Mutant) -> bool:
    """Whether the fault is of a right kind and names the instruction."""
    kernel = SUBJECTS[mutant.subject].kernel
    return bool(
        re.fullmatch(mutant.kinds, result.kind)
        and re.search(rf"\n  kernel \w*{kernel}", result.fault)
        and re.search(mutant.said, result.fault)
    )


_OPCODE = re.compile(r"  by .*?`(?:@\S+\s+)?([\w.:]+)")


def schedule_of(number: int) -> Schedule:
    """All policies, and asynchronous work at all times, among the first ones."""
    if number < len(SCHEDULES):
        return SCHEDULES[number]
    return Schedule(POLICIES[number % len(POLICIES)], WHEN[number % len(WHEN)], number)


def results(true_seeds: int, seeds: int, pattern: str = "") -> Iterator[Result]:
    """All true kernels, then all mutants, if they can be compiled, under so many schedules each."""
    mutants = [x for x in MUTANTS if re.search(pattern, x.name) and SUBJECTS[x.subject].is_here]
    for name in dict.fromkeys(x.subject for x in mutants):
        subject = SUBJECTS[name]
        if subject.is_true:
            for number in range(true_seeds):
                with faults() as found:
                    executed = subject.run(schedule_of(number))
                yield Result("", name, number, "".join(found), subject.iterations(executed))
    for mutant in mutants:
        for number in range(seeds):
            with faults() as found:
                SUBJECTS[mutant.subject].run(schedule_of(number), mutant.edit)
            yield Result(mutant.name, mutant.subject, number, "".join(found))


def main() -> int:
    """Print a table, or every result as JSON; 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_on_cpu.mutants", description=__doc__)
    parser.add_argument("--seeds", type=int, default=len(SCHEDULES), help="schedules of each")
    parser.add_argument("--true-seeds", type=int, help="schedules of the true kernels")
    parser.add_argument("--mutant", default="", help="those whose names match")
    parser.add_argument("--json", action="store_true", help="a line for each result")
    given = parser.parse_args()
    # Triton looks at it once, when it is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    found = []
    for result in results(given.true_seeds or given.seeds, given.seeds, given.mutant):
        found.append(result)
        if given.json:
            sys.stdout.write(json.dumps(dataclasses.asdict(result)) + "\n")
            sys.stdout.flush()
    return 0 if given.json else table(found)


def table(found: list[Result]) -> int:
    """Print what was caught; returns 1 where something was not."""
    wrong = [x for x in found if not x.mutant and x.fault]
    for name in dict.fromkeys(x.subject for x in found if not x.mutant):
        of = [x for x in found if not x.mutant and x.subject == name]
        clean = sum(not x.fault for x in of)
        sys.stdout.write(f"{name}, as it is: clean under {clean} of {len(of)} schedules\n")
    for mutant in MUTANTS:
        of = [x for x in found if x.mutant == mutant.name]
        right = [x for x in of if caught(x, mutant)]
        wrong += [x for x in of if x not in right]
        kinds = "/".join(sorted({x.kind for x in right}))
        named = dict.fromkeys(name for x in right for name in _OPCODE.findall(x.fault)[:1])
        columns = (
            mutant.name,
            mutant.subject,
            kinds,
            "/".join(named),
            f"{len(right)} of {len(of)}",
        )
        sys.stdout.write(" | ".join(columns) + "\n" if of else "")
    for result in wrong:
        sys.stdout.write(f"\n{result.mutant or result.subject}, {schedule_of(result.schedule)}:\n")
        sys.stdout.write(f"{result.fault or 'no fault'}\n")
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
