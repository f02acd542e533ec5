"""What pretrained networks say about batches of images, in one call each."""

import torch
from torch import Tensor

from apps.perceptual.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from apps.perceptual.st_lpips import ShiftTolerantLPIPS, load_st_lpips


@torch.no_grad()
def perceptual_distance(
    images: Tensor, references: Tensor, batch_size: int = 16, network: ShiftTolerantLPIPS | None = None
) -> Tensor:
    """Measure by ST-LPIPS how different each image looks from its reference.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        references: The same shape.
        batch_size: How many pairs are compared at once (memory only).
        network: Compares them where it is; None loads it where `images` are.

    Returns:
        (B,) float32 where `images` are, 0 for equal images.

    Raises:
        ValueError: The shapes differ, or the images are smaller than 21 px.
    """
    if images.shape != references.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and references {tuple(references.shape)}: give one reference each"
        )
    compare = network or load_st_lpips(images.device)
    device = compare.mean.device
    pairs = zip(images.split(batch_size), references.split(batch_size), strict=True)
    return torch.cat([compare(a.to(device), b.to(device)).to(images.device) for a, b in pairs])


@torch.no_grad()
def image_features(images: Tensor, batch_size: int = 32, network: EfficientNetLite0 | None = None) -> Tensor:
    """Describe images by the means of EfficientNet-lite0's maps at stride 8 and 16, for the Frechet distance.

    On some hundred images these tell damaged ones from true ones much better than the 1,280 pooled features do, whose
    covariance needs thousands.

    Args:
        images: (B, 3, H, W) in [-1, 1]; sets that are compared must have one size.
        batch_size: How many are described at once (memory only).
        network: Describes them where it is; None loads it where `images` are.

    Returns:
        (B, 152) float32 where `images` are.

    Raises:
        ValueError: The images have another shape or are smaller than 32 px.
    """
    describe = network or load_efficientnet_lite0(images.device)
    device = describe.stem.weight.device
    rows = []
    for part in images.split(batch_size):
        maps = describe.maps(part.to(device))
        rows.append(torch.cat([values.float().mean((2, 3)) for values in maps], dim=1))  # (b, 152)
    return torch.cat(rows).to(images.device)
