"""A survey measures what candidates would change; a search takes the cheapest ones for an error, and tries the plan."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit.attention import AttentionPlan, TokenGrid, attention, block_sparse_attention, pattern, search_plan
from dit.attention.choices import DENSE, Choice
from dit.attention.corrections.pooled import pooled_tail
from dit.attention.search import PlanPoint, Survey, default_candidates, survey_attention
from dit.models.text_dit import TextDiT
from dit.runtime.hooks import AttachError
from dit.runtime.step_context import StepContext, next_run, step_scope


class Pipe:
    """A pipeline of three steps around a tiny network, which leaves its latents as images."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = TextDiT(
            in_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            text_dim=16,
            sample_size=16,
            patch_size=1,
        ).eval()
        for parameter in self.transformer.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.components = {"transformer": self.transformer}

    @torch.no_grad()
    def __call__(self, prompt: str, generator: torch.Generator, output_type: str = "pt") -> SimpleNamespace:
        x = torch.randn(1, 4, 16, 16, generator=generator)
        text = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(len(prompt)))
        run = next_run()
        for step, sigma in enumerate((1.0, 0.6, 0.3)):
            with step_scope(StepContext(run, step, 3, sigma, sigma)):
                x = x - 0.3 * self.transformer(x, encoder_hidden_states=text, timestep=torch.tensor([sigma])).sample
        return SimpleNamespace(images=x)


CANDIDATES = (
    DENSE,
    Choice("pooled_topk", {"keep": 0.25, "block": 16}),
    Choice("pooled_topk", {"keep": 0.25, "block": 16}, "pooled_tail"),
    Choice("svg_spatial", {"density": 0.3, "block": 16}),
    Choice("svg_spatial", {"density": 0.3, "block": 16}, "residual", {"refresh_every": 2}),
)


def test_rows_of_a_survey_are_rows_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a survey says of all queries is what the kernels compute."""
    pipe = Pipe()
    survey = survey_attention(pipe, ["a fox"], candidates=CANDIDATES[:3], bins=3, rows=256)
    found: list[list[Tensor]] = []

    def compared(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        grid = TokenGrid(1, 16, 16, 3, "first")
        dense = attention(query, key, value, *args, **options)
        block_map = pattern("pooled_topk", grid, query=query, key=key, keep=0.25, block=16)
        outs = [
            block_sparse_attention(query, key, value, block_map, kernel="reference", tail=tail)[:, 3:]
            for tail in (None, pooled_tail(key, value, block_map))
        ]
        norm = dense[:, 3:].square().sum((0, 1, 3))  # (K,), of the visual queries
        found.append([(out - dense[:, 3:]).square().sum((0, 1, 3)) / norm for out in outs])
        return dense

    monkeypatch.setattr("dit.layers.attention.attention", compared)
    pipe("a fox", torch.Generator().manual_seed(0))
    assert len(found) == 6  # three steps of two layers
    for call, errors in enumerate(found):
        seen = survey.error[call // 2, call % 2, 1:].float()  # (C, K)
        torch.testing.assert_close(seen, torch.stack(errors), rtol=1e-3, atol=1e-6)


def test_a_survey_of_dense_attention_changes_nothing() -> None:
    pipe = Pipe()
    before = pipe("a fox", torch.Generator().manual_seed(0)).images
    survey = survey_attention(pipe, ["a fox", "a red apple"], candidates=CANDIDATES, bins=2)
    assert torch.equal(pipe("a fox", torch.Generator().manual_seed(0)).images, before)
    assert survey.grid == (1, 16, 16)
    assert len(survey.sigma_bins) == 1
    assert survey.error.shape == (2, 2, 5, 2)
    assert survey.error[:, :, 0].eq(0).all()
    assert survey.density[:, :, 0].eq(1).all()
    assert (survey.error[:, :, 2] < survey.error[:, :, 1]).float().mean() > 0.5  # pooled tails help
    assert float(survey.density[:, :, 4].mean()) > float(survey.density[:, :, 3].mean())  # refreshes are dense


def made_up() -> Survey:
    """Two layers of three heads; the second candidate is cheap, and bad in one head."""
    error = torch.zeros(1, 2, 2, 3, dtype=torch.float64)
    error[0, :, 1] = torch.tensor([[0.0001, 0.04, 0.0004], [0.01, 0.0025, 0.0001]])
    density = torch.ones(1, 2, 2, 3, dtype=torch.float64)
    density[0, :, 1] = 0.25
    return Survey((DENSE, Choice("skip")), error, density, (), (1, 4, 4), Pipe().transformer)


def test_the_cheapest_table_for_an_error() -> None:
    survey = made_up()
    table = survey.table(error=math.sqrt(0.0031 / 6))  # four heads of 0.0001, 0.0004, 0.0025, 0.0001 fit
    assert table.tolist() == [[[1, 0, 1], [0, 1, 1]]]
    assert survey.point(table).density == pytest.approx((4 * 0.25 + 2) / 6)
    assert survey.table(error=0.0).eq(0).all()
    assert survey.table(error=1.0).eq(1).all()
    assert survey.table(density=0.5).tolist() == table.tolist()
    points = survey.curve()
    assert points[0] == PlanPoint(pytest.approx(math.sqrt(0.0531 / 6)), pytest.approx(0.02), pytest.approx(0.25))
    assert all(a.density <= b.density and a.error >= b.error for a, b in itertools.pairwise(points))
    with pytest.raises(ValueError, match=r"density 0.1.*0.250"):
        survey.table(density=0.1)
    with pytest.raises(ValueError, match="either"):
        survey.table()


def test_a_found_plan_keeps_its_promise_end_to_end(tmp_path: Path) -> None:
    pipe = Pipe()
    prompts = ["a fox", "a red apple"]
    plan = search_plan(pipe, prompts, error=0.1, candidates=CANDIDATES, bins=3)
    plan.save(tmp_path / "plan.safetensors")
    again = AttentionPlan.load(tmp_path / "plan.safetensors")
    with again.attach(pipe.transformer, measure_error=256) as handle:
        pipe("a fox", torch.Generator().manual_seed(0))
        report = handle.report()
    assert report["sparse"] > 0
    assert report["error"] < 0.15
    near = search_plan(pipe, prompts, error=0.3, min_psnr=40.0, candidates=CANDIDATES, bins=3)
    with near.attach(pipe.transformer):
        made = pipe("a fox", torch.Generator().manual_seed(0)).images
    truth = pipe("a fox", torch.Generator().manual_seed(0)).images
    assert -10 * math.log10(float((made - truth).square().mean())) >= 40
    with pytest.raises(ValueError, match="no plan reaches 1000"):
        search_plan(pipe, prompts, error=0.3, min_psnr=1000.0, candidates=CANDIDATES[1:], bins=1)


def test_heads_that_change_their_choice_start_anew() -> None:
    """What one choice kept is not another's: here heads swap theirs, and corrections, at the second noise level."""
    params = {"density": 0.3, "block": 16}
    choices = tuple(Choice("svg_spatial", params, name) for name in ("residual", "ratio_residual"))
    table = torch.tensor([[[0, 1]], [[1, 0]]], dtype=torch.int16)  # (bins, layers, heads)
    plan = AttentionPlan(choices, table, (0.8,))
    pipe = Pipe()
    with plan.attach(pipe.transformer) as handle:
        pipe("a fox", torch.Generator().manual_seed(0))
        layers = handle.report()["layers"].values()
    assert all(one["refreshes"] == 4 for one in layers)  # two heads at the first level, and again at the second
    assert all(one["density"] > 0.6 for one in layers)


