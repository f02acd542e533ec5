"""Generating scale by scale from text: the released sampler's bits, sizes, guidance, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.layers.resolutions import SCALE_SCHEDULES
from dit.models.next_scale import NextScaleTransformer
from pipelines import NextScaleClassToImagePipeline, NextScaleTextToImagePipeline, load_pipeline
from tests.fresh import run_python
from tests.models import infinity_reference as ref
from tests.models import tiny_infinity, tiny_next_scale
from tests.pipes.tiny import tiny_components

CONFIG = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "shared_modulation": True,
    "text_max_length": 20,
    "text_pool_heads": 2,
}


def seeded(seed: int = ref.SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stirred(model: NextScaleTransformer) -> NextScaleTransformer:
    """Weights that say something."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def of_bits(**arguments: Any) -> NextScaleTextToImagePipeline:
    """Infinity in small: text, bits, rotary positions."""
    parts = tiny_components()
    vae = tiny_infinity.tokenizer("wide")
    model = NextScaleTransformer(
        scales=ref.WIDE,
        latent_channels=vae.latent_channels,
        text_dim=parts["text_encoder"].config.d_model,
        bitwise=True,
        positions="rotary",
        max_scales=10,
        **CONFIG,
    )
    pipe = NextScaleTextToImagePipeline(stirred(model), parts["text_encoder"], parts["tokenizer"], vae, **arguments)
    return quiet(pipe)


def of_entries() -> NextScaleTextToImagePipeline:
    """A VAR that reads text."""
    parts, vae = tiny_components(), tiny_next_scale.tokenizer()
    model = NextScaleTransformer(
        scales=vae.config.scales,
        latent_channels=vae.latent_channels,
        vocab_size=vae.config.vocab_size,
        text_dim=parts["text_encoder"].config.d_model,
        **CONFIG,
    )
    return quiet(NextScaleTextToImagePipeline(stirred(model), parts["text_encoder"], parts["tokenizer"], vae))


@pytest.fixture(scope="module")
def pipe() -> NextScaleTextToImagePipeline:
    return of_bits()


@pytest.mark.parametrize("name", ref.RUNS)
@pytest.mark.parametrize("case", ref.CASES)
def test_equals_the_released_sampler(case: str, name: str) -> None:
    run, seen = ref.RUNS[name], []
    painting = quiet(
        NextScaleTextToImagePipeline(tiny_infinity.transformer(case), None, None, tiny_infinity.tokenizer(case))
    )
    texts = dict(zip(("prompt_embeds", "prompt_attention_mask"), ref.texts(), strict=True))
    if run["negative"]:
        names = ("negative_prompt_embeds", "negative_prompt_attention_mask")
        texts |= dict(zip(names, ref.texts(negative=True), strict=True))
    latents = painting(
        **texts,
        guidance_scale=run["cfg"],
        temperature=run["tau"],
        top_k=run["top_k"],
        top_p=run["top_p"],
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda _, __, ___, tensors: seen.append(ref.digest(tensors["indices"])),
        callback_on_step_end_tensor_inputs=["indices"],
    ).images
    assert seen == ref.GOLDEN[f"{case}/bits/{name}"]
    expected = torch.tensor(ref.GOLDEN[f"{case}/latent/{name}"])
    assert torch.allclose(torch.tensor(ref.sampled(latents)), expected, rtol=1e-5, atol=1e-5)


def test_sizes_and_aspect_ratios(pipe: NextScaleTextToImagePipeline) -> None:
    assert pipe("a cat").images[0].size == (336, 224)
    assert pipe.resolve_schedule(aspect_ratio=16 / 9) == SCALE_SCHEDULES[0.571][:7]
    assert pipe.resolve_schedule(512, 512) == SCALE_SCHEDULES[1.0][:10]
    square = pipe("a cat", height=256, width=256, output_type="pt").images
    assert square.shape == (1, 3, 256, 256)
    with pytest.raises(ValueError, match="Nearest: height=256, width=256"):
        pipe("a cat", height=272, width=256)
    with pytest.raises(ValueError, match="give both"):
        pipe("a cat", height=256)
    with pytest.raises(ValueError, match="not both"):
        pipe("a cat", height=256, width=256, aspect_ratio=1.0)


