"""docs/quantization.md is what the registries of recipes, formats and kernels say."""

from pathlib import Path

from apps.quantization_docs import page
from dit.quant.formats import format_names
from dit.quant.kernels.table import linear_kernels
from dit.quant.recipes import recipe_names

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_that_of_the_code() -> None:
    """`python -m apps.quantization_docs docs` writes it anew."""
    committed = (DOCS / "quantization.md").read_text(encoding="utf-8")
    names = (*recipe_names(), *format_names(), *linear_kernels())
    missing = [name for name in names if f"| `{name}` |" not in committed]
    assert not missing, f"run `python -m apps.quantization_docs docs`: it lacks {', '.join(missing)}"
    assert committed == page(), "run `python -m apps.quantization_docs docs`"
