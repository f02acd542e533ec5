"""One linear layer quantized: balance, rotation, low-rank branch, rounding and packing, as its scheme says.

`quantize_linear` makes the tensors that `QuantLinear` computes with; `fake_quantized_output` is the whole layer once
more, written as it is defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dit.quant.balance import Balance, balance_scale, input_magnitude, search_balance
from dit.quant.formats import Format, grouped, weight_format
from dit.quant.formats.base import ungrouped
from dit.quant.low_rank import ROUNDS, LowRank, low_rank_branch
from dit.quant.reference import LARGEST_FP8, LEVELS, SMALLEST, fake_quantize_activations
from dit.quant.rotation import (
    input_factors,
    prepare,
    resolve_block,
    rotate,
    rotate_gram,
    rotate_weight,
    rotation_sign,
    unrotate,
)
from dit.quant.rounding import round_weight
from dit.quant.scheme import Scheme
from dit.quant.statistics import LayerStatistics

MOST_OUTPUTS = 512
"""Outputs that a search for a balance looks at, spread evenly; a low-rank branch needs all."""
CLIPS = tuple(1 - step / 20 for step in range(14))
"""Static scales that are tried, as fractions of the one that holds the largest input."""


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """A quantized linear layer as tensors.

    Attributes:
        scheme: how it is quantized, resolved: alpha, group, rotate and rank are what was used.
        tensors: by their names in the layer, without the bias.
        in_features: K.
        out_features: N.
        bias: as it was, (N,), or None.
        bin_errors: relative error of the output by bin of the statistics, on their sampled rows, (L,); None without
            such rows.
        notes: where it differs from what was asked for, and why.
    """

    scheme: Scheme
    tensors: dict[str, Tensor]
    in_features: int
    out_features: int
    bias: Tensor | None = None
    bin_errors: Tensor | None = None
    notes: tuple[str, ...] = ()


@torch.no_grad()
def quantize_linear(
    linear: nn.Linear,
    scheme: Scheme,
    statistics: LayerStatistics | None = None,
    *,
    name: str = "the layer",
    shared_balance: Balance | None = None,
    aggregate: str = "max",
) -> QuantizedWeights:
    """Quantize a linear layer; it stays as it is.

    Args:
        linear: the layer.
        scheme: how. `rotate` and `rank` are upper bounds, see `QuantizedWeights.notes`.
        statistics: of its inputs; without them channels are not balanced, and scales of activations can't be static.
        name: of the layer, for messages.
        shared_balance: of `find_balance` for all layers that read the input; replaces the scheme's `alpha`.
        aggregate: one of `dit.quant.balance.AGGREGATES`.

    Raises:
        ValueError: weights or statistics with NaN, statistics of another layer, or a scheme that needs statistics where
            there are none; the message names the layer.
    """
    weight = _checked_weight(linear, name)  # (N, K)
    rows, columns = weight.shape
    if statistics is not None:
        statistics.check(name, columns)
    scheme, notes = _resolved(scheme, rows, columns, statistics, name)
    fmt = weight_format(scheme.weights)
    sample = _Sample.of(weight, statistics)

    # 1. balance
    balance = shared_balance
    if balance is None and scheme.alpha is not None and statistics is not None:
        balance = find_balance([weight], scheme, statistics, aggregate=aggregate, name=name)
    if balance is not None and balance.scale is None:
        notes.append("channels are not balanced: no exponent was nearer than that")
    scheme = replace(scheme, alpha=None if balance is None else balance.alpha)
    scale = None if balance is None or balance.scale is None else balance.scale.to(weight.device)  # (K,)

    # 2. rotation
    basis = _Basis.of(scheme, scale, columns, weight.device)
    prepared = basis.weight(weight)  # (N, K)
    inputs = None if sample is None else basis.inputs(sample.rows, scheme, statistics)

    # 3. low-rank branch
    branch = None
    if scheme.rank:
        branch = _branch(prepared, scheme, fmt, basis, sample, inputs, statistics)
    rest = prepared if branch is None else prepared - branch.weight()  # (N, K)

    # 4. rounding and packing
    moments = _second_moments(scheme, basis, sample, statistics)  # (K, K) or None
    rounded, scales = round_weight(rest, fmt, scheme.group, scheme.rounding, gram=moments)
    tensors = fmt.pack(grouped(rounded, scheme.group or 0), scales, columns)
    tensors.update(basis.tensors())
    if branch is not None:
        tensors.update(low_rank_down=branch.down, low_rank_up=branch.up)
    if scheme.static and inputs is not None and inputs.scale is not None:
        tensors["input_scale"] = inputs.scale
    errors = None
    if sample is not None and inputs is not None:
        errors = sample.bin_errors(inputs, rounded, None if branch is None else branch.weight())
    bias = None if linear.bias is None else linear.bias.detach()
    return QuantizedWeights(scheme, tensors, columns, rows, bias, errors, tuple(notes))


@torch.no_grad()
def find_balance(
    weights: Sequence[Tensor],
    scheme: Scheme,
    statistics: LayerStatistics,
    *,
    aggregate: str = "max",
    name: str = "the layer",
) -> Balance:
    """Find the balance of one layer, or of all layers that read one input.

    With `alpha="search"` it is the exponent at which the outputs of the layers, with weights and activations quantized
    to the nearest values, are nearest on the sampled rows; every bin counts the same.

    Args:
        weights: (N, K) each, of the layers; the balance looks at the largest of them channel by channel.
        scheme: of the layers; its `alpha` must not be None.
        statistics: of the input.
        aggregate: one of `dit.quant.balance.AGGREGATES`.
        name: of the layers, for messages.

    Returns:
        The balance; one without a scale where a search finds that better.

    Raises:
        ValueError: a search without sampled rows, a scheme without alpha, or statistics of another layer.
    """
    weight = torch.cat([one.detach().float() for one in weights])  # (N, K)
    rows, columns = weight.shape
    statistics.check(name, columns)
    scheme, _ = _resolved(scheme, rows, columns, statistics, name)
    largest = weight.abs().amax(0)  # (K,)
    magnitude = input_magnitude(statistics, largest.cpu(), aggregate).to(weight.device)  # (K,)
    if scheme.alpha is None:
        raise ValueError(f"the scheme of {name} has no alpha, so it asks for no balance")
    if scheme.alpha != "search":
        return Balance(balance_scale(magnitude, largest, float(scheme.alpha)), float(scheme.alpha))
    some = _some_outputs(weight, scheme)  # (n, K)
    sample = _Sample.of(some, statistics)
    if sample is None:
        raise ValueError(
            f"alpha is 'search', but the statistics of {name} hold no rows; calibrate with rows=256, or give a number"
        )
    return search_balance(magnitude, largest, partial(_trial_error, some, sample, scheme, statistics))


@torch.no_grad()
def fake_quantized_output(x: Tensor, quantized: QuantizedWeights) -> Tensor:
    """Compute a quantized layer as it is defined, in float32: the reference of `QuantLinear`.

    Args:
        x: (..., K).
        quantized: of `quantize_linear`.

    Returns:
        (..., N).
    """
    scheme, tensors = quantized.scheme, quantized.tensors
    x = raw = x.float()
    # the inputs: balanced, then rotated
    if "input_balance" in tensors:
        x = x * tensors["input_balance"]
    if scheme.rotate:
        x = rotate(x, tensors["rotation_sign"], scheme.rotate)
    # quantized inputs times quantized weights
    rounded = fake_quantize_activations(x, scheme, tensors.get("input_scale"))
    weight = weight_format(scheme.weights).unpack(tensors, quantized.in_features, scheme.group)  # (N, K)
    y = rounded @ weight.mT
    # what the branch adds sees the inputs unquantized
    if scheme.rank:
        branched = raw if scheme.raw_branch else x
        y = y + branched @ tensors["low_rank_down"].float().mT @ tensors["low_rank_up"].float().mT
    return y if quantized.bias is None else y + quantized.bias.float()


# ------------------------------------------------------------------------------ the basis


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Sampled inputs in the basis in which they are quantized.

    Attributes:
        prepared: balanced and rotated, (R, K).
        rounded: as their format holds them, (R, K).
        scale: static scale, (1,), or None.
    """

    prepared: Tensor
    rounded: Tensor
    scale: Tensor | None


