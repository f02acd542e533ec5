"""Examples encoded ahead of training, so that a step costs no decoding of files, no rendering and no encoding.

Latents are kept in half precision, in a file beside the runs; each time an example is drawn it gets a fresh caption.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apps.training.data.base import Examples
from dit.tokenizers import as_visual_tokenizer

CHUNK = 64  # images that are encoded at once
Encode = Callable[..., Tensor]
"""From examples (and the arguments of `encode_latents`) to a tensor with a row for each."""


@torch.no_grad()
def encode_latents(examples: Examples, vae: nn.Module, device: torch.device, quiet: bool = True) -> Tensor:
    """Encode the images of all examples.

    Returns:
        Normalized latents, (P, C, h, w), float16 on the CPU.
    """
    tokenizer = as_visual_tokenizer(vae)
    parts = []
    for images in chunks(examples, quiet):  # (b, 3, H, W)
        encoded = tokenizer.encode(images.to(device), return_dict=False)[0]
        parts.append(tokenizer.normalize_latents(encoded).to("cpu", torch.float16))  # (b, C, h, w)
    return torch.cat(parts)


@torch.no_grad()
def encode_tokens(examples: Examples, vae: Any, device: torch.device, quiet: bool = True) -> Tensor:
    """Encode the images of all examples as tokens, all scales in a row.

    Returns:
        Codebook entries (P, L), or bits (P, L, d); int16 on the CPU.
    """
    parts = []
    for images in chunks(examples, quiet):  # (b, 3, H, W)
        parts.append(torch.cat(vae.quantize(images.to(device)).indices, dim=1).to("cpu", torch.int16))  # (b, L[, d])
    return torch.cat(parts)


def cached_latents(
    examples: Examples, vae: Any, device: torch.device, folder: Path, encode: Encode = encode_latents
) -> Tensor:
    """Encode examples, or read what was encoded before.

    Args:
        examples: P examples.
        vae: Autoencoder.
        device: Where to encode.
        folder: Folder of the cache files; a file's name is a hash of all that its latents depend on.
        encode: `encode_latents` or `encode_tokens`.

    Returns:
        What `encode` returns.
    """
    digest = hashlib.sha256(repr((examples.fingerprint(), dict(vae.config))).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    path = folder / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({"latents": encode(examples, vae, device, quiet=False)}, temporary)
        temporary.rename(path)
    return load_file(path)["latents"]


def chunks(examples: Examples, quiet: bool, size: int = CHUNK) -> Iterator[Tensor]:
    """Yield the images (or clips) of all examples, at most `size` at a time, with a progress bar unless `quiet`."""
    starts = range(0, len(examples), size)
    for start in track(starts, "encoding images", console=Console(stderr=True), disable=quiet):
        yield examples.images(range(start, min(start + size, len(examples))))
