r"""The syntax of prompts: weights `(word:1.2)`, alternatives `{a|b}` and wildcards `__name__`. Pure functions.

Weights follow AUTOMATIC1111's web UI: `(word:1.2)` multiplies, nested ones multiply each other, `\(` is a bracket. With
`bare` brackets count too: `(word)` is 1.1 and `[word]` 1 / 1.1. Without, brackets that hold no weight are text, so that
prompts in plain language stay what they are.

Alternatives follow the extension Dynamic Prompts: `{a|b}` is one of them, `{2$$a|b|c}` two different ones joined by
commas, `{1-2$$ and $$a|b|c}` one or two joined by ` and `, `{3::a|b}` or `{a::3|b}` has a three times as often.
`__name__` is a line of a list of that name. `\{`, `\}`, `\|` and `\_` are text. Braces without `|` or `$$` are text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BARE_WEIGHT = 1.1
"""Of a bracket without a number."""
MAX_WEIGHT = 10.0
"""Largest weight of a word, by its absolute value."""
MAX_DEPTH = 8
"""How deep alternatives stand in each other, and wildcards in the lines of wildcards."""
MAX_CHOICES = 500
"""Alternatives and wildcards that one prompt may come to."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_WEIGHTS = re.compile(rf"\\[()\[\]\\]|\\|\(|\[|:\s*({_NUMBER})\s*\)|\)|\]|[^\\()\[\]:]+|:")
_WILDCARD = re.compile(r"__([A-Za-z0-9]+(?:[_\-/]?[A-Za-z0-9]+)*)__")
_COUNT = re.compile(r"\s*(\d{1,3})(?:\s*-\s*(\d{1,3}))?\s*\$\$(?:([^$|{}]*)\$\$)?")
_ODDS_BEFORE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*::")
_ODDS_BEHIND = re.compile(r"::\s*(\d+\.?\d*|\.\d+)\s*$")


class PromptSyntaxError(ValueError):
    """A prompt asks for something that can't be had.

    Attributes:
        place: of the prompt that is wrong.
        remedy: what to write instead.
    """

    def __init__(self, place: str, reason: str, remedy: str) -> None:
        super().__init__(f"prompt: {place!r:.80} {reason}; {remedy}.")
        self.place = place[:80]
        self.reason = reason
        self.remedy = remedy


# ------------------------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a prompt with one weight; 1 is as it comes."""

    text: str
    weight: float = 1.0


def parse_weights(text: str, bare: bool = False) -> tuple[Span, ...]:
    r"""Read the weights of a prompt.

    Args:
        text: the prompt.
        bare: whether brackets without a number count: `(word)` is 1.1, `[word]` 1 / 1.1, to the end of the prompt if
            they aren't closed, and a backslash before other characters is left out, as in AUTOMATIC1111's web UI.

    Returns:
        Its spans in their order, neighbours of one weight put together; none for an empty prompt.

    Raises:
        PromptSyntaxError: a weight beyond `MAX_WEIGHT`.
    """
    reader = _WeightReader(bare)
    for match in _WEIGHTS.finditer(text):
        reader.take(match.group(0), match.group(1))
    reader.close()
    return _joined(reader.texts, reader.weights)


class _WeightReader:
    """Takes the pieces of a prompt one by one, and multiplies those of a bracket when it is closed."""

    def __init__(self, bare: bool) -> None:
        self.texts: list[str] = []
        self.weights: list[float] = []
        self._bare = bare
        self._rounds: list[int] = []  # where they were opened
        self._squares: list[int] = []

    def take(self, piece: str, number: str | None) -> None:
        """Take a piece; `number` is that of a closing bracket with one."""
        if piece.startswith("\\"):
            self._put(piece[1:] if self._bare or len(piece) > 1 else piece)
        elif piece == "(":
            self._rounds.append(len(self.texts))
            self._put("" if self._bare else piece)
        elif self._rounds and number is not None:
            start = self._rounds.pop()
            self.texts[start] = ""
            self._multiply(start, float(number))
        elif self._rounds and piece == ")":
            start = self._rounds.pop()
            self._multiply(start, BARE_WEIGHT if self._bare else 1.0)
            self._put("" if self._bare else piece)
        elif self._bare and piece == "[":
            self._squares.append(len(self.texts))
        elif self._bare and piece == "]" and self._squares:
            self._multiply(self._squares.pop(), 1 / BARE_WEIGHT)
        else:
            self._put(piece)

    def close(self) -> None:
        """Let brackets that are still open reach to the end."""
        for start in self._rounds if self._bare else ():
            self._multiply(start, BARE_WEIGHT)
        for start in self._squares:
            self._multiply(start, 1 / BARE_WEIGHT)

    def _put(self, piece: str) -> None:
        self.texts.append(piece)
        self.weights.append(1.0)

    def _multiply(self, start: int, factor: float) -> None:
        for i in range(start, len(self.weights)):
            self.weights[i] *= factor


