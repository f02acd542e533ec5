"""Plans as values and files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.attention import plan_file
from dit.attention.plan import DENSE, FIRST_FRAME, AttentionPlan, Choice, Guards, PlanEntry, TensorName
from dit.runtime.artifacts import ArtifactError, ArtifactHeader, write_artifact
from tests.families.networks import tiny_transformer

SKIP, COARSE = Choice("skip"), Choice("skip", {"block": 32})


def test_uniform_says_the_same_everywhere() -> None:
    plan = AttentionPlan.uniform("skip", block=16)
    for sigma in (None, 0.0, 0.7):
        ((choice, heads),) = plan.resolve(sigma, 3, 5)
        assert (str(choice), heads) == ("skip(block=16) + pooled_tail", None)
    assert plan.is_portable
    assert not plan.needs_step
    assert AttentionPlan.uniform("dense").choices == (DENSE,)


def test_equal_heads_are_one_launch() -> None:
    entries = [PlanEntry(SKIP, layers=(1,), heads=(0, 3)), PlanEntry(COARSE, layers=(1,), heads=(1,))]
    plan = AttentionPlan.of_entries(entries, layers=2, heads=4)
    found = {group.choice: group.heads for group in plan.resolve(None, 1, 4)}
    assert found == {SKIP: (0, 3), COARSE: (1,), DENSE: (2,)}
    assert plan.resolve(None, 0, 4) == ((DENSE, None),)


def test_noise_levels_belong_to_their_part() -> None:
    plan = AttentionPlan.of_entries([PlanEntry(SKIP, sigma=(0.25, 0.5)), PlanEntry(COARSE, sigma=(0.0, 0.1))])
    said = {sigma: plan.resolve(sigma, 0, 1)[0].choice for sigma in (1.0, 0.51, 0.5, 0.3, 0.25, 0.2, 0.1, 0.05, 0.0)}
    assert [one for one, choice in said.items() if choice == SKIP] == [0.5, 0.3, 0.25]
    assert [one for one, choice in said.items() if choice == COARSE] == [0.1, 0.05, 0.0]
    with pytest.raises(ValueError, match="noise level"):
        plan.resolve(None, 0, 1)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_files_hold_what_was_saved(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = data.draw(st.tuples(*(st.integers(1, 5),) * 3))
    count = shape[0] - 1
    levels = sorted(data.draw(st.sets(st.floats(0.01, 1.0), min_size=count, max_size=count)), reverse=True)
    table = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=(size := shape[0] * shape[1] * shape[2]), max_size=size))
    )
    guards = Guards((0.1, 0.9), 0.2, 1, (0, -1), 64, (FIRST_FRAME, ("blocks", 1, 3)), True)
    plan = AttentionPlan(
        (DENSE, SKIP, COARSE), table.view(shape).to(torch.int16), tuple(levels), guards, (3, 4, 5), "abc", "def"
    )
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    plan.save(path)
    again = AttentionPlan.load(path)
    assert torch.equal(again.table, plan.table)
    for name in ("choices", "sigma_bins", "guards", "grid", "architecture", "weights"):
        assert getattr(again, name) == getattr(plan, name), name


def test_a_large_plan_stays_below_a_megabyte(tmp_path: Path) -> None:
    """50 steps, 60 layers, 24 heads, no two neighbours alike: the worst there is."""
    table = (torch.arange(50 * 60 * 24) % 5).view(50, 60, 24).to(torch.int16)
    choices = tuple(Choice("skip", {"block": 8 * (index + 1)}) for index in range(5))
    plan = AttentionPlan(choices, table, tuple(1 - (i + 1) / 51 for i in range(49)))
    plan.save(tmp_path / "plan.safetensors")
    assert (tmp_path / "plan.safetensors").stat().st_size < 1_000_000
    assert torch.equal(AttentionPlan.load(tmp_path / "plan.safetensors").table, table)


def test_masks_are_kept_as_bits_and_belong_to_their_grid(tmp_path: Path) -> None:
    mask = torch.rand(3, 37, 37) > 0.5
    plan = AttentionPlan(
        (Choice("skip", {"block": TensorName("mask")}),),
        torch.zeros(1, 1, 1, dtype=torch.int16),
        grid=(1, 4, 4),
        tensors={"mask": mask},
    )
    plan.save(tmp_path / "plan.safetensors")
    again = AttentionPlan.load(tmp_path / "plan.safetensors")
    assert torch.equal(again.params_of(again.choices[0])["block"], mask)
    with pytest.raises(ArtifactError, match=r"mask.*one grid"):
        again.regrid((1, 8, 8))
    assert AttentionPlan.uniform("skip").regrid((1, 8, 8)).grid == (1, 8, 8)


def test_other_networks_are_refused() -> None:
    wan, other, flux = tiny_transformer("wan"), tiny_transformer("wan", seed=1), tiny_transformer("flux")
    plan = AttentionPlan.uniform("skip").for_model(wan)
    plan.attach(wan).detach()
    with pytest.raises(ArtifactError, match="another architecture"):
        plan.attach(flux)
    with pytest.raises(ArtifactError, match="any_weights"):
        plan.attach(other)
    plan.attach(other, any_weights=True).detach()
    three = AttentionPlan.of_entries([PlanEntry(SKIP, layers=(2,))], layers=3)
    with pytest.raises(ArtifactError, match="3 attention layers, the network has 2"):
        three.attach(wan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionPlan.uniform("skpi"), "skpi"),
        (lambda: AttentionPlan.uniform("skip", width=3), r"takes no width.*block"),
        (lambda: AttentionPlan.uniform("skip", correction="magic"), "magic"),
        (lambda: AttentionPlan.uniform("skip", kernel="magic"), r"magic.*auto"),
        (lambda: Guards(sigma_range=(0.9, 0.1)), "lower level first"),
        (lambda: Guards(dense_first=-1), "negative"),
        (lambda: Guards(sinks=(("rows", 0, 1),)), r"frames.*blocks"),
        (lambda: AttentionPlan((SKIP,), torch.ones(1, 1, 1, dtype=torch.int16)), "choices up to 1"),
        (lambda: AttentionPlan((SKIP,), torch.zeros(3, 1, 1, dtype=torch.int16), (0.5,)), "2 bins"),
        (lambda: AttentionPlan.of_entries([PlanEntry(SKIP, layers=(4,))], layers=2), "layer 4"),
    ],
)
def test_mistakes_are_said(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # pyright: ignore


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    AttentionPlan.uniform("skip").save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        AttentionPlan.load(path)
    with pytest.raises(FileNotFoundError):
        AttentionPlan.load(tmp_path / "none.safetensors")


def test_a_file_that_names_more_entries_than_memory_holds_is_refused(tmp_path: Path) -> None:
    """Run lengths of a few bytes can stand for any number of entries."""
    path = tmp_path / "plan.safetensors"
    header = ArtifactHeader(plan_file.KIND, "", "", "", (0, 0, 0), ())
    tensors = {plan_file.VALUES: torch.zeros(100, dtype=torch.int16), plan_file.LENGTHS: torch.full((100,), 10**9)}
    data = {"choices": [], "guards": {}, "shape": [10**5, 10**3, 10**3], "masks": {}}
    write_artifact(path, header, tensors, data)
    with pytest.raises(ArtifactError, match="none of at most"):
        AttentionPlan.load(path)
