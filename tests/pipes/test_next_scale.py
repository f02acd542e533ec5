"""Generating scale by scale: the released sampler's tokens, callbacks, interruption, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines import NextScaleClassToImagePipeline, load_pipeline
from pipelines.next_scale.class_to_image import _strength
from sampling import tokens as sampling
from tests.models import next_scale_reference as ref
from tests.models.tiny_next_scale import tokenizer, transformer


@pytest.fixture(scope="module")
def pipe() -> NextScaleClassToImagePipeline:
    return make()


def make(shared: bool = False, **arguments: Any) -> NextScaleClassToImagePipeline:
    made = NextScaleClassToImagePipeline(transformer(shared), tokenizer(), **arguments)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = ref.SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: Tensor, expected: list[float], tolerance: float) -> bool:
    return torch.allclose(torch.tensor(ref.sampled(found)), torch.tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("name", ref.RUNS)
def test_equals_the_released_sampler(shared: bool, name: str) -> None:
    run, seen = ref.RUNS[name], []
    arguments = {
        "cfg": run["cfg"],
        "top_k": run["top_k"],
        "top_p": run["top_p"],
        "smooth": run["more_smooth"],
    }

    def watch(_: object, scale: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        assert scale == int(timestep)
        seen.append(tensors["indices"].tolist())

    painted = make(shared)
    common = {**arguments, "callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["indices"]}
    latents = painted(ref.LABELS, generator=seeded(), output_type="latent", **common).images
    key = f"{int(shared)}/{name}"
    assert seen == ref.GOLDEN[f"tokens/{key}"]
    # Mixtures are sharpened by 1 / 0.005 at the end, which sharpens rounding too.
    tolerance = 1e-3 if name == "smooth" else 1e-5
    assert close(latents, ref.GOLDEN[f"latent/{key}"], tolerance)
    picture = painted.decode_latents(latents).clamp(-1, 1) / 2 + 0.5
    assert close(picture, ref.GOLDEN[f"picture/{key}"], 10 * tolerance)


def test_without_guidance_half_the_rows_run(pipe: NextScaleClassToImagePipeline, monkeypatch: Any) -> None:
    rows, prepare = [], pipe.transformer.prepare_condition
    monkeypatch.setattr(
        pipe.transformer, "prepare_condition", lambda labels, **_: (rows.append(len(labels)), prepare(labels))[1]
    )
    free = pipe([1], guidance_scale=1.0, generator=seeded(), output_type="latent").images
    weak = pipe([1], guidance_scale=1 + 1e-6, generator=seeded(), output_type="latent").images
    assert rows == [1, 2]
    assert torch.allclose(free, weak, atol=1e-4)


def test_one_generator_a_picture_makes_it_independent_of_the_batch(pipe: NextScaleClassToImagePipeline) -> None:
    both = pipe([1, 7], generator=[seeded(1), seeded(2)], output_type="latent", smooth=True).images
    alone = pipe([7], generator=[seeded(2)], output_type="latent", smooth=True).images
    assert torch.allclose(both[1], alone[0], atol=1e-3)


def test_the_picture_grows_and_can_be_watched(pipe: NextScaleClassToImagePipeline) -> None:
    partial = []

    def watch(painting: NextScaleClassToImagePipeline, scale: int, _: Tensor, tensors: dict[str, Tensor]) -> None:
        assert painting.num_timesteps == 4
        shown = painting.preview(tensors["denoised_latents"])
        partial.append((scale, tensors["latents"].clone(), shown[0].size))

    out = pipe(
        [3, 4],
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["latents", "denoised_latents"],
    )
    assert [(scale, size) for scale, _, size in partial] == [(scale, (64, 64)) for scale in range(4)]
    assert torch.equal(partial[-1][1], out.images)
    assert not torch.equal(partial[0][1], partial[1][1])


def test_latents_of_the_callback_are_taken_over(pipe: NextScaleClassToImagePipeline) -> None:
    def blank(_: object, scale: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])} if scale == 3 else {}

    out = pipe([3], output_type="latent", callback_on_step_end=blank)
    assert not out.images.any()


def test_interrupting_stops_before_the_next_scale(pipe: NextScaleClassToImagePipeline) -> None:
    scales = []

    def stop(painting: NextScaleClassToImagePipeline, scale: int, *_: object) -> None:
        scales.append(scale)
        painting.interrupt = scale == 1

    out = pipe([3], callback_on_step_end=stop)
    assert (scales, out.images, pipe.interrupted) == ([0, 1], [], True)
    assert len(pipe([3]).images) == 1
    assert not pipe.interrupted


def test_names_and_counts(pipe: NextScaleClassToImagePipeline, tmp_path: Path) -> None:
    named = make(id2label={1: "cat, kitten", 7: "dog"})
    named.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, device="cpu")
    again.set_progress_bar_config(disable=True)
    assert again.get_label_ids(["kitten", "dog", 10]).tolist() == [1, 7, 10]
    found = again("cat", num_images_per_prompt=2, generator=seeded(), output_type="np").images
    assert found.shape == (2, 64, 64, 3)
    expected = pipe([1, 1], generator=seeded(), output_type="np", return_dict=False)[0]
    assert abs(found - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": []}, "empty"),
        ({"class_labels": [11]}, "expected 0 to 10"),
        ({"class_labels": "cat"}, "not known"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"top_p": 1.5}, "expected 0 to 1"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"kv_policy": "half"}, "'full'"),
        ({"output_type": "jpg"}, "output_type"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_wrong_arguments_are_named(pipe: NextScaleClassToImagePipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1, 2], **arguments})


def test_a_tokenizer_of_another_schedule_is_refused() -> None:
    other = tokenizer()
    other.grids = ((1, 1), (4, 4))
    with pytest.raises(ValueError, match="different schedules of scales"):
        NextScaleClassToImagePipeline(transformer(), other)


# --------------------------------------------------------------------- tokens


def test_top_k_keeps_ties_and_the_rest_is_ruled_out() -> None:
    logits = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 0.0]]])
    assert torch.isfinite(sampling.top_k_filter(logits, 2)).tolist() == [[[True, False, True, True, False]]]
    for everything in (0, 5, 900):
        assert sampling.top_k_filter(logits, everything) is logits


def test_top_p_drops_the_tail_but_never_all() -> None:
    logits = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log()
    assert torch.isfinite(sampling.top_p_filter(logits, 0.9)).tolist() == [[[True, True, True, False]]]
    assert torch.isfinite(sampling.top_p_filter(logits, 0.6)).tolist() == [[[True, True, False, False]]]
    assert torch.isfinite(sampling.top_p_filter(logits, 1e-9)).tolist() == [[[True, False, False, False]]]
    assert sampling.top_p_filter(logits, 0.0) is logits


def test_draws_follow_the_probabilities() -> None:
    shares = torch.tensor([0.6, 0.3, 0.1, 0.0])
    drawn = sampling.sample_tokens(shares.log().expand(2, 4000, 4), seeded())
    found = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    assert torch.allclose(found, shares, atol=0.03)
    cold = sampling.top_k_top_p_filter(shares.log().expand(1, 500, 4), temperature=0.05)
    assert not sampling.sample_tokens(cold, seeded()).any()


def test_mixtures_sharpen_with_progress() -> None:
    codebook, logits = torch.eye(4), torch.zeros(1, 200, 4)
    early = sampling.mix_codes(logits, codebook, 0.0, seeded())
    late = sampling.mix_codes(logits, codebook, 1.0, seeded())
    assert torch.allclose(early.sum(-1), torch.ones(1, 200))
    assert torch.equal(early.argmax(-1), late.argmax(-1))
    assert early.amax(-1).mean() < 0.99 < late.amax(-1).mean()


def test_guidance_ramps_up() -> None:
    assert [sampling.ramp(scale, 5) for scale in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert sampling.ramp(0, 1) == 1.0
    cond, uncond = torch.tensor([2.0]), torch.tensor([1.0])
    assert [sampling.guide_logits(cond, uncond, t).item() for t in (0.0, 1.0, 4.0)] == [2.0, 3.0, 6.0]


def test_cfg_is_the_released_convention_of_guidance_scale(pipe: NextScaleClassToImagePipeline) -> None:
    def paint(**guidance: float) -> Tensor:
        return pipe([1], generator=seeded(), output_type="latent", **guidance).images

    for cfg in (0.1, 1.5, 3.3):
        assert torch.equal(paint(cfg=cfg), paint(guidance_scale=1 + cfg))
    assert torch.equal(paint(), paint(cfg=4.0))
    assert torch.equal(paint(guidance_scale=0.0), paint(guidance_scale=1.0))
    assert torch.equal(paint(cfg=0.0), paint(guidance_scale=1.0))
    with pytest.raises(ValueError, match=r"cfg=2 and guidance_scale=3"):
        paint(cfg=2.0, guidance_scale=3.0)
    with pytest.raises(ValueError, match="cfg=-1"):
        paint(cfg=-1.0)


def test_one_more_and_one_less_is_exact() -> None:
    given = [count / 100 for count in range(3100)]
    assert [_strength(1 + cfg) for cfg in given] == given
