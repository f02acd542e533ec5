"""Search at sampling time: what it costs, whom it chooses, and rewards by name."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel

from dit.cache import ScaleKVCache
from dit.layers.scales import scale_grids, token_counts
from pipelines.loading.load import PRETRAINED
from sampling.inference_search import (
    BATCH_SIZES,
    ScaleSearch,
    SearchSchedule,
    TTSConfig,
    medoids,
    potential,
    principal_view,
    stretch,
    token_cost,
)
from sampling.next_scale import ScaleState, generate
from sampling.rewards import ClipReward

INFINITY = token_counts(scale_grids((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)))
VAR = token_counts(scale_grids((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))


def test_the_default_schedule_costs_what_was_published() -> None:
    assert TTSConfig().at(13) == SearchSchedule(BATCH_SIZES, frozenset({2, 5}), frozenset({6, 9}))
    assert token_cost(BATCH_SIZES, INFINITY) * sum(INFINITY) == 12800
    assert round(token_cost(BATCH_SIZES, INFINITY), 3) == 1.217


def test_the_schedule_stretches() -> None:
    for count in range(1, 20):
        found = stretch(count)
        found.check(count)
        assert found.batch_sizes[0] == 8
        assert TTSConfig().at(count) == found
    assert stretch(10).batch_sizes == (8, 8, 6, 6, 4, 2, 2, 1, 1, 1)
    assert (stretch(10).cluster, stretch(10).resample) == ({2, 4}, {5, 7})


@pytest.mark.parametrize("counts", [INFINITY, VAR])
@pytest.mark.parametrize("cost", [1.0, 1.3, 2.0, 4.0, 9.5])
def test_a_cost_is_met_from_below(counts: tuple[int, ...], cost: float) -> None:
    schedule = TTSConfig.for_cost(cost, counts).at(len(counts))
    spent = token_cost(schedule.batch_sizes, counts)
    assert 0.8 * cost < spent <= cost + 1e-3
    assert schedule.batch_sizes == tuple(sorted(schedule.batch_sizes, reverse=True))
    best = TTSConfig.for_cost(cost, counts, method="best_of").at(len(counts))
    assert best.batch_sizes == (int(cost),) * len(counts)
    assert not best.cluster | best.resample


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "luck"}, "'best_of'"),
        ({"potential": "hope"}, "'value'"),
        ({"batch_sizes": 4}, "single number"),
        ({"batch_sizes": (4, 0)}, "at least 1"),
        ({"strength": -1.0}, "0 or more"),
        ({"batch_sizes": (1, 2, 2)}, "grows from 1 to 2"),
        ({"batch_sizes": (2, 2)}, "2 entries for 3 scales"),
        ({"batch_sizes": (4, 2, 1), "cluster_scales": (1,)}, "where nothing is selected"),
        ({"batch_sizes": (2, 2, 2), "cluster_scales": (3,)}, "lie in 1 to 2"),
        ({"batch_sizes": (2, 2, 2), "cluster_scales": (1,), "resample_scales": (1,)}, "must differ"),
    ],
)
def test_impossible_searches_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTSConfig(**arguments).at(3)
    with pytest.raises(ValueError, match="less than one image"):
        TTSConfig.for_cost(0.5, VAR)


def test_clusters_are_found_and_their_middles_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    owner = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    points = centres[owner] + torch.randn(8, 2, generator=generator) * 0.5
    rows = medoids(points, 3)
    assert sorted(owner[rows].tolist()) == [0, 1, 2]
    for row in rows.tolist():
        members = points[owner == owner[row]]
        nearest = (members - members.mean(0)).norm(dim=1).min()
        assert (points[row] - members.mean(0)).norm() == pytest.approx(nearest.item(), abs=1e-5)
    assert medoids(torch.ones(4, 2), 3).unique().numel() == 3  # equals too
    assert medoids(points, 8).tolist() == list(range(8))


def test_potentials() -> None:
    now, history = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 0.0], [1.0, 1.5]])
    assert potential("value", now, history).tolist() == [1.0, 2.0]
    assert potential("diff", now, history).tolist() == [1.0, 0.5]
    assert potential("max", now, history).tolist() == [3.0, 2.0]
    assert potential("sum", now, history).tolist() == [4.0, 4.5]
    assert potential("sum", now, history[:, :0]).tolist() == [1.0, 2.0]


def test_principal_views_have_one_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    line, ramp = torch.randn(5, generator=generator), torch.linspace(0.2, 2.0, 12)
    tokens = (ramp[:, None] * line).expand(2, -1, -1) + 1e-3 * torch.randn(2, 12, 5, generator=generator)
    view = principal_view(tokens)
    assert torch.allclose(view[0], view[1], atol=0.02)
    expected = (ramp - ramp.mean()) * line.norm()
    assert torch.allclose(view[0], expected, atol=0.02)  # not its negative


# ----------------------------------------------------- rows, on a network one can see through


class Echo:
    """A network whose logits depend on its condition and its whole cache, nothing else."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = counts

    def step(self, codes: Tensor | None, scale: int, condition: "Names", cache: ScaleKVCache) -> Tensor:
        rows, count = len(condition.names), self.counts[scale]
        keys, values = cache.append(0, scale, *(2 * (condition.names.view(-1, 1, 1, 1).expand(rows, count, 1, 1),)))
        cache.evict(0, keys, keys, values)
        assert torch.equal(keys[:, 0, 0, 0], condition.names)  # what is cached moved with its row
        return condition.names.view(-1, 1, 1).expand(rows, count, 2)


