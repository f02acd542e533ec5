"""Statistics of what linear layers read: against all inputs kept, by noise level and branch; files; networks alone."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pipelines
from dit.quant.calibration import Calibration, CalibrationObserver, calibrate
from dit.quant.data_free import data_free_calibration
from dit.quant.statistics import UNKNOWN, LayerStatistics, NoiseLevels, RunningStatistics
from dit.runtime.artifacts import ArtifactError
from dit.runtime.hooks import AttachError, attachments
from dit.runtime.module_conversion import linear_slots
from dit.runtime.step_context import StepContext, step_scope
from pipelines import NextScaleClassToImagePipeline
from tests.families.networks import tiny_transformer
from tests.families.tiny import tiny_pipeline
from tests.models.tiny_next_scale import tokenizer, transformer
from tests.runtime.attention_norms import AttentionNorms
from tests.runtime.truth import guided_call

PROMPTS = ("a red cat", "a blue dog")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_of(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a tiny pipeline and the arguments of a guided call of four steps, without prompt and seed."""
    pipe = tiny_pipeline(name)
    arguments = guided_call(pipe, name, guided=True)
    for unwanted in ("generator", "output_type", "prompt", "class_labels"):
        arguments.pop(unwanted, None)
    return pipe, arguments


@contextmanager
def everything(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Keep all inputs of a layer."""
    kept: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach().clone()))
    yield kept
    handle.remove()


def layer_of(model: nn.Module, name: str) -> nn.Module:
    return next(slot.linear for slot in linear_slots(model) if slot.name == name)


# ------------------------------------------------------------------- against all inputs kept


@pytest.mark.parametrize(
    ("name", "layer", "branches"),
    [
        ("text_dit", "transformer_blocks.1.attn.to_q", ("uncond", "cond")),  # our loop, both branches in a batch
        ("flux", "transformer_blocks.1.ff.net.2", ("cond", "uncond")),  # a call a branch, no step context
        ("pixart", "transformer_blocks.0.attn2.to_k", ("uncond", "cond")),  # both in a batch, no step context
    ],
)
def test_statistics_are_those_of_all_inputs(name: str, layer: str, branches: tuple[str, str]) -> None:
    pipe, arguments = call_of(name)
    with everything(layer_of(pipe.transformer, layer)) as kept:
        found = calibrate(pipe, PROMPTS, rows=40, **arguments).layers[layer]
    # what was read, by (step, branch): the order of branches in calls or batches is that of the table of families
    truth: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    if len(kept) == 4 * len(PROMPTS):
        for number, x in enumerate(kept):
            for branch, part in zip(branches, x.chunk(2), strict=True):
                truth[number % 4, branch].append(part.reshape(-1, x.shape[-1]))
    else:
        assert len(kept) == 8 * len(PROMPTS)
        for number, x in enumerate(kept):
            truth[number // 2 % 4, branches[number % 2]].append(x.reshape(-1, x.shape[-1]))
    assert found.branches == ("cond", "uncond") * 4
    assert found.sigmas.tolist() == sorted(found.sigmas.tolist(), reverse=True)
    for index in range(8):
        seen = torch.cat(truth[index // 2, found.branches[index]])  # (M, K)
        assert torch.equal(found.amax[index], seen.abs().amax(0))
        assert torch.allclose(found.mean_square[index], seen.square().mean(0), rtol=1e-5)
        assert int(found.count[index]) == len(seen)
        rows = found.rows[found.row_bins == index].float()
        assert len(rows) == min(5, len(seen))
        assert all((seen.bfloat16().float() == row).all(1).any() for row in rows)
    assert torch.equal(found.token_max, found.amax.amax(1))


def test_a_context_tells_noise_level_and_branch() -> None:
    layer, observer = nn.Sequential(nn.Linear(8, 4)), CalibrationObserver()
    x = drawn(2, 3, 8)
    with observer.attach(layer):
        for step, branch in enumerate(("cond", "uncond", "cond")):
            with step_scope(StepContext(1, step, 3, 1 - step / 4, 0.0, branch)):
                layer(x + step)
    found = observer.calibration()
    assert (found.axis, found.header.sigma_bins) == ("sigma", (0.875, 0.625))
    statistics = found.layers["0"]
    assert statistics.sigmas.tolist() == [1.0, 0.75, 0.5]
    assert statistics.branches == ("cond", "uncond", "cond")
    assert torch.equal(statistics.amax[1], (x + 1).abs().amax((0, 1)))


def test_calls_of_unknown_noise_level_are_one_bin() -> None:
    layer, observer = nn.Sequential(nn.Linear(8, 4)), CalibrationObserver()
    with observer.attach(layer):
        layer(drawn(2, 8))
        with step_scope(StepContext(1, 0, 1, 0.5, 0.0, "cond")):
            layer(drawn(3, 8))
        layer(drawn(4, 8))
    found = observer.calibration().layers["0"]
    assert found.branches == ("cond", "all")  # unknown ones come last
    assert str(found.sigmas.tolist()) == "[0.5, nan]"
    assert found.count.tolist() == [3, 6]


def test_next_scale_models_are_observed_by_scale() -> None:
    pipe = NextScaleClassToImagePipeline(transformer(False), tokenizer())
    pipe.set_progress_bar_config(disable=True)
    found = calibrate(pipe, [1, 2], rows=64)
    statistics = next(one for name, one in found.layers.items() if name.endswith("attn.to_q"))
    scales = len(pipe.transformer.config.scales)
    assert found.axis == "scale"
    assert statistics.sigmas.tolist() == list(range(scales))
    assert found.header.sigma_bins == ()
    tokens = [side * side for side in pipe.transformer.config.scales]
    assert statistics.count.tolist() == [2 * 2 * one for one in tokens]  # two branches, two images


def test_text_encoders_can_be_observed() -> None:
    pipe, arguments = call_of("text_dit")
    found = calibrate(pipe, PROMPTS, components=["text_encoder"], rows=16, **arguments)
    assert found.layers
    assert all(name.startswith("text_encoder.") for name in found.layers)
    assert found.axis == "none"
    assert {one.branches for one in found.layers.values()} == {("all",)}


# ----------------------------------------------------------------------------- the observer


def test_it_changes_nothing_and_goes_without_a_trace() -> None:
    pipe, arguments = call_of("text_dit")

    def paint() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPTS[0], generator=generator, output_type="latent", **arguments).images

    before = paint()
    with CalibrationObserver().attach(pipe):
        assert torch.equal(paint(), before)
    assert attachments(pipe) == []
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())


def test_it_is_one_of_the_observers_of_a_pass() -> None:
    pipe, arguments = call_of("pixart")
    observer, norms = CalibrationObserver(rows=16), AttentionNorms()
    found = pipelines.observe(pipe, PROMPTS, [observer, norms], **arguments)
    calibration = observer.calibration()
    assert calibration.axis == "sigma"  # a pass tracks the steps
    assert calibration.header.sigma_bins == pytest.approx(found.header.sigma_bins)
    assert calibration.header.grid == found.header.grid
    report = found.reports["quantization_calibration"]
    assert (report["layers"], report["unseen"]) == (len(calibration.layers), [])
    calibration.check(pipe.transformer, pipe.scheduler)


def test_two_passes_are_the_same_bit_for_bit() -> None:
    pipe, arguments = call_of("class_dit")
    one, two = (calibrate(pipe, [1, 2], rows=24, **arguments) for _ in range(2))
    assert one.layers.keys() == two.layers.keys()
    for name, statistics in one.layers.items():
        assert torch.equal(statistics.rows, two.layers[name].rows)
        assert torch.equal(statistics.mean_square, two.layers[name].mean_square)
    other = calibrate(pipe, [1, 2], rows=24, seed=5, **arguments)
    assert not torch.equal(one.layers["proj_out"].rows, other.layers["proj_out"].rows)


def test_layers_that_read_one_input_are_siblings() -> None:
    pipe, arguments = call_of("flux")
    layers = calibrate(pipe, PROMPTS[:1], rows=8, **arguments).layers
    block = "single_transformer_blocks.0"
    assert set(layers[f"{block}.attn.to_k"].siblings) == {
        f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    }
    assert layers[f"{block}.attn.to_q"].amax is layers[f"{block}.proj_mlp"].amax
    assert layers[f"{block}.proj_out"].siblings == (f"{block}.proj_out",)
    text = layers["transformer_blocks.1.attn.add_q_proj"].siblings
    assert "transformer_blocks.1.attn.to_q" not in text
    assert len(text) == 3


def test_blocks_that_read_the_same_text_are_no_siblings() -> None:
    pipe, arguments = call_of("pixart")
    layers = calibrate(pipe, PROMPTS[:1], rows=8, **arguments).layers
    names = [f"transformer_blocks.{block}.attn2.to_{one}" for block in (0, 1) for one in "kv"]
    assert layers[names[0]].siblings == tuple(names[:2])
    assert layers[names[2]].siblings == tuple(names[2:])
    assert layers[names[0]].amax is layers[names[2]].amax  # but what they read is counted once


class Changing(nn.Module):
    """Two layers that read one input until `apart` is set, or the input is changed in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 3)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y + self.two(x * 2 if self.apart else x)


