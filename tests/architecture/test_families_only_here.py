"""Mechanisms know no family: what differs between networks stands in `dit/runtime/families` and nowhere else."""

import ast
import re
from pathlib import Path

import diffusers
import pytest

from dit.runtime.families import FAMILIES

MECHANISMS = ("dit/attention", "dit/quant", "dit/cache", "dit/runtime", "sampling")
TABLE = "dit/runtime/families"

# Words that mean something else than the family: a small one of ours, and a mathematician's.
NAMES = sorted({row.name for row in FAMILIES} - {"dit", "text_dit", "class_dit"})
CLASSES = sorted(
    {row.transformer for row in FAMILIES if row.package == "diffusers"}
    | {listed.name for row in FAMILIES for listed in row.pipelines}
    | {name for name in dir(diffusers) if re.search(r"Transformer[23]D(Model)?$|Pipeline$", name)}
)


def families_named(source: str) -> list[str]:
    """Family and class names in the code of a file: names, attributes, imports and strings, but not docstrings."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    words: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            words |= set(re.findall(r"\w+", node.value))
        elif isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.alias):
            words |= set(node.name.split("."))
        elif isinstance(node, ast.ImportFrom) and node.module:
            words |= set(node.module.split("."))
    pattern = re.compile("|".join(NAMES), re.IGNORECASE)
    return sorted(word for word in words if word in CLASSES or pattern.fullmatch(word) or _starts(word))


def _starts(word: str) -> bool:
    """Whether a name is made of a family's: `flux_blocks`, `WanCache`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).lower()
    return any(spaced.startswith(name + "_") or spaced.endswith("_" + name) for name in NAMES)


def mechanism_files(root: Path) -> list[Path]:
    files = [path for folder in MECHANISMS for path in sorted((root / folder).rglob("*.py"))]
    return [path for path in files if not path.is_relative_to(root / TABLE)]


def test_mechanisms_name_no_family(root: Path) -> None:
    files = mechanism_files(root)
    assert len(files) >= 5
    named = {str(path.relative_to(root)): families_named(path.read_text()) for path in files}
    assert not {path: names for path, names in named.items() if names}, (
        "ask dit.runtime.families.family_of(model) instead of naming a family"
    )


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from diffusers import FluxTransformer2DModel", ["FluxTransformer2DModel"]),
        ("if type(m).__name__ == 'WanTransformer3DModel': pass", ["WanTransformer3DModel"]),
        ("if family.name == 'sd3': pass", ["sd3"]),
        ("def f(pipe):\n    return flux_blocks(pipe.qwen_image)", ["flux_blocks", "qwen_image"]),
        ("from diffusers.models.transformers import AuraFlowTransformer2DModel as A", ["AuraFlowTransformer2DModel"]),
        ('"""As Flux does."""\nwanted = fluxes = family.name', []),
    ],
)
def test_the_search_finds_them(source: str, found: list[str]) -> None:
    assert families_named(source) == found
