"""The small Infinity of the tests, with the weights of the references."""

import torch
from torch import Tensor

from dit.convert import infinity
from dit.models.next_scale import NextScaleTransformer
from dit.tokenizers import MultiScaleBSQ
from tests.models import infinity_reference as ref


def transformer_state(case: str) -> dict[str, Tensor]:
    """Official weights of the transformer."""
    with torch.device("meta"):
        empty = NextScaleTransformer(**ref.config(case))
    shapes = infinity.transformer_to_official(empty, ref.DEPTH)
    return ref.fill({key: torch.zeros(value.shape) for key, value in shapes.items()})


def transformer(case: str) -> NextScaleTransformer:
    """The transformer."""
    return infinity.transformer_from_official(
        transformer_state(case), ref.CASES[case]["grids"], ref.CASES[case]["patchify"]
    )


def tokenizer(case: str) -> MultiScaleBSQ:
    """A tokenizer of images that fits; 16 pixels along a side of a token."""
    patchify = ref.CASES[case]["patchify"]
    torch.manual_seed(0)
    return MultiScaleBSQ(
        scales=ref.CASES[case]["grids"],
        latent_channels=ref.CASES[case]["bits"],
        block_out_channels=(32,) * (4 if patchify == 2 else 5),
        layers_per_block=1,
        patchify=patchify,
    ).eval()
