import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dit.runtime import cost_model, timing
from dit.runtime.metrics import psnr, relative_error, ssim
from dit.runtime.timing import Comparison, Timing, count_bytes, count_flops, measure


def test_psnr_by_hand() -> None:
    reference = torch.zeros(1, 1, 2, 2)
    assert psnr(reference + 0.1, reference) == pytest.approx(20.0)
    assert psnr(reference + 0.1, reference, data_range=2.0) == pytest.approx(20.0 + 20 * math.log10(2))
    assert psnr(reference, reference) == math.inf


def test_ssim_against_torchmetrics() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    reference = torch.rand(2, 3, 24, 31)
    result = (reference + 0.1 * torch.randn_like(reference)).clamp(0, 1)
    _, pixels = structural_similarity_index_measure(result, reference, data_range=1.0, return_full_image=True)
    expected = pixels[..., 5:-5, 5:-5].mean().item()  # without the border, where it mirrors the image
    assert ssim(result, reference) == pytest.approx(expected, abs=1e-5)
    assert ssim(reference, reference) == pytest.approx(1.0)
    assert ssim(1 - reference, reference) < 0


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    """Numbers of scikit-image 0.26: `structural_similarity(gaussian_weights=True, use_sample_covariance=False)`."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    reference = torch.stack([(x * 7 + y * 3) % 97 / 96, (x * y) % 61 / 60, ((x - y) ** 2) % 89 / 88])  # (3, 24, 32)
    result = (reference * 0.9 + 0.05 + 0.08 * torch.sin(x.double() / 3 + y / 5)).clamp(0, 1)
    assert ssim(result[None], reference[None]) == pytest.approx(0.9653504716808361, abs=1e-6)
    assert psnr(result, reference) == pytest.approx(23.760171955465484, abs=1e-4)


def test_relative_errors_by_hand() -> None:
    reference = torch.tensor([3.0, -4.0])
    result = torch.tensor([3.0, -3.0])
    assert relative_error(result, reference) == pytest.approx(0.2)
    assert relative_error(result, reference, order=1) == pytest.approx(1 / 7)
    assert relative_error(result, reference, order=math.inf) == pytest.approx(0.25)
    assert relative_error(reference, reference) == 0.0
    assert relative_error(reference, torch.zeros(2)) == math.inf


def test_shapes_must_agree() -> None:
    for function in (psnr, ssim, relative_error):
        with pytest.raises(ValueError, match=r"shapes differ: \(1, 3, 16, 16\) against \(1, 3, 16, 12\)"):
            function(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 12))
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_flops_and_bytes() -> None:
    layer = nn.Linear(8, 16)
    assert count_flops(lambda: layer(torch.zeros(4, 8))) == 2 * 4 * 8 * 16
    tied = nn.Sequential(layer, layer)
    assert count_bytes(tied) == (8 * 16 + 16) * 4


def test_candidates_take_turns() -> None:
    order = []
    result = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert {len(timing.wall) for timing in result.timings.values()} == {3}
    with pytest.raises(ValueError, match="repeats >= 1"):
        measure({"a": dict}, repeats=0)


def test_wall_and_process_time(monkeypatch) -> None:
    """By clocks that only the measured functions move: one waits for 2 s, the other computes for 0.5 s."""
    now = {"wall": 0.0, "process": 0.0}
    clocks = SimpleNamespace(perf_counter=lambda: now["wall"], process_time=lambda: now["process"])
    monkeypatch.setattr(timing, "time", clocks)

    def take(wall: float, process: float) -> None:
        now["wall"] += wall
        now["process"] += process

    result = measure({"wait": lambda: take(2.0, 0.0), "compute": lambda: take(0.5, 0.5)}, repeats=3)
    assert result.timings["wait"] == Timing((2.0,) * 3, (0.0,) * 3)
    assert result.timings["compute"] == Timing((0.5,) * 3, (0.5,) * 3)
    assert result.ratio("wait", "compute") == 4.0


def test_ratio_is_the_median_over_rounds() -> None:
    """A disturbance that hits one round of both does not count."""
    a, b = Timing((2.0, 20.0, 2.0), (1.0, 1.0, 1.0)), Timing((1.0, 10.0, 4.0), (2.0, 2.0, 2.0))
    result = Comparison({"a": a, "b": b})
    assert result.ratio("a", "b") == 2.0
    assert result.ratio("a", "b", clock="process") == 0.5
    assert (a.wall_min, a.wall_median, a.process_min) == (2.0, 2.0, 1.0)


# --------------------------------------------------------------------------- costs


def test_costs_are_measured_kept_and_found_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost_model.load_costs() is None
    shapes = (("matmul", (32, 32, 32)), ("attention", (1, 2, 16, 16, 8)), ("elementwise", (64,)))
    table = cost_model.measure_costs(shapes, dtypes=("float32",), repeats=3)
    assert [cost.operation for cost in table.costs] == list(cost_model.OPERATIONS)
    assert all(cost.seconds > 0 for cost in table.costs)
    path = table.save()
    assert path.is_relative_to(tmp_path)
    assert cost_model.load_costs() == table
    monkeypatch.setattr(cost_model, "machine_key", lambda device="cpu": "another machine")
    assert cost_model.load_costs(path) is None


def test_estimates_scale_from_the_most_similar_measurement() -> None:
    small = cost_model.Cost("matmul", (10, 10, 10), "float32", 1.0)
    large = cost_model.Cost("matmul", (100, 100, 100), "float32", 100.0)
    table = cost_model.CostTable("here", (small, large))
    assert table.seconds("matmul", (10, 10, 20)) == pytest.approx(2.0)
    assert table.seconds("matmul", (100, 100, 50)) == pytest.approx(50.0)
    with pytest.raises(KeyError, match="no measurement of matmul in bfloat16"):
        table.seconds("matmul", (1, 1, 1), "bfloat16")
    with pytest.raises(ValueError, match="choose one of matmul, attention, elementwise"):
        table.seconds("fft", (8,))
    assert cost_model.amount("attention", (1, 2, 16, 32, 8)) == 2 * 2 * 16 * 32 * 8
