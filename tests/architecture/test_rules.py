"""Rules on the text of the sources: direction of imports, sizes, calls that nobody may make."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import PACKAGES, ROOT, parse, python_files, tracked_files, where

MAX_LINES = 800
# Written in two halves, so that this file does not find itself; /home/someone is for examples.
FORBIDDEN_TEXT = {
    "a path of one machine": re.compile("/(?:" + "home|root|work|Users" + r")/(?!someone/)[\w.-]+/[\w.-]+"),
    "a temporary path of one machine": re.compile(r"/tmp" + r"/[\w.-]+/[\w.-]+"),
}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".html", ".css", ".js", ".cfg", ".yml", ".yaml", ""}


def test_imports_go_only_one_way() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    assert command is not None, "import-linter is missing: pip install '.[dev]'"
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kept, 0 broken" in result.stdout, result.stdout


def test_every_package_has_sources() -> None:
    """Guards the other rules: they would hold for an empty list too."""
    found = {path.relative_to(ROOT).parts[0] for path in python_files()}
    assert found == {*PACKAGES, "tools", "tests"}


def test_no_file_is_longer_than_one_can_read() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    too_long = {name: lines for name, lines in sizes.items() if lines > MAX_LINES}
    assert not too_long, f"over {MAX_LINES} lines, split by idea: {too_long}"


def test_sources_are_ascii() -> None:
    odd = [str(path.relative_to(ROOT)) for path in python_files() if not path.read_bytes().isascii()]
    assert not odd, f"not ASCII: {odd}"


@pytest.mark.parametrize("reason", FORBIDDEN_TEXT)
def test_no_machine_paths(reason: str) -> None:
    found = []
    for path in tracked_files():
        if path.suffix not in TEXT_SUFFIXES:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if FORBIDDEN_TEXT[reason].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, f"{reason}:\n" + "\n".join(found)


def _name(node: ast.expr) -> str:
    """The dotted name of an expression such as `torch.load`, or ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return ""


def forbidden_calls(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    """Find calls that run foreign code, hide errors or write past the console."""
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, keywords = _name(node.func), {word.arg: word.value for word in node.keywords}
            if name in {"eval", "exec", "print", "os.system"}:
                found.append((node, f"{name}()"))
            if name.split(".")[0] in {"pickle", "dill", "cloudpickle"}:
                found.append((node, f"{name}(): unpickling runs code; use safetensors or json"))
            if name == "torch.load" and not _is_constant(keywords.get("weights_only"), True):
                found.append((node, "torch.load() without weights_only=True"))
            if _is_constant(keywords.get("trust_remote_code"), True):
                found.append((node, "trust_remote_code=True"))
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Attribute) and target.attr == "__class__" for target in targets):
                found.append((node, "an object's class is swapped; make another object"))
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                found.append((node, "bare except"))
            if all(isinstance(line, ast.Pass) for line in node.body):
                found.append((node, "an error is swallowed; handle it or say with contextlib.suppress why not"))
    return found


def _is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "print(1)",
        "pickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "M.from_pretrained(n, trust_remote_code=True)",
        "part.__class__ = Linear",
        "try:\n    f()\nexcept ValueError:\n    pass",
        "try:\n    f()\nexcept:\n    g()",
    ],
)
def test_the_rule_sees_each_forbidden_call(source: str) -> None:
    assert len(forbidden_calls(ast.parse(source))) == 1


def test_the_rule_leaves_good_calls_alone() -> None:
    good = "torch.load(f, weights_only=True)\nmodel.eval()\nconsole.print(1)\ncontextlib.suppress(OSError)"
    assert forbidden_calls(ast.parse(good)) == []


def test_no_forbidden_calls() -> None:
    found = [
        f"{where(path, node)}: {what}"
        for path in python_files(tests=False)
        for node, what in forbidden_calls(parse(path))
    ]
    assert not found, "\n".join(found)


def test_no_test_folder_is_named_like_a_package() -> None:
    """Python would import the test folder in the package's place (with pytest's path handling)."""
    assert not [name for name in PACKAGES if (ROOT / "tests" / name).exists()]


def test_typed_markers_are_there() -> None:
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()] == []
