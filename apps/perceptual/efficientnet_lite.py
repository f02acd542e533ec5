"""EfficientNet-lite0: what an image shows and where, by a network trained to recognise photographs.

Tan and Le, "EfficientNet" (arXiv:1905.11946), in its variant for small devices: no squeeze-and-excitation, ReLU6 in
place of swish. The weights are Google's, trained on ImageNet. Batch normalisation is folded into the convolutions when
the weights are converted, so each convolution has a bias, and nothing here depends on the mode of the module.

Images are scaled as (x - 127) / 128 of 0 to 255. On photographs the first convolution then has the variances that its
normalisation recorded in training; a scaling by ImageNet's mean and deviation makes them more than four times as large.

The network is kept in two files. The first five of its seven stages are shipped: they are a fifth of the weights, and
what they compute tells stickers apart. The rest, needed for the 1,280 pooled features only, is built by a script.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from apps.perceptual.weights import EFFICIENTNET_LITE0, EFFICIENTNET_LITE0_DEEP, read_weights


@dataclass(frozen=True)
class Stage:
    """A group of blocks: how far they widen, their kernel, the first one's stride, their channels, how many."""

    expansion: int
    kernel: int
    stride: int
    channels: int
    blocks: int


STEM = 32
STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
MIDDLE, FINE = 4, 2  # the stages whose outputs are the maps at stride 16 and 8
FEATURES = 1280
SMALLEST = 32


class Convolution(nn.Conv2d):
    """A convolution whose output is the input divided by the stride, rounded up, as TensorFlow pads it."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            border = kernel // 2
            return functional.conv2d(input, self.weight, self.bias, padding=border, groups=self.groups)
        padding: list[int] = []
        for side in (input.shape[3], input.shape[2]):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [missing // 2, missing - missing // 2]  # the odd pixel goes behind
        return functional.conv2d(functional.pad(input, padding), self.weight, self.bias, stride, groups=self.groups)


class Block(nn.Module):
    """Widen, convolve each channel by itself, narrow; add the input where nothing changes its shape."""

    def __init__(self, source: int, stage: Stage, stride: int) -> None:
        super().__init__()
        width = source * stage.expansion
        self.expand = Convolution(source, width, 1) if stage.expansion > 1 else None
        self.depthwise = Convolution(width, width, stage.kernel, stride, groups=width)
        self.project = Convolution(width, stage.channels, 1)
        self.residual = stride == 1 and source == stage.channels

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (B, C', H / stride, W / stride) of (B, C, H, W)."""
        wide = hidden_states if self.expand is None else functional.relu6(self.expand(hidden_states))
        narrow = self.project(functional.relu6(self.depthwise(wide)))
        return narrow + hidden_states if self.residual else narrow


class EfficientNetLite0(nn.Module):
    """Describe what images show.

    The parameters are frozen, gradients flow to the images. It was trained on images of 224 px; smaller ones work.

    Args:
        deep: Whether the last two stages and the head are there too, which only `forward` needs.
    """

    def __init__(self, deep: bool = False) -> None:
        super().__init__()
        self.stem = Convolution(3, STEM, 3, 2)
        self.stages = nn.ModuleList()
        source = STEM
        for stage in STAGES if deep else STAGES[: MIDDLE + 1]:
            blocks = []
            for number in range(stage.blocks):
                blocks.append(Block(source, stage, stage.stride if number == 0 else 1))
                source = stage.channels
            self.stages.append(nn.Sequential(*blocks))
        self.head = Convolution(source, FEATURES, 1) if deep else None
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features of the whole network.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W at least 32.

        Returns:
            (B, 1280) float32, from 0 to 6.

        Raises:
            ValueError: The images have another shape or are too small, or the network isn't deep.
        """
        if self.head is None:
            raise ValueError("this network ends at stride 16: call maps(), or load_efficientnet_lite0(deep=True)")
        last = self._stages(images)[-1]  # (B, 320, H / 32, W / 32)
        return functional.relu6(self.head(last)).float().mean((2, 3))  # (B, 1280)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the third and the fifth stage compute.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W at least 32.

        Returns:
            (B, 40, H / 8, W / 8) and (B, 112, H / 16, W / 16), sides rounded up.

        Raises:
            ValueError: The images have another shape or are too small.
        """
        outputs = self._stages(images, MIDDLE)
        return outputs[FINE], outputs[MIDDLE]

    def _stages(self, images: Tensor, last: int = len(STAGES) - 1) -> list[Tensor]:
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SMALLEST:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: give (B, 3, H, W) with H and W at least {SMALLEST}; "
                "enlarge smaller ones first"
            )
        scaled = (images.float() * 127.5 + 0.5) / 128  # (B, 3, H, W): (x - 127) / 128 of x = 0 to 255
        hidden = scaled.to(self.stem.weight.dtype).contiguous(memory_format=torch.channels_last)
        hidden = functional.relu6(self.stem(hidden))  # (B, 32, H / 2, W / 2)
        outputs = []
        for stage in self.stages[: last + 1]:
            hidden = stage(hidden)  # (B, C, h, w)
            outputs.append(hidden)
        return outputs


def load_efficientnet_lite0(device: torch.device | str = "cpu", deep: bool = False) -> EfficientNetLite0:
    """Load the network with its published weights, which are kept in half precision.

    Args:
        device: Where to put it; the weights become float32.
        deep: Whether to load what isn't shipped too, for the pooled features.

    Raises:
        FileNotFoundError: The part that isn't shipped wasn't built; the message says how to.
    """
    network = EfficientNetLite0(deep)
    weights = read_weights(EFFICIENTNET_LITE0)
    if deep:
        weights |= read_weights(EFFICIENTNET_LITE0_DEEP)
    network.load_state_dict(weights)
    return network.eval().to(device)
