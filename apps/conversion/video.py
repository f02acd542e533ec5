"""`tessera convert --family vdt`, `latte`, `pt_dit` or `mvdit`: published networks for clips to ours, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import ModelMixin
from torch import Tensor

from apps.conversion.atomic_io import check_new_file, check_new_folder, read_component, staged_folder, write_state
from apps.service.usage import UsageError
from dit.convert import mvdit, pt_dit, space_time_dit
from dit.convert.dit import read_checkpoint
from dit.models.mvdit import MVDiT
from dit.models.pt_dit import PTDiT
from dit.models.space_time_dit import SpaceTimeDiT
from pipelines.loading.load import as_dtype


@dataclass(frozen=True)
class VideoLayout:
    """How the checkpoints of one family are read and written.

    Args:
        network: our class.
        from_official: from a state dict and the number of heads (None: as published) to the model.
        to_official: from the model to a state dict.
        belongs: from a model to the family that it belongs to; several may share the class.
        assumed: what the files don't show and is taken as released; "" if they show everything.
    """

    network: type[ModelMixin]
    from_official: Callable[[Mapping[str, Tensor], int | None], Any]
    to_official: Callable[[Any], dict[str, Tensor]]
    belongs: Callable[[Any], str]
    assumed: str = ""


def _space_time(family: str) -> VideoLayout:
    families = {arrangement: name for name, arrangement in space_time_dit.ARRANGEMENTS.items()}
    return VideoLayout(
        SpaceTimeDiT,
        lambda state, heads: space_time_dit.from_official(state, family, heads),
        space_time_dit.to_official,
        lambda model: families[model.config.arrangement],
    )


LAYOUTS: Mapping[str, VideoLayout] = MappingProxyType(
    {
        "vdt": _space_time("vdt"),
        "latte": _space_time("latte"),
        "pt_dit": VideoLayout(
            PTDiT,
            pt_dit.from_official,
            pt_dit.to_official,
            lambda model: "pt_dit",
            "windows of 8 x 8 tokens with one proxy each were taken, as of the released 1B model: no file shows them. "
            "For others call dit.convert.pt_dit.from_official(state, window_size=...)",
        ),
        "mvdit": VideoLayout(MVDiT, mvdit.from_official, mvdit.to_official, lambda model: "mvdit"),
    }
)
"""The families by their names on the command line."""


def import_checkpoint(
    family: str,
    checkpoint: Path,
    output: Path,
    vae: str | None = None,
    dtype: str = "auto",
    weights: str = "ema",
    heads: int | None = None,
) -> tuple[ModelMixin, list[str]]:
    """Write the folder of a network from a published checkpoint.

    Args:
        family: a key of `LAYOUTS`.
        checkpoint: a published file (.pt, .pth, .ckpt, .bin or .safetensors), or a checkpoint of the official trainer.
        output: folder to write, new or empty.
        vae: must be None: the folder is that of the network alone.
        dtype: "auto" keeps the checkpoint's number format; else "float32", "bfloat16" or "float16".
        weights: which weights of a trainer's checkpoint to take, "ema" or "model".
        heads: attention heads, for sizes that were never published.

    Returns:
        The network, and what the user should know about it.

    Raises:
        ValueError: tensors that don't fit, or an output that exists.
        OSError: a file can't be read or written.
    """
    check_new_folder(output)
    if vae is not None:
        raise UsageError(
            f"--vae {vae} has no place in the folder of a {family} network; load the autoencoder by itself"
        )
    if checkpoint.is_dir():
        raise UsageError(f"{checkpoint} is a folder; --family {family} reads a published file")
    layout = LAYOUTS[family]
    model = layout.from_official(read_checkpoint(checkpoint, weights), heads)
    if dtype != "auto":
        model = model.to(as_dtype(dtype))
    with staged_folder(output) as folder:
        model.save_pretrained(folder)
    name = layout.network.__name__
    notes = [f"the folder holds the network alone: {layout.network.__module__}.{name}.from_pretrained reads it"]
    return model, [*notes, *([layout.assumed] if layout.assumed else [])]


def export(family: str, source: Path, output: Path, dtype: str = "auto") -> tuple[ModelMixin, list[str]]:
    """Write a file in the official layout from the folder of a network.

    Args:
        family: a key of `LAYOUTS`.
        source: folder of the network, or of a pipeline with it.
        output: a new .pth, .pt or .safetensors file.
        dtype: "auto" keeps the folder's number format.

    Returns:
        The network that was written, and what the user should know about it.

    Raises:
        ValueError: another kind of folder, or an output that exists.
    """
    check_new_file(output)
    layout = LAYOUTS[family]
    model = read_component(source, (layout.network,), family, dtype)
    if layout.belongs(model) != family:
        raise UsageError(f"{source} holds a network of another family; use --family {layout.belongs(model)}")
    write_state(layout.to_official(model), output)
    return model, []