def test_layers_that_part_have_their_own_statistics() -> None:
    model, observer, x = Changing(), CalibrationObserver(rows=4), drawn(5, 6)
    with observer.attach(model):
        model(x)
        model.apart = True
        model(x / 2)
        model(x)
    layers = observer.calibration().layers
    assert layers["one"].siblings == ("one",)
    assert layers["two"].siblings == ("two",)
    assert torch.equal(layers["one"].amax[0], x.abs().amax(0))
    assert torch.equal(layers["two"].amax[0], 2 * x.abs().amax(0))


def test_an_input_changed_in_place_is_another_input() -> None:
    class InPlace(Changing):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x.mul_(3))

    model, observer, x = InPlace(), CalibrationObserver(), drawn(5, 6)
    with observer.attach(model), torch.no_grad():
        model(x.clone())
    layers = observer.calibration().layers
    assert torch.equal(layers["two"].amax, 3 * layers["one"].amax)


def test_adapted_layers_keep_their_names() -> None:
    pipe, arguments = call_of("class_dit")
    names = set(calibrate(pipe, [1], rows=8, **arguments).layers)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipe.transformer)
    assert set(calibrate(pipe, [1], rows=8, **arguments).layers) == names


def test_what_was_never_called_is_named() -> None:
    class Lazy(Changing):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x)

    observer = CalibrationObserver()
    with observer.attach(Lazy()) as attachment:
        with pytest.raises(ValueError, match="no linear layer was called"):
            observer.calibration()
        attachment.models["transformer"](drawn(2, 6))
        assert attachment.report()["unseen"] == ["two"]
    assert observer.calibration().unseen == ("two",)


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model, observer = Changing(), CalibrationObserver()
    x = drawn(4, 6)
    x[2, 3] = math.nan
    with observer.attach(model):
        model(x)
    with pytest.raises(ValueError, match="amax in the statistics of one holds NaN or infinity"):
        observer.calibration()