def test_the_index_head_paints_too() -> None:
    painting, seen = of_entries(), []
    images = painting(
        ["a cat", "a red apple"],
        guidance_scale=2.0,
        top_k=5,
        output_type="np",
        generator=seeded(),
        callback_on_step_end=lambda _, __, ___, tensors: seen.append(tuple(tensors["indices"].shape)),
        callback_on_step_end_tensor_inputs=["indices"],
    ).images
    assert images.shape == (2, 64, 64, 3)
    assert seen == [(2, 1), (2, 4), (2, 9), (2, 16)]
    with pytest.raises(ValueError, match="64 x 64 pixels only"):
        painting("a cat", aspect_ratio=2.0)
    with pytest.raises(ValueError, match="Nearest: height=64, width=64"):
        painting("a cat", height=256, width=256)


def test_text_matters_and_batches_do_not(pipe: NextScaleTextToImagePipeline) -> None:
    prompts = ["a cat", "three small green frogs on a yellow background"]
    both = pipe(prompts, generator=[seeded(1), seeded(1)], output_type="latent").images
    alone = pipe(prompts[1], generator=[seeded(1)], output_type="latent").images
    assert torch.allclose(both[1], alone[0], atol=1e-3)
    assert not torch.allclose(both[0], both[1], atol=1e-1)
    empty = pipe("", generator=[seeded(1)], output_type="latent").images
    assert not torch.allclose(empty[0], both[0], atol=1e-1)


def test_guidance_of_one_runs_half_the_rows(pipe: NextScaleTextToImagePipeline, monkeypatch: Any) -> None:
    rows, prepare = [], pipe.transformer.prepare_condition

    def watch(**arguments: Any) -> Any:
        rows.append(len(arguments["encoder_hidden_states"]))
        return prepare(**arguments)

    monkeypatch.setattr(pipe.transformer, "prepare_condition", watch)
    free = pipe("a cat", guidance_scale=1.0, generator=seeded(), output_type="latent").images
    listed = pipe("a cat", guidance_scale=[1.0] * 6 + [1.0 + 1e-7], generator=seeded(), output_type="latent").images
    assert rows == [1, 2]
    assert torch.allclose(free, listed, atol=1e-3)


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_guidance_below_one_is_off(pipe: NextScaleTextToImagePipeline, low: float) -> None:
    def paint(guidance: float | list[float]) -> Tensor:
        negative = "a blue bicycle"
        arguments = {"negative_prompt": negative, "guidance_scale": guidance, "output_type": "latent"}
        return pipe("a cat", generator=seeded(), **arguments).images

    assert torch.equal(paint(low), paint(1.0))
    assert not pipe.do_classifier_free_guidance
    assert torch.equal(paint([low, *[3.0] * 6]), paint([1.0, *[3.0] * 6]))


def test_a_negative_prompt_steers(pipe: NextScaleTextToImagePipeline) -> None:
    plain, other = (
        pipe("a cat", negative_prompt=negative, generator=seeded(), guidance_scale=4.0, output_type="latent").images
        for negative in (None, "a blue bicycle")
    )
    assert not torch.equal(plain, other)


def test_the_picture_grows_and_can_be_stopped(pipe: NextScaleTextToImagePipeline) -> None:
    partial = []

    def watch(painting: NextScaleTextToImagePipeline, scale: int, _: Tensor, tensors: dict[str, Tensor]) -> None:
        partial.append(painting.preview(tensors["denoised_latents"])[0].size)
        painting.interrupt = scale == 2

    out = pipe("a cat", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["denoised_latents"])
    assert (len(partial), out.images, pipe.interrupted) == (3, [], True)
    assert max(partial[0]) == 128
    assert len(pipe("a cat", num_images_per_prompt=2).images) == 2


