"""What is prepared for a device elsewhere, and put to use there: compiled kernels, a library.

Triton finds a kernel by a hash of its own build, of the kernel's source and of the options. Its
build differs from one version of Python to the next by its binding alone, so a bundle keeps the
rest of the hash, and is put under the names that the device's Triton will look for, where that has
the same version, the same Python sources and the same assembler. Nothing in it is a path.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.device.record import DeviceRun
from resformer_kernels._core import extension
from resformer_kernels._triton import available
from resformer_kernels._triton.cases import gpu_target

MANIFEST, KERNELS, WHEELS = "bundle.json", "kernels.tar.xz", "wheels"
FORMAT = 1
_UNPACKED, _SITE = "unpacked", "site"
_PARTS = ("compiler", "backends", "language", "runtime")
"""Folders of Triton's package whose sources decide what is compiled."""
_INSTALL_SECONDS = 180.0


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


def compiler(capability: int) -> dict[str, str]:
    """What has to be the same where kernels are compiled and where they are used."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    root = Path(triton.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for part in _PARTS for path in (root / part).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    variables = sorted(get_cache_invalidating_env_vars().items())
    return {
        "version": str(triton.__version__),
        "sources": digest.hexdigest()[:16],
        "assembler": _backend(capability).hash(),
        "environment": " ".join(f"{name}={value}" for name, value in variables),
    }


def _backend(capability: int) -> Any:
    from triton.compiler.compiler import make_backend

    return make_backend(gpu_target(capability))


def folder_of(rest: str, build: str | None = None) -> str:
    """The name of a kernel's folder in Triton's cache.

    Args:
        rest: of the hash's text, without Triton's build.
        build: Triton's (default: that of the Triton that is installed).
    """
    from triton.runtime.cache import triton_key

    text = f"{triton_key() if build is None else build}-{rest}"
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def compiled(case: Any, capability: int, cache: Path) -> tuple[str, str]:
    """Compile a `CompileCase`: (its folder in `cache`, the rest of the hash's text)."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature, case.constants, case.attrs)
    given = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    backend = _backend(capability)
    options = backend.parse_options(dict(given))
    variables = str(sorted(get_cache_invalidating_env_vars().items()))
    rest = f"{source.hash()}-{backend.hash()}-{options.hash()}-{variables}"
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache)
        triton.compile(source, target=gpu_target(capability), options=given)
    folder = folder_of(rest)
    if not (cache / folder).is_dir():
        raise RuntimeError(f"Triton {triton.__version__} names the folders of its cache otherwise")
    return folder, rest


def pack(cache: Path, folders: Sequence[str], archive: Path) -> None:
    """Archive what a launch needs of `folders`: the machine code and its description."""
    with tarfile.open(archive, "w:xz") as made:
        for folder in folders:
            for path in sorted((cache / folder).iterdir()):
                if path.suffix in (".cubin", ".json") and not path.name.startswith("__grp__"):
                    made.add(path, f"{folder}/{path.name}", filter=_plain)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def manifest(folder: Path) -> dict[str, Any]:
    """A bundle's description. Raises `Unusable` where there is none."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise Unusable(f"{folder} is no bundle: {error}") from None
    if content.get("format") != FORMAT:
        raise Unusable(f"{folder} is a bundle in format {content.get('format')}, not {FORMAT}")
    found: dict[str, Any] = content
    return found


def unpack(folder: Path, run: DeviceRun) -> Unpacked:
    """Put a bundle to use, noting in `run` what of it is. Raises `Unusable`."""
    about = manifest(folder)
    here = run.fingerprint["sources"]
    if about["sources"] != here:
        raise Unusable(
            f"{folder} was prepared from sources {about['sources']}, these are {here}: prepare it "
            "anew with scripts/prepare_device_bundle.py"
        )
    run.shortlist = run.shortlist or about["shortlist"]
    environment: dict[str, str] = {}
    reason = kernels_reason(about)
    if reason is None:
        cache = folder / _UNPACKED
        count = unpack_kernels(folder / KERNELS, about["kernels"], cache)
        environment["TRITON_CACHE_DIR"] = str(cache.resolve())
        run.notes["bundle, kernels"] = f"{count} put where this Triton looks for them"
    else:
        run.notes["bundle, kernels"] = f"left out: {reason}"
    library = _install_library(folder / extension.CUDA_LIBRARY.name, run)
    wheels = sorted((folder / WHEELS).glob("*.whl"))
    if wheels:
        site = folder / _SITE
        run.notes["bundle, wheels"] = _install(wheels, site)
        paths = [str(site.resolve()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return Unpacked(library, environment)


def kernels_reason(about: Mapping[str, Any]) -> str | None:
    """Why the Triton that is installed would not find a bundle's kernels; None where it would."""
    reason = available.version_reason()
    if reason is not None:
        return reason
    here = compiler(about["capability"])
    other = [name for name, value in about["compiler"].items() if value != here[name]]
    told = ", ".join(
        f"{name} {about['compiler'][name].splitlines()[-1:]}, here {here[name].splitlines()[-1:]}"
        for name in other
    )
    return f"compiled by another Triton: {told}" if other else None


def unpack_kernels(archive: Path, kernels: Mapping[str, str], cache: Path) -> int:
    """Put an archive's kernels where the installed Triton looks for them under `cache`; how many.

    Args:
        archive: what `pack` made.
        kernels: by folder, the rest of the hash's text.
        cache: Triton's cache folder.
    """
    homes = {folder: cache / folder_of(rest) for folder, rest in kernels.items()}
    with tarfile.open(archive, "r:xz") as packed:
        for folder, name, data in _members(packed, homes):
            home = homes[folder]
            home.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(data)
    for home in homes.values():
        paths = {path.name: str(path.resolve()) for path in home.iterdir() if path.is_file()}
        described = next(name for name in paths if name.endswith(".json"))
        (home / f"__grp__{described}").write_text(json.dumps({"child_paths": paths}))
    return len(homes)


def _members(packed: tarfile.TarFile, folders: Container[str]) -> Iterator[tuple[str, str, bytes]]:
    for member in packed:
        folder, _, name = member.name.partition("/")
        data = packed.extractfile(member)
        if data is None or folder not in folders or "/" in name or name.startswith("."):
            raise Unusable(f"its archive holds {member.name}, which no bundle does")
        yield folder, name, data.read()


def _install_library(built: Path, run: DeviceRun) -> bool:
    """Copy the CUDA library into the package, if it loads; whether it did."""
    if not built.exists():
        run.notes["bundle, CUDA library"] = "none"
        return False
    program = "import sys, torch; torch.ops.load_library(sys.argv[1])"
    said = _run([sys.executable, "-c", program, str(built.resolve())])
    if said:
        run.notes["bundle, CUDA library"] = f"left out, it does not load: {said}"
        return False
    shutil.copyfile(built, extension.CUDA_LIBRARY)
    run.notes["bundle, CUDA library"] = f"copied to {extension.CUDA_LIBRARY}"
    return True


def _install(wheels: Sequence[Path], site: Path) -> str:
    """Install wheels into a folder of their own; what became of it."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
    said = _run([*command, "--target", str(site), *map(str, wheels)])
    return f"not installed: {said}" if said else ", ".join(wheel.name for wheel in wheels)


def _run(command: Sequence[str]) -> str:
    """The end of what a failing command said; "" where it succeeded."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not done after {_INSTALL_SECONDS:.0f} s"
    said = (done.stderr or done.stdout).strip()[-300:]
    return (said or f"exit code {done.returncode}") if done.returncode else ""
