"""The error of a layer's output that a rounded weight causes, which adaptive rounding makes small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.quant.formats.base import require_finite

MOST_ROWS = 1024
NO_INPUTS = (
    "this rounding needs inputs of the layer: pass gram (K, K) or rows (R, K) from a calibration, or use rounding "
    "'nearest' or 'mse'"
)
DAMPING = 0.01
"""Part of the inputs' mean square that every input is given on top: no weight is free, however few the rows are."""


@dataclass(frozen=True, eq=False)
class OutputError:
    """Mean squared error of each output of a linear layer: mean over inputs x of (y_q(x) - y(x))^2.

    Either by the inputs' second moments, which is exact where nothing comes after the layer, or by rows.

    Attributes:
        weight: (N, K) fp32, the weight before rounding.
        gram: (K, K), mean of x x^T, or None.
        inputs: (R, K), what the rounded layer is given, or None.
        target: (R, N), what it is to return for them, after `after`.
        share: of the error on rows; the rest is `ridge`'s.
        ridge: (K,), what the squared error of each input's weight counts besides.
        after: the elementwise function behind the layer, such as its activation function.
    """

    weight: Tensor
    gram: Tensor | None
    inputs: Tensor | None
    target: Tensor | None
    share: float
    ridge: Tensor
    after: Callable[[Tensor], Tensor] | None

    def __call__(self, rounded: Tensor) -> Tensor:
        """Return the error of each output, (N,), of a weight (N, K); gradients flow to the weight."""
        difference = rounded - self.weight
        ridge = difference.square() @ self.ridge
        if self.gram is not None:
            slope = difference.detach() @ self.gram  # half the gradient: one product gives both
            return (2 * difference * slope - difference.detach() * slope).sum(1) + ridge
        if self.inputs is None or self.target is None:
            raise ValueError("an OutputError needs gram, or inputs and target; make it with output_error")
        output = self.inputs @ rounded.T
        if self.after is not None:
            output = self.after(output)
        return self.share * (output - self.target).square().mean(0) + ridge


def output_error(
    weight: Tensor,
    rows: Tensor | None,
    gram: Tensor | None,
    activation_scheme: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[Tensor], Tensor] | None = None,
) -> OutputError:
    """Choose how the error of the output is computed: by second moments where that is exact and not dearer, or by rows.

    Second moments of all inputs are preferred to those of a sample; those of a sample are shrunk, see `shrinkage`. At
    most `MOST_ROWS` rows are used, evenly spread.

    Args:
        weight: (N, K) fp32.
        rows: (R, K) sample inputs.
        gram: (K, K), X^T X of inputs X up to a factor.
        activation_scheme: what the inputs become before the product, such as their quantized values.
        after: an elementwise function behind the layer.

    Raises:
        ValueError: neither rows nor gram, or `after` or `activation_scheme` without rows.
    """
    by_rows = after is not None or activation_scheme is not None
    if rows is None and by_rows:
        raise ValueError("after and activation_scheme need rows, sample inputs (R, K) of the layer; pass rows")
    if not by_rows and (gram is not None or rows is None or rows.shape[1] <= 2 * len(rows)):
        moments = second_moments(rows, gram)
        ridge = DAMPING * moments.diagonal().mean().expand(len(moments))
        return OutputError(weight, moments, None, None, 1.0, ridge, None)
    if rows is None:
        raise ValueError(NO_INPUTS)
    rows = rows[:: -(-len(rows) // MOST_ROWS)]
    target = rows @ weight.T
    inputs = rows if activation_scheme is None else activation_scheme(rows)
    power = inputs.square().mean(0)  # (K,)
    shrunk = shrinkage(inputs)
    return OutputError(
        weight=weight,
        gram=None,
        inputs=inputs,
        target=target if after is None else after(target),
        share=1 - shrunk,
        ridge=shrunk * power + DAMPING * power.mean(),
        after=after,
    )


def second_moments(
    rows: Tensor | None, gram: Tensor | None, activation_scheme: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return X^T X up to a factor, (K, K) fp32: `gram`, or that of the rows, shrunk (see `shrinkage`).

    Quantized inputs count where there are rows to quantize.

    Raises:
        ValueError: neither rows nor gram.
    """
    if activation_scheme is not None and rows is not None:
        rows, gram = activation_scheme(rows), None
    if gram is not None:
        return gram
    if rows is None:
        raise ValueError(NO_INPUTS)
    moments = rows.T @ rows / len(rows)
    shrunk = shrinkage(rows)
    return (1 - shrunk) * moments + shrunk * torch.diag(moments.diagonal())


def shrinkage(rows: Tensor) -> float:
    """Return by how much products of different inputs, estimated on few rows, are best drawn towards 0.

    Rounding that relies on chance correlations of a sample is worse on other inputs. This is the least expected squared
    error of the estimate (Ledoit and Wolf, 2003), for inputs scaled to the same mean square (Schaefer and Strimmer,
    2005).

    Args:
        rows: (R, K).

    Returns:
        0, the rows are many, to 1, they say nothing about products of different inputs.
    """
    scaled = rows * rows.square().mean(0).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()  # (R, K)
    squares = scaled.square()
    # Sums over pairs of different inputs: of the mean product's square, and of the product's mean square.
    kernel = scaled @ scaled.T if len(rows) < rows.shape[1] else scaled.T @ scaled
    of_means = (kernel.square().sum() / len(rows) ** 2 - squares.mean(0).square().sum()).item()
    of_products = (squares.sum(1).square().mean() - squares.square().mean(0).sum()).item()
    if of_means <= 0:
        return 1.0
    return min(1.0, max(0.0, (of_products - of_means) / max(1, len(rows) - 1) / of_means))


def check_inputs(weight: Tensor, rows: Tensor | None, gram: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return rows and gram as fp32 on the weight's device.

    Raises:
        ValueError: shapes that don't fit the weight (N, K), no rows, or numbers that are not finite.
    """
    columns = weight.shape[1]
    if rows is not None:
        if rows.ndim != 2 or rows.shape[1] != columns or not len(rows):
            raise ValueError(f"rows is {tuple(rows.shape)}; use sample inputs (R, {columns}), R at least 1")
        rows = rows.detach().to(weight.device, torch.float32)
        require_finite("rows", rows)
    if gram is not None:
        if gram.shape != (columns, columns):
            raise ValueError(f"gram is {tuple(gram.shape)}; use X^T X of the layer's inputs, {(columns, columns)}")
        gram = gram.detach().to(weight.device, torch.float32)
        require_finite("gram", gram)
    return rows, gram
