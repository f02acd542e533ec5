"""What benchmarks of LoRAs share: the model, and what it generates without a file, with it, and without it again."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.benchmarks.next_scale import Asked
from apps.commands.loading import load_for_command
from apps.service.usage import UsageError, checking
from pipelines import info_of, load_lora, unload_lora

AGAIN = 16  # images or clips that are generated once more when the LoRA is off


def load_base(asked: Asked, default: str, output: str) -> tuple[Any, Path]:
    """Load the model that a LoRA is for, and return it with the LoRA's file.

    Args:
        asked: names the LoRA, and perhaps the model.
        default: the model if none is named.
        output: what it must make of prompts, "images" or "frames".

    Raises:
        UsageError: no LoRA is named, or the model makes something else or takes no LoRA.
    """
    if asked.lora is None:
        raise UsageError("no LoRA is named: give --lora FILE, such as one that `tessera train-lora` wrote")
    name = asked.model or default
    pipe = load_for_command(name, asked.device, asked.dtype)
    info = info_of(pipe)
    if not info.can_load_lora or info.output != output or "prompt" not in info.parameters:
        made = "images" if output == "images" else "clips"
        raise UsageError(f"{name} makes no {made} from text, or takes no LoRA files: give a model such as {default}")
    return pipe, asked.lora


def generate_around(
    pipe: Any, asked: Asked, lora: Path, generate: Callable[[int | None, bool], Tensor]
) -> tuple[Tensor, Tensor, bool]:
    """Generate without a LoRA, with it, and the first ones again without it.

    Args:
        pipe: see `load_base`.
        asked: names a LoRA that is on all the time, or none.
        lora: the file.
        generate: how many (None for all), and whether the LoRA is on -> images or clips (B, ...).

    Returns:
        Those without and with the LoRA, and whether those without it are the same bits when it is off again.

    Raises:
        UsageError: a file doesn't fit the model.
    """
    always = [asked.beside] if asked.beside is not None else []
    with _on(pipe, always):
        before = generate(None, False)
    with _on(pipe, [*always, lora]):
        after = generate(None, True)
    with _on(pipe, always):
        again = generate(AGAIN, False)
    return before, after, torch.equal(before[:AGAIN], again)


@contextmanager
def _on(pipe: Any, files: Sequence[Path]) -> Generator[None]:
    """Put LoRAs on a pipeline, all at their full weight, and take them off again."""
    names = [f"lora_{number}" for number in range(len(files))]
    try:
        with checking(ValueError, OSError):
            for name, file in zip(names, files, strict=True):
                load_lora(pipe, file, adapter_name=name)
        if files:
            pipe.transformer.set_adapters(names, [1.0] * len(names))
        yield
    finally:
        unload_lora(pipe)
