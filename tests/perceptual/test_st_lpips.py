"""ST-LPIPS: distances of the published network, shifts against blurs, gradients, what it refuses."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from apps.perceptual import ShiftTolerantLPIPS, load_st_lpips, perceptual_distance
from apps.perceptual.st_lpips import blur_and_halve, convolve_blur_and_halve
from apps.stickers import SceneMix, SceneSampler, load_sprites, render
from tests.perceptual.waves import wave


@pytest.fixture(scope="module")
def network() -> ShiftTolerantLPIPS:
    return load_st_lpips()


@pytest.fixture(scope="module")
def images() -> Tensor:
    sampler = SceneSampler(load_sprites(), split="all", mix=SceneMix(pair=0, count=0))
    return render([sampler.scene(5, index) for index in range(8)], load_sprites(), 64)  # (8, 3, 64, 64)


@pytest.mark.parametrize(
    ("height", "width", "published"),
    [(21, 30, 0.284737), (64, 64, 0.353984), (97, 65, 0.405199), (128, 128, 0.504188)],
)
def test_distances_of_the_published_network(
    network: ShiftTolerantLPIPS, height: int, width: int, published: float
) -> None:
    """The values are of the authors' own code and float32 weights; half precision costs less than a thousandth."""
    distance = network(wave(height, width, 9.0), wave(height, width, 14.0))
    assert distance.item() == pytest.approx(published, rel=1e-3)


def test_equal_images_have_no_distance_and_order_does_not_matter(network: ShiftTolerantLPIPS, images: Tensor) -> None:
    assert network(images, images).tolist() == [0.0] * 8
    there, back = network(images, images.flip(0)), network(images.flip(0), images)
    torch.testing.assert_close(there, back, rtol=1e-5, atol=0)
    assert there.min() > 0.1


def test_a_shift_is_nearer_than_a_blur(network: ShiftTolerantLPIPS, images: Tensor) -> None:
    """In mean squares it is the other way round, which is what the metric is for."""
    shifted = functional.pad(images, (2, 0, 0, 0), mode="replicate")[..., :-2]
    blurred = functional.avg_pool2d(functional.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    assert (network(images, shifted) < 0.5 * network(images, blurred)).all()
    squares = [(images - other).square().mean((1, 2, 3)) for other in (shifted, blurred)]
    assert (squares[0] > squares[1]).float().mean() > 0.5


def test_gradients_reach_the_image_only(network: ShiftTolerantLPIPS, images: Tensor) -> None:
    with torch.no_grad():
        target = network.features(images)
    moved = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    before = network.distance(network.features(moved), target)
    before.sum().backward()
    assert moved.grad is not None
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.no_grad():
        after = network.distance(network.features(moved - 0.2 * moved.grad), target)
    assert (after < before).all()


def test_equal_flat_images_have_finite_gradients(network: ShiftTolerantLPIPS) -> None:
    flat = torch.ones(1, 3, 32, 32, requires_grad=True)
    network(flat, torch.ones(1, 3, 32, 32)).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_distances_stay_float32_under_autocast(network: ShiftTolerantLPIPS, images: Tensor) -> None:
    exact = network(images, images.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(images, images.flip(0))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)


def test_blur_and_halve_is_the_binomial_filter() -> None:
    """Beside the plain definition, with its mirrored border of two pixels."""
    line = torch.arange(7.0).square()
    image = line.expand(1, 2, 7, 7)
    mirrored = [4, 1, *line.tolist(), 25, 16]
    means = [(mirrored[i] + 2 * mirrored[i + 1] + mirrored[i + 2]) / 4 for i in range(0, 9, 2)]
    assert blur_and_halve(image)[0, 1, 2].tolist() == pytest.approx(means)


@pytest.mark.parametrize(("height", "width"), [(21, 22), (30, 33), (64, 64), (37, 41)])
def test_one_convolution_equals_two(network: ShiftTolerantLPIPS, height: int, width: int) -> None:
    """In float64, values and gradients: whatever the parities of the sides."""
    convolution = torch.nn.Conv2d(3, 64, 11, padding=2).double()
    convolution.load_state_dict(network.trunk[0].state_dict())
    image = wave(height, width, 9.0).double().requires_grad_()
    results = [convolve_blur_and_halve(image, convolution), blur_and_halve(convolution(image))]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result.square().sum(), image)[0] for result in results))


@pytest.mark.parametrize("shape", [(1, 3, 20, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_other_shapes_are_refused(network: ShiftTolerantLPIPS, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least 21; enlarge smaller ones"):
        network.features(torch.zeros(shape))


def test_images_of_two_shapes_are_refused(network: ShiftTolerantLPIPS) -> None:
    with pytest.raises(ValueError, match="give images of one shape"):
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 33))


def test_the_smallest_images_work(network: ShiftTolerantLPIPS) -> None:
    assert network(wave(21, 21, 3.0), wave(21, 21, 5.0)).isfinite().all()


def test_batches_are_compared_in_parts(network: ShiftTolerantLPIPS, images: Tensor) -> None:
    whole = network(images, images.flip(0))
    torch.testing.assert_close(perceptual_distance(images, images.flip(0), batch_size=3), whole)
    with pytest.raises(ValueError, match="give one reference each"):
        perceptual_distance(images, images[:3])
