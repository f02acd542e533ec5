"""Tokenizers out of processors: some pipelines store one that reads images and clips too, and give it texts only."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path

import transformers
from diffusers import DiffusionPipeline

from pipelines.loading.model_index import component_entries
from pipelines.loading.sources import component_class, read_index

GIVE_TEXTS_ONLY = frozenset({"Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", "Kandinsky5T2IPipeline"})
"""Pipelines whose slot `tokenizer` holds a processor of Qwen that never gets an image."""


def plain_tokenizers(
    folder: Path, loader: type[DiffusionPipeline], replaced: Collection[str] = ()
) -> dict[str, transformers.PreTrainedTokenizerBase]:
    """Read the tokenizers of processors that can't be loaded here, because their part for clips needs torchvision.

    Args:
        folder: a saved pipeline.
        loader: its class.
        replaced: components that the caller brings.

    Returns:
        Slot -> its tokenizer, which makes the same tokens of texts; empty for most pipelines, and with torchvision.
    """
    if loader.__name__ not in GIVE_TEXTS_ONLY or importlib.util.find_spec("torchvision") is not None:
        return {}
    return {
        name: transformers.Qwen2Tokenizer.from_pretrained(str(folder / name), local_files_only=True)
        for name, (library, class_name) in component_entries(read_index(folder)).items()
        if name not in replaced and issubclass(component_class(name, library, class_name), transformers.ProcessorMixin)
    }
