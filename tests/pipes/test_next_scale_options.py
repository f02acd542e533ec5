"""Cache policies, searches, accelerations and editing, as arguments of the next-scale pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit.cache import KVProfile
from dit.models.next_scale import NextScaleTransformer
from pipelines import NextScaleClassToImagePipeline
from pipelines.next_scale.inpaint import kept_tokens
from sampling.inference_search import TTSConfig
from sampling.scale_acceleration import ScaleAcceleration
from tests.models import next_scale_reference as ref
from tests.models.tiny_next_scale import tokenizer, transformer

GREEDY = {"top_k": 1, "cfg": 2.0}


@pytest.fixture(scope="module")
def pipe() -> NextScaleClassToImagePipeline:
    return make()


def make() -> NextScaleClassToImagePipeline:
    made = NextScaleClassToImagePipeline(transformer(), tokenizer(), id2label={1: "cat, kitten"})
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = ref.SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def redness(pictures: Tensor, prompts: list[str]) -> Tensor:
    return pictures[:, 0].mean((1, 2)) - pictures[:, 1:].mean((1, 2, 3))


# ------------------------------------------------------------------------ cache


@pytest.mark.parametrize("policy", ["window", "streaming", "snapkv", "pyramidkv"])
def test_policies_change_the_picture_little_by_little(pipe: NextScaleClassToImagePipeline, policy: str) -> None:
    def paint(**arguments: Any) -> Tensor:
        return pipe([1, 7], generator=seeded(), output_type="latent", **arguments).images

    exact = paint()
    full = pipe.kv_report
    assert torch.equal(paint(kv_policy=policy, kv_budget=1.0), exact)
    some = paint(kv_policy=policy, kv_budget=0.25)
    report = pipe.kv_report
    assert not torch.equal(some, exact)
    assert (report.policy, report.rows, report.kv_dtype) == (policy, 4, "auto")
    assert report.stored_bytes < 0.3 * full.stored_bytes
    assert report.full_bytes == full.stored_bytes == full.full_bytes
    eight = paint(kv_dtype="int8")
    assert ((eight - exact).norm() / exact.norm()) < 1.5
    width = pipe.transformer.config.attention_head_dim
    history, scales = sum(a * b for a, b in pipe.transformer.grids[:-1]), len(pipe.transformer.grids) - 1
    stored = history * (2 * width + 3) + scales * 4 * width  # codes, steps; means and steps of each scale
    assert pipe.kv_report.stored_bytes / full.stored_bytes == pytest.approx(stored / (history * 8 * width))


def test_scalekv_is_calibrated_once(tmp_path: Path) -> None:
    pipe, file = make(), tmp_path / "kv_profile.safetensors"
    with pytest.raises(ValueError, match="calibrate any other model once"):
        pipe([1], kv_policy="scalekv")
    profile = pipe.calibrate_kv([1, 2, 3], generator=seeded(), path=file, observe=4)
    assert profile.images == 6  # both branches
    exact = pipe([1], generator=seeded(), output_type="latent").images
    some = pipe([1], generator=seeded(), output_type="latent", kv_policy="scalekv", kv_budget=0.3).images
    assert pipe.kv_report.share == pytest.approx(0.3, abs=0.05)
    assert not torch.equal(some, exact)
    assert torch.equal(
        pipe([1], generator=seeded(), output_type="latent", kv_policy="scalekv", kv_budget=1.0).images, exact
    )
    pipe.save_pretrained(tmp_path)  # the profile lies beside the model now
    again = NextScaleClassToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again.kv_profile.lost, profile.lost)
    fresh = make()
    fresh.load_kv_profile(file)
    fresh._kv_profile = KVProfile(profile.lost, ((1, 1),), 1)
    with pytest.raises(ValueError, match="run `calibrate_kv` on it"):
        fresh([1], kv_policy="scalekv")


# ----------------------------------------------------------------- accelerations


def test_skipped_scales_are_not_painted(pipe: NextScaleClassToImagePipeline) -> None:
    seen = []
    arguments = {"generator": seeded(), "output_type": "latent"}
    whole = pipe([3], **arguments, callback_on_step_end=lambda _, __, ___, t: seen.append(t["latents"].clone()) or {})
    arguments["generator"] = seeded()
    out = pipe([3], **arguments, acceleration=ScaleAcceleration(skip_last=2, measure_drift=True)).images
    assert torch.equal(out, seen[1])
    report = pipe.acceleration_report
    assert report["scales"] == [2, 4]
    assert report["token_share"] == pytest.approx(5 / 30)
    assert report["drift"]["latent_error"] == pytest.approx(((out - whole.images).norm() / whole.images.norm()).item())
    assert 0 < report["drift"]["psnr"] < 100


def test_measuring_the_drift_changes_no_draw(pipe: NextScaleClassToImagePipeline) -> None:
    for generator in (seeded(), [seeded(1)], None):
        pictures = []
        for measure in (False, True):
            if generator is None:
                torch.manual_seed(5)
            given = None if generator is None else seeded(9) if not isinstance(generator, list) else [seeded(9)]
            how = ScaleAcceleration(unguided=(-1,), measure_drift=measure)
            pictures.append(pipe([3], generator=given, output_type="latent", acceleration=how).images)
        assert torch.equal(*pictures)


def test_guidance_off_late_halves_the_rows_and_early_keeps_them(pipe: NextScaleClassToImagePipeline) -> None:
    rows, step = [], pipe.transformer.step

    def spy(codes: Tensor | None, scale: int, condition: Any, cache: Any, **more: Any) -> Tensor:
        rows.append(cache.batch_size)
        return step(codes, scale, condition, cache, **more)

    pipe.transformer.step = spy
    try:
        pipe([3], acceleration=ScaleAcceleration(unguided=(-2, -1)), output_type="latent")
        late = pipe.acceleration_report
        pipe([3], acceleration=ScaleAcceleration(unguided=(1,)), output_type="latent")
    finally:
        del pipe.transformer.step
    assert rows == [2, 2, 1, 1, 2, 2, 2, 2]
    assert late["token_share"] == pytest.approx((5 * 2 + 25) / 60)

    def paint(unguided: tuple[int, ...]) -> Tensor:
        how = ScaleAcceleration(unguided=unguided) if unguided else None
        return pipe([3], generator=seeded(), output_type="latent", acceleration=how).images

    exact = paint(())
    assert torch.equal(paint((0,)), exact)  # guidance begins at 0
    assert not torch.equal(paint((1,)), exact)
    assert not torch.equal(paint((3,)), exact)
    assert torch.allclose(paint((0, 1, 2, 3)), pipe([3], 1.0, generator=seeded(), output_type="latent").images)


def test_a_refiner_that_is_the_drafter_changes_nothing(pipe: NextScaleClassToImagePipeline) -> None:
    exact = pipe([3, 5], generator=seeded(), output_type="latent").images
    twin = transformer()
    for start in (1, 2, -1):
        for unguided in ((), (-1,)):
            how = ScaleAcceleration(refiner=twin, refine_from=start, unguided=unguided)
            found = pipe([3, 5], generator=seeded(), output_type="latent", acceleration=how).images
            expected = exact
            if unguided:
                alone = ScaleAcceleration(unguided=unguided)
                expected = pipe([3, 5], generator=seeded(), output_type="latent", acceleration=alone).images
            assert torch.allclose(found, expected, atol=1e-5)


def test_a_smaller_refiner_paints_the_fine_scales(pipe: NextScaleClassToImagePipeline) -> None:
    small = NextScaleTransformer(**{**ref.CONFIG, "num_layers": 1}).eval()
    seen: list[Tensor] = []
    watch = {"callback_on_step_end": lambda _, __, ___, t: seen.append(t["indices"].clone()) or {}}
    watch["callback_on_step_end_tensor_inputs"] = ["indices"]
    pipe([3], generator=seeded(), output_type="latent", **watch)
    exact, seen = seen, []
    watch["callback_on_step_end"] = lambda _, __, ___, t: seen.append(t["indices"].clone()) or {}
    how = ScaleAcceleration(refiner=small, refine_from=2)
    pipe([3], generator=seeded(), output_type="latent", acceleration=how, **watch)
    assert [torch.equal(a, b) for a, b in zip(exact, seen, strict=True)] == [True, True, False, False]


def test_accelerations_that_leave_nothing_out_say_why(
    pipe: NextScaleClassToImagePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    how = ScaleAcceleration(skip_last=1, prune={2: 0.4, 3: 0.5}, unguided=(1,))
    with caplog.at_level("WARNING", "pipelines"):
        pipe([3], guidance_scale=0.0, output_type="latent", acceleration=how)
    idle = pipe.acceleration_report["inactive"]
    assert set(idle) == {"unguided", "prune"}
    assert "no guidance" in idle["unguided"]
    assert "[3]" in idle["prune"]
    assert [record.message.split()[1] for record in caplog.records] == ["unguided", "prune"]
    pipe([3], guidance_scale=2.0, output_type="latent", acceleration=ScaleAcceleration(unguided=(1,)))
    assert pipe.acceleration_report["inactive"] == {}


def test_pruned_tokens_come_from_an_earlier_scale(pipe: NextScaleClassToImagePipeline) -> None:
    exact = pipe([3], generator=seeded(), output_type="latent", **GREEDY).images
    how = ScaleAcceleration(prune={2: 0.4, 3: 0.5}, prune_layers=(0.0, 1.0))
    out = pipe([3], generator=seeded(), output_type="latent", acceleration=how, **GREEDY).images
    assert not torch.equal(out, exact)
    layers, parts = pipe.transformer.config.num_layers, 2
    assert pipe.acceleration_report["pruning"] == {
        "worked_tokens": layers * parts * (6 + 8),
        "given_tokens": layers * parts * 25,
    }
    again = pipe([3], generator=seeded(), output_type="latent", **GREEDY).images
    assert torch.equal(again, exact)  # nothing is left behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "leaves nothing out"),
        ({"skip_last": -1}, "skip_last is -1"),
        ({"refine_from": 2}, "belong together"),
        ({"skip_last": 1, "prune_layers": (0.5, 0.5)}, "rising fractions"),
    ],
)
def test_impossible_accelerations_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleAcceleration(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip_last": 4}, "leaves nothing of 4 scales"),
        ({"unguided": (4,)}, "expected -4 to 3"),
        ({"prune": {2: 1.0}}, "above 0 and below 1"),
        ({"prune": {0: 0.5}}, "cannot fill the gaps"),
        ({"prune": {3: 0.5}, "skip_last": 1}, "all skipped"),
        ({"refiner": object(), "refine_from": 0}, "expected 1 to 3"),
    ],
)
def test_accelerations_that_do_not_fit_are_refused(
    pipe: NextScaleClassToImagePipeline, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipe([1], acceleration=ScaleAcceleration(**arguments))


# ----------------------------------------------------------------------- search


def test_search_returns_the_best_of_its_candidates(pipe: NextScaleClassToImagePipeline) -> None:
    config = TTSConfig(redness, batch_sizes=(6, 6, 3, 2), cluster_scales=(2,), resample_scales=(3,))
    out = pipe(["cat", 5], search=config, generator=[seeded(1), seeded(2)], output_type="pt")
    assert out.images.shape == (2, 3, 64, 64)
    for found, picture, prompt in zip(out.search, out.images, ("cat", "5"), strict=True):
        assert found.prompt == prompt
        assert [(s.scale, s.kind, len(s.images), len(s.survivors)) for s in found.selections] == [
            (2, "cluster", 6, 3),
            (3, "resample", 3, 2),
            (4, "final", 2, 2),
        ]
        assert found.token_cost == pytest.approx((6 * 1 + 6 * 4 + 3 * 9 + 2 * 16) / 30)
        assert found.rewards[0] >= found.rewards[1]
        assert redness(picture[None], [""])[0] == pytest.approx(found.rewards[0].item(), abs=1e-3)
        assert torch.allclose(picture, found.images[0], atol=1e-6)
    alone = pipe([5], search=config, generator=[seeded(2)], output_type="pt")
    assert torch.allclose(alone.images[0], out.images[1], atol=1e-3)


def test_more_candidates_give_more_reward(pipe: NextScaleClassToImagePipeline) -> None:
    def mean_reward(search: TTSConfig | None) -> float:
        rewards = [
            redness(pipe([1], generator=seeded(seed), search=search, output_type="pt").images, [""])
            for seed in range(4)
        ]
        return torch.cat(rewards).mean().item()

    one, two, six = (
        mean_reward(None),
        *(mean_reward(TTSConfig(redness, "best_of", batch_sizes=count)) for count in (2, 6)),
    )
    assert one < two < six


def test_editing_and_accelerations_go_with_search(pipe: NextScaleClassToImagePipeline) -> None:
    original, mask = photo(), half_mask()
    config = TTSConfig(redness, "best_of", batch_sizes=3)
    how = ScaleAcceleration(skip_last=1, unguided=(-2,), refiner=transformer(), refine_from=1)
    out = pipe([1], search=config, acceleration=how, image=original, mask_image=mask, generator=seeded())
    assert np.array_equal(np.array(out.images[0])[:, 32:], np.array(original)[:, 32:])
    assert len(out.search[0].images) == 3
    several = pipe([1], search=config, num_images_per_prompt=2, generator=seeded())
    assert len(several.images) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"search": TTSConfig()}, "comes without a scorer"),
        ({"search": TTSConfig(redness, batch_sizes=(2, 2))}, "2 entries for 4 scales"),
        ({"search": TTSConfig(redness, "best_of", 1), "num_images_per_prompt": 2}, "ends with 1 candidates"),
        ({"search": TTSConfig(lambda x, _: x.mean())}, "reward gave"),
        ({"search": TTSConfig(redness), "acceleration": ScaleAcceleration(prune={3: 0.5})}, "drop `prune`"),
        ({"image": Image.new("RGB", (64, 64))}, "belong together"),
        ({"kv_budget": 0.0}, "forget everything"),
        ({"kv_budget": 1.5}, "kv_budget"),
        ({"kv_dtype": "int4"}, "'int8'"),
    ],
)
def test_wrong_options_are_named(pipe: NextScaleClassToImagePipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe([1], **arguments)


def test_options_of_a_wrong_type_are_named(pipe: NextScaleClassToImagePipeline) -> None:
    with pytest.raises(TypeError, match="search must be a TTSConfig"):
        pipe([1], search=8)
    with pytest.raises(TypeError, match="acceleration must be a ScaleAcceleration"):
        pipe([1], acceleration="fast")
    with pytest.raises(TypeError, match="reward must be a callable"):
        pipe([1], search=TTSConfig(reward=3))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- editing


def photo() -> Image.Image:
    rows, columns = np.mgrid[0:64, 0:64]
    return Image.fromarray(np.stack([rows * 4, columns * 4, 255 - rows * 2], -1).astype(np.uint8))


def half_mask() -> Image.Image:
    """White on the left half."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize("smooth", [False, True])
