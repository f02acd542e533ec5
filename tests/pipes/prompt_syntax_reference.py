"""Slow references of the prompt syntax: recursive, a character at a time, for tests.

Weights are read by recursive descent into a tree, and multiplied on the way out. Nothing is shared with
`pipelines.inputs.prompt_syntax` but the meaning.
"""

from __future__ import annotations

import re

NUMBER = re.compile(r":\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)")


def characters(text: str, bare: bool) -> list[tuple[str, float]]:
    """Return the characters of a prompt, each with its weight.

    Every bracket is followed to what closes it by a scan of its own, so this takes cubic time.

    Args:
        text: the prompt.
        bare: whether brackets without a number count.
    """
    marks = _marks(text)
    weights = [1.0] * len(marks)
    hidden = set()
    for kind, opening, closing in (("round", "(", ")"), ("square", "[", "]")):
        if kind == "square" and not bare:
            continue
        for i, (mark, is_syntax) in enumerate(marks):
            if not is_syntax or mark != opening:
                continue
            end = _partner(marks, i, opening, closing)
            number = None if end is None or kind == "square" else NUMBER.fullmatch(marks[end][0])
            if number is not None:
                factor = float(number.group(1))
                hidden |= {i, end}
            elif bare:
                factor = 1.1 if kind == "round" else 1 / 1.1
                hidden |= {i} if end is None else {i, end}
            else:
                continue
            for j in range(i, len(marks) if end is None else end):
                weights[j] *= factor
    found = []
    for i, (mark, is_syntax) in enumerate(marks):
        if i in hidden or (bare and mark == "\\" and is_syntax):
            continue
        found += [(character, weights[i]) for character in mark]
    return found


def _marks(text: str) -> list[tuple[str, bool]]:
    """Cut a prompt into characters and closing numbers; of each say whether it may be syntax."""
    marks: list[tuple[str, bool]] = []
    i = 0
    while i < len(text):
        number = NUMBER.match(text, i)
        if text[i] == "\\" and text[i + 1 : i + 2] in tuple("()[]\\"):
            marks.append((text[i + 1], False))
            i += 2
        elif number:
            marks.append((number.group(0), True))
            i = number.end()
        else:
            marks.append((text[i], True))
            i += 1
    return marks


def _partner(marks: list[tuple[str, bool]], start: int, opening: str, closing: str) -> int | None:
    """Return where a bracket is closed."""
    depth = 0
    for i in range(start, len(marks)):
        mark, is_syntax = marks[i]
        if is_syntax and mark == opening:
            depth += 1
        elif is_syntax and (mark == closing or (closing == ")" and NUMBER.fullmatch(mark))):
            depth -= 1
            if depth == 0:
                return i
    return None


def every_expansion(text: str, lists: dict[str, list[str]]) -> set[str]:
    """Return all texts that a prompt with alternatives of one each can become, for prompts with whole braces only.

    The innermost braces are replaced by each of their options in turn until there are none left.

    Args:
        text: without escapes, counts and odds.
        lists: wildcards by name.
    """
    wildcard = re.search(r"__([a-z]+)__", text)
    if wildcard:
        begin, end = wildcard.span()
        lines = lists[wildcard.group(1)]
        return set().union(*(every_expansion(text[:begin] + line + text[end:], lists) for line in lines))
    innermost = re.search(r"\{([^{}]*)\}", text)
    if innermost is None:
        return {text}
    begin, end = innermost.span()
    options = innermost.group(1).split("|")
    return set().union(*(every_expansion(text[:begin] + one + text[end:], lists) for one in options))
