"""`tessera convert --family var`: published VAR checkpoints to folders that load here, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from apps.conversion.atomic_io import check_new_file, check_new_folder, read_component, staged_folder, write_state
from apps.service.usage import UsageError
from dit.convert import var as layouts
from dit.models.next_scale import NextScaleTransformer
from dit.tokenizers.multi_scale_vq import MultiScaleVQ
from pipelines.loading.load import as_dtype
from pipelines.next_scale import NextScaleClassToImagePipeline


def import_checkpoint(
    checkpoint: Path, output: Path, vae: str | None = None, dtype: str = "auto", heads: int | None = None
) -> tuple[NextScaleTransformer, list[str]]:
    """Write a pipeline folder from a published transformer and its VQVAE.

    Args:
        checkpoint: a published var_d*.pth (or .safetensors), or a checkpoint of the official trainer, with both models.
        output: folder to write, new or empty.
        vae: the published vae_ch160v4096z32.pth; None takes it from the trainer's checkpoint.
        dtype: "auto" keeps the checkpoint's number format; else "float32", "bfloat16" or "float16".
        heads: attention heads, for files that don't show it.

    Returns:
        The transformer, and what the user should know about it.

    Raises:
        ValueError: tensors that don't fit, a missing tokenizer, or an output that exists.
    """
    check_new_folder(output)
    if checkpoint.is_dir():
        raise UsageError(f"{checkpoint} is a folder; --family var reads a published file such as var_d16.pth")
    if vae is None and not layouts.holds_both(checkpoint):
        raise UsageError(
            f"{checkpoint.name} holds no tokenizer, and VAR can't generate without: pass --vae vae_ch160v4096z32.pth"
        )
    transformer: Any = layouts.transformer_from_official(layouts.read_checkpoint(checkpoint), num_attention_heads=heads)
    state = layouts.read_checkpoint(vae or checkpoint, layouts.TOKENIZER)
    tokenizer: Any = layouts.tokenizer_from_official(state, transformer.config.scales)
    if dtype != "auto":
        transformer, tokenizer = transformer.to(as_dtype(dtype)), tokenizer.to(as_dtype(dtype))
    with staged_folder(output) as folder:
        NextScaleClassToImagePipeline(transformer, tokenizer).save_pretrained(folder)
    return transformer, []


def export(source: Path, output: Path, dtype: str = "auto") -> tuple[ModelMixin, list[str]]:
    """Write a file in the official layout from a folder of ours.

    Args:
        source: a pipeline's folder or its transformer's, for the transformer; its vae's folder for the VQVAE.
        output: a new .pth, .pt or .safetensors file.
        dtype: "auto" keeps the folder's number format.

    Returns:
        The model that was written, and what the user should know about it.

    Raises:
        ValueError: another kind of folder, or an output that exists.
    """
    check_new_file(output)
    model = read_component(source, (NextScaleTransformer, MultiScaleVQ), "var", dtype)
    is_tokenizer = isinstance(model, MultiScaleVQ)
    write_state(
        layouts.tokenizer_to_official(model) if is_tokenizer else layouts.transformer_to_official(model), output
    )
    notes = [] if is_tokenizer else [f"the tokenizer is exported from {source / 'vae'} in the same way"]
    return model, notes
