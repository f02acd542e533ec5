"""The small T5 encoder that turns captions into states, and its tokenizer: new ones, or those of a folder."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from apps.stickers.captions import caption
from apps.training.config import ConfigError, Section
from apps.training.scenes import VALIDATION_SEED, SceneMix, SceneSampler, load_sprites
from apps.training.tokenizer import train_tokenizer

FAR = -6.0  # of a bias that all but closes one side; scores of a new encoder have about unit variance


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
    """Makes an encoder with random weights that looks at neighbouring tokens first; see `look_nearby`."""
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
    look_nearby(encoder)
    return encoder


def look_nearby(encoder: T5EncoderModel) -> None:
    """Starts the heads with a view: of three, one looks back, one ahead, one both ways, all at near tokens.

    T5 knows the order of words only from biases that it adds to scores (arXiv 1910.10683, section 2.1). From random
    ones "a left of b" and "b left of a" still looked alike after 140,000 captions, and a generator never gets a slope
    towards the difference. With linear slopes (as ALiBi's, arXiv 2108.12409) 30,000 sufficed.
    """
    blocks: Any = encoder.encoder.block
    attention = blocks[0].layer[0].SelfAttention
    table = attention.relative_attention_bias.weight  # (buckets, K): keys behind the query, then keys ahead of it
    half = len(table) // 2
    distance = torch.arange(half, dtype=table.dtype)  # (buckets / 2,)
    with torch.no_grad():
        for head in range(table.shape[1]):
            back, ahead = ((-distance, FAR), (FAR, -distance), (-distance / 2, -distance / 2))[head % 3]
            table[:half, head], table[half:, head] = back, ahead


def caption_tokenizer(
    folder: Path, settings: TextModel, corpus: Callable[[], Iterable[str]]
) -> PreTrainedTokenizerBase:
    """The tokenizer that a folder holds, else a new one, trained on the corpus and saved there."""
    if not folder.is_dir():
        train_tokenizer(corpus(), settings.vocab_size, settings.max_length).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def caption_corpus(vocabulary: Sequence[str], mix: SceneMix, count: int, seed: int) -> list[str]:
    """Captions to train a tokenizer on; half of them name any sticker, so that a vocabulary can grow later.

    Args:
        vocabulary: names of the stickers that are learned.
        mix: kinds of scenes.
        count: captions.
        seed: of the captions.
    """
    sheet = load_sprites()
    rng = np.random.default_rng((seed, VALIDATION_SEED))
    samplers = SceneSampler(sheet, vocabulary, mix=mix), SceneSampler(sheet, mix=mix)
    scenes = (samplers[index % 2].scene(VALIDATION_SEED + 2, index) for index in range(count))
    return [caption(scene, sheet, rng, synonyms=0.3) for scene in scenes]


def load_text_encoder(folder: Path) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """Loads `text_encoder/` and `tokenizer/` of a folder, e.g. the export of a run or a pipeline; float32.

    Raises:
        ConfigError: The folder lacks one of them.
    """
    for part in ("text_encoder/config.json", "tokenizer/tokenizer.json"):
        if not (folder / part).is_file():
            raise ConfigError(
                f"{folder} has no {part}; give the folder that a text_reading run exported, or a pipeline"
            )
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return encoder, AutoTokenizer.from_pretrained(folder / "tokenizer")


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str], length: int | None = None) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, both (B, L), with L the given length, else a multiple of 4."""
    padding: dict[str, Any] = (
        {"padding": True, "pad_to_multiple_of": 4}
        if length is None
        else {"padding": "max_length", "max_length": length}
    )
    tokens = tokenizer(captions, truncation=True, return_attention_mask=True, return_tensors="pt", **padding)
    forget_last_call(tokenizer)
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def forget_last_call(tokenizer: PreTrainedTokenizerBase) -> None:
    """A fast tokenizer remembers padding and length of its last call, and would be saved with them."""
    fast: Any = tokenizer.backend_tokenizer
    fast.no_padding()
    fast.no_truncation()
