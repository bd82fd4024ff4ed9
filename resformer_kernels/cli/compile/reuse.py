"""Shared memory that is written while another warp group may still multiply with it.

A `wgmma` reads shared memory on its own, and a wait for it holds for the warp group that waits.
Where a program has several, one is past its wait while the other's products still run: only a
barrier after the wait tells it that both are done. A compiler that takes the wait for a barrier
leaves it out, as Triton before 3.9 does (triton-lang/triton issue 11047).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from resformer_kernels.cli.compile.addresses import Addresses, Range, hull
from resformer_kernels.cli.compile.ptx import (
    Block,
    Instruction,
    Place,
    accesses,
    blocks_of,
    threads_of,
)

WARP_GROUP = 128
"""Threads that run one `wgmma` together."""
_WRITES = (
    "st.shared",
    "stmatrix",
    "atom.shared",
    "cp.async.ca.shared",
    "cp.async.cg.shared",
    "cp.async.bulk.",
    "mbarrier.init",
    "mbarrier.inval",
)
_ADDRESS = re.compile(r"\[\s*(%\w+|\w+)(?:\s*\+\s*(-?\d+))?")
_COLUMNS = re.compile(r"m64n(\d+)k")
_WIDTH = re.compile(r"\.(?:v(\d))?\.?[bufs](\d+)$")
_MOST_GROUPS = 8
"""Groups of products that are counted; a wait that leaves more in flight does not occur."""


class Access(NamedTuple):
    """Shared memory that an instruction reads or writes."""

    place: Place
    instruction: Instruction
    memory: Range
    in_ring: bool
    """Whether the address moves from one iteration of a loop to the next."""


def early_writes(ptx: str) -> list[str]:
    """Writes to shared memory that a product may still read, one sentence for each.

    In one iteration of a loop the slots of a ring are taken to be different ones: that is how
    loops are pipelined. From one iteration to the next they may be the same.
    """
    if threads_of(ptx) <= WARP_GROUP or "wgmma.mma_async" not in ptx:
        return []
    blocks = blocks_of(ptx)
    addresses = Addresses(blocks, ptx)
    writes = {write.place: write for write in _writes(blocks, addresses)}
    found: dict[str, None] = {}
    for product in _products(blocks, addresses):
        for place, looped in _reached_after_wait(blocks, product.place, set(writes)):
            write = writes[place]
            other_slot = product.in_ring and write.in_ring and not looped
            if product.memory.overlaps(write.memory) and not other_slot:
                found[
                    f"{write.instruction.source} writes shared memory that the product of "
                    f"{product.instruction.source} may still read in another warp group: no "
                    "barrier follows its wait"
                ] = None
    return list(found)


def _writes(blocks: list[Block], addresses: Addresses) -> Iterator[Access]:
    for place, each in accesses(blocks, *_WRITES):
        address = _ADDRESS.search(each.text)
        stores = each.opcode.startswith("cp.async.bulk.") and not each.loads_by_descriptor
        if address is None or stores:
            continue
        start = addresses.of(place, address[1])
        offset = int(address[2] or 0)
        memory = Range(start.low + offset, start.high + offset + _written_bytes(each) - 1)
        yield Access(place, each, memory, addresses.varies(place, address[1]))


def _written_bytes(write: Instruction) -> int:
    """Bytes from the address on. A descriptor's box is not told: its first byte stands for it."""
    if write.loads_by_descriptor:
        return 1
    if write.opcode.startswith(("cp.async", "stmatrix")):
        return 16
    width = _WIDTH.search(write.opcode)
    return int(width[1] or 1) * int(width[2]) // 8 if width else 8


def _products(blocks: list[Block], addresses: Addresses) -> Iterator[Access]:
    for place, each in accesses(blocks, "wgmma.mma_async"):
        columns = _COLUMNS.search(each.opcode)
        if columns is None:
            raise ValueError(f"no shape in {each.opcode}")
        operands = each.operands
        flags = operands[-2:] if len(operands) > 6 else ["0", "0"]
        for operand, rows, flag in zip(operands[1:3], (64, int(columns[1])), flags, strict=True):
            if operand.startswith("%rd"):
                value = addresses.of(place, operand)
                memory = _matrix(value, rows, across=flag == "1")
                yield Access(place, each, memory, addresses.varies(place, operand))


def _matrix(descriptor: Range, rows: int, *, across: bool) -> Range:
    """Bytes of a matrix of 32 bytes a row, or with its rows `across`, as numbers of 16 bits may be.

    Fields of the descriptor, in units of 16 bytes: the start in bits 0 to 13, leading and stride
    offsets from bits 16 and 32; bits 62 and 63 are the swizzle's kind.
    """
    if not descriptor.bounded:
        return descriptor
    start, end = ((x & 0x3FFF) << 4 for x in descriptor[:2])
    leading, stride = (((descriptor.low >> bit) & 0x3FFF) << 4 for bit in (16, 32))
    swizzle = {0: 16, 1: 128, 2: 64, 3: 32}[(descriptor.low >> 62) & 3]
    if across:
        chunks = -(-rows * 2 // swizzle)
        size = (chunks - 1) * leading + stride + 8 * swizzle
    else:
        # Rows take turns within the swizzle: slices of them start in the same bytes.
        start, end = start // swizzle * swizzle, end // swizzle * swizzle
        size = (rows // 8 - 1) * stride + 8 * swizzle
    return hull([Range(start, start + size - 1), Range(end, end + size - 1)])


def _reached_after_wait(
    blocks: list[Block], start: Place, writes: set[Place]
) -> Iterator[tuple[Place, bool]]:
    """Writes that come after the wait for the product at `start` with no barrier between.

    With each, whether a loop's next iteration was entered on the way.
    """
    # (block, instruction, groups committed since, whether looped, whether waited for)
    waiting = [(*start, -1, False, False)]
    seen = set(waiting)
    while waiting:
        number, index, groups, looped, waited = waiting.pop()
        stopped = False
        instructions = blocks[number].instructions
        for at in range(index, len(instructions)):
            each = instructions[at]
            if each.opcode.startswith("wgmma.commit_group"):
                groups = min(groups + 1, _MOST_GROUPS)
            elif each.opcode.startswith("wgmma.wait_group"):
                waited |= groups >= int(each.operands[0])
            elif waited and each.is_barrier:
                stopped = True
                break
            elif waited and (number, at) in writes:
                yield (number, at), looped
        if not stopped:
            for after in blocks[number].after:
                state = (after, 0, groups, looped or after <= number, waited)
                if state not in seen:
                    seen.add(state)
                    waiting.append(state)