def test_wrong_arguments_are_refused() -> None:
    pipe, _ = call_of("class_dit")
    for prompts in ((), "a cat"):
        with pytest.raises(ValueError, match="prompts must be a list of at least one prompt"):
            calibrate(pipe, prompts)
    with pytest.raises(ValueError, match="rows is -1 and levels is 8"):
        calibrate(pipe, [1], rows=-1)
    with pytest.raises(AttachError, match="nobody"):
        calibrate(pipe, [1], components=["nobody"])
    with pytest.raises(ValueError, match="num_inference_steps"):
        calibrate(pipe, [1], num_inference_steps=0)
    assert attachments(pipe) == []


def test_the_caller_may_generate() -> None:
    pipe, arguments = call_of("class_dit")
    calls, done = [], []

    def call(pipeline: Any, prompt: Any, seed: int) -> None:
        calls.append((prompt, seed))
        pipeline([prompt], output_type="latent", **arguments)

    calibrate(pipe, [3, 4], seed=7, call=call, rows=8, progress=lambda *at: done.append(at))
    assert calls == [(3, 7), (4, 8)]
    assert done == [(1, 2), (2, 2)]


# --------------------------------------------------------------------------- levels and sums


def test_noise_levels_are_joined_where_there_are_too_many() -> None:
    joined: list[tuple[int, int]] = []
    levels = NoiseLevels(4, lambda kept, gone: joined.append((kept, gone)))
    sigmas = [1 - step / 16 for step in range(16)]
    numbers = [levels.find(sigma) for sigma in sigmas]
    for kept, gone in joined:
        numbers = [kept if one == gone else one for one in numbers]
    order = levels.in_order()
    assert [number for number, _ in order] == list(dict.fromkeys(numbers))  # neighbours, from the noisiest down
    assert max(map(numbers.count, numbers)) <= 2 * min(map(numbers.count, numbers))
    means = [sum(s for s, n in zip(sigmas, numbers, strict=True) if n == one) / numbers.count(one) for one, _ in order]
    assert [mean for _, mean in order] == pytest.approx(means)
    before = len(joined)
    assert [levels.find(sigma) for sigma in sigmas] == numbers  # another run
    assert len(joined) == before
    assert levels.find(math.nan) == UNKNOWN
    with pytest.raises(ValueError, match="levels is 0; use at least 1"):
        NoiseLevels(0, lambda kept, gone: None)