def test_a_choice_that_longer_texts_leave_no_room_for_is_dense() -> None:
    pipe = Pipe()
    scarce = Choice("svg_spatial", {"density": 0.02, "block": 16})  # three of 259 tokens are exact: 0.023 of the pairs
    plan = AttentionPlan((DENSE, scarce), torch.tensor([[[0, 1]]], dtype=torch.int16))
    with plan.attach(pipe.transformer) as handle:
        pipe("a fox", torch.Generator().manual_seed(0))
        report = handle.report()
    assert report["density"] == 1
    assert sum("so many exact tokens" in reason for reason in report["dense_reasons"]) == 1
    uniform = AttentionPlan.uniform("svg_spatial", density=0.02, block=16)
    with uniform.attach(pipe.transformer), pytest.raises(AttachError, match=r"density is 0\.02"):
        pipe("a fox", torch.Generator().manual_seed(0))


def test_what_cannot_be_surveyed_is_said() -> None:
    with pytest.raises(ValueError, match="prompts is empty"):
        search_plan(Pipe(), [])
    with pytest.raises(ValueError, match="linear_complement"):
        survey_attention(Pipe(), ["a"], candidates=[Choice("skip", {}, "linear_complement")])


def test_candidates_fit_the_grid() -> None:
    clip = default_candidates(TokenGrid(5, 6, 6))
    image = default_candidates(TokenGrid(1, 32, 32))
    assert {one.pattern for one in image} == {"dense", "pooled_topk", "svg_spatial"}
    assert "svg_temporal" in {one.pattern for one in clip}
    assert {one.params.get("block") for one in clip} == {None, 32}
    assert {one.params.get("block") for one in image} == {None, 64}
    assert {one.correction for one in image[1:]} == {"pooled_tail", "residual", "ratio_residual"}


def test_a_plan_that_would_lose_time_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe()
    plan = AttentionPlan.uniform("pooled_topk", keep=0.25, block=16)
    before = pipe("a fox", torch.Generator().manual_seed(0)).images
    monkeypatch.setattr("dit.attention.decisions.LEAST_WEIGHED", 256)
    monkeypatch.setattr("dit.attention.map_cache.pattern", lambda *_, **__: pytest.fail("a map was made"))
    with plan.attach(pipe.transformer) as handle:
        made = pipe("a fox", torch.Generator().manual_seed(0)).images
        report = handle.report()
    assert torch.equal(made, before)
    assert report["sparse"] == 0
    assert report["dense_reasons"] == {"all pairs are computed faster here": 6}
