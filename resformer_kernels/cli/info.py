"""Show what this installation can run, and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import resformer_kernels
from resformer_kernels._core import extension
from resformer_kernels._core.hardware import MACHINE
from resformer_kernels.attention import sdpa
from resformer_kernels.bench import machine
from resformer_kernels.bench.tables import pivot, table
from resformer_kernels.cli import COMMANDS, Subparsers
from resformer_kernels.kvcache.cache import pages

Section = dict[str, str]

_OPTIONAL_PACKAGES = (
    *("triton", "flash-attn", "flash-attn-3", "fa3-fwd", "transformers", "matplotlib"),
)
_ENVIRONMENT = ("RESFORMER_CPU", "RESFORMER_CHECK", "RESFORMER_MIX", "RESFORMER_POISON")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _weight(x: Tensor) -> Tensor:
    """Weight of a reservoir of 64 units, whose state is float32 for 16-bit inputs."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_zeros((64, 64), dtype=dtype)


_SAMPLES: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "value_residual_attention": lambda x: (x, x, x, x),
    "attention_with_kvcache": lambda x: (x, x, x),
    "mix_values": lambda x: ([x, x], [0.5, 0.5]),
    "mix_value_embedding": lambda x: (x, x[0], x.new_zeros((1, 1), dtype=torch.int64), 0.5),
    "linear_scan": lambda x: (x[0], x[0]),
    "reservoir_scan": lambda x: (x[0], _weight(x)),
}
"""Arguments to ask each public op about, made from one (1, 1, 1, 64) tensor."""
_OPTIONS: dict[str, dict[str, Any]] = {"attention_with_kvcache": {"cache_seqlens": 1}}
"""Keyword arguments to ask about."""


@dataclass(frozen=True)
class Served:
    """Backend that `auto` takes for one kind of input, with reasons against the others."""

    op: str
    device: str
    dtype: str
    backend: str
    others: dict[str, str]


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `info`."""
    parser = subparsers.add_parser("info", help=COMMANDS["info"], description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="print the dtypes and forms of a call that each backend serves, on any machine",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report. 1 where the environment asks for a CPU path that cannot run."""
    if args.matrix:
        return _run_matrix(as_json=args.json)
    native, healthy = _native()
    sections = {"versions": _versions(), "machine": _machine(), "native": native}
    served = _served() if healthy else []
    if args.json:
        rows = [asdict(row) for row in served]
        print(json.dumps({**sections, "served": rows, "healthy": healthy}, indent=2))
    else:
        _print_tables(sections, served, Console())
    return 0 if healthy else 1


def _run_matrix(*, as_json: bool) -> int:
    # These modules are slow to import and needed here only.
    from resformer_kernels.cli import matrix
    from resformer_kernels.cli.support import answers

    if as_json:
        print(json.dumps([asdict(answer) for answer in answers()], indent=2))
    else:
        matrix.print_tables(matrix.matrices(answers()), Console())
    return 0


def _versions() -> Section:
    build = "CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    return {
        "resformer-kernels": resformer_kernels.__version__,
        "installed at": str(Path(resformer_kernels.__file__).parent),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} ({build})",
        **dict.fromkeys(_OPTIONAL_PACKAGES, "not installed"),
        **machine.versions(_OPTIONAL_PACKAGES),
    }


def _machine() -> Section:
    section = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": machine.processor(),
        "features": machine.features(),
        "cores": f"{machine.usable_cores()} usable of {os.cpu_count()}",
        "torch threads": f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)",
    }
    amx = sdpa.amx_note(MACHINE)
    if amx is not None:
        section["AMX"] = amx
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        section[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    return section


def _native() -> tuple[Section, bool]:
    library = str(extension.LIBRARY)
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment = {"CUDA library": _cuda_library(), "host module": _host(), **environment}
    reason = extension.unavailable_reason()
    if reason is not None:
        return {"library": f"not in use: {reason}", **environment}, True
    best = extension.CPU_PATHS[torch.ops.resformer.cpu_isa_best()]
    try:
        path = extension.cpu_path()
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        return {"library": library, "CPU path": f"error: {message}", **environment}, False
    section = {
        "library": library,
        "CPU path": f"{path}: {_why(path, best)}",
        "paths that run here": ", ".join(extension.available_cpu_paths()),
    }
    return {**section, **environment}, True


def _host() -> str:
    reason = pages.unavailable_reason()
    return "page allocator and decode planner" if reason is None else f"not in use: {reason}"


def _cuda_library() -> str:
    reason = extension.cuda_library_reason()
    if reason is not None:
        return f"not in use: {reason}"
    built = ", ".join(torch.ops.resformer.cuda_architectures().split())
    return f"{extension.CUDA_LIBRARY}, for compute capability {built}"


def _why(path: str, best: str) -> str:
    if os.environ.get("RESFORMER_CPU"):
        return f"RESFORMER_CPU asks for it (without it, up to {best})"
    if path == best:
        return "the highest that this processor and build have"
    if best == "avx512_amx":
        return f"{best} runs here too, where RESFORMER_CPU asks for it: no machine has timed it yet"
    return (
        f"{best} runs here too, but its bfloat16 instruction is slower on this processor than"
        " widening to float32"
    )


def _served() -> list[Served]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [_serve(op, device, dtype) for op in _SAMPLES for device in devices for dtype in _DTYPES]


def _serve(op: str, device: str, dtype: torch.dtype) -> Served:
    sample = torch.zeros(1, 1, 1, 64, device=device, dtype=dtype)
    explained = resformer_kernels.explain(
        getattr(resformer_kernels, op), *_SAMPLES[op](sample), **_OPTIONS.get(op, {})
    )
    name = str(dtype).removeprefix("torch.")
    return Served(op, device, name, explained.backend or "none", explained.reasons)


def _print_tables(sections: dict[str, Section], served: Sequence[Served], console: Console) -> None:
    titles = ("Versions", "Machine", "Native kernels")
    for title, section in zip(titles, sections.values(), strict=True):
        rows = ((f"[bold]{name}[/]", value) for name, value in section.items())
        listed = table(("", " "), rows, fold=(" ",), title=title)
        listed.show_header = False
        console.print(listed)
    if served:
        console.print(served_table(served))
        console.print(reason_table(served))


def served_table(served: Sequence[Served]) -> Table:
    """Backend of each op and device, a column a dtype."""
    cells = (((row.op, row.device), row.dtype, row.backend) for row in served)
    return pivot(("op", "device"), cells, title='What backend="auto" takes')


def reason_table(served: Sequence[Served]) -> Table:
    """Reasons against each backend, each once, with the dtypes that it holds for."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in served:
        for backend, reason in row.others.items():
            if reason != f"{row.backend} is preferred":
                found.setdefault((backend, reason), {})[f"{row.device} {row.dtype}"] = None
    every = len({(row.device, row.dtype) for row in served})
    rows = [
        (backend, reason, "everything" if len(where) == every else ", ".join(where))
        for (backend, reason), where in found.items()
    ]
    headings = ("backend", "reason", "for")
    return table(headings, rows, fold=headings[1:], title="Why not another")
