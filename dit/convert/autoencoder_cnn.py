"""Key maps of latent diffusion's convolutional encoder and decoder, which many tokenizers share, to diffusers' classes.

The two count the decoder's levels from opposite ends: theirs from the finest, `Decoder` of diffusers in the order it
runs, from the coarsest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit.convert.keymap import Rename, Reshape, Rule, Split, affine


@dataclass(frozen=True)
class AutoencoderLayout:
    """How a family writes the layout down.

    Attributes:
        channels: width of each level, fine to coarse.
        layers_per_block: residual blocks a level of the encoder; the decoder has one more.
        has_attention: whether the coarsest level and the middle attend (1x1 convolutions there, linear layers here).
        is_wrapped: whether each convolution and norm sits in a module of its own, as `conv1.conv` and `norm1.norm`.
    """

    channels: Sequence[int]
    layers_per_block: int
    has_attention: bool = True
    is_wrapped: bool = False

    def rules(self) -> tuple[Rule, ...]:
        """Return the map of `encoder` and `decoder` to diffusers' names."""
        last = len(self.channels) - 1
        rules: list[Rule] = []
        for side in ("encoder", "decoder"):
            for theirs, ours in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
                rules += self._layer(f"{side}.{theirs}", f"{side}.{ours}")
            for j in (1, 2):
                rules += self._resnet(f"{side}.mid.block_{j}", f"{side}.mid_block.resnets.{j - 1}", False)
            if self.has_attention:
                rules += self._attention(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", self.channels[-1])
        for i in range(len(self.channels)):
            down = (f"encoder.down.{i}", f"encoder.down_blocks.{i}")
            up = (f"decoder.up.{i}", f"decoder.up_blocks.{last - i}")
            rules += self._level(*down, i, self.layers_per_block, self.channels[max(i - 1, 0)])
            rules += self._level(*up, i, self.layers_per_block + 1, self.channels[min(i + 1, last)])
            if i < last:
                rules += self._layer(f"{down[0]}.downsample.conv", f"{down[1]}.downsamplers.0.conv")
            if i > 0:
                rules += self._layer(f"{up[0]}.upsample.conv", f"{up[1]}.upsamplers.0.conv")
        return tuple(rules)

    def _layer(self, theirs: str, ours: str) -> tuple[Rule, Rule]:
        """Return the rules of one convolution or norm."""
        part = theirs.rsplit(".", maxsplit=1)[-1]
        wrapper = "" if not self.is_wrapped else ".norm" if part.startswith("norm") else ".conv"
        return affine(Rename, theirs + wrapper, ours)

    def _level(self, theirs: str, ours: str, index: int, layers: int, enters_with: int) -> list[Rule]:
        """Return the rules of the blocks of one resolution."""
        rules: list[Rule] = []
        width = self.channels[index]
        for j in range(layers):
            rules += self._resnet(f"{theirs}.block.{j}", f"{ours}.resnets.{j}", j == 0 and enters_with != width)
            if self.has_attention and index == len(self.channels) - 1:
                rules += self._attention(f"{theirs}.attn.{j}", f"{ours}.attentions.{j}", width)
        return rules

    def _resnet(self, theirs: str, ours: str, has_shortcut: bool) -> list[Rule]:
        """Return the rules of a residual block."""
        rules: list[Rule] = []
        for part in ("norm1", "conv1", "norm2", "conv2"):
            rules += self._layer(f"{theirs}.{part}", f"{ours}.{part}")
        if has_shortcut:
            rules += self._layer(f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut")
        return rules

    def _attention(self, theirs: str, ours: str, width: int) -> list[Rule]:
        """Return the rules of an attention block."""
        parts = tuple(f"{ours}.to_{part}" for part in "qkv")
        return [
            *affine(Rename, f"{theirs}.norm", f"{ours}.group_norm"),
            Split(f"{theirs}.qkv.weight", tuple(f"{part}.weight" for part in parts), kernel_axes=2),
            Split(f"{theirs}.qkv.bias", tuple(f"{part}.bias" for part in parts)),
            Reshape(f"{theirs}.proj_out.weight", f"{ours}.to_out.0.weight", (width, width, 1, 1), (width, width)),
            Rename(f"{theirs}.proj_out.bias", f"{ours}.to_out.0.bias"),
        ]
