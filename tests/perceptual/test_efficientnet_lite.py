"""EfficientNet-lite0: values of the published network, sizes, gradients, what it refuses."""

import pytest
import torch

from apps.perceptual import EfficientNetLite0, image_features, load_efficientnet_lite0
from apps.perceptual.efficientnet_lite import Convolution
from tests.perceptual.waves import wave


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_efficientnet_lite0()


def test_maps_of_the_published_network(network: EfficientNetLite0) -> None:
    """The values are of the authors' own code and float32 weights, on images scaled as (x - 127) / 128."""
    fine, middle = network.maps(wave(128, 128, 9.0))
    assert fine.shape == (1, 40, 16, 16)
    assert middle.shape == (1, 112, 8, 8)
    assert fine.mean((2, 3))[0, :3].tolist() == pytest.approx([-1.645381, -2.567312, -2.244605], abs=0.02)
    assert middle.mean((2, 3))[0, :3].tolist() == pytest.approx([2.102149, 4.629097, 2.960294], abs=0.02)


def test_features_are_the_means_of_the_maps(network: EfficientNetLite0) -> None:
    images = torch.cat([wave(64, 64, turns) for turns in (3.0, 5.0, 7.0)])
    features = image_features(images, batch_size=2)
    means = [values.mean((2, 3)) for values in network.maps(images)]
    torch.testing.assert_close(features, torch.cat(means, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("side", "first", "last"), [(8, 0, 1), (9, 1, 1)])
def test_padding_is_that_of_tensorflow(side: int, first: int, last: int) -> None:
    """With an even side the odd pixel of the padding goes behind."""
    convolution = Convolution(1, 1, 3, 2, bias=False)
    with torch.no_grad():
        convolution.weight.fill_(1.0)
        out = convolution(torch.ones(1, 1, side, side))
    assert out.shape[-1] == -(-side // 2)
    assert out[0, 0, 0, 0] == (3 - first) ** 2
    assert out[0, 0, -1, -1] == (3 - last) ** 2


def test_gradients_reach_the_images_only(network: EfficientNetLite0) -> None:
    images = wave(64, 64, 3.0).requires_grad_()
    sum(values.square().mean() for values in network.maps(images)).backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_whole_network_has_pooled_features() -> None:
    pooled = EfficientNetLite0(deep=True)(wave(64, 48, 3.0))
    assert pooled.shape == (1, 1280)
    assert pooled.min() >= 0


def test_what_is_not_there_is_said(network: EfficientNetLite0) -> None:
    with pytest.raises(ValueError, match=r"load_efficientnet_lite0\(deep=True\)"):
        network(wave(64, 64, 3.0))
    with pytest.raises(ValueError, match="at least 32; enlarge smaller ones"):
        network.maps(wave(31, 64, 3.0))
