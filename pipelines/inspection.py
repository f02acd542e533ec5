"""Ask a pipeline, whatever its kind, what it is and what it can do."""

from __future__ import annotations

from typing import Any

from pipelines.base import TesseraPipeline
from pipelines.diffusers_info import call_tasks, diffusers_info, related_pipelines
from pipelines.info import PipelineInfo


def info_of(pipe: Any) -> PipelineInfo:
    """Return what a pipeline is and can do.

    Args:
        pipe: of ours, which declares it, or of diffusers, where it is found out.

    Example:
        >>> info = info_of(load_pipeline("stickers"))
        >>> info.tasks, info.height, info.arguments["steps"]
        (('text_to_image', 'image_to_image', 'inpaint'), 128, 'num_inference_steps')
    """
    return pipe.info() if isinstance(pipe, TesseraPipeline) else diffusers_info(pipe)


def tasks_of(pipeline: type) -> tuple[str, ...]:
    """Return what the pipelines of a class can be asked for, the main task first."""
    return pipeline.tasks if issubclass(pipeline, TesseraPipeline) else call_tasks(pipeline)


def pipelines_by_task(pipe: Any) -> dict[str, Any]:
    """Return the pipeline for each task that the components of a pipeline can do, the main task first.

    Args:
        pipe: of ours or of diffusers; pipelines of diffusers over the same weights are made for other tasks.

    Returns:
        Task -> pipeline; empty for one that generates neither from texts nor from classes.
    """
    tasks = tasks_of(type(pipe))
    found = dict.fromkeys(tasks, pipe)
    return found | related_pipelines(pipe) if tasks == ("text_to_image",) else found
