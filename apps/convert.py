"""`tessera convert`: published DiT and SiT checkpoints to folders that load here, and back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from rich.console import Console
from safetensors.torch import save_file

from dit.convert import dit as layouts
from dit.models.dit import DiT
from pipelines.builtin import as_dtype
from pipelines.class_to_image import ClassToImagePipeline

NO_VAE = (
    "no --vae given: the folder paints latents only, until you load it with one "
    "(load_pipeline(folder, vae=...); the released models use stabilityai/sd-vae-ft-mse)"
)
SHIFT_ZERO = (
    "read from diffusers' layout: the timestep frequencies are those of the released DiT (10000^(-i/128), "
    "shift 0); diffusers' own class uses 10000^(-i/127), so its pictures differ"
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
) -> None:
    """Convert a checkpoint and say what was made.

    Args:
        family: "dit" or "sit".
        checkpoint: a published file (.pt or .safetensors, bare or a trainer's {model, ema, opt, args}), or the
            folder of a diffusers DiT; with `to_official`, a folder of ours.
        output: folder to write, new or empty; with `to_official`, a new .pt or .safetensors file.
        vae: folder or hub id of an AutoencoderKL to put beside the transformer.
        dtype: "auto" keeps the checkpoint's number format; else "float32", "bfloat16" or "float16".
        weights: which weights of a trainer's checkpoint to take, "ema" or "model".
        heads: attention heads, for sizes that were never published.
        to_official: convert the other way, to the layout of facebookresearch/DiT and willisma/SiT.

    Raises:
        ValueError: an unknown family or layout, tensors that don't fit, or an output that exists.
        OSError: a file can't be read or written.
    """
    if family not in layouts.OBJECTIVES:
        raise ValueError(f"--family {family} is not known; use one of {', '.join(sorted(layouts.OBJECTIVES))}")
    console = Console(stderr=True)
    if to_official:
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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; remove it or choose another --output")
    notes, names = [], None
    if checkpoint.is_dir():
        if family != "dit":
            raise ValueError(f"{checkpoint} is a folder, but diffusers has no SiT; use --family dit, or a file")
        model = layouts.from_diffusers(_component(checkpoint, "transformer"))
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
    with _staged(output) as folder:
        pipeline.save_pretrained(folder)
    return model, notes


def export(family: str, source: Path, output: Path, dtype: str = "auto") -> DiT:
    """Write a file in the official layout from a folder of ours; see `run` for the arguments.

    Returns:
        The model that was written.
    """
    if output.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{output.name} must end in .pt (what the official code reads) or .safetensors")
    if output.exists():
        raise ValueError(f"{output} exists; remove it or choose another --output")
    model = DiT.from_pretrained(_component(source, "transformer"), use_safetensors=True)
    if model.config.objective != layouts.OBJECTIVES[family]:
        raise ValueError(
            f"{source} predicts {model.config.objective!r}, but --family {family} means {layouts.OBJECTIVES[family]!r}"
        )
    if dtype != "auto":
        model = model.to(as_dtype(dtype))
    state = {key: tensor.contiguous() for key, tensor in layouts.to_official(model).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.part")
    try:
        if output.suffix == ".pt":
            torch.save(state, partial)
        else:
            save_file(state, partial)
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
    return model


def released_scheduler(model: DiT) -> SchedulerMixin:
    """The scheduler that a model was released with.

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


def _component(folder: Path, name: str) -> Path:
    """The folder of a component, given its own folder or the pipeline's."""
    found = folder / name if (folder / name).is_dir() else folder
    if not (found / "config.json").is_file():
        raise ValueError(f"{folder} holds neither config.json nor {name}/config.json; pass a model's folder")
    return found


def _class_names(folder: Path) -> dict[int, str] | None:
    """The class names that diffusers' DiTPipeline keeps in its index."""
    index = folder / "model_index.json"
    names = json.loads(index.read_text()).get("id2label") if index.is_file() else None
    return {int(label): name for label, name in names.items()} if names else None


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when all went well and vanishes otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp keeps others out
        os.replace(folder, output)  # works over an empty folder too
    finally:
        shutil.rmtree(folder, ignore_errors=True)
