"""Cache policies, search, pruning and editing where text is read, bits are drawn and positions turn the queries."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import NextScaleTextToImagePipeline
from sampling.inference_search import TTSConfig
from sampling.scale_acceleration import ScaleAcceleration
from sampling.token_pruning import TokenPruning, choose_detailed, fill
from tests.pipes.test_next_scale_text import of_bits, seeded

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def pipe() -> NextScaleTextToImagePipeline:
    return of_bits()


def paint(pipe: NextScaleTextToImagePipeline, **arguments: object) -> Tensor:
    return pipe(PROMPT, generator=seeded(), output_type="latent", **arguments).images


def test_policies_and_calibration(pipe: NextScaleTextToImagePipeline) -> None:
    exact = paint(pipe)
    pipe.calibrate_kv([PROMPT, "a cat"], generator=seeded(), observe=4)
    for policy in ("window", "scalekv"):
        assert torch.equal(paint(pipe, kv_policy=policy, kv_budget=1.0), exact)
        paint(pipe, kv_policy=policy, kv_budget=0.3, kv_observe=4, kv_dtype="int8")
        assert pipe.kv_report.share == pytest.approx(0.3, abs=0.1)


def test_a_twin_refines_without_a_change_and_guidance_may_end(pipe: NextScaleTextToImagePipeline) -> None:
    exact = paint(pipe, guidance_scale=3.0)
    twin = ScaleAcceleration(refiner=pipe.transformer, refine_from=2)
    assert torch.equal(paint(pipe, guidance_scale=3.0, acceleration=twin), exact)
    late = ScaleAcceleration(unguided=(-1,), measure_drift=True)
    assert not torch.equal(paint(pipe, guidance_scale=3.0, acceleration=late), exact)
    assert pipe.acceleration_report["drift"]["latent_error"] > 0


def test_searching_moves_the_text_too(pipe: NextScaleTextToImagePipeline) -> None:
    seen = []

    def reward(pictures: Tensor, prompts: list[str]) -> Tensor:
        seen.append(prompts)
        return pictures.mean((1, 2, 3))

    scales = len(pipe.transformer.grids)
    config = TTSConfig(reward, batch_sizes=(3,) * (scales - 1) + (2,), resample_scales=(scales - 1,))
    out = pipe([PROMPT, "two cats"], search=config, generator=[seeded(1), seeded(2)], output_type="pt")
    assert [found.prompt for found in out.search] == [PROMPT, "two cats"]
    assert {one for prompts in seen for one in prompts} == {PROMPT, "two cats"}
    alone = pipe("two cats", search=config, generator=[seeded(2)], output_type="pt")
    assert torch.allclose(alone.images[0], out.images[1], atol=1e-4)


def test_pruned_queries_keep_their_places(pipe: NextScaleTextToImagePipeline) -> None:
    """Pruning nothing worth a token equals the exact run; pruning a part does not, and detaches without a trace."""
    exact, last = paint(pipe), len(pipe.transformer.grids) - 1
    tiny = ScaleAcceleration(prune={last: 1e-6}, prune_layers=(0.0, 1.0))  # every token stays, by the pruned way
    assert torch.equal(paint(pipe, acceleration=tiny), exact)
    half = ScaleAcceleration(prune={last: 0.5}, prune_layers=(0.0, 1.0))
    paint(pipe, acceleration=half)
    counts = pipe.acceleration_report["pruning"]
    assert counts["worked_tokens"] == pytest.approx(0.5 * counts["given_tokens"], rel=0.15)
    assert torch.equal(paint(pipe), exact)


def test_gaps_are_filled_from_the_earlier_map() -> None:
    x = torch.zeros(1, 16, 2)
    x[0, [3, 8]] = 5.0
    places = choose_detailed(x, 2)
    assert places.tolist() == [[3, 8]]
    earlier = torch.arange(4.0)[None, :, None].expand(1, 4, 2)  # a map of 2 x 2
    whole = fill(torch.full((1, 2, 2), 9.0), places, earlier, (4, 4), (2, 2))
    expected = torch.tensor([0.0, 0, 1, 9, 0, 0, 1, 1, 9, 2, 3, 3, 2, 2, 3, 3])
    assert torch.equal(whole[0, :, 0], expected)
    with pytest.raises(ValueError, match="before all of them"):
        TokenPruning({1: 0.5}, 1, ((1, 1), (2, 2)))


def test_kept_pixels_are_the_originals(pipe: NextScaleTextToImagePipeline) -> None:
    size = pipe(PROMPT, generator=seeded()).images[0].size
    original = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[: size[1] // 2] = 255
    out = pipe(PROMPT, image=original, mask_image=Image.fromarray(mask), generator=seeded()).images[0]
    assert np.array_equal(np.array(out)[size[1] // 2 :], np.array(original)[size[1] // 2 :])
    assert not np.array_equal(np.array(out)[: size[1] // 2], np.array(original)[: size[1] // 2])
