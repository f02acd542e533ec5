"""Pipelines with the standard call of diffusers, `load_pipeline`, and `load_upscaler` for the step behind them.

Names are imported on first use, so that `import pipelines` costs nothing.

Example:
    >>> from pipelines import load_pipeline
    >>> pipe = load_pipeline("stickers")
    >>> pipe("a red apple on a white background").images[0].save("apple.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dit.quant.registration import register_when_imported

if TYPE_CHECKING:
    from pipelines.acceleration import AccelerationConfig
    from pipelines.base import TesseraPipeline
    from pipelines.class_to_image import ClassToImagePipeline
    from pipelines.info.inspection import info_of
    from pipelines.info.record import PipelineInfo
    from pipelines.inputs.video_mask import VideoMask
    from pipelines.loading.load import builtin_models, load_pipeline
    from pipelines.loading.upscaler import builtin_upscalers, load_upscaler
    from pipelines.lora.mixin import load_lora, unload_lora
    from pipelines.next_scale import NextScaleClassToImagePipeline, NextScaleTextToImagePipeline
    from pipelines.text_to_image import TextToImagePipeline
    from pipelines.text_to_video import TextToVideoPipeline
    from pipelines.tuning.speed_up import speed_up
    from pipelines.upscaling import Upscaler
    from pipelines.video_completion import VideoCompletionPipeline
    from sampling.observe import observe

__all__ = [
    "AccelerationConfig",
    "ClassToImagePipeline",
    "NextScaleClassToImagePipeline",
    "NextScaleTextToImagePipeline",
    "PipelineInfo",
    "TesseraPipeline",
    "TextToImagePipeline",
    "TextToVideoPipeline",
    "Upscaler",
    "VideoCompletionPipeline",
    "VideoMask",
    "builtin_models",
    "builtin_upscalers",
    "info_of",
    "load_lora",
    "load_pipeline",
    "load_upscaler",
    "observe",
    "speed_up",
    "unload_lora",
]

_MODULE_OF = {
    "AccelerationConfig": "pipelines.acceleration",
    "ClassToImagePipeline": "pipelines.class_to_image",
    "NextScaleClassToImagePipeline": "pipelines.next_scale",
    "NextScaleTextToImagePipeline": "pipelines.next_scale",
    "PipelineInfo": "pipelines.info.record",
    "TesseraPipeline": "pipelines.base",
    "TextToImagePipeline": "pipelines.text_to_image",
    "TextToVideoPipeline": "pipelines.text_to_video",
    "Upscaler": "pipelines.upscaling",
    "VideoCompletionPipeline": "pipelines.video_completion",
    "VideoMask": "pipelines.inputs.video_mask",
    "builtin_models": "pipelines.loading.load",
    "builtin_upscalers": "pipelines.loading.upscaler",
    "info_of": "pipelines.info.inspection",
    "load_lora": "pipelines.lora.mixin",
    "load_pipeline": "pipelines.loading.load",
    "load_upscaler": "pipelines.loading.upscaler",
    "observe": "sampling.observe",
    "speed_up": "pipelines.tuning.speed_up",
    "unload_lora": "pipelines.lora.mixin",
}


register_when_imported()  # quantized models load with `from_pretrained` of diffusers, too


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access is a plain look-up
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
