"""What the network is shown: what a kept entry depends on."""

import pytest
import torch
from PIL import Image

from apps.training.data.fine_tuning import open_fine_tuning
from apps.training.data.fine_tuning_config import FineTuningData
from apps.training.network_inputs import NetworkInputs, pipeline_key
from pipelines.network_calls import from_tensors, prompt_argument
from tests.families.every import build, caption, options, side


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


@pytest.mark.parametrize("name", ["text_dit", "z_image", "hunyuan_video15"])
def test_noise_is_kept_only_with_the_channels_beside_it(name, tmp_path):
    pipe, side_of = build(name), side(name)
    inputs = NetworkInputs(pipe, pipe.transformer, tmp_path, None, options(name))
    bucket = (1, side_of, side_of)
    call = inputs.call(bucket)
    kept = inputs._recorded(bucket, caption(name))
    assert (call.sample_name in from_tensors(kept)) == (name == "hunyuan_video15")
    recorded = [call.record(**dict([prompt_argument(inputs.info, caption(name))]))]
    noisy = torch.randn(1, *call.sample_shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([300.0])
    with torch.no_grad():
        wanted = call.predict(pipe.transformer, noisy, times, recorded)
        for _ in range(2):  # computed, and from the cache
            found = call.predict(pipe.transformer, noisy, times, inputs.arguments(bucket, [caption(name)]))
            torch.testing.assert_close(found, wanted)


def test_captions_are_recorded_for_the_sizes_of_their_files(tmp_path):
    """Beside the empty one, which may take the place of any."""
    shapes = {"square": (32, 32), "wide": (64, 32), "other": (32, 32)}
    for number, (text, size) in enumerate(shapes.items()):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", size, (80 * number, 0, 0)).save(tmp_path / "images" / f"{text}.png")
        (tmp_path / "images" / f"{text}.txt").write_text(text)
    pipe = build("text_dit")
    inputs = NetworkInputs(pipe, pipe.transformer, tmp_path / "cache", None, {})
    section = FineTuningData(folder=tmp_path / "images", held_out_fraction=0, caption_dropout=0.1)
    rows = open_fine_tuning(section, 64, 8, tmp_path / "run", quiet=True)
    asked = []
    inputs.arguments = lambda bucket, texts: asked.extend((bucket[1:], text) for text in texts)
    inputs.prepare(rows, list)
    wide = next(size for size, text in asked if text == "wide")
    assert [text for size, text in asked if size == wide] == ["", "wide"]
    assert [text for size, text in asked if size != wide] == ["", "other", "square"]
