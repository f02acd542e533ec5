"""How alike two results are, and what they cost: the one place that measures.

Likeness: PSNR, SSIM, relative errors. Cost: FLOPs, bytes, time. Times of several candidates are taken in turns (A B A
B), so that whatever else the machine does hits all of them, and are compared by medians of one run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# ------------------------------------------------------------------------ likeness


def psnr(result: Tensor, reference: Tensor, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in decibels; infinite for equal tensors.

    Args:
        result: any shape.
        reference: the same shape.
        data_range: largest minus smallest possible value (1 for images in [0, 1]).

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(result, reference)
    error = (result.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(result: Tensor, reference: Tensor, data_range: float = 1.0) -> float:
    """Structural similarity in [-1, 1] (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5.

    The mean over all pixels whose window lies inside the image, as in the paper.

    Args:
        result: (B, C, H, W), sides of at least 11.
        reference: the same shape.
        data_range: largest minus smallest possible value.

    Raises:
        ValueError: the shapes differ, or a side is below 11 pixels.
    """
    _check_shapes(result, reference)
    if result.ndim != 4 or min(result.shape[-2:]) < 11:
        raise ValueError(f"ssim needs pictures (B, C, H, W) of at least 11 x 11 pixels, got {tuple(result.shape)}")
    ramp = torch.arange(-5, 6, dtype=torch.float64, device=result.device)  # (11,)
    window = torch.exp(-(ramp**2) / (2 * 1.5**2))
    window = window / window.sum()  # (11,)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, window.view(1, 1, 11, 1))
        return F.conv2d(x, window.view(1, 1, 1, 11))

    x, y = (picture.double().flatten(0, 1)[:, None] for picture in (result, reference))  # (B C, 1, H, W)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    scale = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (likeness / scale).mean().item()


def relative_error(result: Tensor, reference: Tensor, order: float = 2) -> float:
    """Norm of the difference over norm of the reference.

    Args:
        result: any shape.
        reference: the same shape.
        order: of the norm: 1, 2 or infinity.

    Returns:
        0 for equal tensors; infinite if only the reference is zero.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(result, reference)
    difference = torch.linalg.vector_norm((result.double() - reference.double()).flatten(), order).item()
    size = torch.linalg.vector_norm(reference.double().flatten(), order).item()
    return 0.0 if difference == 0 else difference / size if size else math.inf


def _check_shapes(result: Tensor, reference: Tensor) -> None:
    if result.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(result.shape)} against {tuple(reference.shape)}")


# ---------------------------------------------------------------------------- cost


def count_flops(function: Callable[[], object]) -> int:
    """Return the floating-point operations of matrix products and convolutions in a call; a multiply-add is two.

    Args:
        function: what to call, once.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def count_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers; shared ones count once.

    Args:
        module: any.
    """
    tensors = [*module.parameters(), *module.buffers()]
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@dataclass(frozen=True)
class Timing:
    """Seconds that a call takes.

    Args:
        wall: of each repeat, by the clock.
        process: of each repeat, processor time of all threads of this process; steadier on a busy machine.
    """

    wall: tuple[float, ...]
    process: tuple[float, ...]

    @property
    def wall_min(self) -> float:
        """Least wall time."""
        return min(self.wall)

    @property
    def wall_median(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)

    @property
    def process_min(self) -> float:
        """Least processor time."""
        return min(self.process)

    @property
    def process_median(self) -> float:
        """Median processor time."""
        return statistics.median(self.process)


@dataclass(frozen=True)
class Comparison:
    """Times of candidates that were taken in turns.

    Args:
        timings: by name.
    """

    timings: dict[str, Timing]

    def ratio(self, name: str, baseline: str, clock: str = "wall") -> float:
        """Return how many times as long as the baseline a candidate takes: the median over rounds of their ratio.

        Args:
            name: the candidate.
            baseline: what to compare with.
            clock: "wall" or "process".
        """
        ours, theirs = getattr(self.timings[name], clock), getattr(self.timings[baseline], clock)
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def measure(candidates: Mapping[str, Callable[[], object]], repeats: int = 5, warmup: int = 1) -> Comparison:
    """Time candidates in turns: A B A B ...

    Args:
        candidates: what to call, by name.
        repeats: rounds that count.
        warmup: rounds before, which do not count.

    Returns:
        The times; work of accelerators is waited for.

    Raises:
        ValueError: no candidates or no repeats.
    """
    if not candidates or repeats < 1 or warmup < 0:
        raise ValueError(f"need candidates, repeats >= 1 and warmup >= 0, got {len(candidates)}, {repeats}, {warmup}")
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    process: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, function in candidates.items():
            _wait()
            begun, busy = time.perf_counter(), time.process_time()
            function()
            _wait()
            if turn >= warmup:
                process[name].append(time.process_time() - busy)
                wall[name].append(time.perf_counter() - begun)
    return Comparison({name: Timing(tuple(wall[name]), tuple(process[name])) for name in candidates})


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
