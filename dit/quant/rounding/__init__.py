"""How weights are rounded: to nearest, with the best clipping, or adaptively for a small error of the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit.quant.formats import Format, Scales
from dit.quant.formats.base import grouped, require_finite, ungrouped
from dit.quant.rounding.adaround import learn_directions
from dit.quant.rounding.gptq import round_and_compensate
from dit.quant.rounding.inputs import DAMPING, Inputs, check_inputs, inputs_of, quantized_inputs
from dit.quant.rounding.nearest import least_squares_scales
from dit.quant.rounding.output_error import OutputError, error_behind
from dit.quant.rounding.signed_sgd import learn_shifts
from dit.quant.scheme import ROUNDINGS

__all__ = ["round_weight"]

LEARNED = ("adaround", "signed_sgd")


def round_weight(
    weight: Tensor,
    fmt: Format,
    group: int | None,
    method: str,
    *,
    rows: Tensor | None = None,
    gram: Tensor | None = None,
    samples: int | None = None,
    importance: Tensor | None = None,
    activation_scheme: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[Tensor], Tensor] | None = None,
    iterations: int | None = None,
    lr: float | None = None,
) -> tuple[Tensor, Scales]:
    """Round the weight of a linear layer y = x W^T to values that a format can store.

    With "gptq", "adaround" and "signed_sgd" no output's error, as the inputs given here tell it, is larger than that of
    the nearest values with the scales of the least squared error.

    Args:
        weight: (N, K), floating point, in the basis of the quantized layer: balanced, rotated, without low-rank part.
        fmt: format of the weights.
        group: inputs that share a scale; None is the format's own, 0 the whole row.
        method: "nearest"; "mse", to nearest with the scales of the least squared error; "gptq" (arXiv 2210.17323);
            "adaround" (arXiv 2004.10568; for floating-point formats arXiv 2503.15465); "signed_sgd" (arXiv 2309.05516).
        rows: (R, K), sample inputs in the same basis.
        gram: (K, K), X^T X of all inputs X up to a factor, in the same basis.
        samples: how many inputs `gram` is of; with few of them, products of different inputs are drawn towards 0, as
            they are with rows alone. None takes gram as it is.
        importance: (K,), weight of each input's squared error where scales are searched; None takes the mean squares of
            the inputs, if there are rows or gram. "nearest" doesn't use it.
        activation_scheme: what the inputs become before the product: their quantized and dequantized values, of the
            same shape. The weight is then first changed to make up for what their errors have in common with them; it
            needs rows. "nearest" does without.
        after: the elementwise function behind the layer, as for the first layer of a feed-forward network; "adaround"
            and "signed_sgd" then look at the error behind it, as far as the rows are enough to tell. It needs rows and
            is given the outputs of all, (R, N).
        iterations: of "adaround" (300 if None) and "signed_sgd" (200).
        lr: of "adaround" (0.03) and "signed_sgd" (1 / iterations).

    Returns:
        The rounded weight (N, K) fp32 and its scales, which `fmt.pack` stores without a further error.

    Raises:
        ValueError: an unknown method, a group that the format can't store, inputs that are missing, that don't fit or
            aren't finite, arguments that the method doesn't know, or a gram that isn't positive semidefinite.
    """
    if method not in ROUNDINGS:
        raise ValueError(f"rounding is {method!r}; use one of {', '.join(ROUNDINGS)}")
    _check_arguments(method, samples, after=after, iterations=iterations, lr=lr)
    if method == "nearest" and activation_scheme is not None:
        raise ValueError("activation_scheme has no meaning for rounding 'nearest'; leave it out or use 'mse'")
    group = fmt.resolve_group(group)
    groups = grouped(weight, group)
    weight = ungrouped(groups, weight.shape[1])
    rows, gram = check_inputs(weight, rows, gram)
    if method == "nearest":
        scales = fmt.scales(groups)
        return ungrouped(fmt.snap(groups, scales), weight.shape[1]), scales
    inputs, seen, original = inputs_of(rows, gram, samples), rows, weight
    if activation_scheme is not None:
        weight, inputs, seen = quantized_inputs(weight, _needed(rows), gram, samples, activation_scheme)
        groups = grouped(weight, group)
    weighting = _importance(weight, inputs, importance)
    scales = least_squares_scales(groups, fmt, None if weighting is None else grouped(weighting[None], group))
    plain = ungrouped(fmt.snap(groups, scales), weight.shape[1])
    if method == "mse":
        return plain, scales
    if inputs is None:
        raise ValueError(
            f"rounding {method!r} needs inputs of the layer: pass gram (K, K) or rows (R, K) from a calibration, or "
            "use rounding 'nearest' or 'mse'"
        )
    error = OutputError.of(weight, inputs)
    if after is not None:
        error = replace(error, behind=error_behind(original, _needed(rows), _needed(seen), after))
    if method == "signed_sgd":
        return learn_shifts(weight, fmt, group, scales, error, iterations, lr)
    if method == "gptq":
        rounded = round_and_compensate(weight, fmt, group, scales, inputs.dense())
    else:
        rounded = learn_directions(weight, fmt, group, scales, error, iterations, lr)
    better = error(rounded) < error(plain)  # (N,)
    return torch.where(better[:, None], rounded, plain), scales


def _needed(rows: Tensor | None) -> Tensor:
    if rows is None:
        raise ValueError("after and activation_scheme need rows, sample inputs (R, K) of the layer; pass rows")
    return rows


def _check_arguments(method: str, samples: int | None, **values: object) -> None:
    """Raise for arguments that only the learned methods know, and for values out of range."""
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples!r}; use how many inputs gram is of, at least 1, or None")
    for name, value in values.items():
        if value is not None and method not in LEARNED:
            raise ValueError(
                f"{name} has no meaning for rounding {method!r}, only for {', '.join(LEARNED)}; leave it out"
            )
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} is {value!r}; use a positive number")


def _importance(weight: Tensor, inputs: Inputs | None, importance: Tensor | None) -> Tensor | None:
    """Return the weights of the inputs' squared errors, (K,) fp32, or None for equal ones."""
    if importance is None:
        importance = None if inputs is None else inputs.power.clamp(min=0)
    elif importance.shape != (weight.shape[1],):
        raise ValueError(f"importance is {tuple(importance.shape)}; use one number an input, ({weight.shape[1]},)")
    if importance is None:
        return None
    importance = importance.detach().to(weight.device, torch.float32)
    require_finite("importance", importance)
    if bool((importance < 0).any()):
        raise ValueError(
            "importance has negative values; use mean squares of the inputs or other numbers of at least 0"
        )
    if not bool((importance > 0).any()):
        return None
    return importance / importance.mean() + DAMPING
