"""`tessera convert`: published weights to folders that load here, and back; `run` lists the families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from rich.console import Console

from apps.conversion import infinity as convert_infinity
from apps.conversion import realesrgan as convert_realesrgan
from apps.conversion import st_vae as convert_st_vae
from apps.conversion import var as convert_var
from apps.conversion import video as convert_video
from apps.conversion.atomic_io import check_new_file, check_new_folder, component_folder, staged_folder, write_state
from apps.service.usage import UsageError
from dit.convert import dit as layouts
from dit.models.dit import DiT
from pipelines.class_to_image import ClassToImagePipeline
from pipelines.loading.load import as_dtype

NO_VAE = (
    "no --vae given: the folder generates latents only, until you load it with one "
    "(load_pipeline(folder, vae=...); the released models use stabilityai/sd-vae-ft-mse)"
)
SHIFT_ZERO = (
    "read from diffusers' layout: the timestep frequencies are those of the released DiT (10000^(-i/128), "
    "shift 0); diffusers' own class uses 10000^(-i/127), so its images differ"
)


def run(
    family: str,
    checkpoint: Path,
    output: Path,
    vae: str | None = None,
    dtype: str = "auto",
    weights: str = "ema",
    heads: int | None = None,
    to_official: bool = False,
    text_encoder: str | None = None,
    resolution: str = "1M",
) -> None:
    """Convert a checkpoint and say what was made.

    Args:
        family: "dit", "sit", one with a module of its name in `apps.conversion` ("var", "infinity", "realesrgan",
            "st_vae"), or a network for clips, a key of `apps.conversion.video.LAYOUTS`.
        checkpoint: a published file (.pt or .safetensors, bare or a trainer's {model, ema, opt, args}), or the
            folder of a diffusers DiT; with `to_official`, a folder of ours.
        output: folder to write, new or empty; with `to_official`, a new .pt or .safetensors file.
        vae: folder or hub id of an AutoencoderKL to put beside the transformer; for "var" and "infinity" the published
            tokenizer's file.
        dtype: "auto" keeps the checkpoint's number format; else "float32", "bfloat16" or "float16".
        weights: which weights of a trainer's checkpoint to take, "ema" or "model".
        heads: attention heads, for sizes that were never published.
        to_official: convert the other way, to the layout of the official code.
        text_encoder: for "infinity", a local folder of flan-t5-xl to put beside the transformer.
        resolution: for "infinity", a key of `dit.layers.resolutions.NUM_SCALES`.

    Raises:
        ValueError: an unknown family or layout, tensors that don't fit, or an output that exists.
        OSError: a file can't be read or written.
    """
    families = (
        *sorted(layouts.OBJECTIVES),
        *("var", "infinity", "realesrgan", "st_vae"),
        *convert_video.LAYOUTS,
    )
    if family not in families:
        raise UsageError(f"--family {family} is not known; use one of {', '.join(families)}")
    if text_encoder is not None and (family != "infinity" or to_official):
        raise UsageError(
            f"--text-encoder goes with importing --family infinity; {family} checkpoints read no text here"
        )
    console = Console(stderr=True)
    if family == "infinity":
        model, notes = (
            convert_infinity.export(checkpoint, output, dtype)
            if to_official
            else convert_infinity.import_checkpoint(checkpoint, output, vae, dtype, weights, text_encoder, resolution)
        )
    elif family == "realesrgan":
        model, notes = (
            convert_realesrgan.export(checkpoint, output, dtype)
            if to_official
            else convert_realesrgan.import_checkpoint(checkpoint, output, dtype)
        )
    elif family == "st_vae":
        model, notes = (
            convert_st_vae.export(checkpoint, output, dtype)
            if to_official
            else convert_st_vae.import_checkpoint(checkpoint, output, dtype)
        )
    elif family == "var":
        model, notes = (
            convert_var.export(checkpoint, output, dtype)
            if to_official
            else convert_var.import_checkpoint(checkpoint, output, vae, dtype, heads)
        )
    elif family in convert_video.LAYOUTS:
        model, notes = (
            convert_video.export(family, checkpoint, output, dtype)
            if to_official
            else convert_video.import_checkpoint(family, checkpoint, output, vae, dtype, weights, heads)
        )
    elif to_official:
        model = export(family, checkpoint, output, dtype)
        notes = []
    else:
        model, notes = import_checkpoint(family, checkpoint, output, vae, dtype, weights, heads)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.print(f"{family}: {parameters:.1f} M parameters, {model.dtype}, written to {output}", highlight=False)
    for note in notes:
        console.print(f"note: {note}", highlight=False)


def import_checkpoint(
    family: str,
    checkpoint: Path,
    output: Path,
    vae: str | None = None,
    dtype: str = "auto",
    weights: str = "ema",
    heads: int | None = None,
) -> tuple[DiT, list[str]]:
    """Write a pipeline folder from a published checkpoint; see `run` for the arguments.

    Returns:
        The model, and what the user should know about it.
    """
    check_new_folder(output)
    notes, names = [], None
    if checkpoint.is_dir():
        if family != "dit":
            raise UsageError(f"{checkpoint} is a folder, but diffusers has no SiT; use --family dit, or a file")
        model: Any = layouts.from_diffusers(component_folder(checkpoint, "transformer"))
        names = _class_names(checkpoint)
        vae = vae or (str(checkpoint / "vae") if (checkpoint / "vae").is_dir() else None)
        notes.append(SHIFT_ZERO)
    else:
        model = layouts.from_official(layouts.read_checkpoint(checkpoint, weights), family, heads)
    if dtype != "auto":
        model = model.to(as_dtype(dtype))
    autoencoder = None
    if vae is None:
        notes.append(NO_VAE)
    else:
        autoencoder = AutoencoderKL.from_pretrained(vae, use_safetensors=True, torch_dtype=model.dtype)
    pipeline = ClassToImagePipeline(model, autoencoder, released_scheduler(model), id2label=names)
    with staged_folder(output) as folder:
        pipeline.save_pretrained(folder)
    return model, notes


def export(family: str, source: Path, output: Path, dtype: str = "auto") -> DiT:
    """Write a file in the official layout from a folder of ours; see `run` for the arguments.

    Returns:
        The model that was written.
    """
    check_new_file(output)
    model: Any = DiT.from_pretrained(component_folder(source, "transformer"), use_safetensors=True)
    if model.config.objective != layouts.OBJECTIVES[family]:
        raise UsageError(
            f"{source} predicts {model.config.objective!r}, but --family {family} means {layouts.OBJECTIVES[family]!r}"
        )
    if dtype != "auto":
        model = model.to(as_dtype(dtype))
    write_state(layouts.to_official(model), output)
    return model


def released_scheduler(model: DiT) -> SchedulerMixin:
    """Return the scheduler that a model was released with.

    Args:
        model: a DiT (respaced DDPM over linear betas, arXiv 2212.09748) or a SiT (the flow's ODE by Euler steps).
    """
    if model.config.objective == "velocity":
        return FlowMatchEulerDiscreteScheduler()
    learned = model.config.out_channels == 2 * model.config.in_channels
    return DDPMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="learned_range" if learned else "fixed_large",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def _class_names(folder: Path) -> dict[int, str] | None:
    """Return the class names that diffusers' DiTPipeline keeps in its index."""
    index = folder / "model_index.json"
    names = json.loads(index.read_text()).get("id2label") if index.is_file() else None
    return {int(label): name for label, name in names.items()} if names else None
