"""A second judge: which sticker an image shows, by the most similar reference image.

The exact judge of `apps.stickers` compares pixels with known shapes. This one compares what a pretrained network sees:
the object is cut out of the image by its difference from the border's colour, put on gray, scaled to 64 px, and its
maps of EfficientNet-lite0 are compared by their cosine with those of all stickers, cut out in the same way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from apps.perceptual.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from apps.stickers.judge import crop, visible
from apps.stickers.renderer import draw_sprites
from apps.stickers.scene import Placement
from apps.stickers.sprites import SpriteSheet

SIDE = 64  # pixels of a cut-out
MARGIN = 0.08  # of a cut-out on each side, as a share of the object's longer side
SEEN = 0.3  # how clearly a pixel of the object must differ from the border, as `visible` measures it
GRIDS = (8, 4)  # cells a side that the maps at stride 8 and 16 are averaged over
GROUNDS = (1.0, 0.5, 0.0)  # gray levels that each sticker's references stand on
REFERENCE_SIZE = 0.7  # of a sticker in its reference, as a fraction of the image's side
REFERENCE_SIDE = 128  # pixels of that image
UNSEEN = -1


@dataclass(frozen=True, eq=False)
class NearestStickers:
    """What images show.

    Attributes:
        sprites: (B,) numbers in the sheet; -1 where nothing differs from the border.
        similarity: (B,) cosines with the reference, from -1 to 1; 0 where nothing was seen.
    """

    sprites: Tensor
    similarity: Tensor


class NearestStickerJudge:
    """Reads which sticker an image shows, if it shows a single one on a plain background.

    Args:
        sheet: The stickers, all of which compete; their references are computed here, in a few seconds.
        device: Where to work.
        batch_size: How many references are drawn and embedded at once (memory only).
    """

    def __init__(self, sheet: SpriteSheet, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        self.device = torch.device(device)
        self.network = load_efficientnet_lite0(self.device)
        references = []
        with torch.inference_mode():
            for start in range(0, len(sheet), batch_size):
                sprites = range(start, min(start + batch_size, len(sheet)))
                placements = [Placement(sprite, 0.5, 0.5, REFERENCE_SIZE) for sprite in sprites]
                drawn = draw_sprites(placements, sheet, REFERENCE_SIDE, self.device)  # (b, 4, R, R)
                grounds = [drawn[:, :3] + level * (1 - drawn[:, 3:]) for level in GROUNDS]  # 3 x (b, 3, R, R)
                references.append(torch.stack([self._embed(ground * 2 - 1)[0] for ground in grounds], dim=1))
            embeddings = torch.cat(references)  # (S, 3, D)
            # What all stickers share says nothing about which one it is.
            self._mean = embeddings.mean((0, 1))  # (D,)
            self._references = functional.normalize(embeddings - self._mean, dim=-1)  # (S, 3, D)

    @torch.inference_mode()
    def read(self, images: Tensor, batch_size: int = 32) -> NearestStickers:
        """Read images.

        Args:
            images: (B, 3, H, H) in [-1, 1].
            batch_size: How many are read at once (memory only).

        Raises:
            ValueError: The images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images have shape {tuple(images.shape)}: give (B, 3, H, H) in [-1, 1]")
        sprites, similarities = [], []
        for part in images.split(batch_size):
            embeddings, seen = self._embed(part.to(self.device, torch.float32))  # (b, D), (b,)
            queries = functional.normalize(embeddings - self._mean, dim=-1)  # (b, D)
            cosines = (queries @ self._references.flatten(0, 1).T).unflatten(1, self._references.shape[:2]).amax(2)
            similarity, sprite = cosines.max(1)  # (b,)
            sprites.append(torch.where(seen, sprite, UNSEEN))
            similarities.append(torch.where(seen, similarity, 0.0))
        return NearestStickers(torch.cat(sprites), torch.cat(similarities))

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the network sees of the objects in images (B, 3, H, H), and whether there are any (B,)."""
        objects, seen = cut_out(images)  # (B, 3, 64, 64), (B,)
        return embed(self.network, objects), seen


def embed(network: EfficientNetLite0, images: Tensor) -> Tensor:
    """Describe images (B, 3, H, W) by both maps of the network over coarse grids, each scaled to length one: (B, D)."""
    parts = [
        functional.normalize(functional.adaptive_avg_pool2d(values.float(), grid).flatten(1), dim=1)  # (B, C g g)
        for values, grid in zip(network.maps(images), GRIDS, strict=True)
    ]
    return torch.cat(parts, dim=1)


def cut_out(images: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the object out of each image and put it on gray.

    The ground is the median colour of the border, and the object is the square around all that clearly differs from it.

    Args:
        images: (B, 3, H, H) in [-1, 1].

    Returns:
        (B, 3, 64, 64) in about [-1, 1], and (B,) whether there is an object; where not, the whole image is taken.
    """
    values = (images.clamp(-1, 1) + 1) / 2  # (B, 3, H, H)
    edges = (values[..., 0], values[..., -1], values[..., 0, :], values[..., -1, :])
    ground = torch.cat(edges, dim=-1).median(-1).values[..., None, None]  # (B, 3, 1, 1)
    difference = values - ground  # (B, 3, H, H)
    opacity = visible(difference)  # (B, H, H)
    left, right = _extent((opacity > SEEN).any(1))  # (B,)
    top, bottom = _extent((opacity > SEEN).any(2))  # (B,)
    size = torch.maximum(right - left, bottom - top) * (1 + 2 * MARGIN)  # (B,)
    square = ((left + right)[:, None] / 2, (top + bottom)[:, None] / 2, size[:, None])
    layers = torch.cat([difference, opacity[:, None]], dim=1)  # (B, 4, H, H)
    cut = crop(layers, *square, SIDE)[:, 0]  # (B, 4, 64, 64)
    colours = cut[:, :3] + ground * cut[:, 3:] + 0.5 * (1 - cut[:, 3:])  # (B, 3, 64, 64)
    return colours * 2 - 1, (opacity > SEEN).flatten(1).any(1)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the first True of each row (B, N) begins and the last ends, as fractions; 0 and 1 without any."""
    side = occupied.shape[1]
    place = torch.arange(side, device=occupied.device)
    first = torch.where(occupied, place, side).amin(1)  # (B,)
    last = torch.where(occupied, place + 1, 0).amax(1)  # (B,)
    found = occupied.any(1)
    return torch.where(found, first / side, 0.0), torch.where(found, last / side, 1.0)
