"""What Linux says of this machine's processor."""

from __future__ import annotations

import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def entry(name: str) -> str | None:
    """An entry of /proc/cpuinfo, where there is one."""
    text = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def flags() -> frozenset[str]:
    """Instruction sets that the processor has and the system lets programs use; none elsewhere."""
    return frozenset((entry("flags") or entry("Features") or "").split())
