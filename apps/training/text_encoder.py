"""The small T5 encoder that turns captions into states, and its tokenizer: new ones, or those of a folder."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from apps.training.attention_init import init_t5_attention
from apps.training.config import ConfigError, Section
from apps.training.tokenizer import train_tokenizer


class TextModel(Section):
    """The `[model.text]` section: a T5 encoder and its tokenizer."""

    vocab_size: int = Field(default=2048, ge=300)
    max_length: int = Field(default=64, ge=8)
    d_model: int = 192
    d_kv: int = 64
    d_ff: int = 512
    num_layers: int = 3
    num_heads: int = Field(default=3, ge=1)


def new_text_encoder(settings: TextModel, tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    """Make an encoder with random weights whose heads attend to neighbouring tokens at first."""
    ends: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            **settings.model_dump(exclude={"vocab_size", "max_length"}),
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            **ends,
        )
    )
    init_t5_attention(encoder)
    return encoder


def caption_tokenizer(
    folder: Path, settings: TextModel, corpus: Callable[[], Iterable[str]]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a folder holds, else train one on the corpus and save it there."""
    if not folder.is_dir():
        train_tokenizer(corpus(), settings.vocab_size, settings.max_length).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def load_text_encoder(folder: Path) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """Load `text_encoder/` and `tokenizer/` of a folder, e.g. the export of a run or a pipeline; float32.

    Raises:
        ConfigError: The folder lacks one of them.
    """
    for part in ("text_encoder/config.json", "tokenizer/tokenizer.json"):
        if not (folder / part).is_file():
            raise ConfigError(
                f"{folder} has no {part}; give the folder that a text_encoder_pretraining run exported, or a pipeline"
            )
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return encoder, AutoTokenizer.from_pretrained(folder / "tokenizer")


def tokenize(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], length: int | None = None, multiple: int = 4
) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, both (B, L), with L the given length, else a multiple of `multiple`."""
    padding: dict[str, Any] = (
        {"padding": True, "pad_to_multiple_of": multiple}
        if length is None
        else {"padding": "max_length", "max_length": length}
    )
    tokens = tokenizer(captions, truncation=True, return_attention_mask=True, return_tensors="pt", **padding)
    forget_last_call(tokenizer)
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def forget_last_call(tokenizer: PreTrainedTokenizerBase) -> None:
    """Reset padding and length of the last call, which a fast tokenizer would otherwise save with itself."""
    fast: Any = tokenizer.backend_tokenizer
    fast.no_padding()
    fast.no_truncation()