class Names:
    """A condition that is a number a row."""

    def __init__(self, names: Tensor) -> None:
        self.names = names

    def select(self, rows: Tensor) -> "Names":
        return Names(self.names[rows])


class Sum:
    """A tokenizer that adds tokens up."""

    def next_input(self, latents: Tensor, scale: int) -> Tensor:
        return latents

    def accumulate(self, latents: Tensor, tokens: Tensor, scale: int) -> Tensor:
        return latents + tokens[:, :1, None, None]


def walk_of(names: list[float], counts: tuple[int, ...]) -> ScaleState:
    both = torch.tensor([*names, *(-one for one in names)])
    return ScaleState(
        Echo(counts),
        Sum(),
        Names(both),
        ScaleKVCache(counts, 1, len(both), 1, 1),
        torch.zeros(len(names), 1, 1, 1),
        guided=True,
        guide=lambda cond, uncond, scale: cond - uncond,  # twice the name, if the branches still belong together
        sample=lambda logits, scale: (logits[..., 0].long(), logits[..., 0]),
        num_scales=len(counts),
    )


@pytest.mark.parametrize("method", ["tts", "beam"])
def test_latents_condition_and_cache_move_together(method: str) -> None:
    counts = (1, 4, 9, 16)
    config = TTSConfig(
        lambda pictures, _: pictures.flatten(),
        method,
        batch_sizes=(4, 4, 3, 2),
        cluster_scales=(),
        resample_scales=(2, 3),
        strength=0.3,
        features=lambda pictures: pictures.flatten(1),
    )
    state = walk_of([1.0, 2.0, 3.0, 4.0], counts)
    search = ScaleSearch(config, config.reward, "", 4, lambda latents: latents, torch.Generator().manual_seed(0))

    class Choosing:
        finish_now = False

        def begin_scale(self, state: ScaleState, scale: int) -> bool:
            search.select_candidates(state, scale)
            return True

        def end_scale(self, state: ScaleState, scale: int, indices: torch.Tensor) -> None:
            assert torch.equal(state.latents.flatten(), 2 * (scale + 1) * state.condition.names[: state.batch_size])

    generate(state, 4, Choosing())
    assert state.steps == [(8, 1), (8, 4), (6, 9), (4, 16)]
    found = search.finish(state)
    assert found.rewards.tolist() == sorted(found.rewards.tolist(), reverse=True)
    if method == "beam":  # the best two branch to three, then the best two go on
        assert [selection.survivors.tolist() for selection in found.selections[:-1]] == [[3, 2, 3], [0, 2]]
    assert torch.equal(state.latents.flatten(), found.rewards)


@pytest.mark.parametrize("cost", [1, 1.2, 1.5, 2, 7 / 3, 2.5, 3, 4, 6.3])
def test_where_two_scales_hold_most_tokens_candidates_are_drawn_before_them(cost: float) -> None:
    counts = (1, 4, 9, 16, 64, 64)
    schedule = TTSConfig.for_cost(cost, counts).at(6)
    assert token_cost(schedule.batch_sizes, counts) <= cost + 1e-3
    assert not schedule.cluster
    assert schedule.resample <= {4, 5}
    *coarse, fine, last = schedule.batch_sizes
    assert last == max(int(cost) // 2, 1)
    assert fine in (last, last + 1)
    assert set(coarse) == {max(coarse)}
    larger = (*(size + 1 for size in coarse), fine, last)
    assert token_cost(larger, counts) > cost - 1e-3, "what is left goes into coarse candidates"


@pytest.mark.parametrize(
    ("cost", "sizes"), [(1.2, (2, 2, 2, 2, 1, 1)), (2, (4, 4, 4, 4, 2, 1)), (4, (10, 10, 10, 10, 3, 2))]
)
def test_what_costs_buy_of_the_built_in_schedule(cost: float, sizes: tuple[int, ...]) -> None:
    config = TTSConfig.for_cost(cost, (1, 4, 9, 16, 64, 64))
    assert config.batch_sizes == sizes
    assert not config.replacement


def test_drawing_again_follows_the_rewards() -> None:
    config = TTSConfig(lambda pictures, _: pictures.flatten(), batch_sizes=(2, 2), strength=1.0, resample_scales=(1,))
    search = ScaleSearch(config, config.reward, "", 2, lambda latents: latents, torch.Generator().manual_seed(0))
    drawn = torch.cat([search._draw(torch.tensor([0.0, 1.0]), 2) for _ in range(1000)])
    assert drawn.float().mean() == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1].item(), abs=0.03)


