"""Measuring which layers need their history, and dividing a budget by it."""

from itertools import product
from pathlib import Path

import pytest
import torch

from dit.cache import KVCalibrator, KVProfile, plan_cache
from dit.cache.calibration import STEPS
from dit.layers.scales import token_counts
from dit.models.next_scale import NextScaleTransformer
from dit.runtime.artifacts import ArtifactError
from tests.models import next_scale_reference as ref
from tests.models.tiny_next_scale import transformer

GRIDS = ((1, 1), (2, 2), (3, 3))


def profile(*curves: list[float]) -> KVProfile:
    """Curves given at a few places, the same at all scales."""
    places = torch.linspace(0, 1, STEPS + 1)
    lost = []
    for curve in curves:
        given = torch.tensor(curve)
        left = (places * (len(curve) - 1)).floor().long().clamp(max=len(curve) - 2)
        part = places * (len(curve) - 1) - left
        lost.append(given[left] * (1 - part) + given[left + 1] * part)
    return KVProfile(torch.stack(lost).expand(3, -1, -1).contiguous(), GRIDS, 1)


def test_a_budget_goes_where_it_saves_most() -> None:
    """The division is the best of all divisions, tried one by one."""
    found = profile([0.9, 0.5, 0.2, 0.05, 0.0], [0.3, 0.1, 0.05, 0.01, 0.0], [0.1, 0.1, 0.1, 0.1, 0.0])
    held, average = 16, 8
    row = found.divide(2, average, held)
    floor = int(0.3 * average)

    def cost(kept: tuple[int, ...]) -> float:
        return sum(float(found.lost[2, layer, n * STEPS // held]) for layer, n in enumerate(kept))

    able = [kept for kept in product(range(floor, held + 1), repeat=3) if sum(kept) == 3 * average]
    assert sum(row) == 3 * average
    assert max(row) <= held
    assert cost(tuple(row)) == pytest.approx(min(map(cost, able)), abs=1e-6)
    assert found.drafters(2, average, held) == [0]


@pytest.mark.parametrize("average", [1, 2, 7, 31, 40])
def test_the_sum_is_kept(average: int) -> None:
    found = profile([1.0, 0.0], [0.5, 0.0], [0.1, 0.0])
    row = found.divide(1, average, 40)
    assert sum(row) == 3 * average
    assert min(row) >= 1
    assert max(row) <= 40


@torch.no_grad()
def measured(model: NextScaleTransformer, **settings: int) -> KVProfile:
    watch = KVCalibrator(model.grids, model.config.num_layers, **settings)
    labels, inputs = torch.tensor(ref.LABELS), ref.inputs()
    condition, cache = model.prepare_condition(labels), model.make_cache(len(labels), observer=watch)
    with pytest.raises(ValueError, match="nothing was measured"):
        watch.profile()
    for scale, place in enumerate(model.slices):
        model.step(inputs[:, place.start - 1 : place.stop - 1] if scale else None, scale, condition, cache)
    return watch.profile()


def test_lost_attention_is_what_compression_loses() -> None:
    """Attention that falls on tokens beyond the best c, computed from the keys one by one."""
    model, seen = transformer(), {}

    def remember(layer: int, scale: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        seen[layer, scale] = query.clone(), keys.clone()

    labels, inputs = torch.tensor(ref.LABELS), ref.inputs()
    with torch.no_grad():
        condition, cache = model.prepare_condition(labels), model.make_cache(len(labels), observer=remember)
        for scale, place in enumerate(model.slices):
            model.step(inputs[:, place.start - 1 : place.stop - 1] if scale else None, scale, condition, cache)
    found = measured(model, observe=100, pool=1)  # all queries rank, so the ranking is plain to see
    scale, layer, counts = 2, 1, token_counts(model.grids)
    history = sum(counts[:scale])
    lost = torch.zeros(history + 1)
    for b in range(len(labels)):
        for h in range(model.config.num_attention_heads):
            width = model.config.attention_head_dim**0.5
            (before, old), (query, keys) = seen[layer, scale - 1], seen[layer, scale]
            scores = (before[b, :, h] @ old[b, :, h].T / width).softmax(-1).sum(0)
            order = scores.argsort(descending=True)
            weights = (query[b, :, h] @ keys[b, :, h].T / width).softmax(-1).mean(0)
            for kept in range(history + 1):
                lost[kept] += weights[:history][order[kept:]].sum()
    lost /= len(labels) * model.config.num_attention_heads
    places = torch.linspace(0, history, STEPS + 1).round().long()
    assert torch.allclose(found.lost[scale, layer], lost[places], atol=1e-5)
    assert found.lost[..., -1].abs().max() < 1e-6
    assert (found.lost.diff(dim=-1) <= 1e-6).all()


def test_profiles_are_kept_in_files_and_belong_to_their_network(tmp_path: Path) -> None:
    model = transformer()
    found, path = measured(model), tmp_path / "kv_profile.safetensors"
    found.save(path, model)
    again = KVProfile.load(path, transformer())
    assert torch.equal(again.lost, found.lost)
    assert (again.grids, again.images) == (found.grids, len(ref.LABELS))
    plan = model.plan_cache("scalekv", 0.3, profile=again)
    assert plan == plan_cache("scalekv", token_counts(model.grids), model.config.num_layers, 0.3, profile=found)
    with pytest.raises(ArtifactError, match="another architecture"):
        KVProfile.load(path, transformer(shared=True))
    other = transformer()
    other.proj_out.weight.data.add_(1.0)
    with pytest.raises(ArtifactError, match="any_weights"):
        KVProfile.load(path, other)
    assert KVProfile.load(path, other, any_weights=True).images == len(ref.LABELS)


def test_a_compressed_run_cannot_calibrate() -> None:
    watch = KVCalibrator(GRIDS, 1)
    token = torch.ones(1, 9, 1, 2)
    with pytest.raises(ValueError, match="kv_policy='full'"):
        watch(0, 2, token, token, token)  # five tokens of history are missing


@torch.no_grad()
@pytest.mark.parametrize("policy", ["window", "streaming", "snapkv", "pyramidkv", "scalekv"])
def test_the_network_with_a_compressed_cache_nears_the_exact_one(policy: str) -> None:
    """The more is kept, the nearer the logits; with everything kept they are equal."""
    model = transformer()
    found = measured(model)
    labels, inputs = torch.tensor(ref.LABELS), ref.inputs()

    def logits(budget: float, kv_dtype: str = "auto") -> torch.Tensor:
        plan = model.plan_cache(policy, budget, profile=found)
        condition = model.prepare_condition(labels)
        cache = model.make_cache(len(labels), plan=plan, kv_dtype=kv_dtype)
        for scale, place in enumerate(model.slices):
            out = model.step(inputs[:, place.start - 1 : place.stop - 1] if scale else None, scale, condition, cache)
        assert cache.report().share == pytest.approx(budget, abs=0.05)
        return out

    exact = run_full(model, labels, inputs)
    errors = [((logits(budget) - exact).norm() / exact.norm()).item() for budget in (0.15, 0.6, 1.0)]
    assert errors[2] < 1e-6
    assert errors[0] > errors[2]
    assert errors[1] < 2 * errors[0]
    assert ((logits(1.0, "int8") - exact).norm() / exact.norm()).item() < 0.02


def run_full(model: NextScaleTransformer, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    condition, cache = model.prepare_condition(labels), model.make_cache(len(labels))
    for scale, place in enumerate(model.slices):
        out = model.step(inputs[:, place.start - 1 : place.stop - 1] if scale else None, scale, condition, cache)
    return out
