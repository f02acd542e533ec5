"""CompactUpscaler: against an independent reference, its reach, what it saves and refuses."""

import pytest
import torch
from torch import Tensor, nn

from dit.models.compact_upscaler import CompactUpscaler


def tiny(**config: int) -> CompactUpscaler:
    network = CompactUpscaler(**{"hidden_channels": 8, "num_layers": 2, "factor": 3, **config})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def reference(network: CompactUpscaler, image: Tensor) -> Tensor:
    """Compute it from the weights tap by tap and pixel by pixel, in double precision; (C, H, W) -> (C, f H, f W)."""
    weights = {name: tensor.double() for name, tensor in network.state_dict().items()}

    def convolve(planes: Tensor, key: str) -> Tensor:
        kernel, bias = weights[f"{key}.weight"], weights[f"{key}.bias"]
        height, width = planes.shape[1:]
        padded = torch.zeros(len(planes), height + 2, width + 2, dtype=torch.float64)
        padded[:, 1:-1, 1:-1] = planes
        total = bias[:, None, None].expand(-1, height, width).clone()
        for row in range(3):
            for column in range(3):
                seen = padded[:, row : row + height, column : column + width]
                total += torch.einsum("oi,ihw->ohw", kernel[:, :, row, column], seen)
        return total

    planes = image.double()
    for key in ("conv_in", *(f"blocks.{i}" for i in range(len(network.blocks)))):
        planes = convolve(planes, f"{key}.conv")
        slopes = weights[f"{key}.act.weight"][:, None, None]
        planes = torch.where(planes > 0, planes, slopes * planes)
    planes, factor = convolve(planes, "conv_out"), network.config.factor
    large = torch.empty(len(image), factor * image.shape[1], factor * image.shape[2], dtype=torch.float64)
    for channel in range(len(image)):
        for row in range(factor):
            for column in range(factor):
                detail = planes[channel * factor**2 + row * factor + column]
                large[channel, row::factor, column::factor] = detail + image[channel]
    return large


@torch.no_grad()
def test_it_computes_what_the_reference_does() -> None:
    network, image = tiny(), torch.rand(1, 3, 11, 7)
    expected = reference(network, image[0])
    assert network(image).shape == (1, 3, 33, 21)
    assert (network(image)[0] - expected).abs().max() / expected.abs().max() < 1e-5


def test_the_published_size() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in CompactUpscaler().parameters()) == 621_424


@torch.no_grad()
def test_an_output_pixel_sees_so_far_and_no_farther() -> None:
    """Tiles overlap by it: less leaves seams, more costs time."""
    network, image = tiny(), torch.rand(1, 3, 21, 21)
    changed = image.clone()
    changed[..., 10, 10] += 1
    differs = (network(image) != network(changed)).any(1)[0]  # (63, 63)
    rows = differs.any(1).nonzero()
    factor, reach = 3, network.reach
    assert (rows.min().item(), rows.max().item()) == (factor * (10 - reach), factor * (11 + reach) - 1)


def test_it_loads_what_it_saves(tmp_path) -> None:
    network = tiny(factor=2)
    network.save_pretrained(tmp_path)
    again = CompactUpscaler.from_pretrained(tmp_path, use_safetensors=True)
    image = torch.rand(2, 3, 5, 6)
    assert torch.equal(again(image), network(image))


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        network = tiny()
        if checkpoints:
            network.enable_gradient_checkpointing()
        network(torch.rand(1, 3, 6, 6)).square().mean().backward()
        gradients.append(network.conv_in.conv.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("config", [{"factor": 0}, {"hidden_channels": 0}, {"num_layers": -1}])
def test_sizes_that_make_no_network_are_named(config: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(config))):
        CompactUpscaler(**config)
