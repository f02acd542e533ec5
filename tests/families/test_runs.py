"""The rows' facts about calls, against what tiny pipelines really do."""

from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit.runtime.families import FAMILIES, family_of
from tests.families.record import Call, Recorder, record, recorded
from tests.families.tiny import TINY_NAMES, VARIANTS, tiny_call, tiny_pipeline

ALL = (*TINY_NAMES, *VARIANTS)
STEPS = tiny_call("flux")["num_inference_steps"]


def condition(call: Call) -> Any:
    """What tells the branches apart: the text states, or the labels."""
    row_argument = "cap_feats" if "cap_feats" in call.inputs else "encoder_hidden_states"
    return call.inputs["class_labels"] if "class_labels" in call.inputs else call.inputs[row_argument]


def branches_of(name: str, guided: bool) -> int:
    pipe, _ = recorded(name, guided)
    layout = family_of(pipe.transformer).branches(pipe)
    return 2 if guided and layout.kind != "none" else 1


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("name", ALL)
class TestRuns:
    def test_pipeline_is_listed(self, name: str, guided: bool) -> None:
        pipe, _ = recorded(name, guided)
        assert family_of(pipe.transformer).pipeline(pipe).name == type(pipe).__name__

    def test_calls_and_batches(self, name: str, guided: bool) -> None:
        pipe, calls = recorded(name, guided)
        kind, branches = family_of(pipe.transformer).branches(pipe).kind, branches_of(name, guided)
        assert len(calls) == STEPS * (branches if kind == "two_calls" else 1)
        assert {len(call.latents) for call in calls} == {branches if kind == "batched" else 1}

    def test_timestep_is_the_schedulers(self, name: str, guided: bool) -> None:
        pipe, calls = recorded(name, guided)
        row = family_of(pipe.transformer)
        scale = row.timestep_scale(pipe.transformer, pipe)
        per_step = len(calls) // STEPS
        for index, call in enumerate(calls):
            expected = pipe.scheduler.timesteps[index // per_step].float()
            found = row.scheduler_timestep(pipe.transformer, call.inputs, pipe)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-3)
            received = torch.as_tensor(call.inputs[row.timestep_argument]).flatten()[0].item()
            assert received == pytest.approx(scale.received(expected.item()), rel=1e-5, abs=1e-6)

    def test_every_attention_layer_sees_the_tokens(self, name: str, guided: bool) -> None:
        pipe, calls = recorded(name, guided)
        for call in calls:
            for layer in family_of(pipe.transformer).attention_layers(pipe.transformer):
                products = call.lengths[layer.name]
                # one product for the batch, or one for each sample without its padding
                samples = range(len(products)) if len(products) == len(call.latents) else (None,)
                lengths = [call.layout.lengths(layer.kind, layer.axes, sample) for sample in samples]
                assert [product[1:] for product in products] == lengths, layer.name

    def test_folded_axes_are_in_the_batch(self, name: str, guided: bool) -> None:
        pipe, calls = recorded(name, guided)
        frames, rows, columns = calls[0].layout.grid
        copies = {"thw": 1, "hw": frames, "t": rows * columns}
        for layer in family_of(pipe.transformer).attention_layers(pipe.transformer):
            products = calls[0].lengths[layer.name]
            assert sum(batch for batch, _, _ in products) == len(calls[0].latents) * copies[layer.axes], layer.name

    def test_layers_run_in_the_order_of_the_row(self, name: str, guided: bool) -> None:
        pipe, calls = recorded(name, guided)
        layers = family_of(pipe.transformer).attention_layers(pipe.transformer)
        assert list(calls[0].lengths) == [layer.name for layer in layers]

    def test_grid_holds_the_latents(self, name: str, guided: bool) -> None:
        calls = recorded(name, guided)[1]
        frames, rows, columns = calls[0].layout.grid
        assert columns == rows * (1 if name.startswith(("dit", "class")) else 2)  # as the calls ask
        assert frames == {"wan": 3, "hunyuan_video": 3, "cogvideox": 3, "mochi": 3, "ltx": 3, "latte": 4}.get(name, 1)


@pytest.mark.parametrize("name", ALL)
def test_order_of_branches(name: str) -> None:
    pipe, calls = recorded(name, True)
    layout = family_of(pipe.transformer).branches(pipe)
    _, plain = recorded(name, False)
    if layout.kind == "none":
        assert layout.order == ("cond",)
        return
    if layout.kind == "batched":
        halves = calls[0].latents.chunk(2)
        assert torch.equal(*halves)
        cond = list(condition(calls[0]))[layout.order.index("cond")]
        other = list(condition(calls[0]))[layout.order.index("uncond")]
    else:
        cond = condition(calls[layout.order.index("cond")])[0]
        other = condition(calls[layout.order.index("uncond")])[0]
    expected = condition(plain[0])[0]
    torch.testing.assert_close(cond, expected)
    assert other.shape != expected.shape or not torch.allclose(other, expected)


