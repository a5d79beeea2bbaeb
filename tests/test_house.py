"""The package's layers: no circular imports, no Ray in pure modules, no string that names a module of a layer above."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import umarvel_ray

PACKAGE = "umarvel_ray"
ROOT = Path(umarvel_ray.__file__).parent
WITHOUT_RAY = (
    "items",
    "data",
    "model",
    "importing",
    "suites",
    "index",
    "estimate",
    "retrieve.topk",
    "retrieve.metrics",
    "mining.filters",
    "compat.private",
)
REFERENCE = re.compile(rf"\b{PACKAGE}(?:\.\w+)+")

Graph = dict[str, set[str]]


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of every module of the package by its name. Left out is `umarvel_ray/__init__.py`, the face."""
    trees = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))
        if name != PACKAGE:
            trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names imported anywhere in a module: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The module of the package that a dotted name belongs to; None for another package or the face."""
    while name and name not in sources():
        name = name.rpartition(".")[0]
    return name or None


@cache
def modules() -> Graph:
    """Which modules each module imports."""
    return {
        name: {found for imported in imports(tree) if (found := module_of(imported)) and found != name}
        for name, tree in sources().items()
    }


def folder_of(module: str) -> str:
    """`umarvel_ray.items.item` → `items`; a top-level module is a folder of its own."""
    return module.split(".")[1]


def below(module: str) -> set[str]:
    """Everything that a module imports, directly or not."""
    found, pending = set(), [module]
    while pending:
        fresh = modules()[pending.pop()] - found
        found |= fresh
        pending += fresh
    return found


def circle(graph: Graph) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_folders_form_layers():
    folders: Graph = {}
    for name, imported in modules().items():
        folders.setdefault(folder_of(name), set()).update(map(folder_of, imported))
    for name, imported in folders.items():
        imported.discard(name)
    assert circle(folders) is None


def test_modules_form_layers():
    assert circle(modules()) is None


def test_no_module_imports_the_face():
    """`umarvel_ray/__init__.py` imports the models: to import it back would be circular."""
    face = {PACKAGE, *(f"{PACKAGE}.{name}" for name in umarvel_ray.__all__)}
    assert [name for name, tree in sources().items() if face & set(imports(tree))] == []


@pytest.mark.parametrize("layer", WITHOUT_RAY)
def test_pure_modules_import_no_ray(layer):
    """In a fresh process, so that what other packages import counts as well."""
    prefix = f"{PACKAGE}.{layer}"
    names = [name for name in sources() if name == prefix or name.startswith(f"{prefix}.")]
    assert names
    code = (
        f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
        "    assert 'ray' not in sys.modules, name"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert process.returncode == 0, process.stderr


def test_no_string_names_a_module_of_a_layer_above():
    upward = [
        f"{name} line {node.lineno}: {found}"
        for name, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for reference in REFERENCE.findall(node.value)
        if (found := module_of(reference)) and name in below(found)
    ]
    assert upward == []


def test_the_walk_sees_every_kind_of_import():
    guarded = "if TYPE_CHECKING:\n    from e import f\n"
    nested = "def g():\n    import h\n    from i import j\n"
    tree = ast.parse(f"import a.b\nfrom c import d\n{guarded}{nested}")
    assert set(imports(tree)) == {"a.b", "c.d", "e.f", "h", "i.j"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None
    assert circle({"a": {"b", "c"}, "b": {"c"}}) is None