@dataclass(frozen=True, eq=False)
class _Basis:
    """Balance and rotation of a layer's inputs.

    Attributes:
        scale: s of the balance, (K,), or None.
        sign: of the rotation, int8, (K,), or None.
        block: of the rotation; 0 is none.
        device: of the layer.
    """

    scale: Tensor | None
    sign: Tensor | None
    block: int
    device: torch.device

    @classmethod
    def of(cls, scheme: Scheme, scale: Tensor | None, columns: int, device: torch.device) -> _Basis:
        return cls(scale, rotation_sign(columns).to(device) if scheme.rotate else None, scheme.rotate, device)

    def weight(self, weight: Tensor) -> Tensor:
        """Return the weight (N, K) for prepared inputs."""
        return rotate_weight(weight if self.scale is None else weight * self.scale, self.sign, self.block)

    def inputs(self, rows: Tensor, scheme: Scheme, statistics: LayerStatistics | None) -> _Inputs:
        """Prepare inputs (R, K) and quantize them."""
        balance = None if self.scale is None else 1 / self.scale
        prepared = prepare(rows, input_factors(balance, self.sign), self.block)  # (R, K)
        scale = None
        if scheme.static and statistics is not None:
            scale = _static_scale(prepared, scheme, self._largest(prepared, statistics), statistics.row_bins)
        if scheme.per_sample and statistics is not None:  # rows of one bin stand for those of one sample
            rounded = torch.zeros_like(prepared, dtype=torch.float32)
            for number in statistics.row_bins.unique():
                rows_here = (statistics.row_bins == number).to(prepared.device)
                rounded[rows_here] = fake_quantize_activations(prepared[rows_here], scheme)
            return _Inputs(prepared, rounded, scale)
        return _Inputs(prepared, fake_quantize_activations(prepared, scheme, scale), scale)

    def gram(self, gram: Tensor) -> Tensor:
        """Return the Gram matrix (K, K) of prepared inputs."""
        if self.scale is not None:
            gram = gram / self.scale / self.scale[:, None]
        return rotate_gram(gram, self.sign, self.block)

    def root_mean_square(self, statistics: LayerStatistics, bin_weights: Tensor | None) -> Tensor:
        """Return the magnitude of balanced inputs that are not rotated, (K,).

        Args:
            statistics: of the inputs.
            bin_weights: of the squares, (L,); None weighs bins by their own energy, so that all count alike.
        """
        square = statistics.mean_square.float()  # (L, K)
        weights = 1 / square.mean(1).clamp(min=1e-30) if bin_weights is None else bin_weights.cpu()  # (L,)
        mean = (weights @ square).sqrt()  # (K,)
        return mean if self.scale is None else mean / self.scale.cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a layer stores of it."""
        found = {} if self.scale is None else {"input_balance": (1 / self.scale).float()}
        return found if self.sign is None else {**found, "rotation_sign": self.sign}

    def _largest(self, prepared: Tensor, statistics: LayerStatistics) -> Tensor:
        """Return the largest prepared input: of all that were seen, or, rotated, of the sampled ones."""
        if self.block or not len(statistics.amax):
            return prepared.abs().amax()
        largest = statistics.amax.amax(0).to(prepared.device)  # (K,)
        return (largest if self.scale is None else largest / self.scale).amax()


# ------------------------------------------------------------------------------ errors


@dataclass(frozen=True, eq=False)
class _Sample:
    """Sampled inputs, and the outputs that the layer has for them.

    Attributes:
        rows: float32, (R, K).
        outputs: without bias, (R, N).
        bins: bin of each row, int64, (R,).
        weights: of the squared errors, such that they sum up to the mean over the bins of the relative ones, (R,).
        bin_weights: the same by bin, (L,).
    """

    rows: Tensor
    outputs: Tensor
    bins: Tensor
    weights: Tensor
    bin_weights: Tensor

    @classmethod
    def of(cls, weight: Tensor, statistics: LayerStatistics | None) -> _Sample | None:
        """Multiply the sampled rows by a weight (N, K); None where there are no rows."""
        if statistics is None or not len(statistics.rows):
            return None
        rows = statistics.rows.to(weight.device, torch.float32)  # (R, K)
        bins = statistics.row_bins.to(weight.device)
        outputs = rows @ weight.mT  # (R, N)
        energy = _by_bin(outputs.square().sum(1), bins, len(statistics.branches))  # (L,)
        filled = energy > 0
        bin_weights = torch.where(filled, 1 / energy.clamp(min=1e-30), 0) / max(int(filled.sum()), 1)  # (L,)
        return cls(rows, outputs, bins, bin_weights[bins], bin_weights)

    def bin_errors(self, inputs: _Inputs, rounded: Tensor, part: Tensor | None) -> Tensor:
        """Return the relative error by bin, (L,); NaN where no row of a bin was sampled, or its outputs are zero."""
        wrong = self._wrong(inputs, rounded, part).square().sum(1)  # (R,)
        bins = len(self.bin_weights)
        energy = _by_bin(self.outputs.square().sum(1), self.bins, bins)
        return (_by_bin(wrong, self.bins, bins) / energy).sqrt().cpu()

    def error(self, inputs: _Inputs, rounded: Tensor, part: Tensor | None) -> float:
        """Return the root of the mean relative squared error; all bins count the same.

        Args:
            inputs: the rows, prepared.
            rounded: quantized weight, (N, K).
            part: low-rank part of the weight, (N, K), or None.
        """
        return float((self._wrong(inputs, rounded, part).square().sum(1) @ self.weights).sqrt())

    def weighted(self, prepared: Tensor) -> Tensor:
        """Return prepared rows (R, K) scaled such that their plain squared error is the weighted one."""
        return prepared * self.weights.sqrt()[:, None]

    def _wrong(self, inputs: _Inputs, rounded: Tensor, part: Tensor | None) -> Tensor:
        outputs = inputs.rounded @ rounded.mT  # (R, N)
        if part is not None:
            outputs = outputs + inputs.prepared @ part.mT
        return outputs - self.outputs


def _trial_error(
    weight: Tensor, sample: _Sample, scheme: Scheme, statistics: LayerStatistics, scale: Tensor | None
) -> float:
    """Return the error of a layer (N, K) with a balance (K,), or None, that is rounded to the nearest values."""
    basis = _Basis.of(scheme, scale, weight.shape[1], weight.device)
    prepared = basis.weight(weight)  # (N, K)
    inputs = basis.inputs(sample.rows, scheme, statistics)
    fmt = weight_format(scheme.weights)
    if scheme.rank:
        return _branch(prepared, scheme, fmt, basis, sample, inputs, statistics, rounds=1).error
    return sample.error(inputs, _nearest(prepared, fmt, scheme.group), None)


def _branch(
    prepared: Tensor,
    scheme: Scheme,
    fmt: Format,
    basis: _Basis,
    sample: _Sample | None,
    inputs: _Inputs | None,
    statistics: LayerStatistics | None,
    rounds: int = ROUNDS,
) -> LowRank:
    """Find the low-rank branch of a prepared weight (N, K)."""
    weighting = None
    if statistics is not None:
        weighting = basis.root_mean_square(statistics, None if sample is None else sample.bin_weights)

    def error(rest: Tensor, part: Tensor) -> float:
        if sample is None or inputs is None:
            return float((prepared - part - rest).norm())
        return sample.error(inputs, rest, part)

    return low_rank_branch(
        prepared,
        scheme.rank,
        partial(_nearest, fmt=fmt, group=scheme.group),
        error,
        weighting=None if weighting is None else weighting.to(prepared.device),
        rotate=partial(rotate, sign=basis.sign, block=basis.block),
        unrotate=partial(unrotate, sign=basis.sign, block=basis.block),
        rounds=rounds,
    )


def _nearest(weight: Tensor, fmt: Format, group: int | None) -> Tensor:
    """Round a weight (N, K) to the nearest values, with scales that hold all of its range."""
    groups = grouped(weight, group or 0)
    return ungrouped(fmt.snap(groups, fmt.scales(groups, clip=1.0)), weight.shape[1])


def _static_scale(prepared: Tensor, scheme: Scheme, largest: Tensor, bins: Tensor) -> Tensor:
    """Return the scale for all tokens with the least squared error, (1,); bins count the same.

    Args:
        prepared: sampled inputs, (R, K).
        scheme: of the layer.
        largest: largest input, ().
        bins: bin of each row, (R,).
    """
    limit = LARGEST_FP8 if scheme.activations == "fp8" else LEVELS[scheme.activations]
    widest = (largest / limit).clamp(min=SMALLEST).reshape(1)
    if not len(prepared):
        return widest
    bins = bins.to(prepared.device)
    energy = _by_bin(prepared.square().sum(1), bins, int(bins.max()) + 1)[bins].clamp(min=1e-30)  # (R,)

    def error(scale: Tensor) -> float:
        wrong = fake_quantize_activations(prepared, scheme, scale) - prepared
        return float((wrong.square().sum(1) / energy).sum())

    return min((widest * clip for clip in CLIPS), key=error)


def _second_moments(
    scheme: Scheme, basis: _Basis, sample: _Sample | None, statistics: LayerStatistics | None
) -> Tensor | None:
    """Return what rounding may know of the prepared inputs, (K, K), all bins of the same weight; None if nothing."""
    if statistics is None or scheme.rounding == "nearest" or (sample is None and statistics.gram is None):
        return None
    moments = statistics.second_moments(None if sample is None else sample.bin_weights.cpu())
    return basis.gram(moments.to(basis.device))


# ------------------------------------------------------------------------------ what is given


def _checked_weight(linear: nn.Linear, name: str) -> Tensor:
    """Return the weight in float32, (N, K).

    Raises:
        ValueError: it is not in memory, or holds NaN or infinity.
    """
    weight = linear.weight.detach()
    if weight.device.type == "meta":
        raise ValueError(f"the weight of {name} is not in memory (offloaded?); quantize before offloading")
    weight = weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight of {name} holds NaN or infinity: repair the checkpoint, or leave the layer out")
    return weight


def _resolved(
    scheme: Scheme, rows: int, columns: int, statistics: LayerStatistics | None, name: str
) -> tuple[Scheme, list[str]]:
    """Return the scheme that a layer of this size takes, without what has no statistics, and notes of what changed.

    Raises:
        ValueError: static scales or a rounding without the statistics that they need, a branch that is only imported,
            or a group that the format can't store.
    """
    notes = []
    if scheme.raw_branch and scheme.rank:
        raise ValueError(f"raw_branch of {name} is for files that hold such a branch; leave it out to make one")
    if scheme.static and (statistics is None or not len(statistics.rows)):
        raise ValueError(
            f"static activations of {name} need statistics with rows; calibrate with rows=256, or leave static out"
        )
    if scheme.rounding not in ("nearest", "mse") and statistics is None:
        raise ValueError(
            f"rounding {scheme.rounding!r} of {name} needs statistics of its inputs; calibrate, or use 'mse'"
        )
    if scheme.alpha is not None and statistics is None:
        notes.append(f"channels are not balanced (alpha was {scheme.alpha!r}): there are no statistics of the inputs")
        scheme = replace(scheme, alpha=None)
    block = resolve_block(columns, scheme.rotate)
    if block != scheme.rotate:
        what = f"blocks of {block}" if block else "no rotation"
        notes.append(f"rotate is {scheme.rotate}, which {columns} inputs don't allow: {what}")
    rank = min(scheme.rank, rows, columns)
    if rank != scheme.rank:
        notes.append(f"rank is {scheme.rank}, a layer of {rows} x {columns} takes at most {rank}")
    group = weight_format(scheme.weights).resolve_group(scheme.group)
    return replace(scheme, group=group, rotate=block, rank=rank), notes


def _some_outputs(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the rows (n, K) of a weight that a search looks at."""
    if scheme.rank or len(weight) <= MOST_OUTPUTS:
        return weight
    return weight[torch.linspace(0, len(weight) - 1, MOST_OUTPUTS, device=weight.device).round().long()]


def _by_bin(values: Tensor, bins: Tensor, count: int) -> Tensor:
    """Sum up values (R,) by bin, (count,)."""
    return values.new_zeros(count).index_add_(0, bins, values)
