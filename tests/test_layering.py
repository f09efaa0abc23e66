"""The import rule, and that what ships is what lies on disk."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "engine", "recipes", "benchmarks")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "recipes": {"recipes", "engine"},
    "benchmarks": {"benchmarks", "engine", "kernels"},
}
# Data walk left to right: a room may read from those before it, and from the files beside them.
WALK = ("data", "teacher", "train", "evaluate")
KERNEL_LIBRARIES = {"torch", "triton"}
TRANSFORMERS_FILES = {"engine/model.py"}
SOURCES = sorted(p.relative_to(ROOT) for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> list[str]:
    """Every module a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_follow_the_rule(path: Path) -> None:
    room = path.parts[0]
    allowed = set(MAY_IMPORT[room])
    if path == Path("recipes/cli.py"):
        allowed.add("benchmarks")
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "unteach":
            assert parts[1] in allowed, f"{path} imports {name}"
            check_walk(path, parts)
        assert parts[0] not in ROOMS, f"{path} imports {name} without unteach."
        if parts[0] == "typer":
            assert room == "recipes", f"{path}: typer belongs in recipes"
        if parts[0] == "transformers" and room == "engine":
            data = path.parts[1] == "data"
            assert data or path.as_posix() in TRANSFORMERS_FILES, f"{path} imports transformers"


def check_walk(path: Path, parts: list[str]) -> None:
    if path.parts[0] != "engine" or parts[1] != "engine" or len(parts) < 3:
        return
    here, there = path.parts[1], parts[2]
    if here in WALK and there in WALK:
        assert WALK.index(there) <= WALK.index(here), f"{path} imports {'.'.join(parts)}"


def test_kernels_know_torch_and_triton_only() -> None:
    import sys

    for path in SOURCES:
        if path.parts[0] == "kernels":
            tops = {name.split(".")[0] for name in imported(path)} - {"unteach"}
            assert tops <= KERNEL_LIBRARIES | sys.stdlib_module_names, f"{path}: {tops}"


def test_packages_are_the_folders_with_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in SOURCES} | {Path(room) for room in ROOMS}
    assert listed == {"unteach." + ".".join(folder.parts) for folder in folders}


def test_rooms_are_namespace_portions() -> None:
    assert not [p for room in ROOMS for p in (ROOT / room).rglob("__init__.py")]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_are_short(path: Path) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 400
