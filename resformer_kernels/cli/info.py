"""`resformer-kernels info`: what this installation can run, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
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
from resformer_kernels._core import extension as _extension
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
    """Of a reservoir of 64 units, whose state is float32 for 16-bit inputs."""
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
"""Each public op, and the arguments it is asked about, made from one (1, 1, 1, 64) tensor."""
_OPTIONS: dict[str, dict[str, Any]] = {"attention_with_kvcache": {"cache_seqlens": 1}}
"""Arguments that are named."""
# The flags that decide a CPU path, or that a reader of a benchmark asks about.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
    *("avx512_fp16", "amx_bf16", "asimd", "sve", "bf16"),
)


@dataclass(frozen=True)
class Served:
    """Which backend `auto` takes for one kind of input, and why not the others."""

    op: str
    device: str
    dtype: str
    backend: str
    others: dict[str, str]


@dataclass(frozen=True)
class Report:
    """Everything `info` says."""

    versions: Section
    machine: Section
    native: Section
    served: list[Served]
    healthy: bool
    """False where the environment asks for something that cannot run."""


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `info`."""
    parser = subparsers.add_parser("info", help=COMMANDS["info"], description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="print which form of a call each backend serves in which dtype, on any machine",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report. 1 where the environment asks for a CPU path that cannot run."""
    if args.matrix:
        return _run_matrix(as_json=args.json)
    report = collect()
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print_tables(report, Console())
    return 0 if report.healthy else 1


def _run_matrix(*, as_json: bool) -> int:
    # Both build tensors to ask about: not at import.
    from resformer_kernels.cli import matrix
    from resformer_kernels.cli.support import answers

    if as_json:
        print(json.dumps([asdict(answer) for answer in answers()], indent=2))
    else:
        matrix.print_tables(matrix.matrices(answers()), Console())
    return 0


def collect() -> Report:
    """Gather the report; loads the native library if it is there."""
    native, healthy = _native()
    served = _served() if healthy else []
    return Report(_versions(), _machine(), native, served, healthy)


def _versions() -> Section:
    versions = {
        "resformer-kernels": resformer_kernels.__version__,
        "installed at": str(Path(resformer_kernels.__file__).parent),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} ({_torch_build()})",
    }
    for name in _OPTIONAL_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _torch_build() -> str:
    if torch.version.cuda is None:
        return "CPU build"
    return f"CUDA {torch.version.cuda}"


def _machine() -> Section:
    model, features = _processor()
    machine = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": model,
        "features": " ".join(name for name in _FEATURES if name in features) or "none known",
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "torch threads": f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)",
    }
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        machine[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    return machine


def _processor() -> tuple[str, frozenset[str]]:
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first_core = cpuinfo.read_text().split("\n\n")[0]
        fields = {
            name.strip(): value.strip()
            for name, _, value in (line.partition(":") for line in first_core.splitlines())
        }
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, frozenset((fields.get("flags") or fields.get("Features") or "").split())


def _native() -> tuple[Section, bool]:
    library = str(_extension.LIBRARY)
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment = {"CUDA library": _cuda_library(), "host module": _host(), **environment}
    reason = _extension.unavailable_reason()
    if reason is not None:
        return {"library": f"not in use: {reason}", **environment}, True
    best = _extension.CPU_PATHS[torch.ops.resformer.cpu_isa_best()]
    try:
        path = _extension.cpu_path()
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        return {"library": library, "CPU path": f"error: {message}", **environment}, False
    section = {
        "library": library,
        "CPU path": f"{path}: {_why(path, best)}",
        "paths that run here": ", ".join(_extension.available_cpu_paths()),
    }
    return {**section, **environment}, True


def _host() -> str:
    reason = pages.unavailable_reason()
    return "page allocator and decode planner" if reason is None else f"not in use: {reason}"


def _cuda_library() -> str:
    reason = _extension.cuda_library_reason()
    if reason is not None:
        return f"not in use: {reason}"
    built = ", ".join(torch.ops.resformer.cuda_architectures().split())
    return f"{_extension.CUDA_LIBRARY}, for compute capability {built}"


def _why(path: str, best: str) -> str:
    if os.environ.get("RESFORMER_CPU"):
        return f"RESFORMER_CPU asks for it (without it, up to {best})"
    if path == best:
        return "the highest that this processor and build have"
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


def _print_tables(report: Report, console: Console) -> None:
    for title, section in (
        ("Versions", report.versions),
        ("Machine", report.machine),
        ("Native kernels", report.native),
    ):
        listed = table(("", ""), section.items(), fold=("",), title=title)
        listed.show_header = False
        console.print(listed)
    if not report.served:
        return
    console.print(served_table(report.served))
    console.print(reason_table(report.served))


def served_table(served: Sequence[Served]) -> Table:
    """The backend of each op and device, a column a dtype."""
    cells = (((row.op, row.device), row.dtype, row.backend) for row in served)
    return pivot(("op", "device"), cells, title='What backend="auto" takes')


def reason_table(served: Sequence[Served]) -> Table:
    """Why each backend was passed over, every reason once, and for which dtypes."""
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
