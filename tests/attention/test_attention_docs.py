"""docs/attention.md is what the registry of patterns says, and its image has a mask of each."""

from pathlib import Path

from PIL import Image

from apps.attention_docs import page, sheet
from dit.attention import pattern_names

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_names_every_pattern_with_its_parameters() -> None:
    """`python -m apps.attention_docs docs` writes page and image anew."""
    committed = (DOCS / "attention.md").read_text(encoding="utf-8")
    missing = [name for name in pattern_names() if f"| `{name}` |" not in committed]
    assert not missing, f"run `python -m apps.attention_docs docs`: it lacks {', '.join(missing)}"
    assert committed == page(), "run `python -m apps.attention_docs docs`"


def test_the_image_has_a_mask_of_every_pattern_and_is_small() -> None:
    path = DOCS / "attention.png"
    assert path.stat().st_size < 50_000
    drawn = sheet()
    with Image.open(path) as committed:
        assert committed.mode == "P"
        assert committed.size == drawn.size
    assert drawn.getextrema() == (0, 3)
