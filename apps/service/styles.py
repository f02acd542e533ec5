"""Styles: templates that a prompt is put into, from a JSON file that anyone can edit."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from apps.service import limits
from apps.service.prompt_texts import as_literal
from apps.service.request_error import RequestError

STYLES = Path(__file__).parent / "presets" / "styles.json"


class Style(BaseModel):
    """One style.

    Attributes:
        prompt: text with `{prompt}` in it.
        negative_prompt: what to avoid besides.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(max_length=500)
    negative_prompt: str = Field(default="", max_length=500)

    @field_validator("prompt")
    @classmethod
    def _check_place(cls, text: str) -> str:
        if text.count("{prompt}") != 1:
            raise ValueError("a style's prompt holds {prompt} exactly once")
        return text


@functools.cache
def load_styles(file: Path = STYLES) -> dict[str, Style]:
    """Read the styles.

    Args:
        file: JSON object, name -> style.

    Raises:
        ValueError: not such a file.
    """
    found = TypeAdapter(dict[str, Style]).validate_python(json.loads(file.read_text(encoding="utf-8")))
    return dict(found)


def apply_style(name: str, prompt: str, negative_prompt: str, syntax: str | None = None) -> tuple[str, str]:
    """Put a prompt into a style.

    Args:
        name: of the style.
        prompt: what to generate.
        negative_prompt: what to avoid.
        syntax: of both, see `apps.service.prompt_texts`; the style's own words are taken as they are.

    Returns:
        Prompt and negative prompt.

    Raises:
        ValueError: no such style, or the text becomes too long.
    """
    styles = load_styles()
    if name not in styles:
        raise RequestError(
            "choice",
            f"There is no such style; choose among {', '.join(styles)}.",
            field="style",
            value=name,
            choices=", ".join(styles),
        )
    style = styles[name]
    before, behind = (as_literal(part, syntax) for part in style.prompt.split("{prompt}"))
    text = f"{before}{prompt}{behind}"
    own = as_literal(style.negative_prompt, syntax)
    avoided = ", ".join(part for part in (negative_prompt.strip(), own) if part)
    if max(len(text), len(avoided)) > limits.MAX_PROMPT_CHARS:
        raise RequestError(
            "style.long",
            f"With the style {name!r} the prompt is longer than {limits.MAX_PROMPT_CHARS} characters.",
            value=name,
            most=limits.MAX_PROMPT_CHARS,
        )
    return text, avoided
