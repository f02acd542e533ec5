"""A text file with one JSON object a line: {"file": "cat.png", "caption": "a cat", "weight": 2}.

`caption` may be missing, a text, or a list of texts of which one is drawn at each visit; `weight` says how often the
file is drawn, relative to the others (1 if missing). `file_name` and `text` are accepted for `file` and `caption`.
"""

from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from apps.training.config import ConfigError
from apps.training.data.decode import CLIP_SUFFIXES, IMAGE_SUFFIXES
from apps.training.data.files import Entry


class Line(BaseModel):
    """One line."""

    model_config = ConfigDict(extra="forbid")
    file: str = Field(min_length=1, validation_alias=AliasChoices("file", "file_name"))
    caption: str | list[str] = Field(default="", validation_alias=AliasChoices("caption", "text"))
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)


def list_lines(file: Path, folder: Path | None) -> list[Entry]:
    """List the files that the lines name, in their order.

    Args:
        file: One JSON object a line; empty lines are passed over.
        folder: What names are relative to; the folder of `file` if None.

    Raises:
        ConfigError: If the file is missing or empty, or a line is wrong: its number and what is accepted.
    """
    if not file.is_file():
        raise ConfigError(f"data.file = {str(file)!r} is no file; give a text file with one JSON object a line")
    root, found = folder or file.parent, {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = Line.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"{file}, line {number}: {_reason(error)}") from error
        if Path(line.file).suffix.lower() not in IMAGE_SUFFIXES | CLIP_SUFFIXES:
            accepted = ", ".join(sorted(IMAGE_SUFFIXES | CLIP_SUFFIXES))
            raise ConfigError(
                f"{file}, line {number}: file = {line.file!r} is no image or clip; accepted are {accepted}"
            )
        if line.file in found:
            raise ConfigError(
                f"{file}, line {number}: file = {line.file!r} was named before; give it a list of captions"
            )
        captions = [line.caption] if isinstance(line.caption, str) else line.caption
        captions = tuple(caption.strip() for caption in captions if caption.strip())
        found[line.file] = Entry(line.file, root / line.file, captions, line.weight)
    if not found:
        raise ConfigError(f"data.file = {str(file)!r} is empty; give one JSON object a line, such as {EXAMPLE}")
    return list(found.values())


EXAMPLE = '{"file": "cat.png", "caption": "a cat"}'


def _reason(error: ValidationError) -> str:
    """Return what is wrong with a line."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"][:1])
    if problem["type"] == "json_invalid":
        return f"no JSON object ({problem['msg']}); give one such as {EXAMPLE}"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}; accepted are file, caption and weight"
    if problem["type"] == "missing":
        return f"'file' is missing; give an object such as {EXAMPLE}"
    return f"{where} = {problem['input']!r}: {problem['msg']}; give an object such as {EXAMPLE}"
