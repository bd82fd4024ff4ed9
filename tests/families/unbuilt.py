"""Families that no test builds, and why."""

from __future__ import annotations

NOT_BUILT: dict[str, str] = {}