def _joined(texts: Sequence[str], weights: Sequence[float]) -> tuple[Span, ...]:
    """Put neighbours of one weight together, and check the weights."""
    spans: list[Span] = []
    for text, weight in zip(texts, weights, strict=True):
        if not text:
            continue
        if not abs(weight) <= MAX_WEIGHT:
            raise PromptSyntaxError(
                text, f"has the weight {weight:g}", f"weights are from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
            )
        if spans and spans[-1].weight == weight:
            spans[-1] = Span(spans[-1].text + text, weight)
        else:
            spans.append(Span(text, weight))
    return tuple(spans)


def plain_text(spans: Sequence[Span]) -> str:
    """Return a prompt without its weights."""
    return "".join(span.text for span in spans)


def has_weights(spans: Sequence[Span]) -> bool:
    """Whether any part of a prompt has a weight other than 1."""
    return any(span.weight != 1 for span in spans)


def write_weights(spans: Sequence[Span]) -> str:
    """Write a prompt so that `parse_weights`, without `bare`, reads the same spans."""
    return "".join(
        escape_weights(one.text) if one.weight == 1 else f"({escape_weights(one.text)}:{_decimal(one.weight)})"
        for one in spans
    )


def _decimal(number: float) -> str:
    """Write a number without an exponent, to the last bit."""
    text = repr(number)
    return text if "e" not in text else f"{number:.330f}".rstrip("0")


def escape_weights(text: str) -> str:
    """Write a text so that `parse_weights` takes it as it is."""
    return re.sub(r"[\\()]", lambda match: f"\\{match.group(0)}", text)


# --------------------------------------------------------------------------- alternatives


