"""What rounding knows of a layer's inputs: second moments, also from few rows and of quantized inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.quant.formats.base import require_finite

DAMPING = 0.01
"""Part of the inputs' mean square that every input is given on top, where a matrix is inverted or an error weighed: no
weight is free, however few the rows are."""
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Inputs:
    """Second moments of a layer's inputs x, mean of x x^T up to a factor, as a matrix or by a sample.

    Attributes:
        matrix: (K, K) fp32, or None.
        sample: (R, K) fp32, whose sample^T sample is the matrix without `own`; None if there is a matrix.
        own: (K,) fp32, what belongs to the diagonal besides.
    """

    matrix: Tensor | None
    sample: Tensor | None
    own: Tensor

    @property
    def power(self) -> Tensor:
        """Mean square of each input up to a factor, (K,)."""
        part = self.matrix.diagonal() if self.matrix is not None else self._sample.square().sum(0)
        return part + self.own

    @property
    def _sample(self) -> Tensor:
        if self.sample is None:
            raise ValueError("Inputs have neither matrix nor sample; make them with inputs_of")
        return self.sample

    def dense(self) -> Tensor:
        """Return the second moments as a matrix, (K, K)."""
        matrix = self.matrix if self.matrix is not None else self._sample.T @ self._sample
        return matrix + torch.diag(self.own)

    def times(self, weight: Tensor) -> Tensor:
        """Return weight (N, K) times the second moments, (N, K)."""
        product = weight @ self.matrix if self.matrix is not None else (weight @ self._sample.T) @ self._sample
        return product + weight * self.own


def inputs_of(rows: Tensor | None, gram: Tensor | None, samples: int | None = None) -> Inputs | None:
    """Estimate second moments: those of all inputs if they are known, otherwise those of a sample.

    With few samples, products of different inputs are drawn towards 0, see `shrinkage`.

    Args:
        rows: (R, K) sample inputs.
        gram: (K, K), X^T X of inputs X up to a factor.
        samples: how many inputs `gram` is of; None takes it as it is.

    Returns:
        Second moments, or None without rows and gram.
    """
    if gram is not None:
        return _of_gram(gram, samples)
    return None if rows is None else _of_rows(rows)


def _of_gram(gram: Tensor, samples: int | None) -> Inputs:
    kept = 1.0 if samples is None else 1 - _gaussian_shrinkage(gram, samples)
    return Inputs(kept * gram, None, (1 - kept) * gram.diagonal())


def _of_rows(rows: Tensor) -> Inputs:
    kept = 1 - shrinkage(rows)
    own = (1 - kept) * rows.square().mean(0)
    factor = rows * (kept / len(rows)) ** 0.5
    if rows.shape[1] <= 2 * len(rows):  # a product with the matrix costs no more than two with the rows
        return Inputs(factor.T @ factor, None, own)
    return Inputs(None, factor, own)


def quantized_inputs(
    weight: Tensor, rows: Tensor, gram: Tensor | None, samples: int | None, scheme: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Inputs, Tensor]:
    """Return the best weight for quantized inputs, their second moments, and the quantized rows.

    With inputs x + e in place of x the weight of the least squared error is W - W E[x' e^T] E[x' x'^T]^-1, x' = x + e:
    it makes up for what e has in common with the inputs. Both expectations are estimates, shrunk each by its own
    certainty, so that nothing is learned of errors that have nothing in common.

    Args:
        weight: (N, K) fp32.
        rows: (R, K) sample inputs.
        gram: (K, K) of all inputs before they are quantized, or None.
        samples: how many inputs `gram` is of.
        scheme: rows (R, K) -> quantized and dequantized rows.

    Raises:
        ValueError: `scheme` returns another shape, or numbers that are not finite.
    """
    seen = scheme(rows).to(weight.device, torch.float32)
    if seen.shape != rows.shape:
        raise ValueError(f"activation_scheme made {tuple(seen.shape)} of rows {tuple(rows.shape)}; keep their shape")
    require_finite("what activation_scheme returned", seen)
    error = seen - rows
    inputs = _of_rows(seen) if gram is None else _quantized(_of_gram(_as_mean(gram, rows), samples), rows, seen)
    common = seen.T @ error / len(rows)  # (K, K)
    shrunk = shrinkage(seen, error)
    common = (1 - shrunk) * common + shrunk * torch.diag(common.diagonal())
    moments = inputs.dense()
    moments.diagonal().add_(DAMPING * moments.diagonal().mean() + TINY)
    shift = torch.linalg.solve(moments, common @ weight.T).T  # (N, K)
    return weight - shift, inputs, seen


def _quantized(inputs: Inputs, rows: Tensor, seen: Tensor) -> Inputs:
    """Return the second moments of quantized inputs by those of the inputs and a sample of both.

    A quantized input is taken for the input times a gain, and an error that has nothing in common with any input.
    """
    power = rows.square().mean(0).clamp(min=TINY)
    gain = (seen * rows).mean(0) / power  # (K,)
    diagonal = inputs.power * seen.square().mean(0) / power
    matrix = inputs.dense() * gain * gain[:, None]
    return Inputs(matrix, None, (diagonal - matrix.diagonal()).clamp(min=0))


def _as_mean(gram: Tensor, rows: Tensor) -> Tensor:
    """Return `gram` with the factor at which it is the mean of x x^T, judged by the rows."""
    trace = gram.diagonal().sum()
    return gram * (rows.square().sum() / len(rows) / torch.where(trace > 0, trace, 1))


def shrinkage(rows: Tensor, others: Tensor | None = None) -> float:
    """Return by how much products of different inputs, estimated on few rows, are best drawn towards 0.

    Rounding that relies on chance correlations of a sample is worse on other inputs. This is the least expected squared
    error of the estimate (Ledoit and Wolf, 2003), for inputs scaled to the same mean square (Schaefer and Strimmer,
    2005).

    Args:
        rows: (R, K).
        others: (R, K), for products of an input in `rows` and another one in `others`; None is `rows`.

    Returns:
        0, the rows are many, to 1, they say nothing about products of different inputs.
    """
    left = _scaled(rows)
    right = left if others is None else _scaled(others)
    first, second = left.square(), right.square()
    # Sums over pairs of different inputs: of the mean product's square, and of the product's mean square.
    if len(rows) < rows.shape[1]:
        of_means = ((left @ left.T) * (right @ right.T)).sum() / len(rows) ** 2
    else:
        of_means = (left.T @ right).square().sum() / len(rows) ** 2
    of_means = of_means - (left * right).mean(0).square().sum()
    of_products = (first.sum(1) * second.sum(1)).mean() - (first * second).mean(0).sum()
    return share_of_noise(of_products, of_means, len(rows)).item()


def share_of_noise(of_squares: Tensor, of_means: Tensor, count: int) -> Tensor:
    """Return which part of the squares of means is expected to be noise, 0 to 1.

    Args:
        of_squares: sums of the mean squares of some quantities.
        of_means: sums of the squares of their means.
        count: samples that the means are of.
    """
    noise = (of_squares - of_means) / max(1, count - 1)
    return torch.where(of_means > 0, noise / of_means.clamp(min=TINY), 1.0).clamp(0, 1)


def _scaled(rows: Tensor) -> Tensor:
    return rows * rows.square().mean(0).clamp(min=TINY).rsqrt()


def _gaussian_shrinkage(gram: Tensor, samples: int) -> float:
    """Return what `shrinkage` expects of Gaussian inputs with these second moments, of which only sums are known."""
    scale = gram.diagonal().clamp(min=TINY).rsqrt()
    correlation = gram * scale * scale[:, None]
    of_means = (correlation.square().sum() - correlation.diagonal().square().sum()).item()
    pairs = len(gram) * (len(gram) - 1)
    return min(1.0, (pairs + of_means) / samples / of_means) if of_means > 0 else 1.0


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
