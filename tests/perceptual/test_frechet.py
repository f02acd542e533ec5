"""The Frechet distance against closed forms."""

import pytest
import torch

from apps.perceptual import frechet_distance
from apps.perceptual.frechet import gaussian_distance


def draw(count: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_sets_have_no_distance() -> None:
    """Also with fewer images than features, where the covariance has no full rank."""
    for count in (200, 20):
        assert frechet_distance(draw(count, 50), draw(count, 50)) == pytest.approx(0, abs=1e-6)


def test_a_shift_counts_by_its_square() -> None:
    features = draw(64, 8)
    assert frechet_distance(features, features + torch.arange(8)) == pytest.approx(140)


def test_one_feature() -> None:
    """(m - n)^2 + (s - t)^2 for standard deviations s and t."""
    first, second = draw(100, 1), 3 * draw(90, 1, seed=1) + 2
    expected = (first.mean() - second.mean()) ** 2 + (first.std() - second.std()) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected.item())


def test_covariances_with_the_same_axes() -> None:
    """The sum of (sqrt(a) - sqrt(b))^2 over the axes, whichever way they are turned."""
    turn = torch.linalg.qr(draw(5, 5)).Q
    a, b = torch.tensor([1.0, 4, 9, 0, 2]).double(), torch.tensor([4.0, 1, 0, 0, 8]).double()
    mean = torch.zeros(5)
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    covariances = [(turn * values) @ turn.T for values in (a, b)]
    assert gaussian_distance(mean, covariances[0], mean, covariances[1]) == pytest.approx(expected)


def test_covariances_with_other_axes() -> None:
    """Against the root of the product A B itself, by its (real, positive) eigenvalues."""
    a, b = (factor @ factor.T for factor in (draw(6, 6), draw(6, 6, seed=1)))
    cross = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = (a.trace() + b.trace() - 2 * cross).item()
    mean = torch.zeros(6)
    assert gaussian_distance(mean, a, mean, b) == pytest.approx(expected)
    assert gaussian_distance(mean, b, mean, a) == pytest.approx(expected)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"second has shape \(1, 4\): give \(N, D\) with N at least 2"):
        frechet_distance(draw(5, 4), draw(1, 4))
    with pytest.raises(ValueError, match="first has 4 features and second 3"):
        frechet_distance(draw(5, 4), draw(5, 3))
    with pytest.raises(ValueError, match="give finite features"):
        frechet_distance(draw(5, 4), draw(5, 4) / 0)
