r"""What the prompts of a request become for one image: alternatives chosen, wildcards filled in, weights read.

`prompt_syntax` says what counts: nothing with `plain`, which is the default of requests; weights `(word:1.2)` with
`weights`; `{a|b}` and `__name__` too with `dynamic`, which is what page and command line ask for; brackets without a
number too with `a1111`. What is chosen follows from the seed of the image, so image i of a request has a choice of its
own, which is the same whenever that image is generated again. Recorded is what came out, as `weights` or `plain`, and
the prompt that it came from beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel

from apps.service import limits
from apps.service.request_error import RequestError
from apps.service.requests import AnyRequest
from apps.service.wildcards import Wildcards
from pipelines.inputs.prompt_syntax import (
    PromptSyntaxError,
    Span,
    escape_weights,
    expand,
    has_choices,
    has_weights,
    parse_template,
    parse_weights,
    plain_text,
    write_weights,
)

Found = TypeVar("Found")
Asked = TypeVar("Asked", bound=BaseModel)

FIELDS = ("prompt", "negative_prompt")
SIDES = ("prompt", "negative prompt")
"""What notes call them."""
CHOOSING = ("dynamic", "a1111")
"""Syntaxes with alternatives and wildcards."""
SHOWN = 300
"""Characters of a prompt that a note repeats."""
READ_AS, WEIGHTS = "was read as:", "gives words a weight:"
"""What notes say of a prompt."""


@dataclass(frozen=True, slots=True)
class PromptTexts:
    """A request for one image, and where its prompts come from.

    Attributes:
        request: with the prompts of the image; its syntax is `weights`, or None if they have none.
        prompt_template: what the prompt was before; None if it was the same.
        negative_prompt_template: what the negative prompt was before; None if it was the same.
        notes: what became of them, a sentence each.
    """

    request: AnyRequest
    prompt_template: str | None = None
    negative_prompt_template: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def recorded(self) -> dict[str, str | None]:
        """Fields of `apps.service.metadata.PictureSettings` beside those of the request."""
        return {
            "prompt_template": self.prompt_template,
            "negative_prompt_template": self.negative_prompt_template,
        }


def syntax_of(request: BaseModel) -> str:
    """Return how the prompts of a request are read."""
    return getattr(request, "prompt_syntax", None) or "plain"


def varies(request: AnyRequest) -> bool:
    """Whether the images of a request have prompts of their own.

    Raises:
        RequestError: a prompt is not understood.
    """
    if syntax_of(request) not in CHOOSING:
        return False
    return any(has_choices(_checked(lambda text=text: parse_template(text))) for text in _texts(request).values())


def one_by_one(request: AnyRequest) -> AnyRequest:
    """Return a request whose images are generated one at a time if they have prompts of their own.

    Raises:
        RequestError: it picks an image of a batch, all of which have one prompt.
    """
    if not varies(request):
        return request
    if request.pick is not None:
        message = (
            "pick chooses from a batch of one prompt, and this prompt becomes another one for each image; leave pick "
            "out, or set prompt_syntax to plain."
        )
        raise RequestError("prompt.pick", message)
    return request.model_copy(update={"batch_size": 1})


def texts_of(request: AnyRequest, seed: int, wildcards: Wildcards) -> PromptTexts:
    """Return the prompts of one image.

    Args:
        request: what was asked.
        seed: of the image.
        wildcards: of the server.

    Raises:
        RequestError: a prompt is not understood, names an unknown wildcard, becomes empty or too long, or gives a word
            a weight out of range.
    """
    syntax, before = syntax_of(request), _texts(request)
    if syntax == "plain" or not before:
        return PromptTexts(request)
    spans = {name: _spans(text, syntax, seed, name, wildcards) for name, text in before.items()}
    if not plain_text(spans["prompt"]).strip():
        raise RequestError("prompt", "the prompt is empty; say what to generate.")
    is_weighted = any(map(has_weights, spans.values()))
    after = {name: (write_weights if is_weighted else plain_text)(found) for name, found in spans.items()}
    for text in after.values():
        if len(text) > limits.MAX_PROMPT_CHARS:
            raise RequestError(
                "prompt.long",
                f"prompt: it becomes {len(text)} characters long, and at most {limits.MAX_PROMPT_CHARS} are read; "
                "shorten it, or the lines of its wildcards.",
                value=len(text),
                most=limits.MAX_PROMPT_CHARS,
            )
    changed = {f"{name}_template": text for name, text in before.items() if after[name] != text}
    notes = _notes(before, after, spans) if syntax in CHOOSING else ()
    written = request.model_copy(update={**after, "prompt_syntax": "weights" if is_weighted else None})
    return PromptTexts(written, **changed, notes=notes)


def check_texts(request: AnyRequest, wildcards: Wildcards) -> None:
    """Check the prompts of all images of a request, whose seed is settled, before it waits in line.

    Raises:
        RequestError: see `texts_of` and `one_by_one`.
    """
    if syntax_of(request) != "plain":
        for seeds in one_by_one(request).batches():
            texts_of(request, seeds[0], wildcards)


def spans_of(request: BaseModel) -> dict[str, tuple[Span, ...]]:
    """Return the spans of the prompts of one image, as `texts_of` wrote them; none if no word has a weight."""
    if syntax_of(request) != "weights":
        return {}
    return {name: _checked(lambda text=text: parse_weights(text)) for name, text in _texts(request).items()}


def without_weights(request: Asked) -> Asked:
    """Return the request, or the settings, of one image with the plain text of its prompts."""
    plain = {name: plain_text(spans) for name, spans in spans_of(request).items()}
    return request.model_copy(update={**plain, "prompt_syntax": None}) if plain else request


def as_literal(text: str, syntax: str | None) -> str:
    """Write a text so that it stays what it is within a prompt of a syntax, such as that of a style."""
    if syntax in (None, "plain"):
        return text
    text = escape_weights(text)
    if syntax == "a1111":
        text = text.replace("[", "\\[").replace("]", "\\]")
    if syntax in CHOOSING:
        for mark in "{}|_":
            text = text.replace(mark, f"\\{mark}")
    return text


def is_prompt_note(note: str) -> bool:
    """Whether a note on an image says what a prompt became."""
    return note.startswith(tuple(f"The {what} {said}" for what in SIDES for said in (READ_AS, WEIGHTS)))


# -------------------------------------------------------------------------------- details


def _texts(request: BaseModel) -> dict[str, str]:
    """Return the prompts that a request has; none for an image of a class."""
    found = {name: getattr(request, name, None) for name in FIELDS}
    return {name: text for name, text in found.items() if text is not None} if found["prompt"] else {}


def _spans(text: str, syntax: str, seed: int, name: str, wildcards: Wildcards) -> tuple[Span, ...]:
    """Return what a prompt becomes for one image."""
    if syntax in CHOOSING:
        template = _checked(lambda: parse_template(text))
        if has_choices(template):
            generator = random.Random(f"{seed}:{name}")
            text = _checked(lambda: expand(template, generator, wildcards.lines))
            text = " ".join(text.split())  # an empty alternative leaves two blanks
        else:
            text = "".join(part for part in template if isinstance(part, str))
    return _checked(lambda: parse_weights(text, bare=syntax == "a1111"))


def _checked(read: Callable[[], Found]) -> Found:
    """Return what a function reads of a prompt; its refusal as that of a request."""
    try:
        return read()
    except PromptSyntaxError as error:
        raise RequestError("prompt.syntax", str(error), value=error.place, reason=str(error)) from error


def _notes(before: Mapping[str, str], after: Mapping[str, str], spans: Mapping[str, Sequence[Span]]) -> tuple[str, ...]:
    """Say what prompts became, where that is another text, and which of their words have weights."""
    notes = []
    for name, text in after.items():
        what = f"The {SIDES[FIELDS.index(name)]}"
        if text != before[name]:
            notes.append(f"{what} {READ_AS} {text[:SHOWN]}")
        elif has_weights(spans[name]):
            words = ", ".join(f"{one.text.strip()[:40]} {one.weight:g}" for one in spans[name] if one.weight != 1)
            notes.append(f"{what} {WEIGHTS} {words[:SHOWN]}")
    return tuple(notes)
