"""`info_of`: the `PipelineInfo` of any pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModularPipeline

from pipelines.base import TesseraPipeline
from pipelines.info.diffusers_info import call_tasks, diffusers_info, is_offloaded, makes_clips, related_pipelines
from pipelines.info.guider_call import guided_call
from pipelines.info.modular_call import ModularCall, makes_clips_of_blocks, tasks_of_blocks
from pipelines.info.record import PipelineInfo
from pipelines.loading.modular import empty_pipeline, is_modular, read_modular_index
from pipelines.loading.sources import pipeline_class, read_index

Said = TypeVar("Said")


def info_of(pipe: Any) -> PipelineInfo:
    """Return what a pipeline is and can do.

    Args:
        pipe: of ours, which declares it, or of diffusers, where it is found out. A modular pipeline of diffusers is
            asked for what `ModularCall` makes of it; its own call accepts the same inputs.

    Example:
        >>> info = info_of(load_pipeline("stickers"))
        >>> info.tasks, info.height, info.arguments["steps"]
        (('text_to_image', 'image_to_image', 'inpaint'), 128, 'num_inference_steps')
    """
    if isinstance(pipe, ModularPipeline):
        return ModularCall(pipe).info()
    return pipe.info() if isinstance(pipe, TesseraPipeline | ModularCall) else diffusers_info(pipe)


def tasks_of(pipeline: type) -> tuple[str, ...]:
    """Return what the pipelines of a class can be asked for, the main task first."""
    return pipeline.tasks if issubclass(pipeline, TesseraPipeline) else call_tasks(pipeline)


def tasks_in(folder: Path) -> tuple[str, ...]:
    """Return what a saved pipeline can be asked for, by its index alone; see `_said_by_index`."""
    return _said_by_index(folder, tasks_of_blocks, tasks_of)


def makes_clips_in(folder: Path) -> bool:
    """Return whether a saved pipeline makes clips, by its index alone; see `_said_by_index`."""
    return _said_by_index(folder, makes_clips_of_blocks, makes_clips)


def _said_by_index(folder: Path, of_blocks: Callable[[Any], Said], of_class: Callable[[type], Said]) -> Said:
    """Return what the index of a saved pipeline says.

    Args:
        folder: of a pipeline of ours or of diffusers, standard or modular.
        of_blocks: reads it of the blocks of a modular one.
        of_class: reads it of the class of a standard one.

    Raises:
        OSError: it can't be read.
        ValueError: it holds no pipeline that is known here.
    """
    if is_modular(folder):
        return of_blocks(empty_pipeline(read_modular_index(folder)).blocks)
    return of_class(pipeline_class(read_index(folder)))


def pipelines_by_task(pipe: Any) -> dict[str, Any]:
    """Return the pipeline for each task that the components of a pipeline can do, the main task first.

    Args:
        pipe: of ours or of diffusers; pipelines of diffusers over the same weights are made for other tasks.

    Returns:
        Task -> pipeline, which has the standard call; empty for one that generates neither from texts nor from classes.
    """
    if isinstance(pipe, ModularPipeline):
        pipe = ModularCall(pipe)
    if isinstance(pipe, ModularCall):
        return dict.fromkeys(pipe.info().tasks, pipe)
    pipe = guided_call(pipe)
    tasks = tasks_of(type(pipe))
    found = dict.fromkeys(tasks, pipe)
    if is_offloaded(pipe):  # its parts are hooked for one pipeline only
        return found
    if isinstance(pipe, TesseraPipeline):
        return found | pipe.related()
    return found | related_pipelines(pipe) if tasks == ("text_to_image",) else found
