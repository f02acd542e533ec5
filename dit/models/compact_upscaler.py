"""CompactUpscaler: a plain convolutional network that enlarges images by a whole factor.

The network of Real-ESRGAN (arXiv 2107.10833) in its compact form, there called SRVGGNetCompact: 3x3 convolutions at
the size of the input, each but the last followed by a PReLU; the last one makes factor x factor pixels of each pixel,
which are added to the input's own pixel. It runs once and has no steps; every output pixel depends on input pixels at
most `reach` away, so an image can be enlarged tile by tile without a trace.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dit.runtime._typing import Typed


class ConvBlock(nn.Module):
    """A 3x3 convolution and a PReLU.

    Args:
        in_channels: of the input.
        out_channels: of the output; each has a slope of its own.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.act = nn.PReLU(out_channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run the block, (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return self.act(self.conv(hidden_states))


class CompactUpscaler(Typed, ModelMixin, ConfigMixin):
    """Enlarges images by a whole factor; 621,424 parameters in its published size.

    Args:
        in_channels: channels of an image.
        hidden_channels: width of the convolutions.
        num_layers: convolutions between the first and the last one.
        factor: output pixels a side of an input pixel.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ConvBlock"]
    _repeated_blocks = ["ConvBlock"]

    @register_to_config
    def __init__(self, in_channels: int = 3, hidden_channels: int = 64, num_layers: int = 16, factor: int = 4) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "hidden_channels": hidden_channels, "factor": factor}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; choose a whole number from 1.")
        if num_layers < 0:
            raise ValueError(f"num_layers is {num_layers}; choose a whole number from 0.")
        self.conv_in = ConvBlock(in_channels, hidden_channels)
        self.blocks = nn.ModuleList(ConvBlock(hidden_channels, hidden_channels) for _ in range(num_layers))
        self.conv_out = nn.Conv2d(hidden_channels, in_channels * factor**2, 3, padding=1)
        self.gradient_checkpointing = False

    @property
    def reach(self) -> int:
        """Pixels of the input, on every side, that an output pixel depends on."""
        return len(self.blocks) + 2

    def forward(self, sample: Tensor) -> Tensor:
        """Enlarge images.

        Args:
            sample: RGB in [0, 1], (B, C, H, W).

        Returns:
            (B, C, factor * H, factor * W); values may lie a little outside [0, 1].
        """
        factor: int = self.config.factor
        hidden_states = self.conv_in(sample)  # (B, hidden_channels, H, W)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                run: Any = self._gradient_checkpointing_func
                hidden_states = run(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        detail = F.pixel_shuffle(self.conv_out(hidden_states), factor)  # (B, C, factor * H, factor * W)
        return detail + F.interpolate(sample, scale_factor=factor, mode="nearest")
