"""Published Real-ESRGAN networks of the compact form to a `CompactUpscaler` and back.

*Official* is the layout of xinntao/Real-ESRGAN: state dicts with `body.0.weight` ..., nested under `params` in its
`.pth` files. *ncnn* is the form in which the executable of the project carries the same weights: a `.param` file that
lists the layers, and a `.bin` file with their numbers in that order, the convolutions' weights in half precision and
all others in single precision.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dit.convert.keymap import KeyMapError, Rename, Rule, affine, convert, inverse
from dit.models.compact_upscaler import CompactUpscaler

NEST = "params"
"""Entry under which published files keep their tensors."""
NCNN_MAGIC = "7767517"
"""First line of a `.param` file."""
NCNN_HALF = 0x01306B47
"""Word before weights that are stored in half precision."""
SIDES = {"0": "channels", "1": "side", "4": "padding", "6": "weights"}
"""Keys of a convolution in a `.param` file -> what they say."""


def key_map(num_layers: int) -> tuple[Rule, ...]:
    """Return the map from the official layout to ours.

    Args:
        num_layers: convolutions between the first and the last one.
    """
    rules: list[Rule] = []
    for i in range(num_layers + 1):
        ours = "conv_in" if i == 0 else f"blocks.{i - 1}"
        rules += affine(Rename, f"body.{2 * i}", f"{ours}.conv")
        rules.append(Rename(f"body.{2 * i + 1}.weight", f"{ours}.act.weight"))
    rules += affine(Rename, f"body.{2 * num_layers + 2}", "conv_out")
    return tuple(rules)


def from_official(state: Mapping[str, Tensor]) -> CompactUpscaler:
    """Build a network from a state dict of the official layout; the number formats of its tensors are kept.

    Args:
        state: tensors by key.

    Raises:
        KeyMapError: keys or shapes are not those of the layout, or its activations are no PReLU.
    """
    if not {"body.0.weight", "body.1.weight"} <= state.keys():
        raise KeyMapError("this is no Real-ESRGAN network of the compact form with PReLU: body.1.weight is not there")
    num_layers = sum(key.endswith(".bias") for key in state) - 2  # activations have none
    ours = convert(state, key_map(num_layers))
    hidden_channels, in_channels = ours["conv_in.conv.weight"].shape[:2]
    factor = math.isqrt(len(ours["conv_out.bias"]) // in_channels)
    network = CompactUpscaler(in_channels, hidden_channels, num_layers, factor)
    for name, tensor in network.state_dict().items():
        if ours[name].shape != tensor.shape:
            raise KeyMapError(f"{name} has shape {tuple(ours[name].shape)}, expected {tuple(tensor.shape)}")
    network.load_state_dict(ours, strict=True, assign=True)
    return network.eval()


def to_official(network: CompactUpscaler) -> dict[str, Tensor]:
    """Return the state dict of a network in the official layout."""
    return convert(network.state_dict(), inverse(key_map(len(network.blocks))))


def read_ncnn(param: str, data: bytes) -> dict[str, Tensor]:
    """Read the two files of ncnn's form into the official layout, to the last byte.

    Args:
        param: content of the `.param` file.
        data: content of the `.bin` file.

    Returns:
        Tensors by key: weights of convolutions in float16, biases and slopes in float32, as they are stored.

    Raises:
        KeyMapError: layers of another kind or order, or numbers that are lacking or left over.
    """
    lines = param.split("\n")
    if lines[0].strip() != NCNN_MAGIC:
        raise KeyMapError(f"the .param file begins with {lines[0][:20]!r}, expected {NCNN_MAGIC!r}")
    reader, state, inputs = _Reader(data), dict[str, Tensor](), 3
    layers = [line.split() for line in lines[2:] if line.strip()]
    for kind, name, *rest in layers:
        values = dict(part.split("=", 1) for part in rest if re.fullmatch(r"-?\d+=\S+", part))
        key = f"body.{len([one for one in state if one.endswith('.weight')])}"
        if kind == "Convolution":
            said = {what: int(values[number]) for number, what in SIDES.items()}
            outputs = said["channels"]
            if (said["side"], said["padding"], said["weights"]) != (3, 1, 9 * inputs * outputs):
                raise KeyMapError(f"the layer {name} is no 3x3 convolution of {inputs} channels: {said}")
            state[f"{key}.weight"] = reader.half((outputs, inputs, 3, 3))
            state[f"{key}.bias"] = reader.single(outputs)
            inputs = outputs
        elif kind == "PReLU":
            state[f"{key}.weight"] = reader.single(int(values["0"]))
        elif kind not in ("Input", "Split", "PixelShuffle", "Interp", "BinaryOp"):
            raise KeyMapError(f"the layer {name} is a {kind}, which this network has not")
    reader.check_end()
    return state


class _Reader:
    """Takes numbers from the front of bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def half(self, shape: tuple[int, ...]) -> Tensor:
        """Take weights in half precision, which a word announces; ncnn fills them up to a multiple of 4 bytes."""
        (word,) = np.frombuffer(self._take(4), "<u4")
        if word != NCNN_HALF:
            raise KeyMapError(f"weights begin with the word {word:#010x}, expected {NCNN_HALF:#010x} (half precision)")
        count = int(np.prod(shape))
        values = np.frombuffer(self._take(2 * count), "<f2")
        self._take(-2 * count % 4)
        return torch.from_numpy(values.copy()).reshape(shape)

    def single(self, count: int) -> Tensor:
        """Take values in single precision."""
        return torch.from_numpy(np.frombuffer(self._take(4 * count), "<f4").copy())

    def check_end(self) -> None:
        """Raise if bytes are left."""
        if self._place != len(self._data):
            raise KeyMapError(f"{len(self._data) - self._place} bytes of the .bin file are left over")

    def _take(self, count: int) -> bytes:
        part = self._data[self._place : self._place + count]
        if len(part) != count:
            raise KeyMapError(f"the .bin file ends at byte {len(self._data)}, {count - len(part)} bytes too early")
        self._place += count
        return part
