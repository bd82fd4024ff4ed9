"""Facts that are written in two places, held to one."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import resformer_kernels
from build_support import backend

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("resformer_kernels", "build_support", "tests", "csrc", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
)


def test_version_stands_in_one_place() -> None:
    assert importlib.metadata.version("resformer-kernels") == resformer_kernels.__version__
    quoted = f'"{resformer_kernels.__version__}"'
    written = [path for path in (*SOURCES, ROOT / "pyproject.toml") if quoted in path.read_text()]
    assert written == [ROOT / "resformer_kernels" / "__init__.py"]


def test_set_up_build_and_readme_pin_the_same_torch() -> None:
    pinned = re.search(r"TORCH_VERSION:-([\d.]+)", (ROOT / "scripts/venv.sh").read_text())
    assert pinned is not None
    assert pinned[1] == backend.TORCH
    assert f"torch {pinned[1]}" in (ROOT / "README.md").read_text()


def test_files_are_short_enough_to_read() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


PACKAGE = ROOT / "resformer_kernels"
LAYERS = (
    *("_triton", "_core", "mix", "scan", "attention", "kvcache", "reservoir", "nn", "models"),
    *("distributed", "tasks", "compat", "integrations", "testing", "bench", "demo", "cli"),
)
"""Folders of the package: each may import itself and those before it."""


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules that a module names, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


IMPORTS = {
    name: {found for found in imports(tree) if found in MODULES} for name, tree in MODULES.items()
}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    reach = {name: reached(name) for name in graph}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    return sorted(map(list, groups))


def test_no_module_imports_itself_through_others() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert circles(IMPORTS) == []


def _layer(module: str) -> int:
    folder = module.split(".")[1:2]
    return LAYERS.index(folder[0]) if folder else len(LAYERS)


def test_nothing_imports_upward() -> None:
    wrong = [
        f"{name} imports {found}"
        for name, named in IMPORTS.items()
        for found in named
        if found != "resformer_kernels" and _layer(name) < _layer(found)
    ]
    assert wrong == []
    assert [name for name in MODULES if "benchmarks" in set(imports(MODULES[name]))] == []


def _backend(module: str) -> str | None:
    """Which backend of an op a module is part of."""
    parts = module.split(".")
    known = ("native", "reference", "triton", "flash_attn", "sdpa")
    op = parts[1:2] and parts[1] in ("attention", "kvcache", "mix", "scan", "reservoir")
    return next((part for part in parts[2:3] if part in known), None) if op else None


def test_no_backend_imports_another() -> None:
    wrong = [
        f"{name} imports {found}"
        for name, named in IMPORTS.items()
        for found in named
        if _backend(name) and _backend(found) and _backend(name) != _backend(found)
    ]
    assert wrong == []


def _replaced(tree: ast.Module) -> list[str]:
    """Attributes of imported names that a module sets."""
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    targets = [
        target
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AugAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
    ]
    owners = {ast.unparse(target): target.value for target in targets}
    return [name for name, owner in owners.items() if ast.unparse(owner).split(".")[0] in imported]


def test_the_package_replaces_functions_of_transformers_alone_at_run_time() -> None:
    assert _replaced(ast.parse("import os\nos.path.join = None")) == ["os.path.join"]
    found = {name: replaced for name, tree in MODULES.items() if (replaced := _replaced(tree))}
    settings = found.pop("resformer_kernels.cli.compile.artifacts")
    assert all(name.startswith("triton.knobs.") for name in settings)
    assert found == {
        "resformer_kernels.integrations.transformers.batching": [
            "ContinuousBatchingManager.switch_to_cb_friendly_attn",
            "paged_cache.PagedAttentionMemoryHandler.__init__",
        ],
        "resformer_kernels.integrations.transformers.support": [
            "PreTrainedModel.get_correct_attn_implementation"
        ],
    }
    mocking = [
        name
        for name, tree in MODULES.items()
        if any(module.split(".")[0] == "unittest" for module in imports(tree))
    ]
    assert mocking == []


def anonymous(tree: ast.Module) -> list[str]:
    """Functions that take `*arguments: Any`, but for methods of an autograd.Function, whose `apply`
    passes whatever it is given."""
    boundaries = {
        method
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any("autograd.Function" in ast.unparse(base) for base in node.bases)
        for method in node.body
    }
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node not in boundaries
        and node.args.vararg is not None
        and node.args.vararg.annotation is not None
        and ast.unparse(node.args.vararg.annotation) == "Any"
    ]


def test_arguments_have_names() -> None:
    # An op's registration, and `explain`, take the arguments of any op.
    exempt = ("resformer_kernels._core.op", "resformer_kernels._core.select")
    found = {name: anonymous(tree) for name, tree in MODULES.items() if name not in exempt}
    assert {name: functions for name, functions in found.items() if functions} == {}
