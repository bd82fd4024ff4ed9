"""Microseconds that a call costs on the host, without a GPU: `python -m benchmarks.host_cost`.

Everything runs as before a GPU, the driver library excepted (`driver_double`): the checks of the
public function, the choice of a backend, autograd, torch's dispatcher, allocation (torch's of the
CPU), Triton's launcher. Tensors are small, as what a call costs on the host does not depend on it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.driver_double import CAPABILITY, Double
from resformer_kernels import attention_with_kvcache, value_residual_attention
from resformer_kernels._core.hardware import Hardware
from resformer_kernels._core.select import Request, prepare
from resformer_kernels.attention import triton as attention
from resformer_kernels.kvcache import triton as kvcache

_CALLS, _BATCHES = 200, 15


class _Gpu(Hardware):
    """A machine with a GPU, as far as the choice of a backend asks."""

    def triton_reason(self, device: torch.device) -> str | None:
        """None: Triton serves every device."""
        del device
        return None

    def cuda_library_reason(self, device: torch.device) -> str | None:
        """The CUDA library is not there."""
        return f"no library for {device}"


def microseconds(run: Callable[[], object]) -> float:
    """Processor time of a call, the least of several batches: other processes count little."""
    times = []
    for _ in range(_BATCHES):
        start = time.process_time()
        for _ in range(_CALLS):
            run()
        times.append((time.process_time() - start) / _CALLS * 1e6)
    return min(times)


def _tensors(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in shapes]


def _attend(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q, k, v, first = _tensors(device, *[(1, 16, 2, 128)] * 4)
    return (q, k, v, first), {"causal": True}


def _decode(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cache = _tensors(device, *[(1, 64, 2, 128)] * 2)
    q, k, v = _tensors(device, (1, 1, 8, 128), *[(1, 1, 2, 128)] * 2)
    lengths = torch.full((1,), 30, device=device, dtype=torch.int32)
    return (q, *cache, k, v), {"cache_seqlens": lengths, "num_splits": 4}


def rows() -> Iterator[tuple[str, str, float]]:
    """(call, layer, microseconds)."""
    from resformer_kernels.attention.op import BACKWARD, FORWARD, BackwardCall
    from resformer_kernels.kvcache.op import OP

    hardware = _Gpu()

    def checks(name: str, function: Any, inputs: Any) -> Iterator[tuple[str, str, float]]:
        # On meta tensors, whose contents are not read either.
        args, options = inputs("meta")
        request: Request = prepare(function, *args, **options)
        yield name, "checks", microseconds(lambda: prepare(function, *args, **options))

        def choose() -> None:
            for backend in request.backends:
                if backend.unsupported_reason(request.call, hardware) is None:
                    return

        yield name, "choice", microseconds(choose)

    yield from checks("forward", value_residual_attention, _attend)
    args, options = _attend("cpu")
    call = prepare(value_residual_attention, *args, **options).call
    with torch.no_grad():
        yield "forward", "op and launches", microseconds(lambda: FORWARD("resformer_triton", call))
        yield "forward", "op, no gradient, in all", microseconds(lambda: attention.run(call))
    for x in args:
        x.requires_grad_()
    yield "forward", "op, gradient wanted, in all", microseconds(lambda: attention.run(call))
    out, _, _ = attention.run(call)
    grad = torch.ones_like(out)
    with torch.no_grad():
        lse = FORWARD("resformer_triton", call._replace(return_lse=True))[1]
        given = BackwardCall(grad, None, None, call, out.detach(), lse, None, 0b1111)
        yield (
            "backward",
            "op and launches",
            microseconds(lambda: BACKWARD("resformer_triton", given)),
        )
    yield (
        "backward",
        "autograd, in all",
        microseconds(lambda: torch.autograd.grad(out, args, grad, retain_graph=True)),
    )
    yield from checks("decode", attention_with_kvcache, _decode)
    args, options = _decode("cpu")
    decode = prepare(attention_with_kvcache, *args, **options).call
    with torch.no_grad():
        yield "decode", "op and launches", microseconds(lambda: OP("resformer_triton", decode))
        yield "decode", "op, in all", microseconds(lambda: kvcache.run(decode))


def main() -> None:
    """Print the table: calls that launchers serve each time, and calls that are replayed."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    os.environ["RESFORMER_MIX"] = "prologue"
    with tempfile.TemporaryDirectory() as folder:
        Double(Path(folder))
        from resformer_kernels._triton import launch, tape

        found: dict[tuple[str, str], list[float]] = {}
        for mode in (nullcontext(), tape.everywhere()):
            with launch.assumed_capability(CAPABILITY), mode:
                for name, layer, cost in rows():
                    found.setdefault((name, layer), []).append(cost)
    print("| call | layer | launched, us | replayed, us |\n| --- | --- | --- | --- |")
    for (name, layer), (launched, replayed) in found.items():
        print(f"| {name} | {layer} | {launched:.1f} | {replayed:.1f} |")


if __name__ == "__main__":
    main()