def test_timesteps_that_rise_in_a_run_are_in_its_order() -> None:
    levels = NoiseLevels(8, lambda kept, gone: None, is_rising=None)
    for value in (0.0, 0.0, 12.0, 25.0):
        levels.find(value)
    assert [value for _, value in levels.in_order()] == [0.0, 12.0, 25.0]


def test_a_long_run_keeps_few_levels_and_all_rows_count() -> None:
    layer, observer = nn.Sequential(nn.Linear(8, 4)), CalibrationObserver(levels=3, rows=12)
    inputs = drawn(10, 5, 8)
    with observer.attach(layer):
        for step, x in enumerate(inputs):
            with step_scope(StepContext(1, step, 10, 1 - step / 10, 0.0, "cond")):
                layer(x)
    found = observer.calibration().layers["0"]
    assert len(found.branches) == 3
    assert int(found.count.sum()) == 50
    first = 0
    for index, count in enumerate(found.count.tolist()):  # levels are runs of neighbouring steps
        seen = inputs.flatten(0, 1)[first : first + count]
        first += count
        assert torch.equal(found.amax[index], seen.abs().amax(0))
        assert torch.allclose(found.mean_square[index], seen.square().mean(0))
        rows = found.rows[found.row_bins == index].float()
        assert len(rows) == 4
        assert all((seen.bfloat16().float() == row).all(1).any() for row in rows)


def test_rows_are_a_fair_sample_of_all_calls() -> None:
    running = RunningStatistics("layer", 1, rows=400)
    for call in range(20):
        running.add(0, "all", torch.full((100, 1), float(call)))
    counts = torch.bincount(running.result([(0, 0.5)]).rows.flatten().long(), minlength=20)
    assert int(counts.sum()) == 400
    assert 8 <= int(counts.min()) <= int(counts.max()) <= 36  # 20 each on average, 4.2 the standard deviation


def test_the_gram_matrix_weighs_calls_alike() -> None:
    running = RunningStatistics("layer", 5, rows=0, gram=True)
    calls = [drawn(30, 5), 100 * drawn(20, 5, seed=1)]
    for number, x in enumerate(calls):
        running.add(number, "all", x)
    found = running.result([(0, 0.9), (1, 0.1)])
    assert found.gram is not None
    expected = sum(x.mT @ x * 5 / x.square().sum() for x in calls) / 2
    assert torch.allclose(found.gram, expected, atol=1e-5)
    assert len(found.rows) == 0


@pytest.mark.parametrize("gram", [False, True])
def test_second_moments_keep_what_is_correlated_only(gram: bool) -> None:
    size, tokens = 48, 64
    scale = drawn(size).exp()

    def moments(x: Tensor) -> tuple[Tensor, LayerStatistics]:
        running = RunningStatistics("layer", size, rows=tokens, gram=gram)
        running.add(0, "all", x)
        found = running.result([(0, 0.5)])
        return found.second_moments(), found

    independent, found = moments(drawn(tokens, size, seed=1) * scale)
    diagonal = found.mean_square[0] / found.mean_square[0].mean()
    assert torch.allclose(independent.diagonal(), diagonal, rtol=1e-4)
    beside = (independent - independent.diagonal().diag()).norm() / independent.norm()
    assert beside < 0.15
    mixed = (drawn(tokens, 3, seed=1) @ drawn(3, size, seed=2) + 0.1 * drawn(tokens, size, seed=3)) * scale
    correlated, found = moments(mixed)
    truth = mixed.mT @ mixed / tokens / found.mean_square[0].mean()
    assert (correlated - truth).norm() < 0.1 * truth.norm()
    for one in (independent, correlated):
        assert torch.linalg.eigvalsh(one.double()).min() > 0


