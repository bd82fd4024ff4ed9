"""A kernel's PTX as blocks of instructions, each with the line of the source that it comes from."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

_REGISTER = re.compile(r"%\w+(?:\.[xyz])?")
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[(?:\{[^}]*\}|[^\]])*\]|[^,;{\[])+")
_BULK_LOAD = re.compile(r"cp\.async\.bulk\.tensor\.\w+\.shared::\w+\.global")
_THREADS = re.compile(r"\.(?:reqntid|maxntid) (\d+)")
_BARRIERS = ("bar.sync", "barrier.sync", "barrier.cta.sync")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.MULTILINE)
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_LABEL = re.compile(r"(\$?\w+):$")

Place = tuple[int, int]
"""A block's number, and an instruction's in it."""


@dataclass
class Instruction:
    """One instruction of PTX, with the line of the source that it comes from."""

    opcode: str
    text: str
    source: str
    guard: str | None
    written: tuple[str, ...]
    read: tuple[str, ...]

    @property
    def operands(self) -> list[str]:
        """What stands between commas, results included; braces and brackets hold together."""
        return [x.strip() for x in _OPERAND.findall(self.text.partition(self.opcode)[2])]

    @property
    def loads_by_descriptor(self) -> bool:
        """Whether a tile of global memory is copied to shared memory."""
        return _BULK_LOAD.match(self.opcode) is not None

    @property
    def is_barrier(self) -> bool:
        """Whether all threads of the program meet here."""
        return self.opcode.startswith(_BARRIERS)


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


def threads_of(ptx: str) -> int:
    """Threads of a program; ValueError where the kernel does not tell."""
    threads = _THREADS.search(ptx)
    if threads is None:
        raise ValueError("the PTX has neither .reqntid nor .maxntid")
    return int(threads[1])


@functools.lru_cache(maxsize=1)
def blocks_of(ptx: str) -> list[Block]:
    """The blocks of the only kernel in `ptx`."""
    files = {number: PurePath(path).name for number, path in _FILE.findall(ptx)}
    labels: dict[str, list[int]] = {}
    blocks = [Block()]
    jumps: list[tuple[int, str]] = []
    source, open_ended = "an unknown line", True

    def start() -> None:
        nonlocal open_ended
        blocks.append(Block())
        if open_ended:
            blocks[-2].after.append(len(blocks) - 1)
        open_ended = True

    for raw in ptx[ptx.index("{\n") :].splitlines():
        line = raw.split("//")[0].strip()
        if location := _LOCATION.match(line):
            source = f"{files.get(location[1], '?')}:{location[2]}"
        elif label := _LABEL.match(line):
            start()
            labels.setdefault(label[1], []).append(len(blocks) - 1)
        elif line.endswith(";") and not line.startswith("."):
            each = _instruction(line, source)
            blocks[-1].instructions.append(each)
            if each.opcode.startswith("bra"):
                jumps.append((len(blocks) - 1, each.text.split()[-1].rstrip(";")))
                open_ended = each.guard is not None
                start()
            elif each.opcode == "ret":
                open_ended = each.guard is not None
                start()
    for block, target in jumps:
        # Loops of inline assembly repeat their labels, each in a scope of its own.
        before = [place for place in labels[target] if place <= block]
        blocks[block].after.append(before[-1] if before else labels[target][0])
    return blocks


def _instruction(line: str, source: str) -> Instruction:
    guard = None
    if line.startswith("@"):
        guard, line = line.split(None, 1)
        guard = guard.lstrip("@!")
    opcode, operands = (*line.rstrip(";").split(None, 1), "")[:2]
    registers = tuple(_REGISTER.findall(operands))
    result = re.match(r"\s*(?:\{[^}]*\}|[^,;\[]*)", operands)
    no_result = opcode.startswith(("st.", "bra", "bar", "red", "ret")) or result is None
    written = () if no_result or result is None else tuple(_REGISTER.findall(result[0]))
    read = registers[len(written) :] + (() if guard is None else (guard,))
    return Instruction(opcode, line, source, guard, written, read)


def accesses(blocks: list[Block], *opcodes: str) -> Iterator[tuple[Place, Instruction]]:
    """Instructions whose opcode begins with one of `opcodes`, and where they are."""
    for number, block in enumerate(blocks):
        for index, each in enumerate(block.instructions):
            if each.opcode.startswith(opcodes):
                yield (number, index), each
