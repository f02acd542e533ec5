"""Settings of components, as their configuration files hold them: types and ranges, before anything is built.

Networks of ours declare the types of their settings, and mean them. Those of diffusers' are read more generously: not
every declaration there is right, so only what can't be meant is refused.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from dit.tokenizers.vit_autoencoder import ViTAutoencoder

LARGEST = 65_536
"""Of whole numbers of networks of ours: widths, channels, lengths."""

RANGES: dict[str, tuple[float, float]] = {
    "num_layers": (1, 1000),
    "encoder_layers": (1, 1000),
    "decoder_layers": (1, 1000),
    "refiner_layers": (0, 1000),
    "refiner_channels": (0, LARGEST),
    "layers_per_block": (1, 100),
    "coordinate_frequencies": (0, 1024),
    "text_position_frequencies": (0, 1024),
    "num_classes": (1, 10**7),
    "default_label": (0, 10**7),
    "vocab_size": (1, 10**7),
    "sample_size": (1, 8192),
    "patch_size": (1, 256),
    "patch_size_t": (1, 64),
    "scales": (1, 1024),
    "num_phis": (1, 100),
    "factor": (1, 16),
    "ff_ratio": (1e-3, 64),
    "phi_ratio": (-1, 2),
    "class_dropout_prob": (0, 1),
    "rope_axes_dims": (0, 1024),
    "rope_theta": (1, 1e9),
    "norm_eps": (0, 0.1),
    "time_scale": (1e-6, 1e6),
    "space_scale": (1e-6, 1e6),
    "text_dropout_prob": (0, 1),
}
"""Accepted values of the settings of our networks; other whole numbers are from 1 to `LARGEST`."""

MAX_EPSILON = 0.1
LONGEST_LIST = 128
LARGEST_SCHEDULE = 10**6
"""Most steps of a scheduler's training schedule."""

LARGEST_SHIFT = 1e6


def check_settings(found: type, config: Mapping[str, Any], source: object, exact: bool) -> None:
    """Check the settings of a component against what its class declares.

    Args:
        found: the class.
        config: its configuration file's content.
        source: the file, for the message.
        exact: every type and range, for components of ours; otherwise what can't be meant.

    Raises:
        ValueError: a setting has another type or is out of range; the message names it.
    """
    hints = declared(found)
    for name, value in config.items():
        if name.startswith("_") or name not in hints:
            continue  # diffusers tells of settings that it doesn't know
        hint = hints[name]
        fits = _fits(value, hint) if exact else _may_fit(value, hint)
        if not fits:
            raise ValueError(
                f"{source}: {name} is {_shown(value)}, expected {_written(hint)}; fetch the file again or mend it."
            )
        if exact:
            _check_range(name, value, source)
            if name == "vit" and value is not None:
                check_settings(ViTAutoencoder, value, f"{source}: vit", exact)


def check_schedule(config: Mapping[str, Any], source: object) -> None:
    """Check what schedulers compute their tables from.

    Args:
        config: of the scheduler.
        source: the file, for the message.

    Raises:
        ValueError: the length of the training schedule, its noise or its shift is out of range.
    """
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= LARGEST_SCHEDULE:
        raise ValueError(
            f"{source}: num_train_timesteps is {_shown(steps)}, expected a whole number from 1 to {LARGEST_SCHEDULE}."
        )
    for name in ("beta_start", "beta_end"):
        beta = config.get(name, 0.01)
        if type(beta) not in (int, float) or not 0 < beta < 1:
            raise ValueError(f"{source}: {name} is {_shown(beta)}, expected a number between 0 and 1.")
    for name in ("shift", "flow_shift"):
        shift = config.get(name, 1.0)
        if shift is not None and (type(shift) not in (int, float) or not 0 < shift <= LARGEST_SHIFT):
            raise ValueError(f"{source}: {name} is {_shown(shift)}, expected a number above 0 up to {LARGEST_SHIFT:g}.")


