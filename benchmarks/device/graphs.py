"""Calls captured in a CUDA graph, so that only the device's time counts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from resformer_kernels.bench.timing import Call

_WARM_UPS = 3


def captured(make: Callable[[], Call], device: str) -> Call:
    """The replay of a graph of `make()`'s call; where there are no graphs, the call itself.

    Capturing raises where the call waits for the device or allocates outside torch's pool.
    """
    call = make()
    if torch.device(device).type != "cuda":
        return call
    with torch.cuda.device(device):
        # Compilation and the libraries' handles have to be done before.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay
