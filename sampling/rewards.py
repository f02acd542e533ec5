"""Rewards by name: how well an image fits its prompt, by a CLIP-like model of transformers."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dit.runtime.onednn import use_onednn


class ClipReward:
    """Cosine similarity of image and prompt.

    Args:
        name: folder or hub id of a model with `get_image_features` and `get_text_features`, with its tokenizer and
            image processor. Weights come from safetensors files only, and no code of the repository is run.
        device: where to compute.

    Attributes:
        unit: difference of two similarities that counts: they lie close together, see `TTSConfig.strength`.

    Raises:
        ValueError: the model is not CLIP-like.
        OSError: there is no such model.
    """

    unit: float = 0.1

    def __init__(self, name: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        exact = torch.device(device).type == "cpu"  # half precision is slow there, and close candidates would tie
        with _no_false_alarm():
            self.model: Any = AutoModel.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, dtype=torch.float32 if exact else "auto"
            )
        for needed in ("get_image_features", "get_text_features"):
            if not hasattr(self.model, needed):
                raise ValueError(
                    f"{name} is a {type(self.model).__name__} without {needed}: as a reward by name use a CLIP-like "
                    "model, or pass any callable (pictures, prompts) -> (B,)"
                )
        self.model.eval().to(device)
        if exact:
            use_onednn(self.model)
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        self._padding: dict[str, Any] = {"padding": True}
        self._unread = {"token_type_ids"}
        if str(self.model.config.model_type).startswith("siglip"):  # reads its padding, always to the same length
            longest = self.model.config.text_config.max_position_embeddings
            self._padding = {"padding": "max_length", "max_length": longest}
            self._unread = {"token_type_ids", "attention_mask"}

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """Judge images (B, 3, H, W) in [0, 1]; returns (B,) in [-1, 1]."""
        return (self.look(pictures) * self.read(prompts)).sum(-1)  # (B,)

    def pixels(self, pictures: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] as the model's image processor shows them, (B, 3, h, w)."""
        shown = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        return self.processor([Image.fromarray(one) for one in shown], return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def look(self, pictures: Tensor) -> Tensor:
        """Unit vectors of images (B, 3, H, W) in [0, 1], (B, F), float32."""
        pixels = self.pixels(pictures).to(self.model.device, self.model.dtype)  # (B, 3, h, w)
        return unit_vectors(self.model.get_image_features(pixel_values=pixels))  # (B, F)

    @torch.no_grad()
    def read(self, prompts: list[str]) -> Tensor:
        """Unit vectors of prompts, (B, F), float32."""
        words = self.tokenizer(prompts, truncation=True, return_tensors="pt", **self._padding)
        words = {name: tensor.to(self.model.device) for name, tensor in words.items() if name not in self._unread}
        return unit_vectors(self.model.get_text_features(**words))  # (B, F)


@contextmanager
def _no_false_alarm() -> Generator[None]:
    """Keep transformers from warning of token numbers that only SigLIP's default configuration has, for comparison."""
    logger = logging.getLogger("transformers.configuration_utils")

    def is_right(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not ("_token_id must be" in said and said.split("got ")[-1].startswith(("49406", "49407")))

    logger.addFilter(is_right)
    try:
        yield
    finally:
        logger.removeFilter(is_right)


def as_reward(reward: Any, device: torch.device | str = "cpu") -> Any:
    """A callable from what the user gave: the callable itself, or a CLIP-like model by name.

    Raises:
        TypeError: neither.
    """
    if isinstance(reward, str | os.PathLike):
        return ClipReward(reward, device)
    if not callable(reward):
        raise TypeError(f"reward must be a callable or the name of a CLIP-like model, got {type(reward).__name__}")
    return reward


def unit_vectors(features: Any) -> Tensor:
    """Features of a CLIP-like model, made unit vectors, (B, F) in float32.

    Args:
        features: (B, F'): transformers returns them bare or as an output with `pooler_output`.
    """
    found = features if isinstance(features, Tensor) else features.pooler_output  # (B, F)
    return F.normalize(found.float(), dim=-1)
