"""Pipelines of models that generate coarse to fine, one scale a step: VAR (arXiv 2404.02905) and Infinity (2412.04431).

A call becomes a `ScaleTask` (what to generate) and `ScaleOptions` (how), see `options`; `run` carries it out.
"""

from __future__ import annotations

from pipelines.next_scale.class_to_image import NextScaleClassToImagePipeline
from pipelines.next_scale.text_to_image import NextScaleTextToImagePipeline

__all__ = ["NextScaleClassToImagePipeline", "NextScaleTextToImagePipeline"]
