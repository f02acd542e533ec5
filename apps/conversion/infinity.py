"""`tessera convert --family infinity`: published Infinity checkpoints to folders that load here, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from apps.conversion.atomic_io import check_new_file, check_new_folder, read_component, staged_folder, write_state
from apps.service.usage import UsageError
from dit.convert import infinity as layouts
from dit.convert.var import read_checkpoint, trainer_parts
from dit.models.next_scale import NextScaleTransformer
from dit.tokenizers.multi_scale_bsq import MultiScaleBSQ
from pipelines.builtin import as_dtype
from pipelines.next_scale_text import NextScaleTextToImagePipeline

TEXT_MAX_LENGTH = 512
"""Tokens of a prompt that the released models were trained with; the tokenizer's own files say nothing."""

NO_TEXT_ENCODER = (
    "no --text-encoder given: the folder paints from prompt_embeds only, until you load it with the encoder that the "
    "released models read (load_pipeline(folder, text_encoder=..., tokenizer=...), both of google/flan-t5-xl)"
)


def import_checkpoint(
    checkpoint: Path,
    output: Path,
    vae: str | None = None,
    dtype: str = "auto",
    weights: str = "ema",
    text_encoder: str | None = None,
    resolution: str = "1M",
) -> tuple[NextScaleTransformer, list[str]]:
    """Write a pipeline folder from a published transformer, its tokenizer of pictures, and its text encoder.

    Args:
        checkpoint: infinity_2b_reg.pth (or .safetensors), the folder of a sharded one, or a checkpoint of the official
            trainer.
        output: folder to write, new or empty.
        vae: the published tokenizer, e.g. infinity_vae_d32_reg.pth; None takes it from the trainer's checkpoint.
        dtype: "auto" keeps the checkpoint's number format; else "float32", "bfloat16" or "float16".
        weights: which weights of a trainer's checkpoint to take, "ema" or "model".
        text_encoder: a local folder of flan-t5-xl, whole or its encoder, with its tokenizer and safetensors weights.
        resolution: pixels (in millions) of the pictures that are painted by default, which the files don't show.

    Returns:
        The transformer, and what the user should know about it.

    Raises:
        ValueError: tensors that don't fit, a missing tokenizer, or an output that exists.
    """
    check_new_folder(output)
    if vae is None and (checkpoint.is_dir() or layouts.TRAINER_TOKENIZER not in trainer_parts(checkpoint)):
        raise UsageError(
            f"{checkpoint.name} holds no tokenizer of pictures: pass --vae infinity_vae_d32_reg.pth (or the one that "
            "belongs to your transformer)"
        )
    scales = layouts.square_scales(resolution)
    reader = None if text_encoder is None else read_text_encoder(Path(text_encoder))
    part = layouts.TOKENIZER if vae else layouts.TRAINER_TOKENIZER
    pictures = layouts.tokenizer_from_official(read_checkpoint(vae or checkpoint, part), scales)
    state, taken = layouts.read_transformer(checkpoint, weights)
    transformer = layouts.transformer_from_official(state, scales, pictures.config.patchify)
    models: list[Any] = [transformer, pictures, *([] if reader is None else [reader[0]])]
    if dtype != "auto":
        models = [model.to(as_dtype(dtype)) for model in models]
    defaults = {"guidance_scale": 3.0, "temperature": 1.0 if pictures.config.patchify == 2 else 0.5, "top_p": 0.97}
    with staged_folder(output) as folder:
        pipe = NextScaleTextToImagePipeline(transformer, *(reader or (None, None)), pictures, defaults)
        pipe.save_pretrained(folder)
    notes = [f"the {taken!r} weights of the trainer's checkpoint were taken"] if taken else []
    return transformer, notes if reader else [*notes, NO_TEXT_ENCODER]


def read_text_encoder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a T5 encoder and its tokenizer from a local folder, from safetensors only.

    Args:
        folder: with config.json, weights, and the tokenizer's files; a whole T5 gives its encoder.

    Raises:
        ValueError: no such folder, or another kind of model.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json; pass a local folder of flan-t5-xl as --text-encoder")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "t5":
        raise UsageError(f"{folder} holds a {kind!r} model; the released transformers read text of a 't5'")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.model_max_length = min(tokenizer.model_max_length, TEXT_MAX_LENGTH)
    encoder = T5EncoderModel.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
    return encoder, tokenizer


def export(source: Path, output: Path, dtype: str = "auto") -> tuple[ModelMixin, list[str]]:
    """Write a file in the official layout from a folder of ours.

    Args:
        source: a pipeline's folder or its transformer's, for the transformer; its vae's folder for the tokenizer.
        output: a new .pth, .pt or .safetensors file.
        dtype: "auto" keeps the folder's number format.

    Returns:
        The model that was written, and what the user should know about it.

    Raises:
        ValueError: another kind of folder, or an output that exists.
    """
    check_new_file(output)
    model = read_component(source, (NextScaleTransformer, MultiScaleBSQ), "infinity", dtype)
    if isinstance(model, MultiScaleBSQ):
        write_state(layouts.tokenizer_to_official(model), output, nest=layouts.TOKENIZER)
        return model, []
    if not model.config.bitwise:
        raise UsageError(f"{source} predicts entries of a codebook, which no Infinity does; use --family var")
    write_state(layouts.transformer_to_official(model), output)
    return model, [f"the tokenizer of pictures is exported from {source / 'vae'} in the same way"]
