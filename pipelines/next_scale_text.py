"""The old path of `pipelines.next_scale.text_to_image`, kept for programs that import from it."""

from pipelines.next_scale.text_to_image import DEFAULTS, NextScaleTextToImagePipeline, ScaleSampling

__all__ = ["DEFAULTS", "NextScaleTextToImagePipeline", "ScaleSampling"]
