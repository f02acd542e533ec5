"""Checks of user input. Every message names the value, the accepted range and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Check a finite real number.

    Args:
        name: argument name for the message.
        value: what the user gave.
        low: smallest accepted value.
        high: largest accepted value.

    Raises:
        TypeError: not a number.
        ValueError: NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number from {low:g} to {high:g}, got {_shown(value)}.")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(f"{name}={number:g} is out of range: expected {low:g} to {high:g}.")


def check_count(name: str, value: object, low: int, high: int) -> None:
    """Check a whole number.

    Args:
        name: argument name for the message.
        value: what the user gave.
        low: smallest accepted value.
        high: largest accepted value.

    Raises:
        TypeError: not an int.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int from {low} to {high}, got {_shown(value)}.")
    if not low <= int(value) <= high:
        raise ValueError(f"{name}={value} is out of range: expected {low} to {high}.")


def check_side(name: str, side: object, multiple: int, largest: int) -> None:
    """Check an image's height or width in pixels.

    Args:
        name: "height" or "width".
        side: what the user gave.
        multiple: pixels a token covers; the side must be a multiple of it.
        largest: limit in pixels.

    Raises:
        TypeError: not an int.
        ValueError: out of range or no multiple; the message names the nearest allowed value.
    """
    if isinstance(side, bool) or not isinstance(side, Integral):
        raise TypeError(f"{name} must be an int (pixels, a multiple of {multiple}), got {_shown(side)}.")
    pixels = int(side)
    if pixels % multiple or not multiple <= pixels <= largest:
        limit = largest // multiple * multiple
        nearest = min(max(round(pixels / multiple), 1) * multiple, limit)
        raise ValueError(
            f"{name}={side} is not usable: expected a multiple of {multiple} from {multiple} to {limit}. "
            f"Nearest: {name}={nearest}."
        )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that a value is one of a list.

    Args:
        name: argument name for the message.
        value: what the user gave.
        choices: accepted values.

    Raises:
        ValueError: something else.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}.")


def check_prompts(name: str, prompts: object) -> list[str]:
    """Check one prompt or a list of them.

    Args:
        name: argument name for the message.
        prompts: what the user gave.

    Returns:
        The prompts as a list.

    Raises:
        TypeError: neither a string nor a list of strings.
        ValueError: an empty list.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"{name} must be a string or a list of strings, got {_shown(prompts)}.")
    if not prompts:
        raise ValueError(f'{name} is an empty list: pass at least one prompt ("" is a valid prompt).')
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"{name}[{index}] must be a string, got {_shown(prompt)}.")
    return list(prompts)


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Check custom noise levels: numbers in (0, 1], strictly decreasing, at least one.

    Args:
        sigmas: what the user gave.

    Raises:
        TypeError: an entry is no number.
        ValueError: empty, out of range or not decreasing.
    """
    if len(sigmas) == 0:
        raise ValueError("sigmas is empty: pass at least one noise level in (0, 1], or None for the default.")
    for index, sigma in enumerate(sigmas):
        check_number(f"sigmas[{index}]", sigma, 1e-6, 1.0)
        if index and not sigma < sigmas[index - 1]:
            raise ValueError(f"sigmas must decrease, got {sigmas[index - 1]:g} followed by {sigma:g} at index {index}.")


def check_generators(generator: object, count: int) -> None:
    """Check the random generators of a call.

    Args:
        generator: None, one for all images, or one for each.
        count: images B.

    Raises:
        TypeError: something else than generators.
        ValueError: a list of another length.
    """
    given = generator if isinstance(generator, list | tuple) else [generator] * count
    if len(given) != count:
        raise ValueError(f"Got {len(given)} generators for {count} images: pass one, or one per image.")
    for one in given:
        if one is not None and not isinstance(one, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them, got {type(one).__name__}. "
                "From a seed: torch.Generator().manual_seed(seed)."
            )


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"