def changed_tokens(first: Tensor, second: Tensor) -> list[int]:
    """Tokens whose values (K, N, E) differ."""
    return (first != second).any(dim=-1).any(dim=0).nonzero().flatten().tolist()


JOINT = [row.name for row in FAMILIES if row.pipelines and any(entry.kind == "joint" for entry in row.attention)]


@pytest.mark.parametrize("name", JOINT)
def test_text_stands_where_the_row_says(name: str) -> None:
    """Other noise changes the values of the image's tokens before any mixing, and of no text token."""
    (_, one), (_, two) = (record(name, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    layout = one[0].layout
    pairs = list(zip(one[0].values, two[0].values, strict=True))
    samples = [(a, b) for x, y in pairs for a, b in zip(x, y, strict=True)]
    for sample, (first, second) in enumerate(samples):
        picture, text = layout.image_slice(sample), layout.text_slice(sample)
        changed = changed_tokens(first, second)
        assert set(range(picture.start, picture.stop)) <= set(changed)
        assert not set(range(text.start, text.stop)) & set(changed)
        assert text.stop > text.start


@pytest.mark.parametrize("name", ["lumina2", "z_image", "mochi"])
def test_texts_of_different_lengths(name: str) -> None:
    """Where a network drops padding, each sample has its own place for image and text."""
    prompts = ["a cat", "three small green frogs on a yellow background, in the rain"]
    limits = {"max_sequence_length": 200}
    runs = [
        record(
            name,
            prompt=list(prompts),
            negative_prompt=["", ""],
            generator=torch.Generator().manual_seed(seed),
            **limits,
        )[1]
        for seed in (0, 1)
    ]
    layout = runs[0][0].layout
    assert len(set(layout.text_lengths)) > 1
    values = [[sample for product in run[0].values for sample in product] for run in runs]
    for sample, (first, second) in enumerate(zip(*values, strict=True)):
        picture, text = layout.image_slice(sample), layout.text_slice(sample)
        changed = changed_tokens(first, second)
        assert set(range(picture.start, picture.stop)) <= set(changed)
        assert not set(range(text.start, text.stop)) & set(changed)


def record_as(name: str, pipeline: str, **overrides: Any) -> tuple[diffusers.DiffusionPipeline, list[Call]]:
    """Run another pipeline of the same components."""
    pipe = getattr(diffusers, pipeline)(**tiny_pipeline(name).components)
    pipe.set_progress_bar_config(disable=True)
    row = family_of(pipe.transformer)
    with Recorder(row, pipe.transformer).watching() as recorder:
        pipe(**tiny_call(name, **overrides))
    return pipe, recorder.calls


RED = Image.new("RGB", (64, 64), "red")


@pytest.mark.parametrize(
    ("name", "pipeline", "overrides"),
    [
        ("flux2", "Flux2Pipeline", {}),
        ("flux", "FluxKontextPipeline", {"_auto_resize": False, "max_area": 32 * 64, "true_cfg_scale": 2.0}),
    ],
)
def test_reference_pictures_stand_behind_the_grid(name: str, pipeline: str, overrides: dict[str, Any]) -> None:
    pipe, calls = record_as(name, pipeline, image=RED, **overrides)
    layout = calls[0].layout
    assert (layout.grid, layout.extra, layout.text_length) == ((1, 2, 4), 16, 16)
    for products in calls[0].lengths.values():
        assert products[0][1:] == layout.lengths("joint")
    assert family_of(pipe.transformer).pipeline(pipe).name == pipeline


def test_a_clip_that_continues_a_picture_has_timesteps_for_its_tokens() -> None:
    pipe, calls = record_as("ltx", "LTXImageToVideoPipeline", image=RED)
    row = family_of(pipe.transformer)
    assert len(calls) == STEPS
    for call, expected in zip(calls, pipe.scheduler.timesteps, strict=True):
        assert call.inputs["timestep"].unique().numel() == 2
        assert row.scheduler_timestep(pipe.transformer, call.inputs, pipe) == pytest.approx(expected.item(), rel=1e-5)
        assert call.lengths["transformer_blocks.0.attn1"][0][1:] == call.layout.lengths("self")


def test_skipping_layers_for_guidance_adds_an_undoubled_call() -> None:
    pipe, calls = record_as(
        "sd3",
        "StableDiffusion3Pipeline",
        guidance_scale=3.0,
        skip_guidance_layers=[1],
        skip_layer_guidance_start=-0.1,
        skip_layer_guidance_stop=1.0,
    )
    assert [len(call.latents) for call in calls] == [2, 1] * STEPS
    row = family_of(pipe.transformer)
    found = [float(row.scheduler_timestep(pipe.transformer, call.inputs, pipe)) for call in calls]
    assert found == pytest.approx([t.item() for t in pipe.scheduler.timesteps for _ in range(2)], rel=1e-5)
