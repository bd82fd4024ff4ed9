"""What `scripts/prepare_device_bundle.py` prepared, put to use on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.device.record import DeviceRun


class Unusable(ValueError):
    """A folder that is no bundle, or one of other sources."""


@dataclass(frozen=True)
class Unpacked:
    """What of a bundle is in use."""

    library: bool = False
    """Whether it brought the CUDA library."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the workers need to find the rest."""


NOTHING = Unpacked()


def unpack(folder: Path, run: DeviceRun) -> Unpacked:
    raise NotImplementedError
