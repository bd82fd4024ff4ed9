"""What the Triton kernels of attention choose for themselves, chosen by a test."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from unittest import mock

from resformer_kernels.attention.triton import configs


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a call is served that a caller does not say: tiles, loads and where V' is mixed."""

    rows: int = 32
    keys: int = 32
    capability: tuple[int, int] = (9, 0)
    mix: str = "prologue"

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        from resformer_kernels._triton.launch import assumed_capability

        config = configs.Config(self.rows, self.keys, warps=4, stages=1)
        with (
            mock.patch.object(configs, "choose", return_value=config),
            mock.patch.dict(os.environ, {configs.VARIABLE: self.mix}),
            assumed_capability(self.capability),
        ):
            yield