def test_second_moments_need_something() -> None:
    running = RunningStatistics("layer", 4, rows=0)
    running.add(0, "all", drawn(3, 4))
    with pytest.raises(ValueError, match="neither rows nor a Gram matrix"):
        running.result([(0, 0.5)]).second_moments()


# ----------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Calibration]:
    pipe, arguments = call_of("class_dit")
    return pipe, calibrate(pipe, [1, 2], rows=16, gram=True, **arguments)


def same(one: LayerStatistics, other: LayerStatistics) -> bool:
    tensors = ("sigmas", "amax", "mean_square", "count", "rows", "row_bins", "gram")
    values = [(getattr(one, name), getattr(other, name)) for name in tensors]
    plain = (one.branches, one.siblings) == (other.branches, other.siblings)
    return plain and all(a is b is None or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in values)


def test_a_calibration_comes_back(measured: tuple[Any, Calibration], tmp_path: Path) -> None:
    pipe, calibration = measured
    path = tmp_path / "statistics.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert (loaded.header, loaded.axis, loaded.unseen) == (calibration.header, calibration.axis, calibration.unseen)
    assert list(loaded.layers) == list(calibration.layers)
    assert all(same(one, loaded.layers[name]) for name, one in calibration.layers.items())
    query, key = (loaded.layers[f"transformer_blocks.0.attn.to_{one}"] for one in "qk")
    assert query.amax is key.amax  # in the file once
    loaded.check(pipe.transformer, pipe.scheduler)
    loaded.check(pipe.transformer)


def test_a_foreign_network_is_refused(measured: tuple[Any, Calibration]) -> None:
    pipe, calibration = measured
    other = tiny_transformer("class_dit", seed=1)
    with pytest.raises(ArtifactError, match="other weights of this architecture"):
        calibration.check(other)
    calibration.check(other, any_weights=True)
    with pytest.raises(ArtifactError, match="another architecture"):
        calibration.check(tiny_transformer("pixart"), any_weights=True)
    with pytest.raises(ArtifactError, match="another scheduler"):
        calibration.check(pipe.transformer, tiny_pipeline("flux").scheduler)


