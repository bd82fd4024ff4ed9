"""Prepare what `device-check --bundle` needs on a GPU that is rented by the minute.

    python scripts/prepare_device_bundle.py --wheel flash_attn_3-....whl

It takes no GPU and about a quarter of an hour on two cores: the Triton kernels that the check will
launch are compiled for sm_90, and the configurations of attention that its tuning pass will try are
chosen among those that compile without spills. The CUDA library is built where nvcc is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from benchmarks import tuning
from benchmarks import tuning_space as space
from benchmarks.device import ahead, bundle, plan
from benchmarks.device.record import sources_digest
from build_support import cuda
from resformer_kernels._core import extension
from resformer_kernels._triton import available
from resformer_kernels._triton.arch import architecture
from resformer_kernels._triton.cases import CompileCase
from resformer_kernels.bench.machine import usable_cores
from resformer_kernels.cli.compile import artifacts

ROOT = Path(__file__).resolve().parents[2]
CAPABILITY = (9, 0)
NUMBER = 90
MOST_TRIES = 24
"""Configurations of a point that are compiled to find those without spills."""
KERNELS = {
    "forward": "forward_kernel",
    "keys": "keys_gradient_kernel",
    "queries": "queries_gradient_kernel",
}
"""The kernel of each direction that a configuration is of."""

RUN = """On the device, from the checkout, one command, again until it says that nothing is left:

    python3 -m resformer_kernels.cli device-check --bundle {folder} --minutes 9 --out {out}

Each call takes 9 minutes at most and goes on where the one before stopped. On a machine whose disk
is not kept in between, add --resume with the JSON that the call before left. Beside the JSON lie
its .txt (tables), .log (progress) and .configs.json (attention's table, where another was faster).
"""

T = TypeVar("T")
R = TypeVar("R")


_begun = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since the beginning."""
    print(f"[{time.monotonic() - _begun:4.0f} s] {text}", flush=True)


def spread(function: Callable[[T], R], items: Sequence[T], workers: int, what: str) -> list[R]:
    """`function` of each item, in forked processes; results in order."""
    found: dict[int, R] = {}
    told = time.monotonic()
    # Forked, so that each has the list of kernels without finding it anew.
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        waiting = {pool.submit(function, item): place for place, item in enumerate(items)}
        for done in as_completed(waiting):
            try:
                found[waiting[done]] = done.result()
            except BrokenProcessPool:
                sys.exit("error: a compiler's process died; --jobs 1 --cache DIR shows where")
            if time.monotonic() - told > 15 or len(found) == len(items):
                told = time.monotonic()
                say(f"{what}: {len(found)} of {len(items)}")
    return [found[place] for place in range(len(items))]


def chosen(cache: Path, point: space.Point) -> list[space.Config]:
    """A point's own configuration, and those like it that compile without spills."""
    table, name = tuning.load_table(), architecture(CAPABILITY).name
    own, *others = space.candidates(table, name, point)
    found = [own.config]
    for trial in others[:MOST_TRIES]:
        if len(found) == plan.MOST_CONFIGS:
            break
        launched = ahead.trial_launches(trial, CAPABILITY)
        wanted = [x for x in launched if x.kernel.__name__ == KERNELS[point.direction]]
        if all(fits(case, cache) for case in ahead.cases(wanted, CAPABILITY)):
            found.append(trial.config)
    return found


def fits(case: CompileCase, cache: Path) -> bool:
    """Whether a kernel compiles, within the architecture's limits and without spills."""
    found = artifacts.build("attention", case, NUMBER, cache)
    return found.ok and not found.local_accesses


_cases: list[CompileCase] = []
"""The kernels to compile: processes that are forked later have them."""


def compiled(cache: Path, place: int) -> tuple[str, str] | str:
    """A kernel's folder in the cache, and what its name is made from; why it does not compile."""
    import triton

    try:
        return bundle.compiled(_cases[place], NUMBER, cache)
    except (triton.TritonError, RuntimeError) as error:
        return f"{_cases[place].kernel.__name__} does not compile: {str(error).strip()[:200]}"


def pack_kernels(
    archive: Path, cache: Path, trials: Sequence[space.Trial], words: str, workers: int
) -> dict[str, str]:
    """Compile and archive the kernels of the check, and of those trials: by folder in the cache,
    what the folder's name is made from."""
    launches = []
    for problem in ahead.problems(words):
        launches += ahead.launches(problem, CAPABILITY)
    for trial in trials:
        launches += ahead.trial_launches(trial, CAPABILITY)
    _cases[:] = ahead.cases(launches, CAPABILITY)
    say(f"{len(launches)} launches need {len(_cases)} kernels")
    found = spread(partial(compiled, cache), range(len(_cases)), workers, "kernels compiled")
    kernels: dict[str, str] = {}
    for each in found:
        if isinstance(each, str):
            say(f"left out: {each}")
        else:
            kernels[each[0]] = each[1]
    bundle.pack(cache, list(kernels), archive)
    return kernels


def build_library(folder: Path) -> bool:
    """Bring the CUDA library up to date and copy it; whether there is one."""
    reason = cuda.skip_reason()
    if reason is not None:
        say(f"CUDA library: left out, {reason}; the device builds it if it has nvcc")
        return False
    command = [sys.executable, "-m", "build_support.native"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "RESFORMER_CUDA": "1"})
    shutil.copy(extension.CUDA_LIBRARY, folder)
    say(f"CUDA library: {extension.CUDA_LIBRARY.stat().st_size / 2**20:.1f} MiB")
    return True