def test_loads_in_a_fresh_process_and_paints_the_same(tmp_path: Path) -> None:
    painting = of_bits(defaults={"guidance_scale": 2.0, "temperature": 0.5})
    painting.save_pretrained(tmp_path)
    expected = painting("a cat", generator=seeded(), output_type="latent").images
    code = (
        "import sys, torch; from pipelines import load_pipeline; pipe = load_pipeline(sys.argv[1], device='cpu');"
        "assert pipe.config.defaults == {'guidance_scale': 2.0, 'temperature': 0.5};"
        f"out = pipe('a cat', generator=torch.Generator().manual_seed({ref.SEED}), output_type='latent').images;"
        "torch.save(out, sys.argv[2])"
    )
    run_python("-c", code, tmp_path, tmp_path / "out.pt")
    assert torch.allclose(torch.load(tmp_path / "out.pt"), expected, atol=1e-4)


def test_defaults_of_the_model_hold_unless_the_call_says_otherwise(tmp_path: Path) -> None:
    painting = of_bits(defaults={"guidance_scale": 2.0, "top_p": 0.9})
    how = painting._sampling(3, None, None, 4, None)
    assert (how.guidance_scale, how.temperature, how.top_k, how.top_p) == ((2.0,) * 3, (1.0,) * 3, 4, 0.9)
    assert painting._sampling(2, [1.0, 3.0], 0.5, None, 0.0).guidance_scale == (1.0, 3.0)
    with pytest.raises(ValueError, match=r"\['tau'\]"):
        of_bits(defaults={"tau": 0.5})


def test_without_a_text_encoder_states_are_asked_for(tmp_path: Path) -> None:
    vae, model = tiny_infinity.tokenizer("wide"), tiny_infinity.transformer("wide")
    quiet(NextScaleTextToImagePipeline(model, None, None, vae)).save_pretrained(tmp_path)
    painting = quiet(load_pipeline(tmp_path, device="cpu"))
    with pytest.raises(ValueError, match="no text encoder"):
        painting("a cat")
    assert painting(prompt_embeds=ref.texts()[0], output_type="pt").images.shape == (2, 3, 224, 336)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "empty list"),
        ({"prompt": None}, "neither"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": [1.0, 2.0]}, "each of 7 scales"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "expected 0 to 1"),
        ({"kv_policy": "half"}, "'full'"),
        ({"output_type": "jpg"}, "output_type"),
        ({"aspect_ratio": 20.0}, "aspect_ratio"),
        ({"generator": [seeded()] * 2}, "2 generators for 1 images"),
        ({"max_sequence_length": 100}, "reads 1 to"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 7)}, "width 7"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 16), "prompt_attention_mask": torch.zeros(1, 3)}, "token"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 21, 16)}, "expected 1 to 20"),
    ],
)
def test_wrong_arguments_are_named(pipe: NextScaleTextToImagePipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a cat", **arguments})


def test_pairs_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="different tokens: bits and indices"):
        NextScaleTextToImagePipeline(tiny_infinity.transformer("wide"), None, None, tiny_next_scale.tokenizer())
    with pytest.raises(ValueError, match="latent channels: 6 and 3"):
        NextScaleTextToImagePipeline(tiny_infinity.transformer("wide"), None, None, tiny_infinity.tokenizer("patchify"))
    with pytest.raises(ValueError, match="reads class labels"):
        NextScaleTextToImagePipeline(tiny_next_scale.transformer(), None, None, tiny_next_scale.tokenizer())
    with pytest.raises(ValueError, match="reads text"):
        NextScaleClassToImagePipeline(tiny_infinity.transformer("wide"), tiny_infinity.tokenizer("wide"))
