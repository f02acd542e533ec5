"""Pretrained networks that judge images; the project trained none of them.

- `perceptual_distance` says how different pairs of images look (ST-LPIPS; `load_st_lpips` gives it as a loss);
- `frechet_distance` of two sets' `image_features` says how far apart they are as sets (never called FID);
- `NearestStickerJudge` reads which sticker an image shows, without the exact judge's knowledge of shapes.
"""

from apps.perceptual.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from apps.perceptual.frechet import frechet_distance
from apps.perceptual.measures import image_features, perceptual_distance
from apps.perceptual.nearest import NearestStickerJudge, NearestStickers
from apps.perceptual.st_lpips import ShiftTolerantLPIPS, load_st_lpips

__all__ = [
    "EfficientNetLite0",
    "NearestStickerJudge",
    "NearestStickers",
    "ShiftTolerantLPIPS",
    "frechet_distance",
    "image_features",
    "load_efficientnet_lite0",
    "load_st_lpips",
    "perceptual_distance",
]