def test_kept_pixels_are_the_originals(pipe: NextScaleClassToImagePipeline, smooth: bool) -> None:
    original = photo()
    pictures = [
        pipe([label], image=original, mask_image=half_mask(), smooth=smooth, generator=seeded()).images[0]
        for label in (1, 7)
    ]
    for picture in pictures:
        assert np.array_equal(np.array(picture)[:, 32:], np.array(original)[:, 32:])
    assert not np.array_equal(*(np.array(picture)[:, :32] for picture in pictures))


def test_kept_tokens_are_the_originals_at_every_scale(pipe: NextScaleClassToImagePipeline) -> None:
    original, latents = photo(), []
    out = pipe(
        [1, 2],
        image=[original, original],
        mask_image=half_mask(),
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=lambda _, __, ___, tensors: latents.append(tensors["latents"].clone()) or {},
    ).images
    pixels = pipe.image_processor.preprocess(original)
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., :32] = True
    from pipelines.inputs.inpaint import fill_in

    expected = pipe.vae.quantize(fill_in(pixels, mask)).indices
    first = pipe.vae.accumulate(pipe.vae.start_latents(1), expected[0], 0)
    assert torch.allclose(latents[0], first.expand(2, -1, -1, -1), atol=1e-6)
    assert torch.equal(out, latents[-1])
    assert kept_tokens(mask, (1, 1)).tolist() == [[False]]
    assert kept_tokens(mask, (2, 2)).tolist() == [[False, True, False, True]]


def test_what_is_masked_leaves_no_trace(pipe: NextScaleClassToImagePipeline) -> None:
    original, other = photo(), photo()
    other.paste((255, 0, 0), (0, 0, 32, 64))
    pictures = [pipe([1], image=one, mask_image=half_mask(), generator=seeded()).images[0] for one in (original, other)]
    assert np.array_equal(*map(np.array, pictures))


def test_pictures_of_other_sizes_are_fitted(pipe: NextScaleClassToImagePipeline) -> None:
    out = pipe([1], image=photo().resize((128, 96)), mask_image=half_mask().resize((32, 32)), generator=seeded())
    assert out.images[0].size == (64, 64)
    with pytest.raises(ValueError, match="3 images for 1"):
        pipe([1], image=[photo()] * 3, mask_image=half_mask())
    with pytest.raises(ValueError, match="nothing would be generated"):
        pipe([1], image=photo(), mask_image=Image.new("L", (64, 64)))
