"""Files, and rooms of the system, use each other in one direction only: downward."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("python/amtl", "python/amtl_command", "amtl_kernels", "bench")
FLOORS = {"amtl_kernels": 0, "amtl": 1, "amtl_command": 1, "bench": 2}
"""Packages by the height at which they stand: each uses those below it and beside it."""
ROOMS = {
    "kernels": {"kernels", "hostsim"},
    "cpu": {"cpu", "kernels"},
    "cuda": {"cuda", "kernels"},
    "torch": {"torch", "cpu", "cuda", "kernels"},
    "serve": {"serve", "cpu"},
}
"""Folders of `csrc`, and those whose headers they include; only `torch` knows PyTorch's."""


def modules(packages: Iterable[Path]) -> dict[str, Path]:
    """Files by the name under which they are imported."""
    found = {}
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def named(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names that import statements name, those inside functions and `TYPE_CHECKING` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which of `files` each names in an import; a package's name stands for its `__init__`."""
    graph = {}
    for name, path in files.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        used = set()
        for target in named(ast.parse(path.read_text(encoding="utf-8")), package):
            inside = target if target in files else target.rpartition(".")[0]
            used |= {inside} & files.keys()
        graph[name] = used - {name}
    return graph


def room(name: str) -> str:
    """`amtl.layer.table` is in the room `amtl.layer`; `amtl.cli` is one of its own."""
    return ".".join(name.split(".")[:2])


def joined(graph: Mapping[str, set[str]], place: Callable[[str], str]) -> dict[str, set[str]]:
    """The graph of the places that its nodes lie in."""
    places: dict[str, set[str]] = {}
    for name, used in graph.items():
        places.setdefault(place(name), set()).update(map(place, used))
    return {name: used - {name} for name, used in places.items()}


def check_acyclic(graph: Mapping[str, set[str]]) -> None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("import each other: " + " <- ".join(error.args[1]))


def test_no_two_files_import_each_other() -> None:
    graph = imports(modules(REPOSITORY / package for package in PACKAGES))
    assert "amtl.layer.table" in graph["amtl.layer.embedding"]
    check_acyclic(graph)


def test_no_two_rooms_import_each_other() -> None:
    graph = joined(imports(modules([REPOSITORY / "python/amtl"])), room)
    assert "amtl.layer" in graph["amtl.run"]
    check_acyclic(graph)


def test_no_floor_imports_a_higher_one() -> None:
    graph = joined(
        imports(modules(REPOSITORY / package for package in PACKAGES)),
        lambda name: name.split(".")[0],
    )
    assert graph["amtl"] == {"amtl_kernels", "amtl_command"}
    for name, used in graph.items():
        assert all(FLOORS[other] <= FLOORS[name] for other in used), name


@pytest.mark.parametrize("name", ROOMS)
def test_native_code_includes_lower_rooms_only(name: str) -> None:
    found = set()
    for path in (REPOSITORY / "csrc" / name).iterdir():
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r'^#include "(\w+)/', text, re.M))
        assert name == "torch" or not re.search(r"#include <(torch|ATen|c10)/", text), path
    assert {name} <= found <= ROOMS[name]


@pytest.mark.parametrize(
    "statement",
    [
        "import house.kitchen.stove",
        "from house.kitchen import stove",
        "from house.kitchen.stove import flame",
        "from .kitchen.stove import flame",
        "def cook():\n    from .kitchen import stove",
    ],
)
def test_a_cycle_is_found(tmp_path: Path, statement: str) -> None:
    kitchen = tmp_path / "house" / "kitchen"
    kitchen.mkdir(parents=True)
    for path in (tmp_path / "house", kitchen):
        (path / "__init__.py").touch()
    (tmp_path / "house" / "hall.py").write_text(statement)
    stove = kitchen / "stove.py"
    stove.touch()
    graph = imports(modules([tmp_path / "house"]))
    assert graph["house.hall"] == {"house.kitchen.stove"}
    check_acyclic(graph)
    stove.write_text("from ..hall import door")
    graph = imports(modules([tmp_path / "house"]))
    for each in (graph, joined(graph, room)):
        with pytest.raises(pytest.fail.Exception, match=r"import each other: house\."):
            check_acyclic(each)
