"""How far ahead of its use a tile is loaded through a tensor descriptor."""

from __future__ import annotations

import heapq
import re
from typing import NamedTuple

from resformer_kernels.cli.compile.addresses import Addresses, Range
from resformer_kernels.cli.compile.ptx import Block, Instruction, Place, accesses, blocks_of

_BRACKETED = re.compile(r"\[\s*(%?\w+)(?:\s*\+\s*(-?\d+))?")


class Distance(NamedTuple):
    """What a program runs between a tile's load and the wait for it."""

    products: int
    """Matrix products of whole tiles, as they are committed: on sm_100 by one warp alone, so that
    the shortest path has none."""
    instructions: int
    """Instructions of PTX that a thread runs."""


def nearest_load(ptx: str) -> Distance | None:
    """The shortest distance of the loads inside loops; None where no loop loads by descriptor.

    Loads before a loop fill the first slots and are waited for at once, whatever the number of
    stages. A load and a wait belong together where they name one barrier in shared memory.
    """
    blocks = blocks_of(ptx)
    addresses = Addresses(blocks, ptx)
    waits = {
        place: _barrier(addresses, place, each)
        for place, each in accesses(blocks, "mbarrier.try_wait")
    }
    found = [
        distance
        for place, each in accesses(blocks, "cp.async.bulk.tensor")
        if each.loads_by_descriptor and _reaches(blocks, place[0])
        if (distance := _nearest(blocks, place, _barrier(addresses, place, each), waits))
    ]
    return min(found, default=None)


def _barrier(addresses: Addresses, place: Place, each: Instruction) -> Range:
    """The shared memory of an instruction's barrier: the last address of a load, a wait's only."""
    register, offset = _BRACKETED.findall(each.text)[-1]
    start = addresses.of(place, register)
    return Range(start.low + int(offset or 0), start.high + int(offset or 0) + 7)


def _reaches(blocks: list[Block], number: int) -> bool:
    """Whether a block is part of a loop."""
    waiting, seen = list(blocks[number].after), set[int]()
    while waiting:
        each = waiting.pop()
        if each == number:
            return True
        if each not in seen:
            seen.add(each)
            waiting += blocks[each].after
    return False


def _nearest(
    blocks: list[Block], start: Place, barrier: Range, waits: dict[Place, Range]
) -> Distance | None:
    """The distance along the shortest path to the wait for a load that `barrier` tells of.

    In a ring of barriers the ones between are waited for first: all but the one that was freed.
    """
    slots = (barrier.high - barrier.low + 1) // 8 if barrier.bounded else 1
    waiting = [(0, 0, max(1, slots - 1), start[0], start[1] + 1)]
    seen = set[tuple[int, int]]()
    while waiting:
        instructions, products, left, number, first = heapq.heappop(waiting)
        block = blocks[number].instructions
        for at in range(first, len(block)):
            left -= barrier.overlaps(waits.get((number, at), Range(1, 0)))
            if not left:
                return Distance(products, instructions)
            instructions += 1
            products += block[at].opcode.startswith(("wgmma.commit_group", "tcgen05.commit"))
        for after in blocks[number].after:
            # A wait is a loop of its own, which is left when the barrier's phase ends.
            if after != number and (after, left) not in seen:
                seen.add((after, left))
                heapq.heappush(waiting, (instructions, products, left, after, 0))
    return None