def travelling(folder: Path) -> tuple[int, int]:
    """Bytes of the bundle, and of the files of the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = [name for name in listed.stdout.split("\0") if name]
    checkout = sum((ROOT / name).stat().st_size for name in names if (ROOT / name).is_file())
    return sum(x.stat().st_size for x in folder.rglob("*") if x.is_file()), checkout


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="prepare_device_bundle.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "device_bundle", metavar="DIR")
    parser.add_argument(
        "--wheel", type=Path, action="append", default=[], help="a wheel to bring, such as FA3's"
    )
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="processes at once")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep compiled kernels here, for the next time (default: a temporary folder)",
    )
    parser.add_argument("--filter", default="", metavar="TEXT", help="kernels of these cases alone")
    parser.add_argument(
        "--no-configurations",
        action="store_true",
        help="choose none: the device then tries the first ones that may fit",
    )
    parser.add_argument("--no-library", action="store_true", help="bring no CUDA library")
    parser.add_argument(
        "--limit-mib",
        type=float,
        default=64.0,
        help="error where bundle and checkout together are larger (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> int:
    """Prepare, check the size, tell the command. 0; 1 where it is too large; 2 where nothing can
    be compiled."""
    args = parsed()
    reason = "unset TRITON_INTERPRET" if available.interpreted() else available.version_reason()
    missing = [str(wheel) for wheel in args.wheel if not wheel.is_file()]
    if reason is not None or missing:
        told = reason or f"no such wheel: {', '.join(missing)}"
        print(f"prepare_device_bundle.py: error: {told}", file=sys.stderr)
        return 2
    if args.out.exists():
        try:
            bundle.manifest(args.out)
        except bundle.Unusable as error:
            print(f"prepare_device_bundle.py: error: {error}; not replaced", file=sys.stderr)
            return 2
    folder = args.out.with_name(f"{args.out.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / bundle.WHEELS).mkdir(parents=True)
    for wheel in args.wheel:
        shutil.copy(wheel, folder / bundle.WHEELS)
    if not args.no_library:
        build_library(folder)
    points = [] if args.no_configurations else plan.points()
    with tempfile.TemporaryDirectory() if args.cache is None else nullcontext(args.cache) as kept:
        cache = Path(kept)
        configs = spread(partial(chosen, cache), points, args.jobs, "points with configurations")
        pairs = [(x, y) for x, found in zip(points, configs, strict=True) for y in found]
        trials = [space.Trial(point, config) for point, config in pairs]
        archive = folder / bundle.KERNELS
        kernels = pack_kernels(archive, cache, trials, args.filter, args.jobs)
    about = {
        "format": bundle.FORMAT,
        "capability": NUMBER,
        "sources": sources_digest(),
        "compiler": bundle.compiler(NUMBER),
        "kernels": kernels,
        "shortlist": {x.name: found for x, found in zip(points, configs, strict=True)},
    }
    (folder / bundle.MANIFEST).write_text(json.dumps(about, indent=1) + "\n")
    # Whether they load where they were not made has not been seen.
    say("FlashAttention 4: its compiled objects are left out; --wheel brings its wheels")
    return finish(folder, args.out, args.limit_mib)


def finish(folder: Path, out: Path, limit_mib: float) -> int:
    """Check the size, put the bundle in its place and tell the command."""
    name = os.path.relpath(out, ROOT)
    text = RUN.format(folder=name, out="reports/device.json")
    (folder / "RUN.txt").write_text(text)
    own, checkout = travelling(folder)
    sizes = f"{own / 2**20:.1f} MiB in {out}, {checkout / 2**20:.1f} MiB in the checkout"
    if own + checkout > limit_mib * 2**20:
        print(f"error: {sizes}: together over the limit of {limit_mib:g} MiB", file=sys.stderr)
        return 1
    shutil.rmtree(out, ignore_errors=True)
    folder.rename(out)
    say(sizes)
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
