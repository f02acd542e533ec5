"""Budgets on the block stack: what is measured is what is forecast, and a forecast step runs all but the blocks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from apps.benchmarks.step_cache import Workload
from dit.runtime.artifacts import ArtifactHeader
from dit.runtime.families import TokenLayout
from sampling.step_cache import Profile, StepCache, calibrate_budget
from sampling.step_cache.calibration import GramObserver, _image
from sampling.step_cache.forecasters import Gram
from sampling.step_cache.gates import Mask
from sampling.step_cache.regions import region_of
from sampling.step_cache.schedule import Errors
from tests.families.tiny import tiny_pipeline
from tests.runtime.counting import count_calls
from tests.runtime.truth import guided_call
from tests.step_cache.loops import Loop, levels

STEPS = 10


class Case:
    """A tiny pipeline and one call of it."""

    def __init__(self, name: str) -> None:
        self.pipe = tiny_pipeline(name)
        known = {**guided_call(self.pipe, name, guided=True), "num_inference_steps": STEPS}
        self.key = "prompt" if "prompt" in known else "class_labels"
        self.prompt = known[self.key]
        self.settings = {name: value for name, value in known.items() if name not in (self.key, "generator")}

    def calibrate(self, region: str) -> Profile:
        return calibrate_budget(self.pipe, [self.prompt], region=region, **self.settings)  # pyright: ignore

    def paint(self) -> torch.Tensor:
        noise = torch.Generator().manual_seed(5)
        return torch.as_tensor(self.pipe(**{self.key: self.prompt}, **self.settings, generator=noise)[0])


@pytest.mark.parametrize("name", ["flux", "wan", "dit", "text_dit"])
def test_a_budget_on_the_blocks_runs_as_planned(name: str) -> None:
    case = Case(name)
    made = case.calibrate("blocks")
    assert made.region == "blocks"
    plain = case.paint()
    with StepCache.preset("budget", budget=0.4, profile=made).attach(case.pipe) as attached:
        cached = case.paint()
        assert torch.equal(case.paint(), cached), "the second run differs from the first"
        report = attached.report()
    expected = "".join("C" if computed else "." for computed in made.mask((), 0.4))
    assert report["region"] == "Blocks"
    assert set(report["strip"].values()) == {expected}
    assert report["inactive"] == {}
    assert not torch.equal(cached, plain)
    with StepCache.preset("budget", budget=1.0, profile=made).attach(case.pipe):
        assert torch.equal(case.paint(), plain)
    assert torch.equal(case.paint(), plain), "something stayed behind"


def test_gram_of_the_blocks_is_that_of_what_they_add_to_the_picture_and_of_what_enters_them() -> None:
    case = Case("text_dit")
    network = case.pipe.transformer
    entered, left, tokens = [], [], []
    handles = [
        network.transformer_blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0].clone())),
        network.transformer_blocks[-1].register_forward_hook(lambda module, args, output: left.append(output.clone())),
        network.patch_embed.register_forward_hook(lambda module, args, output: tokens.append(output.shape[1])),
    ]
    made = case.calibrate("blocks")
    for handle in handles:
        handle.remove()
    before, after = (torch.stack(values).double()[:, :, -tokens[0] :].flatten(2) for values in (entered, left))
    uncond, cond = (after - before).unbind(1)  # (N, P D) each; the text stands before the image
    both = torch.cat([uncond + made.guidance * (cond - uncond), before[:, 1]])  # (2 N, P D)
    np.testing.assert_allclose(made.joint(), (both @ both.T / both.shape[1]).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.gram(), made.joint()[:STEPS, :STEPS])


def test_forecasts_are_the_least_squares_of_two_steps_and_the_input() -> None:
    made = Case("text_dit").calibrate("blocks")
    gram, sigmas = made.joint(), made.sigmas
    errors = Errors.of(gram, sigmas, "gram")
    for older, newest, step in ((0, 0, 3), (0, 2, 5), (1, 4, 9)):
        anchors = [newest] if older == newest else [newest, older]
        weights = made.weights([sigmas[anchor] for anchor in anchors], sigmas[step])
        assert len(weights) == len(anchors) + 1
        row = np.zeros(2 * STEPS)
        row[anchors], row[STEPS + step], row[step] = weights[:-1], weights[-1], -1.0
        error = np.sqrt(max(row @ gram @ row, 0.0)) * errors.lengths[step]
        assert errors.size[older, newest, step] == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert errors.entered[older, newest, step] == pytest.approx(weights[-1], rel=1e-3, abs=1e-5)
        without = Errors.of(made.gram(), sigmas, "gram").size[older, newest, step]
        assert errors.size[older, newest, step] <= 1.02 * without + 1e-3 * errors.lengths[step]


def test_the_input_counts_beside_the_computed_steps() -> None:
    loop = Loop()
    sigmas = loop.sigmas
    grams = {"cond,cond": np.eye(8), "cond,input": np.zeros((8, 8)), "input,input": np.eye(8)}
    np.fill_diagonal(grams["cond,input"], 0.5)  # half of what enters is what the blocks add; steps tell nothing
    made = Profile(ArtifactHeader("step_cache_profile", "a", "w", "s", (1, 2, 2), ()), tuple(sigmas), grams)
    mask = (True, False, True, True, False, True, True, True)
    entered: list[torch.Tensor] = []
    left: list[torch.Tensor] = []
    loop.model.transformer_blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    loop.model.norm_out.register_forward_pre_hook(lambda module, args: left.append(args[0].clone()))
    with StepCache(Mask(mask), Gram(made), region_of("blocks")).attach(loop.model):
        loop()
    for step in (1, 4):
        tokens = left[step].shape[1]
        torch.testing.assert_close(left[step], 1.5 * entered[step][:, -tokens:], rtol=1e-4, atol=1e-5)


def test_fifty_steps_with_inputs_are_planned_in_a_fraction_of_a_second_and_kept_below_100_kb(tmp_path: Path) -> None:
    sigmas = levels(50)
    values = np.sin(np.outer(np.asarray(sigmas * 2) ** 2, np.linspace(0, 6, 40)) + np.arange(40))
    whole = values @ values.T / 40
    parts = {"cond,cond": whole[:50, :50], "cond,input": whole[:50, 50:], "input,input": whole[50:, 50:]}
    grams = parts | {"uncond,uncond": parts["cond,cond"], "cond,uncond": parts["cond,cond"]}
    grams["uncond,input"] = parts["cond,input"]
    made = Profile(ArtifactHeader("step_cache_profile", "a", "w", "s", (1, 2, 2), ()), tuple(sigmas), grams, 4.0)
    assert count_calls(lambda: made.mask((), 0.35)) < 2 * 50**3
    assert sum(made.mask((), 0.35)) == 17
    made.save(tmp_path / "profile.safetensors")
    assert (tmp_path / "profile.safetensors").stat().st_size < 100_000


def test_a_forecast_step_runs_all_but_the_blocks_and_its_cost_is_counted() -> None:
    case = Case("text_dit")
    made = case.calibrate("blocks")
    work = Workload(case.pipe, [], STEPS, 3.0)
    heads: list[int] = []
    handle = case.pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: heads.append(1))
    with work.counting() as counted:
        case.paint()
        whole = counted()
    with StepCache.preset("budget", budget=0.4, profile=made).attach(case.pipe), work.counting() as counted:
        case.paint()
        some = counted()
    handle.remove()
    assert (whole[1], some[1]) == (STEPS, 4)
    assert len(heads) == 2 * STEPS
    share = some[0] / whole[0]
    assert 0.4 < share < 1.0, "what stands around the blocks is no free lunch"
    on_output = case.calibrate("output")
    with StepCache.preset("budget", budget=0.4, profile=on_output).attach(case.pipe), work.counting() as counted:
        case.paint()
        assert counted()[0] / whole[0] == pytest.approx(0.4)


def test_the_pictures_part_is_found_in_every_order_of_streams() -> None:
    layout = TokenLayout((1, 2, 2), text_length=3, text_position="before")
    picture, text, joint = torch.randn(2, 4, 5), torch.randn(2, 3, 5), torch.randn(2, 7, 5)
    assert _image((picture, text), layout) == (0, slice(None))
    assert _image((text, picture), layout) == (1, slice(None))
    assert _image((joint,), layout) == (0, slice(3, 7))
    assert _image((joint,), replace(layout, text_position="after")) == (0, slice(0, 4))


def test_profiles_of_older_versions_are_of_the_output(tmp_path: Path) -> None:
    made = Case("text_dit").calibrate("blocks")
    path, older = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    made.save(path)
    assert Profile.load(path).region == "blocks"
    with safe_open(str(path), framework="pt") as file:
        metadata = {key: text.replace(', "region": "blocks"', "") for key, text in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in made.grams}
    assert "region" not in metadata["data"]
    save_file(tensors, older, metadata=metadata)
    assert Profile.load(older).region == "output"


def test_unknown_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="region 'head' is not known; use one of output, blocks"):
        region_of("head")
    with pytest.raises(ValueError, match="'modules'"):
        GramObserver("modules")  # pyright: ignore[reportArgumentType]
