"""No module imports itself through others, not even within a package or inside a function."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, parse, python_files


def module_name(path: Path) -> str:
    """Return the dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, known: set[str]) -> set[str]:
    """Return the modules of ours that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found |= {full if (full := f"{base}.{alias.name}") in known else base for alias in node.names}
    return (found & known) - {module_name(path)}


def graph() -> dict[str, set[str]]:
    """Return the imports of each module; packages whose `__init__` looks names up later are not entered."""
    files = {module_name(path): path for path in python_files(tests=False)}
    lazy = {name for name, path in files.items() if path.name == "__init__.py" and "__getattr__" in path.read_text()}
    return {name: imported(path, set(files)) - lazy for name, path in files.items() if name not in lazy}


def test_no_circle_of_imports() -> None:
    imports = graph()
    assert len(imports) > 200, "guards the rule: it would hold for an empty graph too"
    try:
        tuple(TopologicalSorter(imports).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None


def test_a_circle_would_be_found() -> None:
    imports = graph()
    imports["dit.layers.norms"] = imports["dit.layers.norms"] | {"dit.models.dit"}
    with pytest.raises(CycleError, match=r"dit\.layers\.attention"):
        tuple(TopologicalSorter(imports).static_order())
