"""Which files the rules look at."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dit", "sampling", "pipelines", "apps")


@cache
def tracked_files() -> tuple[Path, ...]:
    """All files of the repository, also new ones that git does not ignore; those on disk in an exported copy."""
    if not (ROOT / ".git").exists():
        return tuple(path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts)
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return tuple(path for name in names if name and (path := ROOT / name).is_file())


def python_files(*, tests: bool = True) -> list[Path]:
    """The Python files of the four packages and of the installer, and of the tests too if asked."""
    folders = (*PACKAGES, "tools", "tests") if tests else (*PACKAGES, "tools")
    return [path for path in tracked_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, node: ast.AST) -> str:
    """A place as 'file:line', for messages."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