def check_numbers(config: Mapping[str, Any], source: object, exact: bool) -> None:
    """Refuse numbers that no network computes with: NaN anywhere, and an epsilon that is none.

    Args:
        config: of a network, perhaps with those of its parts.
        source: the file, for the message.
        exact: refuse infinities too; in some networks of others they stand for "no limit".

    Raises:
        ValueError: it names the setting.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_numbers(value, f"{source}: {name}", exact)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float) and (math.isnan(one) or (exact and not _is_finite(one))):
                raise ValueError(f"{source}: {name} is {_shown(value)}, expected finite numbers.")
            is_epsilon = name.split("_")[-1] in ("eps", "epsilon")
            if is_epsilon and isinstance(one, int | float) and not 0 <= one <= MAX_EPSILON:
                raise ValueError(f"{source}: {name} is {_shown(value)}, expected a number from 0 to {MAX_EPSILON}.")


def check_counts(config: Mapping[str, Any], tensors: int, source: object) -> None:
    """Refuse numbers of layers that the weights can't fill, before a loop over them is begun.

    Args:
        config: of a network, perhaps with those of its parts.
        tensors: in its weight files.
        source: the file, for the message.

    Raises:
        ValueError: more layers than tensors.
    """
    limit = max(tensors, LONGEST_LIST)
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_counts(value, tensors, f"{source}: {name}")
        counts: list[Any] = value if isinstance(value, list) else [value]
        if any(word in name for word in ("layers", "blocks", "depth")):
            for count in counts:
                if isinstance(count, int | float) and not -limit <= count <= limit:
                    raise ValueError(
                        f"{source}: {name} is {_shown(value)}, but its weights are {tensors} tensors: expected at most "
                        f"{limit}. The configuration is damaged, or of another model."
                    )


def declared(found: type) -> dict[str, Any]:
    """Return the declared types of the settings of a class; those it doesn't declare are `Any`."""
    initialise = inspect.unwrap(found.__init__)
    names = [name for name in inspect.signature(initialise).parameters if name != "self"]
    try:
        hints = typing.get_type_hints(initialise)
    except (NameError, TypeError):  # a declaration that only type checkers can read
        hints = {}
    return {name: hints.get(name, Any) for name in names}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value of JSON has the declared type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin in (tuple, list) or hint in (tuple, list):
        return _fits_list(value, arguments)
    simple: dict[Any, bool] = {
        type(None): value is None,
        bool: isinstance(value, bool),
        int: type(value) is int,
        float: type(value) in (int, float) and _is_finite(value),
        str: isinstance(value, str),
    }
    if origin in (dict, Mapping) or hint is dict:
        return isinstance(value, dict)
    return simple.get(hint, True)


def _fits_list(value: Any, arguments: tuple[Any, ...]) -> bool:
    if not isinstance(value, list) or not 1 <= len(value) <= LONGEST_LIST:
        return False
    if len(arguments) == 1 or arguments[1:] == (Ellipsis,):
        return all(_fits(one, arguments[0]) for one in value)
    return len(value) == len(arguments) and all(_fits(one, hint) for one, hint in zip(value, arguments, strict=True))


def _may_fit(value: Any, hint: Any) -> bool:
    """Return whether a value could be meant: no text or object for a number, no NaN."""
    if isinstance(value, float) and math.isnan(value):
        return False
    numbers = {int, float, bool, type(None)}
    declared_types = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    return not (declared_types <= numbers and isinstance(value, str | dict))


def _check_range(name: str, value: Any, source: object) -> None:
    """Refuse numbers out of the range of a setting, alone or in a list."""
    if isinstance(value, list):
        for one in value:
            _check_range(name, one, source)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high = RANGES.get(name, (1, LARGEST) if isinstance(value, int) else (-1e9, 1e9))
    if not low <= value <= high:
        raise ValueError(f"{source}: {name} is {_shown(value)}, expected {low:g} to {high:g}.")


def _is_finite(value: float) -> bool:
    return -1e300 < value < 1e300


def _shown(value: Any) -> str:
    return f"{value!r:.60}"


def _written(hint: Any) -> str:
    """Write a declared type for people."""
    return hint.__name__ if inspect.isclass(hint) and not get_args(hint) else str(hint).replace("typing.", "")
