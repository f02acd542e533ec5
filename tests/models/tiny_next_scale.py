"""The small VAR of the tests, with the weights of the references."""

import torch
from torch import Tensor

from dit.convert import var
from dit.models.next_scale import NextScaleTransformer
from dit.tokenizers import MultiScaleVQ
from tests.models import next_scale_reference as ref
from tests.tokenizers import multi_scale_reference as tokens


def transformer_state(shared: bool) -> dict[str, Tensor]:
    """Official weights of the transformer."""
    return ref.fill(var.transformer_to_official(NextScaleTransformer(**ref.CONFIG, shared_modulation=shared)))


def transformer(shared: bool = False) -> NextScaleTransformer:
    """The transformer."""
    return var.transformer_from_official(transformer_state(shared))


def tokenizer_state() -> dict[str, Tensor]:
    """Official weights of the tokenizer."""
    with torch.device("meta"):
        empty = MultiScaleVQ(**tokens.CONFIG)
    return tokens.fill({key: tuple(value.shape) for key, value in var.tokenizer_to_official(empty).items()})


def tokenizer() -> MultiScaleVQ:
    """The tokenizer."""
    return var.tokenizer_from_official(tokenizer_state(), tokens.SCALES)