def rewritten(path: Path, to: Path, tensors: dict[str, Tensor | None], change: Any = None) -> Path:
    """Write a file anew with some tensors and the data changed."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept = {name: one for name, one in {**kept, **tensors}.items() if one is not None}
    if change is not None:
        data = json.loads(metadata["data"])
        change(data)
        metadata["data"] = json.dumps(data)
    save_file(kept, to, metadata)
    return to


def _broken() -> dict[str, tuple[dict[str, Tensor | None], Any, str]]:
    return {
        "nan": ({"0.amax": torch.full((8, 256), math.nan)}, None, "values in 0.amax that are NaN"),
        "negative": ({"0.amax": -torch.ones(8, 256)}, None, "amax in the statistics of .* is negative"),
        "missing": ({"0.amax": None}, None, "input 0 has no amax"),
        "dtype": ({"0.amax": torch.ones(8, 256, dtype=torch.float64)}, None, "amax of input 0 is torch.float64"),
        "axes": ({"0.amax": torch.ones(8)}, None, r"amax of input 0 has the shape \(8,\)"),
        "shape": ({"0.mean_square": torch.ones(8, 255)}, None, r"mean_square in .* is \(8, 255\), expected"),
        "gram": ({"0.gram": torch.ones(3, 3)}, None, r"gram in .* is \(3, 3\), expected"),
        "bins": ({}, lambda data: data["inputs"][0]["branches"].pop(), "expected"),
        "count": ({"0.count": torch.zeros(8, dtype=torch.int64)}, None, "count in .* is 0, expected at least 1"),
        "rows": ({"0.row_bins": torch.full((16,), 99)}, None, "row_bins in .* names bins outside of 0 to 7"),
        "axis": ({}, lambda data: data.update(axis="weather"), "axis is 'weather'"),
        "twice": ({}, lambda data: data["inputs"].append(data["inputs"][0]), "has no amax|occurs twice"),
        "no list": ({}, lambda data: data.update(inputs=5), "no statistics that can be read"),
        "no names": ({}, lambda data: data["inputs"][0].update(layers=7), "no statistics that can be read"),
        "nothing": ({}, lambda data: data.update(inputs=[]), "0 layers are described"),
        "sigma": ({}, lambda data: data["inputs"][0].update(sigmas=["high"] * 8), "no statistics that can be read"),
    }


@pytest.mark.parametrize("case", list(_broken()))
def test_damaged_files_are_refused(case: str, measured: tuple[Any, Calibration], tmp_path: Path) -> None:
    tensors, change, message = _broken()[case]
    _, calibration = measured
    calibration.save(tmp_path / "good.safetensors")
    path = rewritten(tmp_path / "good.safetensors", tmp_path / "bad.safetensors", tensors, change)
    with pytest.raises(ArtifactError, match=message):
        Calibration.load(path)


def test_other_artifacts_and_no_file_are_refused(tmp_path: Path, measured: tuple[Any, Calibration]) -> None:
    from dit.attention.plan import AttentionPlan

    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none.safetensors")
    pipe, _ = measured
    plan = AttentionPlan.uniform("dense").for_model(pipe.transformer, (1, 2, 2))
    plan.save(tmp_path / "plan.safetensors")
    with pytest.raises(ArtifactError, match="is a 'attention_plan', expected a 'quantization_statistics'"):
        Calibration.load(tmp_path / "plan.safetensors")


def test_merging_levels_equals_measuring_fewer(measured: tuple[Any, Calibration]) -> None:
    _, calibration = measured
    name = "transformer_blocks.0.ff.net.2"
    before, merged = calibration.layers[name], calibration.merged(2)
    after = merged.layers[name]
    assert after.branches == ("cond", "uncond", "cond", "uncond")
    means = [float(part.mean()) for part in before.sigmas.chunk(2)]
    assert after.sigmas.tolist() == pytest.approx([means[0], means[0], means[1], means[1]])
    assert merged.header.sigma_bins == pytest.approx([sum(means) / 2])
    for index in range(4):
        of = [i for i in range(8) if i // 4 == index // 2 and before.branches[i] == after.branches[index]]
        assert torch.equal(after.amax[index], before.amax[of].amax(0))
        weights = before.count[of].float()
        assert torch.allclose(after.mean_square[index], weights @ before.mean_square[of] / weights.sum())
        assert int(after.count[index]) == int(weights.sum())
        expected = before.rows[torch.isin(before.row_bins, torch.tensor(of))]
        assert torch.equal(after.rows[after.row_bins == index], expected)
    assert after.siblings == before.siblings
    assert len(calibration.merged(99).layers[name].branches) == 8
    query, key = (merged.layers[f"transformer_blocks.0.attn.to_{one}"] for one in "qk")
    assert query.amax is key.amax
    with pytest.raises(ValueError, match="bins is 0; use at least 1"):
        calibration.merged(0)


# ------------------------------------------------------------------------------ without data


@pytest.mark.parametrize("name", ["class_dit", "text_dit", "flux", "sd3", "wan", "mvdit", "pixart", "ltx"])
def test_a_network_alone_is_calibrated(name: str) -> None:
    model = tiny_transformer(name)
    found = data_free_calibration(model, levels=3, batch=2, rows=24)
    assert found.unseen == ()
    assert found.axis == "timestep"
    assert min(found.header.grid) >= 1
    statistics = max(found.layers.values(), key=lambda one: int(one.count.sum()))
    assert statistics.sigmas.tolist() == pytest.approx([1000 * 5 / 6, 500.0, 1000 / 6])
    assert statistics.branches == ("cond",) * 3
    assert len(statistics.rows) == 24
    found.check(model)
    again = data_free_calibration(model, levels=3, batch=2, rows=24)
    assert all(torch.equal(one.amax, again.layers[layer].amax) for layer, one in found.layers.items())


def test_a_network_that_is_not_understood_says_why_and_takes_inputs() -> None:
    model = tiny_transformer("cogvideox")
    with pytest.raises(ValueError, match=r"CogVideoXTransformer3DModel can't be calibrated without.*Tried: images"):
        data_free_calibration(model, levels=1)
    with pytest.raises(ValueError, match="which timesteps Sequential takes is not known"):
        data_free_calibration(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="levels is 0"):
        data_free_calibration(model, levels=0)
    model = tiny_transformer("class_dit")

    def inputs(batch: int, generator: torch.Generator) -> dict[str, Any]:
        latents = torch.randn(batch, 4, 4, 4, generator=generator)
        return {"hidden_states": latents, "class_labels": torch.tensor([3] * batch)}

    found = data_free_calibration(model, levels=2, batch=2, inputs=inputs)
    assert found.unseen == ()
