"""ST-LPIPS: how different two images look to people, by a network that overlooks small shifts.

Ghildyal and Liu, "Shift-tolerant perceptual similarity metric" (arXiv:2207.13686), the AlexNet variant. As in LPIPS
(Zhang et al., arXiv:1801.03924), images are compared by the activations of a network that was trained to recognise
photographs: at five depths each pixel's activations are scaled to length one, and the squared differences are weighted
per channel (learned from people's judgements) and averaged over the image.

What makes it tolerant of shifts: wherever AlexNet takes every second pixel, this network first blurs with the binomial
filter (1, 2, 1), over borders that are mirrored by two pixels (section 4 of the paper), so that no activation depends
on whether an edge falls on an even or an odd pixel. The first convolution therefore has stride 1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from apps.perceptual.weights import ST_LPIPS, read_weights

CHANNELS = (64, 192, 384, 256, 256)  # of the five depths
KERNELS = (11, 5, 3, 3, 3)
PADDINGS = (2, 2, 1, 1, 1)
SMALLEST = 21  # side in pixels below which the third blur's mirrored border would reach beyond the image
# Mean and deviation of photographs in [-1, 1], which the network was trained with.
MEAN = (-0.030, -0.088, -0.188)
DEVIATION = (0.458, 0.448, 0.450)
BINOMIAL, PAIR = (0.25, 0.5, 0.25), (0.5, 0.5)
TINY = 1e-10  # added to the length of a pixel's activations, as in LPIPS


def blur_and_halve(images: Tensor) -> Tensor:
    """Blur by the binomial filter (1, 2, 1) / 4 along both axes, then take every second pixel.

    The border is mirrored by two pixels on each side, so the result is one to two pixels larger than half.

    Args:
        images: (B, C, H, W), H and W at least 3.

    Returns:
        (B, C, (H + 1) // 2 + 1, (W + 1) // 2 + 1).
    """
    channels = images.shape[1]
    line = torch.tensor(BINOMIAL, dtype=images.dtype, device=images.device)
    kernel = torch.outer(line, line).expand(channels, 1, 3, 3)  # (C, 1, 3, 3)
    padded = functional.pad(images, (2, 2, 2, 2), mode="reflect")  # (B, C, H + 4, W + 4)
    return functional.conv2d(padded, kernel, stride=2, groups=channels)


def convolve_blur_and_halve(images: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Return `blur_and_halve(convolution(images))`, faster: both in one convolution of stride 2.

    A convolution, then a blur, is a convolution with the blurred kernel; only at the mirrored border it is another one.
    There the first output repeats the second, since both blur the same three values, and so does the last if their
    number is odd. If it is even, the last blurs the last two values by (1, 1) / 2.

    Args:
        images: (B, C, H, W), H and W at least 21.
        convolution: Of stride 1, with a padding on all sides.
    """
    height, width = images.shape[2:]
    (kernel, _), (border, _) = convolution.kernel_size, convolution.padding
    padded = functional.pad(images, [int(border)] * 4)  # (B, C, H + 2 p, W + 2 p)
    odd = [(side + 2 * int(border) - kernel + 1) % 2 for side in (height, width)]

    def part(last_row: bool, last_column: bool) -> Tensor:
        rows, columns = (PAIR if last else BINOMIAL for last in (last_row, last_column))
        weight = _blurred_kernel(_blurred_kernel(convolution.weight, rows).mT, columns).mT
        source = padded[:, :, -kernel - 1 :] if last_row else padded
        source = source[..., -kernel - 1 :] if last_column else source
        return functional.conv2d(source, weight, convolution.bias, stride=2)

    def line(last_row: bool) -> Tensor:
        inner = part(last_row, False)  # (B, C', h, w)
        last = inner[..., -1:] if odd[1] else part(last_row, True)  # (B, C', h, 1)
        return torch.cat([inner[..., :1], inner, last], dim=3)

    inner = line(False)
    last = inner[:, :, -1:] if odd[0] else line(True)  # (B, C', 1, w)
    return torch.cat([inner[:, :, :1], inner, last], dim=2)


def _blurred_kernel(weight: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Convolve kernels (O, C, h, w) with a line of taps along h: (O, C, h + taps - 1, w)."""
    reach = len(taps) - 1
    return torch.stack(
        [tap * functional.pad(weight, (0, 0, place, reach - place)) for place, tap in enumerate(taps)]
    ).sum(0)


class ShiftTolerantLPIPS(nn.Module):
    """Measure how different images look; 0 for equal images, about 0.5 for unrelated ones.

    The parameters are frozen, but gradients flow to the images, so it serves as a training loss too. Where the other
    image stays the same, take its features once:

        with torch.no_grad():
            target = network.features(images)
        loss = network.distance(network.features(decoded), target).mean()

    Under autocast the convolutions run in the lower precision; lengths, differences and means are always float32.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *CHANNELS[:-1])
        self.trunk = nn.ModuleList(
            nn.Conv2d(source, target, kernel, padding=padding)
            for source, target, kernel, padding in zip(inputs, CHANNELS, KERNELS, PADDINGS, strict=True)
        )
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(channels)) for channels in CHANNELS)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance of each pair of images.

        Args:
            first: (B, 3, H, W) in [-1, 1], H and W at least 21.
            second: The same shape.

        Returns:
            (B,) float32.

        Raises:
            ValueError: The shapes differ, or are no such images.
        """
        if first.shape != second.shape:
            raise ValueError(
                f"first has shape {tuple(first.shape)} and second {tuple(second.shape)}: give images of one shape"
            )
        return self.distance(self.features(first), self.features(second))

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the activations at five depths, each pixel's scaled to length one.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W at least 21.

        Returns:
            Five maps (B, C, h, w) float32 with C = 64, 192, 384, 256, 256.

        Raises:
            ValueError: The images have another shape or are too small.
        """
        return tuple(_unit_length(activations) for activations in self.activations(images))

    def activations(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the same as `features`, not scaled, in the dtype that the convolutions ran in."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SMALLEST:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: give (B, 3, H, W) with H and W at least {SMALLEST}; "
                "enlarge smaller ones first"
            )
        scaled = (_at_least_float32(images) - self.mean) / self.deviation  # (B, 3, H, W)
        # Twice as fast on a CPU with the channels last.
        hidden = scaled.to(self.heads[0].dtype).contiguous(memory_format=torch.channels_last)
        first, *others = (module for module in self.trunk if isinstance(module, nn.Conv2d))
        hidden = functional.relu(convolve_blur_and_halve(hidden, first))  # (B, 64, about H / 2, W / 2)
        maps = [hidden]
        for depth, convolution in enumerate(others):
            if depth < 2:
                hidden = blur_and_halve(functional.max_pool2d(hidden, 3, stride=1))  # (B, C, about h / 2, w / 2)
            hidden = functional.relu(convolution(hidden))  # (B, C, h, w)
            maps.append(hidden)
        return tuple(maps)

    def distance(self, first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
        """Compare the features of two batches: five maps each, to (B,) float32."""
        with torch.autocast(first[0].device.type, enabled=False):
            distances = [
                ((a - b).square().mean((2, 3)) * head).sum(1)  # (B,)
                for head, a, b in zip(self.heads, first, second, strict=True)
            ]
        return torch.stack(distances).sum(0)  # (B,)


def load_st_lpips(device: torch.device | str = "cpu") -> ShiftTolerantLPIPS:
    """Load the network with its published weights, which are shipped in half precision.

    Args:
        device: Where to put it; the weights become float32.
    """
    network = ShiftTolerantLPIPS()
    network.load_state_dict(read_weights(ST_LPIPS))
    return network.eval().to(device)


def _unit_length(activations: Tensor) -> Tensor:
    """Scale each pixel's activations (B, C, h, w) to length one, in float32; all-zero ones stay zero."""
    values = _at_least_float32(activations)
    # The clamp changes no value, but keeps the gradient of the root finite where all activations are zero.
    length = values.square().sum(1, keepdim=True).clamp(min=TINY**2).sqrt()  # (B, 1, h, w)
    return values / (length + TINY)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
