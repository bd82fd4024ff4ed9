"""Hazards between the threads of a program, found in its PTX.

Triton orders nothing in global memory between threads of a program, and each of them holds a copy
of a number or of a small tile: all load it, one stores it. Where nothing comes between, a thread
that is late loads what was stored. If it then takes another branch than the rest, and threads meet
at a barrier under that branch, the program hangs. No interpreter of one thread can show that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from resformer_kernels.cli.compile.ptx import Block, Instruction, Place, accesses, blocks_of

_ADDRESS = re.compile(r"\[\s*(%\w+)")
_POINTER_PARAMETER = re.compile(r"\.param \.u64 \.ptr .*?(\w+_param_\d+)")


def divergent_barriers(ptx: str) -> list[str]:
    """Barriers that threads may miss, one sentence for each load that decides over one.

    A load of global memory is named if a branch under which threads meet depends on it, other than
    through shared memory, which gives all threads one value, and if the program stores to the same
    tensor before or after it with no barrier between. Tensors are told apart by the kernel's
    parameters, elements of one tensor are not.
    """
    blocks = blocks_of(ptx)
    instructions = [each for block in blocks for each in block.instructions]
    defined: dict[str, list[Instruction]] = {}
    for each in instructions:
        for register in each.written:
            defined.setdefault(register, []).append(each)
    pointers = set(_POINTER_PARAMETER.findall(ptx))
    guarded = set(_guards_of_barriers(blocks))
    stores = [
        (place, store, _roots(store, defined, pointers))
        for place, store in accesses(blocks, "st.global")
    ]
    found: dict[str, None] = {}
    for place, load in accesses(blocks, "ld.global"):
        roots = _roots(load, defined, pointers)
        if not roots or not guarded & _tainted(load, instructions):
            continue
        for other, store, stored in stores:
            if roots & stored and (
                _leads_without_barrier(blocks, place, other)
                or _leads_without_barrier(blocks, other, place)
            ):
                found[
                    f"what {load.source} loads decides over a barrier, and {store.source} stores "
                    "to the same tensor with no barrier between: threads may part"
                ] = None
    return list(found)


def _roots(
    access: Instruction, defined: dict[str, list[Instruction]], pointers: set[str]
) -> set[str]:
    """The parameters that an access's address may come from."""
    address = _ADDRESS.search(access.text)
    waiting, seen, found = [address[1]] if address else [], set(), set()
    while waiting:
        register = waiting.pop()
        if register in seen:
            continue
        seen.add(register)
        for each in defined.get(register, ()):
            if each.opcode.startswith("ld.param"):
                found |= {name for name in pointers if f"{name}]" in each.text}
            elif not each.opcode.startswith(("ld", "atom")):
                # A pointer has 64 bits; what is narrower is an offset.
                waiting += [x for x in each.read if x.startswith("%rd")]
    return found


def _tainted(load: Instruction, instructions: list[Instruction]) -> set[str]:
    """Registers that depend on what a load gave this thread."""
    found = set(load.written)
    grew = True
    while grew:
        grew = False
        for each in instructions:
            memory = each.opcode.startswith(("ld.", "atom"))
            if not memory and found & set(each.read) and not set(each.written) <= found:
                found |= set(each.written)
                grew = True
    return found


def _guards_of_barriers(blocks: list[Block]) -> Iterator[str]:
    """The predicates of branches of which one side has a barrier and the other need not."""
    every = set(range(len(blocks)))
    # Post-dominators: blocks through which all paths to the end lead.
    after = [every if block.after else {number} for number, block in enumerate(blocks)]
    changed = True
    while changed:
        changed = False
        for number in reversed(range(len(blocks))):
            block = blocks[number]
            if block.after:
                new = set.intersection(*(after[x] for x in block.after)) | {number}
                changed |= new != after[number]
                after[number] = new
    for number, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if last is None or last.guard is None or not last.opcode.startswith("bra"):
            continue
        inside = _reachable(blocks, block.after, after[number] - {number})
        if any(each.is_barrier for x in inside for each in blocks[x].instructions):
            yield last.guard


def _reachable(blocks: list[Block], starts: list[int], stops: set[int]) -> set[int]:
    """The blocks that may follow, up to `stops`."""
    waiting, seen = list(starts), set[int]()
    while waiting:
        number = waiting.pop()
        if number not in seen and number not in stops:
            seen.add(number)
            waiting += blocks[number].after
    return seen


def _leads_without_barrier(blocks: list[Block], start: Place, goal: Place) -> bool:
    """Whether a path without a barrier leads from one instruction to another."""
    waiting, seen = [(start[0], start[1] + 1)], set()
    while waiting:
        number, first = waiting.pop()
        rest = blocks[number].instructions[first:]
        stop = next((i for i, each in enumerate(rest) if each.is_barrier), len(rest))
        if number == goal[0] and first <= goal[1] < first + stop:
            return True
        if stop == len(rest):
            new = [(x, 0) for x in blocks[number].after if x not in seen]
            seen |= {x for x, _ in new}
            waiting += new
    return False
