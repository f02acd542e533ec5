"""Plans of other projects."""

import json
from pathlib import Path

import pytest
import torch

from dit.attention.importers import PARO_ORDERS, flow_levels, import_paro, import_sparge, import_sta
from dit.attention.plan import DENSE, AttentionPlan
from tests.families.networks import tiny_transformer

FULL, LINE, FRAME = [5, 6, 10], [5, 3, 3], [1, 6, 10]
HUNYUAN = (30, 48, 80)


def sta(steps: int = 4, layers: int = 2, heads: int = 3) -> dict[str, list[int]]:
    """Dense at first, then a window by head, as the authors' files say."""
    return {
        f"{step}_{layer}_{head}": FULL if step < 2 else (LINE if head != 1 else FRAME)
        for step in range(steps)
        for layer in range(layers)
        for head in range(heads)
    }


def test_sliding_tiles_by_step_layer_and_head(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(sta()))
    plan = import_sta(tmp_path / "plan.json", flow_levels(4), grid=HUNYUAN)
    assert (plan.table.shape, plan.sigma_bins, plan.grid) == ((2, 2, 3), (0.625,), HUNYUAN)
    assert plan.resolve(0.75, 1, 3) == ((DENSE, None),)
    groups = {str(group.choice): group.heads for group in plan.resolve(0.5, 1, 3)}
    assert groups == {
        "sliding_tile(window=(5, 3, 3), tile=(6, 8, 8))": (0, 2),
        "sliding_tile(window=(1, 6, 10), tile=(6, 8, 8))": (1,),
    }
    assert DENSE not in import_sta(sta(), flow_levels(4)).choices, "which window is full depends on the grid"


def test_levels_of_a_shifted_schedule() -> None:
    assert flow_levels(2) == (1.0, 0.5)
    assert flow_levels(4, 7.0)[2] == pytest.approx(7 * 0.5 / (1 + 6 * 0.5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"0_0": FULL}, "step_layer_head"), ({"9_0_0": FULL}, "some are missing"), ({"0_0_0": [1, 2]}, r"\[1, 2\]")],
)
def test_broken_sliding_tiles_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_sta({**sta(), **changed}, flow_levels(4))
    with pytest.raises(ValueError, match="3 levels for 4 steps"):
        import_sta(sta(), flow_levels(3))


def test_masks_of_paro_run_in_one_launch_a_layer(tmp_path: Path) -> None:
    grid, generator = (2, 4, 6), torch.Generator().manual_seed(0)
    masks = torch.rand(2, 2, 2, 2 + 12, 2 + 12, generator=generator) > 0.6  # two blocks of text, twelve of four tokens
    orders = torch.tensor([[0, 2], [5, 5]])
    plan = import_paro(masks, orders, grid, flow_levels(4), text_blocks=2, block=4)
    plan.save(tmp_path / "plan.safetensors")
    plan = AttentionPlan.load(tmp_path / "plan.safetensors")
    ((choice, heads),) = plan.resolve(0.9, 0, 2)
    assert (choice.params["axes"], heads) == (("thw", "hwt"), None)
    kept = plan.params_of(choice)["masks"]
    assert torch.equal(kept[:, :-1, :-1], masks[0, 0, :, 2:-1, 2:-1])
    assert bool(kept[:, -1].all())
    assert plan.resolve(0.1, 0, 2)[0].choice != choice, "another bucket"
    model = tiny_transformer("wan")
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 12),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }
    from dit.runtime.step_context import StepContext, next_run, step_scope

    with plan.attach(model) as handle, torch.no_grad(), step_scope(StepContext(next_run(), 0, 4, 0.9, 900.0)):
        model(**inputs)
        report = handle.report()
    assert report["sparse"] == 2
    assert 0.3 < report["density"] < 0.9


def test_masks_of_paro_leave_an_incomplete_block_out() -> None:
    plan = import_paro(
        torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, dtype=torch.int64), (1, 3, 3), flow_levels(2), block=4
    )
    mask = plan.params_of(plan.choices[0])["masks"][0]
    assert mask.tolist() == [[False, False, True], [False, False, True], [True, True, True]]
    assert PARO_ORDERS[plan.choices[0].params["axes"] == ("wth",)] == "thw"
    with pytest.raises(ValueError, match="expected 3"):
        import_paro(torch.zeros(1, 1, 1, 5, 5), torch.zeros(1, 1), (1, 3, 3), flow_levels(2), block=4)


def test_thresholds_of_sparge() -> None:
    state = {
        "blocks.0.attn1.inner_attention.cdfthreshd": torch.tensor([0.9, 0.8]),
        "blocks.0.attn1.inner_attention.simthreshd1": torch.tensor([0.5, 0.25]),
        "blocks.0.attn1.inner_attention.simthreshd2": torch.tensor([0.0, 0.0]),
        "blocks.0.attn1.inner_attention.pvthreshd": torch.tensor([20.0, 20.0]),
        "blocks.0.attn1.inner_attention.is_sparse": torch.tensor([True, False]),
    }
    plan = import_sparge(state, ["blocks.0"])
    sparse, dense = plan.resolve(None, 0, 2)
    assert (sparse.heads, dense.heads, dense.choice) == ((0,), (1,), DENSE)
    assert sparse.choice.params["p"] == pytest.approx(0.9)
    assert sparse.choice.params["similarity"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"blocks\.1"):
        import_sparge(state, ["blocks.0", "blocks.1"])