@dataclass(frozen=True, slots=True)
class Wildcard:
    """A line of a list."""

    name: str


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Some of several texts.

    Attributes:
        options: how often one comes beside the others, and what it is.
        low: fewest of them.
        high: most of them.
        joint: between two of them.
    """

    options: tuple[tuple[float, Template], ...]
    low: int = 1
    high: int = 1
    joint: str = ", "


Template = tuple["str | Wildcard | Alternatives", ...]
"""What a prompt with alternatives consists of."""


def parse_template(text: str) -> Template:
    r"""Read the alternatives and wildcards of a prompt.

    Backslashes before other characters than `{}|_` stay where they are, because weights are read afterwards.

    Raises:
        PromptSyntaxError: alternatives stand in each other too deep, or ask for more of them than there are.
    """
    return _parse(text, 0, len(text), _closed_braces(text), 0)


def has_choices(template: Template) -> bool:
    """Whether a prompt comes out differently with different seeds."""
    return any(not isinstance(part, str) for part in template)


def _closed_braces(text: str) -> dict[int, int]:
    """Return where braces are closed, by where they are opened; those without a partner are text."""
    found: dict[int, int] = {}
    opened: list[int] = []
    i = 0
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            opened.append(i)
        elif text[i] == "}" and opened:
            found[opened.pop()] = i
        i += 1
    return found


def _parse(text: str, start: int, end: int, closed: dict[int, int], depth: int) -> Template:
    """Read a part of a text, from `start` to before `end`."""
    parts: list[str | Wildcard | Alternatives] = []

    def put(piece: str) -> None:
        if parts and isinstance(parts[-1], str):
            parts[-1] += piece
        elif piece:
            parts.append(piece)

    i = start
    while i < end:
        if text[i] == "\\" and i + 1 < end:
            put(text[i + 1] if text[i + 1] in "{}|_" else text[i : i + 2])
            i += 2
        elif text[i] == "{" and i in closed:
            found = _alternatives(text, i + 1, closed[i], closed, depth + 1)
            if found is None:
                put("{")
                i += 1
            else:
                parts.append(found)
                i = closed[i] + 1
        elif text[i] == "_" and (match := _WILDCARD.match(text, i, end)):
            parts.append(Wildcard(match.group(1)))
            i = match.end()
        else:
            put(text[i])
            i += 1
    return tuple(parts)


def _alternatives(text: str, start: int, end: int, closed: dict[int, int], depth: int) -> Alternatives | None:
    """Read what stands between braces; None if it offers no choice."""
    count = _COUNT.match(text, start, end)
    begin = start if count is None else count.end()
    cuts = _cuts(text, begin, end, closed)
    if count is None and len(cuts) == 1:
        return None
    place = text[start - 1 : end + 1]
    if depth > MAX_DEPTH:
        raise PromptSyntaxError(place, "stands in too many braces", f"at most {MAX_DEPTH} stand in each other")
    options = tuple(_option(text, first, last, closed, depth) for first, last in cuts)
    if not sum(odds for odds, _ in options) > 0:
        raise PromptSyntaxError(place, "offers nothing", "give one of them a number above 0")
    low, high, joint = 1, 1, ", "
    if count is not None:
        low = int(count.group(1))
        high = low if count.group(2) is None else int(count.group(2))
        joint = joint if count.group(3) is None else count.group(3)
    is_list = len(options) == 1 and len(options[0][1]) == 1 and isinstance(options[0][1][0], Wildcard)
    if low > high or (high > len(options) and not is_list):
        raise PromptSyntaxError(place, f"asks for {low} to {high} of {len(options)}", "ask for as many as there are")
    return Alternatives(options, low, high, joint)


def _cuts(text: str, start: int, end: int, closed: dict[int, int]) -> list[tuple[int, int]]:
    """Return from where to where the options between braces go."""
    cuts, first, i = [], start, start
    while i < end:
        if text[i] == "\\":
            i += 1
        elif text[i] == "{" and i in closed:
            i = closed[i]
        elif text[i] == "|":
            cuts.append((first, i))
            first = i + 1
        i += 1
    return [*cuts, (first, end)]


def _option(text: str, start: int, end: int, closed: dict[int, int], depth: int) -> tuple[float, Template]:
    """Read an option and how often it comes."""
    before = _ODDS_BEFORE.match(text, start, end)
    behind = None if before else _ODDS_BEHIND.search(text[start:end])
    odds = before or behind
    if before:
        start = before.end()
    elif behind:
        end = start + behind.start()
    return 1.0 if odds is None else float(odds.group(1)), _parse(text, start, end, closed, depth)


# ------------------------------------------------------------------------------ expansion


def expand(
    template: Template, generator: random.Random, lines_of: Callable[[str], Sequence[str]], most: int = 10_000
) -> str:
    """Choose among the alternatives of a prompt.

    Args:
        template: from `parse_template`.
        generator: chooses; seeded alike it chooses alike.
        lines_of: returns the lines of a wildcard by its name, or raises.
        most: characters that the result may have.

    Returns:
        A prompt without alternatives; its weights are as they were.

    Raises:
        PromptSyntaxError: wildcards stand in each other too deep, the prompt comes to too many choices or becomes too
            long, or a list has fewer lines than are asked for.
    """
    return _Expansion(generator, lines_of, most).run(template, 0)


class _Expansion:
    """One expansion, and how much it has done."""

    def __init__(self, generator: random.Random, lines_of: Callable[[str], Sequence[str]], most: int) -> None:
        self._generator, self._lines_of, self._most = generator, lines_of, most
        self._choices = 0

    def run(self, template: Template, depth: int) -> str:
        """Expand a template that stands in `depth` wildcards."""
        text = "".join(part if isinstance(part, str) else self._choose(part, depth) for part in template)
        if len(text) > self._most:
            raise PromptSyntaxError(text, f"becomes longer than {self._most} characters", "shorten it")
        return text

    def _choose(self, part: Wildcard | Alternatives, depth: int) -> str:
        self._choices += 1
        if self._choices > MAX_CHOICES:
            raise PromptSyntaxError("the prompt", f"comes to more than {MAX_CHOICES} choices", "ask for fewer")
        if isinstance(part, Wildcard):
            return self._line(part.name, self._generator.choice(self._lines(part.name)), depth)
        wanted = self._generator.randint(part.low, part.high)
        first = part.options[0][1]
        if len(part.options) == 1 and len(first) == 1 and isinstance(first[0], Wildcard):  # {2$$__name__}
            name = first[0].name
            lines = self._lines(name)
            if wanted > len(lines):
                raise PromptSyntaxError(f"__{name}__", f"has {len(lines)} lines, not {wanted}", "ask for fewer")
            return part.joint.join(self._line(name, one, depth) for one in self._generator.sample(lines, wanted))
        left = [option for option in part.options if option[0] > 0]
        if wanted > len(left):
            raise PromptSyntaxError("{...}", f"asks for {wanted} of {len(left)} that may come", "ask for fewer")
        chosen: list[str] = []
        for _ in range(wanted):
            index = self._generator.choices(range(len(left)), [odds for odds, _ in left])[0]
            chosen.append(self.run(left.pop(index)[1], depth))
        return part.joint.join(chosen)

    def _lines(self, name: str) -> Sequence[str]:
        lines = self._lines_of(name)
        if not lines:
            raise PromptSyntaxError(f"__{name}__", "is an empty list", "write one text a line into its file")
        return lines

    def _line(self, name: str, line: str, depth: int) -> str:
        if depth >= MAX_DEPTH:
            raise PromptSyntaxError(
                f"__{name}__", "stands in too many wildcards, perhaps in itself", f"at most {MAX_DEPTH} may"
            )
        return self.run(parse_template(line), depth + 1)
