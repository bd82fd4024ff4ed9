"""Changes of a kernel's PTX that find their place by what is around it."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.MULTILINE)
_LOCATION = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_LABEL = re.compile(r"(\$L__BB\w+):")
_BRANCH = re.compile(r"bra(?:\.uni)?\s+(\$L__BB\w+);")
_ENTRY = re.compile(r"^(?=(?:\.visible\s+)?\.entry\s)", re.MULTILINE)


class Code:
    """The lines of one kernel."""

    def __init__(self, text: str, files: dict[str, str]) -> None:
        self.lines = text.split("\n")
        self._files = files

    def loops(self) -> list[range]:
        """From a label to a branch back to it, the smallest ones first."""
        labels: dict[str, int] = {}
        found: dict[int, int] = {}
        for i, line in enumerate(self.lines):
            if label := _LABEL.match(line):
                labels[label[1]] = i
            elif (branch := _BRANCH.search(line)) and branch[1] in labels:
                found[labels[branch[1]]] = i
        return sorted((range(first, last + 1) for first, last in found.items()), key=len)

    def sources(self) -> list[str]:
        """The line of the package's source that each line comes from."""
        found, source = [], ""
        for line in self.lines:
            if location := _LOCATION.match(line):
                source = _source(self._files.get(location[1], ""), int(location[2]))
            found.append(source)
        return found


def _source(path: str, line: int) -> str:
    """A line of a file; compiled code that was kept may name those of another checkout."""
    package = re.search(r"(?:resformer_kernels|csrc)/.*", path)
    return linecache.getline(str(ROOT / package[0]) if package else path, line)


@dataclass(frozen=True)
class At:
    """A statement: the first that matches `pattern` and all that is said of it."""

    pattern: str
    after: At | None = None
    before: At | None = None
    last: bool = False
    """The last one instead."""
    number: int = 0
    """So many others of them are left out first."""
    loop: str = ""
    """Within the smallest loop that has a statement like this."""
    source: str = ""
    """From a line of the source like this."""

    def find(self, code: Code) -> int:
        """Its line.

        Raises:
            LookupError: there is none.
        """
        within = range(len(code.lines))
        if self.loop:
            loops = (x for x in code.loops() if re.search(self.loop, _text(code, x)))
            within = min(loops, key=lambda x: (len(x), x.start), default=range(0))
        if self.after is not None:
            within = range(max(within.start, self.after.find(code) + 1), within.stop)
        if self.before is not None:
            within = range(within.start, min(within.stop, self.before.find(code)))
        sources = code.sources() if self.source else [""] * len(code.lines)
        found = [
            i
            for i in within
            if re.search(self.pattern, code.lines[i]) and re.search(self.source, sources[i])
        ]
        if len(found) <= self.number:
            raise LookupError(f"no statement is {self}")
        return found[::-1][self.number] if self.last else found[self.number]

    def next(self, pattern: str) -> At:
        """The first such statement after this one."""
        return At(pattern, after=self)


def _text(code: Code, lines: range) -> str:
    return "\n".join(code.lines[lines.start : lines.stop])


Change = Callable[[Code], None]


def drop(at: At) -> Change:
    """Leave a statement out."""

    def change(code: Code) -> None:
        del code.lines[at.find(code)]

    return change


def drop_all(pattern: str, after: At, before: At) -> Change:
    """Leave out every such statement between two."""

    def change(code: Code) -> None:
        first, end = after.find(code) + 1, before.find(code)
        kept = [x for x in code.lines[first:end] if not re.search(pattern, x)]
        code.lines[first:end] = kept

    return change


def change(at: At, old: str, new: str) -> Change:
    """Put `new` in place of what matches `old` in a statement; it may be several statements."""

    def change(code: Code) -> None:
        line = at.find(code)
        text, count = re.subn(old, new, code.lines[line])
        if count != 1:
            raise LookupError(f"{count} times {old} in {code.lines[line]}")
        code.lines[line : line + 1] = text.split("\n")

    return change


def move(at: At, before: At, *, keep: bool = False) -> Change:
    """Move a statement before another one; with `keep`, say it a second time there."""

    def change(code: Code) -> None:
        old, new = at.find(code), before.find(code)
        code.lines.insert(new, code.lines[old])
        if not keep:
            del code.lines[old + (new <= old)]

    return change


def edited(ptx: str, kernel: str, *changes: Change) -> str:
    """A module with changes of its kernels whose names match.

    Raises:
        LookupError: a change finds no place, or changes nothing.
    """
    files = dict(_FILE.findall(ptx))
    head, *kernels = _ENTRY.split(ptx)
    for i, text in enumerate(kernels):
        if not re.search(rf"\.entry\s+\w*{kernel}\w*\(", text):
            continue
        code = Code(text, files)
        for change in changes:
            before = list(code.lines)
            change(code)
            if before == code.lines:
                raise LookupError("a change that changes nothing")
        kernels[i] = "\n".join(code.lines)
    return "".join([head, *kernels])