def test_drawing_without_replacement_keeps_candidates_apart() -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0, 50.0])
    config = TTSConfig(lambda _, __: rewards, batch_sizes=(4, 2), strength=1.0, resample_scales=(1,), replacement=False)
    search = ScaleSearch(config, config.reward, "", 2, lambda latents: latents, torch.Generator().manual_seed(0))
    drawn = torch.stack([search._draw(rewards, 2) for _ in range(2000)])  # (R, 2)
    assert (drawn[:, 0] == 3).all(), "a weight of nearly one is drawn first"
    second = torch.bincount(drawn[:, 1], minlength=4) / len(drawn)
    assert torch.allclose(second[:3], rewards[:3].softmax(0), atol=0.03), "then in proportion among what is left"
    assert second[3] == 0
    assert sorted(search._draw(rewards, 4).tolist()) == [0, 1, 2, 3]


def test_a_reward_may_say_which_difference_counts() -> None:
    class Close:
        unit = 0.1

        def __call__(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return pictures.flatten()

    config = TTSConfig(Close(), batch_sizes=(2, 2), strength=1.0, resample_scales=(1,))
    search = ScaleSearch(config, config.reward, "", 2, lambda latents: latents, torch.Generator().manual_seed(0))
    drawn = torch.cat([search._draw(torch.tensor([0.0, 0.1]), 2) for _ in range(1000)])
    assert drawn.float().mean() == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1].item(), abs=0.03)


# ------------------------------------------------------------------------ rewards


def tiny_clip(folder: Path) -> Path:
    letters = sorted(set("redcat"))
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokens = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(tokens),
            "max_position_embeddings": 16,
            "eos_token_id": tokens.eos_token_id,
        },
        vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


def test_clip_like_models_are_rewards_by_name(tmp_path: Path) -> None:
    reward = ClipReward(str(tiny_clip(tmp_path)))
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = reward(pictures, ["a red cat", "a cat", "red"])
    assert found.shape == (3,)
    assert found.abs().max() <= 1
    assert reward(pictures[1:2], ["a cat"]).item() == pytest.approx(found[1].item(), abs=1e-5)
    shown = [Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()) for one in pictures]
    inputs = reward.processor(shown, return_tensors="pt")
    words = reward.tokenizer(["a red cat", "a cat", "red"], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = reward.model(**inputs, **words)
    expected = (output.image_embeds * output.text_embeds).sum(-1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_built_in_scorer_is_read_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")  # which keeps its messages from the root
    logger.addHandler(caplog.handler)
    try:
        ClipReward(PRETRAINED / "stickers-var-scorer")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_siglip_is_given_its_padding(tmp_path: Path) -> None:
    tokens = CLIPTokenizer.from_pretrained(tiny_clip(tmp_path / "clip"), model_max_length=10**6)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **size,
        "vocab_size": len(tokens),
        "max_position_embeddings": 8,
        "projection_size": 16,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}))
    model.save_pretrained(tmp_path / "siglip")
    tokens.model_input_names = ["input_ids"]
    tokens.save_pretrained(tmp_path / "siglip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path / "siglip")

    reward = ClipReward(str(tmp_path / "siglip"))
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["red", "cat", "a red cat and a cat that is red"]  # the last one is cut
    found = reward(pictures, prompts)
    alone = torch.cat([reward(picture[None], [prompt]) for picture, prompt in zip(pictures, prompts, strict=True)])
    assert torch.allclose(found, alone, atol=1e-5)
    padded = tokens(["red"], padding="max_length", max_length=8, return_tensors="pt")["input_ids"]
    assert padded.shape == (1, 8)
    with torch.no_grad():
        told = model.get_text_features(input_ids=padded).pooler_output
        pixels = reward.processor(Image.fromarray((pictures[0] * 255).round().byte().permute(1, 2, 0).numpy()))
        seen = model.get_image_features(pixel_values=torch.tensor(pixels["pixel_values"][0])[None]).pooler_output
    assert found[0].item() == pytest.approx(torch.cosine_similarity(seen, told).item(), abs=1e-5)


def test_other_models_are_no_rewards(tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path)
    reward = ClipReward(str(folder))
    reward.model.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="CLIP-like"):
        ClipReward(str(tmp_path / "text"))
