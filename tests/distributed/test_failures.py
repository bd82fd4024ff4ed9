"""A rank that dies while a sharded model trains: the others stop with an error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import distributed as dist

from tests.distributed.models import batch, language_model, shard

_Store: Any = dist.TCPStore  # type: ignore[attr-defined]

TIMEOUT = 60.0
"""Seconds that a collective of gloo waits for the others."""
WORLD = 3


def _train(rank: int, port: int, told: Connection) -> None:
    """Steps without end; tells the number of each, and then what ended them."""
    torch.set_num_threads(1)
    store = _Store("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT)
    )
    model = language_model("learnable", num_layers=2, checkpointing=True)
    shard(model, model.blocks)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    step = 0
    try:
        while True:
            model(*batch()).backward()
            optimiser.step()
            optimiser.zero_grad()
            step += 1
            told.send(step)
    except RuntimeError as error:
        told.send(str(error))
        # Not by way of the process group's end, which would wait for the dead.
        os._exit(3)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_others(victim: int) -> None:
    # As torchrun does: the store is in the process that starts the ranks, and outlives them.
    store = _Store("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resformer_kernels.models", "tests.distributed.models"])
    pipes = [context.Pipe(duplex=False) for _ in range(WORLD)]
    processes = [
        context.Process(target=_train, args=(rank, store.port, told), daemon=True)
        for rank, (_, told) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, told in pipes:
            told.close()
        hears = [heard for heard, _ in pipes]
        for heard in hears:
            while _next(heard) != 3:
                pass
        os.kill(processes[victim].pid or 0, signal.SIGKILL)
        killed = time.monotonic()
        for rank in set(range(WORLD)) - {victim}:
            message = _last(hears[rank])
            assert time.monotonic() - killed < TIMEOUT
            assert "onnection" in message
            processes[rank].join(TIMEOUT)
            assert processes[rank].exitcode == 3
        processes[victim].join(TIMEOUT)
        assert processes[victim].exitcode == -signal.SIGKILL
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _next(heard: Connection) -> Any:
    """What a rank tells next."""
    if not heard.poll(2 * TIMEOUT):
        raise AssertionError("a rank says nothing")
    return heard.recv()


def _last(heard: Connection) -> str:
    """The error that a rank ends with."""
    while not isinstance(told := _next(heard), str):
        pass
    return told
