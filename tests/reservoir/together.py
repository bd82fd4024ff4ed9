"""Runs the programs of a Triton kernel concurrently in Triton's interpreter.

The interpreter runs a grid's programs in turn: programs that wait for one another would wait for
ever. Here each has a process of its own, forked from this one, and tensors lie in shared memory.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_SECONDS = 200.0


def _run_one(run: Callable[..., None], place: int, count: int, arguments: dict[str, Any]) -> None:
    """Run program `place` of `count`, as a grid of one that is told otherwise."""
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    builder = interpreter.interpreter_builder
    dimensions, index = builder.set_grid_dim, builder.set_grid_idx
    with (
        mock.patch.object(builder, "set_grid_dim", side_effect=lambda *_: dimensions(count, 1, 1)),
        mock.patch.object(builder, "set_grid_idx", side_effect=lambda *_: index(place, 0, 0)),
        # Copying results back would overwrite those of other programs.
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev"),
    ):
        run(grid=(1,), device=torch.device("cpu"), **arguments)


def launch_at_once(launched: list[int]) -> Callable[..., None]:
    """What takes the place of `launch`: all programs of a grid run at once. It appends how many."""
    from resformer_kernels._triton.launch import launch as run_launch

    def launch(kernel: Any, grid: tuple[int, ...], _device: object, **arguments: Any) -> None:
        for value in tree_leaves(arguments):
            if isinstance(value, Tensor):
                value.share_memory_()
        given = {"kernel": kernel, **arguments}
        fork = multiprocessing.get_context("fork")
        workers = [
            fork.Process(target=_run_one, args=(run_launch, place, grid[0], given), daemon=True)
            for place in range(grid[0])
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(_SECONDS)
        codes = [worker.exitcode for worker in workers]
        for worker in workers:
            worker.kill()
        assert codes == [0] * len(workers), codes
        launched.append(grid[0])

    return launch


@contextmanager
def together(programs: int) -> Iterator[list[int]]:
    """Within it, up to `programs` run at once; yields how many each launch had."""
    from resformer_kernels.reservoir.triton import recurrence

    launched: list[int] = []
    with (
        mock.patch.object(recurrence, "_programs", return_value=programs),
        mock.patch.object(recurrence, "launch", launch_at_once(launched)),
    ):
        yield launched
