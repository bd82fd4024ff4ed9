"""Ranks for tests: processes that stay, with gloo between them.

`run(world, function, *arguments)` calls `function(*arguments)` on every rank of a fresh process
group and returns what each returned, tensors and all. The processes come from a fork server that
has imported torch once, and serve one call after another: a call costs a tenth of a second.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist
from torch._C._distributed_c10d import FileStore

LONGEST = 120.0
"""Seconds a call may take before its ranks are stopped."""
_GRACE = 5.0
"""Seconds that the other ranks have once one has failed."""
_PRELOADED = (
    *("torch", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("resformer_kernels", "resformer_kernels.models", "tests.conftest"),
)


class Failed(AssertionError):
    """A rank raised; the message holds its traceback."""


class _Worker(NamedTuple):
    process: BaseProcess
    calls: Connection


_workers: list[_Worker] = []


def _serve(calls: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, world, store, function, arguments = calls.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                store=FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=LONGEST / 2),
            )
            dist.barrier()  # or the first to be done leaves before the last has come
            torch.manual_seed(0)
            result = function(*arguments)
            # Or the first to be done closes what others still receive. Where one has failed, that
            # one says so.
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            calls.send((True, result))
        except BaseException:  # noqa: BLE001 - the test raises it
            calls.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _worker(index: int) -> _Worker:
    """The process that is rank `index`, started where it is not there yet."""
    while len(_workers) <= index:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _workers.append(_Worker(process, ours))
    return _workers[index]


def _answer(calls: Any) -> tuple[bool, Any]:
    """(whether the rank did not fail, what it returned or its traceback)."""
    try:
        well, value = calls.recv()
    except EOFError:
        return False, "the process ended"
    return well, value


@atexit.register
def stop() -> None:
    """End every rank; the next call starts anew."""
    for worker in _workers:
        worker.process.kill()
        worker.calls.close()
    _workers.clear()


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks, in their order.

    The function and its arguments are pickled: the function stands at the top of a module.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        workers = [_worker(rank) for rank in range(world)]
        for rank, worker in enumerate(workers):
            worker.calls.send((rank, world, store, function, arguments))
        found: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting: dict[Any, int] = {worker.calls: rank for rank, worker in enumerate(workers)}
        while waiting:
            # Ranks that wait for one that failed say nothing of their own.
            longest = _GRACE if failures else LONGEST
            ready = wait(list(waiting), timeout=longest)
            if not ready:
                failures |= dict.fromkeys(waiting.values(), f"no answer in {longest:.0f} s")
                break
            for calls in ready:
                rank = waiting.pop(calls)
                well, value = _answer(calls)
                (found if well else failures)[rank] = value
    if failures:
        stop()
        raise Failed("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return [found[rank] for rank in range(world)]
