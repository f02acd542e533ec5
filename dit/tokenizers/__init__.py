"""Pixels to latents and back: one interface, our own autoencoders, and an adapter for diffusers' ones."""

from dit.tokenizers.adapters import DiffusersTokenizer, as_visual_tokenizer
from dit.tokenizers.base import TokenizerOutput, VisualTokenizer
from dit.tokenizers.causal_video import CausalVideoAutoencoder
from dit.tokenizers.inflation import from_image_autoencoder
from dit.tokenizers.multi_scale import MultiScaleCodes
from dit.tokenizers.multi_scale_bsq import MultiScaleBSQ
from dit.tokenizers.multi_scale_vq import MultiScaleVQ
from dit.tokenizers.vit_autoencoder import ViTAutoencoder

__all__ = [
    "CausalVideoAutoencoder",
    "DiffusersTokenizer",
    "MultiScaleBSQ",
    "MultiScaleCodes",
    "MultiScaleVQ",
    "TokenizerOutput",
    "ViTAutoencoder",
    "VisualTokenizer",
    "as_visual_tokenizer",
    "from_image_autoencoder",
]
