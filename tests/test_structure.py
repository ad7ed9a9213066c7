"""The layout of the code: who imports whom, and names that stand for one thing."""

import ast
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.launching import ROOT

PACKAGES = ("megatron_rl", "rollout", "drafter")
ALLOWED = {
    "megatron_rl": {"megatron_rl", "rollout", "drafter"},
    "rollout": {"rollout", "megatron_rl.config"},
    "drafter": {"drafter"},
}
"""Per package, what its modules may import of this repository."""


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _imports() -> dict[str, frozenset[str]]:
    """Module -> the modules of this repository that it imports, also inside functions and for types alone."""
    files = {_module(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}
    found = {}
    for module, file in files.items():
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are absolute here"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        modules = {name if name in files else name.rpartition(".")[0] for name in names}
        found[module] = frozenset((modules & files.keys()) - {module})
    return found


def _cycles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Groups of nodes that can all reach each other."""
    reach = {node: set(graph[node]) for node in graph}
    for middle in graph:
        for node in graph:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    groups = {tuple(sorted(other for other in reach[node] if node in reach[other])) for node in graph}
    return [list(group) for group in sorted(groups) if group]


def _rooms(package: str) -> dict[str, frozenset[str]]:
    """The same between the folders of a package; a module beside them is a room of its own."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    members = {module: targets for module, targets in _imports().items() if module.startswith(f"{package}.")}
    graph: dict[str, set[str]] = {room(module): set() for module in members}
    for module, targets in members.items():
        graph[room(module)] |= {room(target) for target in targets if target.startswith(f"{package}.")} - {room(module)}
    return {name: frozenset(targets) for name, targets in graph.items()}


def test_there_are_modules_and_imports_to_look_at() -> None:
    assert len(_imports()) > 150
    assert "megatron_rl.config.schema" in _imports()["megatron_rl.config.load"]
    assert _cycles({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("b")}) == [["b", "c"]]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert _cycles(_imports()) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_rooms_of_a_package_have_an_order(package: str) -> None:
    assert _cycles(_rooms(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards(package: str) -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in _imports().items()
        for target in targets
        if module.split(".")[0] == package
        and not any(target == allowed or target.startswith(allowed + ".") for allowed in ALLOWED[package])
    ]
    assert wrong == []


def test_no_file_name_stands_twice_in_the_product() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES, "csrc", "benchmarks", "launch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = Counter(Path(file).name for file in listed.stdout.split() if (ROOT / file).exists())
    assert {name for name, count in names.items() if count > 1} <= {"__init__.py", "README.md", "py.typed"}
