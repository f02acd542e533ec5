"""Devices of a pipeline's weights: on the accelerator, or offloaded to the CPU until they are needed.

Three ways of diffusers behind one word, from fast to frugal: `model` keeps one whole component on the device at a
time, `group` brings layers over one ahead of their use, `sequential` brings each layer when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dit.runtime.onednn import use_onednn
from pipelines.inputs.checks import check_choice

if TYPE_CHECKING:  # diffusers takes seconds to import, and whoever checks a setting needs none of it
    from diffusers import DiffusionPipeline

OFFLOADS = ("none", "model", "sequential", "group")


def check_offload(offload: str, device: torch.device) -> None:
    """Check an offload before anything is loaded.

    Args:
        offload: one of `OFFLOADS`.
        device: where the pipeline should compute.

    Raises:
        ValueError: an unknown word, or nothing to offload from: the device is the CPU.
    """
    check_choice("offload", offload, OFFLOADS)
    if offload != "none" and device.type == "cpu":
        raise ValueError(
            f"offload={offload!r} keeps weights on the CPU and brings them to an accelerator; device 'cpu' has none. "
            "Use offload='none'; to save memory on a CPU, dtype='bfloat16' or a quantized (GGUF) transformer."
        )


def apply_offload(pipe: DiffusionPipeline, device: torch.device, offload: str = "none") -> DiffusionPipeline:
    """Bring a pipeline, just loaded and still on the CPU, to where it computes.

    Offloading goes first and instead of `.to(device)`: moved the other way round, all weights would have to fit on
    the device at once, which is what offloading should avoid.

    Args:
        pipe: on the CPU, without hooks.
        device: where it computes.
        offload: one of `OFFLOADS`.

    Returns:
        The same pipeline.

    Raises:
        ValueError: its class doesn't say in which order its components run.
    """
    check_choice("offload", offload, OFFLOADS)
    if offload == "none":
        if device.type == "cpu":
            for component in pipe.components.values():
                if isinstance(component, nn.Module):
                    use_onednn(component)
        return pipe.to(device)
    if offload == "model":
        if pipe.model_cpu_offload_seq is None:
            raise ValueError(
                f"{type(pipe).__name__} doesn't say in which order its components run, which offload='model' needs; "
                "use 'group' or 'sequential'."
            )
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        # Layer by layer fits every architecture; with a stream of its own the copy hides behind the computation.
        pipe.enable_group_offload(
            onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda", non_blocking=True
        )
    return pipe
