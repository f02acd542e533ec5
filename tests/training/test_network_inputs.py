"""What the network is shown: what a kept entry depends on."""

import pytest
import torch

from apps.training.network_inputs import NetworkInputs, pipeline_key
from tests.families.every import build


def key(pipe, folder, network="transformer"):
    return NetworkInputs(pipe, getattr(pipe, network), folder, None, {}).key


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_entries_of_another_number_format_are_not_taken(tmp_path, part):
    """Weights that both formats hold exactly have one fingerprint, but what is computed with them differs."""
    pipe = build("text_dit")
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        module.bfloat16().float()
    before = key(pipe, tmp_path)
    getattr(pipe, part).bfloat16()
    assert key(pipe, tmp_path) != before
    assert pipeline_key(pipe) in key(pipe, tmp_path)
    getattr(pipe, part).float()
    assert key(pipe, tmp_path) == before


def test_arguments_of_one_network_are_not_those_of_another(tmp_path):
    pipe = build("wan22")
    assert key(pipe, tmp_path) != key(pipe, tmp_path, "transformer_2")


def test_entries_of_other_weights_are_not_taken(tmp_path):
    pipe = build("text_dit")
    before = key(pipe, tmp_path)
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1)
    assert key(pipe, tmp_path) != before
