"""Which shared memory an instruction of PTX may touch, as ranges of bytes.

Addresses are sums of constants, bits of the thread's number and slots of a ring. Each register is
bounded from the definitions that reach its use: bits by their masks, slots by the comparison that
wraps them around. What depends on anything else is unbounded.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

from resformer_kernels.cli.compile.ptx import Block, Instruction, Place, threads_of

_NUMBER = re.compile(r"-?(?:0x[0-9a-fA-F]+|\d+)")
_ROUNDS = 12
"""Rounds after which an end that still moves is taken for unbounded: rings have fewer slots."""
_INFINITY = 1 << 100


class Range(NamedTuple):
    """Integers from `low` to `high`, both included; empty where `low` is above `high`."""

    low: int
    high: int
    bits: int = -1
    """Bits that may be set, where `low` is not negative; -1 for any."""

    @property
    def bounded(self) -> bool:
        """Whether both ends are known."""
        return self.low > -_INFINITY and self.high < _INFINITY

    @property
    def number(self) -> int | None:
        """The only integer, where there is one."""
        return self.low if self.low == self.high else None

    def overlaps(self, other: Range) -> bool:
        """Whether the two share an integer, as far as their ends tell."""
        return self.low <= other.high and other.low <= self.high


ANY = Range(-_INFINITY, _INFINITY)
NONE = Range(_INFINITY, -_INFINITY, 0)
_Node = tuple[Place, str]
"""A register as one instruction defines it."""


def hull(ranges: list[Range]) -> Range:
    """The smallest range that holds all of `ranges`."""
    if not ranges:
        return NONE
    bits = functools.reduce(operator.or_, (x.bits for x in ranges))
    return Range(min(x.low for x in ranges), max(x.high for x in ranges), bits)


def exactly(number: int) -> Range:
    """One integer."""
    return Range(number, number, number if number >= 0 else -1)


def _tight(x: Range) -> Range:
    """The same integers, with ends within infinity, and each bound applied to the other."""
    low, high = max(x.low, -_INFINITY), min(x.high, _INFINITY)
    if low < 0:
        return Range(low, high)
    bits = x.bits if high == _INFINITY else x.bits & ((1 << high.bit_length()) - 1)
    return Range(low, high if bits < 0 else min(high, bits), bits)


def _plus(x: Range, y: Range) -> Range:
    apart = min(x.low, y.low) >= 0 and not x.bits & y.bits
    return Range(x.low + y.low, x.high + y.high, x.bits | y.bits if apart else -1)


def _product(x: Range, y: Range) -> Range:
    if not (x.bounded and y.bounded):
        return ANY
    corners = [a * b for a in x[:2] for b in y[:2]]
    return Range(min(corners), max(corners))


def _shifted_left(x: Range, count: Range) -> Range:
    by = count.number
    known = x.bounded and by is not None and 0 <= by < 64
    return Range(x.low << by, x.high << by, x.bits << by) if known and by is not None else ANY


def _shifted_right(x: Range, count: Range) -> Range:
    by = count.number
    known = x.bounded and by is not None and 0 <= by < 64
    return Range(x.low >> by, x.high >> by, x.bits >> by) if known and by is not None else ANY


def _and(x: Range, y: Range) -> Range:
    for mask, other in ((x, y), (y, x)):
        number = mask.number
        low_bits = number is not None and not number & (number + 1)
        if low_bits and 0 <= other.low <= other.high <= mask.high:
            return other
    masks = [each.high for each in (x, y) if each.low >= 0]
    return Range(0, min(masks), x.bits & y.bits) if masks else ANY


def _field(x: Range, first: Range, count: Range) -> Range:
    most = (1 << count.high) - 1 if count.high < 64 else _INFINITY
    return _and(_shifted_right(x, first), exactly(most))


def _or(x: Range, y: Range) -> Range:
    if min(x.low, y.low) < 0:
        return ANY
    apart = not x.bits & y.bits
    low = x.low + y.low if apart else max(x.low, y.low)
    return Range(low, x.high + y.high, x.bits | y.bits)


def _xor(x: Range, y: Range) -> Range:
    return Range(0, x.high + y.high, x.bits | y.bits) if min(x.low, y.low) >= 0 else ANY


_RESULTS: dict[str, Callable[..., Range]] = {
    "mov": lambda x, *_: x,
    "cvt": lambda x, *_: x,
    "shfl.sync.idx": lambda x, *_: x,
    "add": _plus,
    "sub": lambda x, y: Range(x.low - y.high, x.high - y.low),
    "mul.lo": _product,
    "mul.wide": _product,
    "mad": lambda x, y, z: _plus(_product(x, y), z),
    "shl": _shifted_left,
    "shr": _shifted_right,
    "and": _and,
    "or": _or,
    "xor": _xor,
    "bfe.u32": _field,
    "min": lambda x, y: Range(min(x.low, y.low), min(x.high, y.high)),
    "max": lambda x, y: Range(max(x.low, y.low), max(x.high, y.high)),
}
"""What an instruction gives for its operands, by how its opcode begins."""

_LIMITS: dict[str, Callable[[int], Range]] = {
    "setp.lt": lambda x: Range(-_INFINITY, x - 1),
    "setp.le": lambda x: Range(-_INFINITY, x),
    "setp.gt": lambda x: Range(x + 1, _INFINITY),
    "setp.ge": lambda x: Range(x, _INFINITY),
}
"""Where a register lies that compares so with a number."""
_OPPOSITE = {"setp.lt": "setp.ge", "setp.le": "setp.gt", "setp.gt": "setp.le", "setp.ge": "setp.lt"}


class Addresses:
    """The values of registers in one kernel, by interval analysis."""

    def __init__(self, blocks: list[Block], ptx: str) -> None:
        self._blocks = blocks
        self._special = {"global_smem": exactly(0)}
        self._special["%tid.x"] = _tight(Range(0, threads_of(ptx) - 1))
        self._before: list[list[int]] = [[] for _ in blocks]
        for number, block in enumerate(blocks):
            for after in block.after:
                self._before[after].append(number)
        self._last: list[dict[str, int]] = [
            {register: i for i, each in enumerate(block.instructions) for register in each.written}
            for block in blocks
        ]
        self._reaching: dict[tuple[Place, str], list[_Node]] = {}
        self._values: dict[_Node, Range] = {}

    def of(self, place: Place, operand: str) -> Range:
        """What an operand may be, as the instruction at `place` reads it."""
        self._solve(place, operand)
        return self._read(place, operand)

    def varies(self, place: Place, operand: str) -> bool:
        """Whether an operand depends on what an earlier iteration of a loop left."""
        slice_ = self._slice(self._definitions(place, operand))
        return any(node in self._slice(self._inputs(node)) for node in slice_)

    def _definitions(self, place: Place, operand: str) -> list[_Node]:
        """The definitions of an operand that reach the instruction at `place`."""
        if not operand.startswith("%") or operand in self._special:
            return []
        key = (place, operand)
        if key not in self._reaching:
            self._reaching[key] = self._search(place, operand)
        return self._reaching[key]

    def _search(self, place: Place, register: str) -> list[_Node]:
        number, index = place
        for i in range(index - 1, -1, -1):
            if register in self._blocks[number].instructions[i].written:
                return [((number, i), register)]
        found: list[_Node] = []
        waiting, seen = list(self._before[number]), set[int]()
        while waiting:
            block = waiting.pop()
            if block in seen:
                continue
            seen.add(block)
            if register in self._last[block]:
                found.append(((block, self._last[block][register]), register))
            else:
                waiting += self._before[block]
        return found

    def _inputs(self, node: _Node) -> list[_Node]:
        place, _ = node
        each = self._at(place)
        return [x for register in each.read for x in self._definitions(place, register)]

    def _at(self, place: Place) -> Instruction:
        return self._blocks[place[0]].instructions[place[1]]

    def _slice(self, nodes: list[_Node]) -> dict[_Node, None]:
        """`nodes` and all that they are computed from, without what memory holds."""
        waiting, seen = list(nodes), dict[_Node, None]()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen[node] = None
                if not self._at(node[0]).opcode.startswith(("ld.", "atom")):
                    waiting += self._inputs(node)
        return seen

    def _solve(self, place: Place, operand: str) -> None:
        nodes = [n for n in self._slice(self._definitions(place, operand)) if n not in self._values]
        nodes.sort()
        self._values |= dict.fromkeys(nodes, NONE)
        changed, round_ = bool(nodes), 0
        while changed:
            changed, round_ = False, round_ + 1
            for node in nodes:
                old = self._values[node]
                new = hull([old, self._result(node)])
                if round_ > _ROUNDS:
                    new = Range(
                        new.low if new.low == old.low else ANY.low,
                        new.high if new.high == old.high else ANY.high,
                    )
                if new != old:
                    self._values[node], changed = new, True

    def _read(self, place: Place, operand: str) -> Range:
        """A range for an operand, from what is known of its definitions so far."""
        nodes = self._definitions(place, operand)
        if nodes:
            return hull([self._values[node] for node in nodes])
        number = _NUMBER.fullmatch(operand)
        return self._special.get(operand, exactly(int(number[0], 0)) if number else ANY)

    def _result(self, node: _Node) -> Range:
        """What the instruction of a node gives for what is known of its operands so far."""
        place, register = node
        each = self._at(place)
        result, *operands = each.operands
        if result != register:
            return ANY
        if each.opcode.startswith("selp"):
            *chosen, predicate = operands
            return hull(
                [
                    self._limited(place, operand, predicate, held)
                    for operand, held in zip(chosen, (True, False), strict=True)
                ]
            )
        reads = [self._read(place, operand) for operand in operands]
        if NONE in reads:
            return NONE
        for opcode, value in _RESULTS.items():
            if f"{each.opcode}.".startswith(f"{opcode}."):
                found = _tight(value(*reads))
                width = int(each.opcode[-2:]) if opcode == "shl" else 64
                return _and(found, exactly((1 << width) - 1)) if width < 64 else found
        return ANY

    def _limited(self, place: Place, operand: str, predicate: str, held: bool) -> Range:
        """An operand's range where a predicate held or did not."""
        found = self._read(place, operand)
        definitions = self._definitions(place, predicate)
        if len(definitions) != 1:
            return found
        compared = definitions[0][0]
        each = self._at(compared)
        comparison = ".".join(each.opcode.split(".")[:2])
        _, left, right = each.operands if len(each.operands) == 3 else ("", "", "")
        same = self._definitions(compared, left) == self._definitions(place, operand)
        number = _NUMBER.fullmatch(right)
        if comparison not in _LIMITS or left != operand or not same or number is None:
            return found
        limit = _LIMITS[comparison if held else _OPPOSITE[comparison]](int(number[0], 0))
        low, high = max(found.low, limit.low), min(found.high, limit.high)
        return _tight(Range(low, high, found.bits)) if low <= high else NONE
