import copy
import json

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import save_file

import pipelines
from dit.runtime.artifacts import (
    ArtifactError,
    ArtifactHeader,
    model_fingerprint,
    read_artifact,
    scheduler_fingerprint,
    write_artifact,
)
from dit.runtime.attachment import AttachError, Attachment, Mechanism, attachments
from dit.runtime.coordinates import current_coordinates
from dit.runtime.demonstration import AttentionNorms
from dit.runtime.families import family_of
from dit.runtime.stages import Stage
from sampling.observe import Observer, observe
from sampling.resolve import CoordinateResolver
from tests.families.tiny import TINY_NAMES, tiny_pipeline
from tests.pipes.tiny import tiny_components
from tests.runtime.truth import guided_call


class Energy(Mechanism):
    """Streams the mean square of each attention output by branch over all runs."""

    name = "energy"
    stage = Stage.OBSERVER

    def __init__(self) -> None:
        self.total, self.seen, self.events = {}, {}, []

    def install(self, attachment: Attachment) -> None:
        for layer in attachment.layers():
            attachment.after(layer.module, self.add)

    def add(self, module, args, kwargs, output) -> None:
        here = current_coordinates()
        picture = output[0] if isinstance(output, tuple) else output
        self.total[here.branch] = self.total.get(here.branch, 0.0) + picture.square().mean().item()
        self.seen[here.branch] = self.seen.get(here.branch, 0) + 1

    def begin(self, prompt) -> None:
        self.events.append(("begin", prompt))

    def end(self, prompt) -> None:
        self.events.append(("end", prompt))


@pytest.mark.parametrize("name", TINY_NAMES)
def test_one_pass_serves_all_observers_of_every_family(name: str) -> None:
    pipe = tiny_pipeline(name)
    arguments = guided_call(pipe, name, guided=True)
    for unwanted in ("generator", "output_type"):
        arguments.pop(unwanted)
    prompt = arguments.pop("prompt", None) or arguments.pop("class_labels")
    energy, norms = Energy(), AttentionNorms()
    assert isinstance(energy, Observer)
    found = observe(pipe, [prompt, prompt, prompt], [energy, norms], **arguments)
    assert found.prompts == 3
    assert found.coordinates["inactive"] == {}
    assert set(found.reports) == {"energy", "attention_norms"}
    layers = len(family_of(pipe.transformer).attention_layers(pipe.transformer))
    assert set(energy.seen.values()) == {layers * 4 * 3}
    assert len(found.reports["attention_norms"]["norms"]) == layers
    assert energy.events == [(event, prompt) for _ in range(3) for event in ("begin", "end")]
    assert min(found.header.grid) >= 1
    assert len(found.header.sigma_bins) == 3
    assert attachments(pipe) == []


def test_a_pass_is_the_same_twice_and_prompts_have_their_own_noise() -> None:
    pipe = tiny_pipeline("text_dit")
    results = []
    for _ in range(2):
        energy = Energy()
        observe(pipe, ["a cat", "a cat"], [energy], num_inference_steps=2, seed=3)
        results.append(energy.total)
    assert results[0] == results[1]
    energy = Energy()
    observe(pipe, ["a cat"], [energy], num_inference_steps=2, seed=3)
    assert 2 * energy.total["all"] != results[0]["all"]


def test_public_name() -> None:
    assert pipelines.observe is observe


def test_an_error_detaches_everything() -> None:
    pipe = tiny_pipeline("text_dit")
    with pytest.raises(ValueError, match="num_inference_steps"):
        observe(pipe, ["a cat"], [AttentionNorms()], num_inference_steps=0)
    assert attachments(pipe) == []
    with pytest.raises(AttachError, match="already has a mechanism of this name"):
        observe(pipe, ["a cat"], [AttentionNorms(), AttentionNorms()], num_inference_steps=2)
    assert attachments(pipe) == []
    for prompts, observers in (([], [AttentionNorms()]), (["a"], []), ("a", [AttentionNorms()])):
        with pytest.raises(ValueError, match="at least one prompt, and at least one observer"):
            observe(pipe, prompts, observers)


def test_the_callers_resolver_stays() -> None:
    pipe = tiny_pipeline("flux")
    with CoordinateResolver().attach(pipe) as own:
        arguments = guided_call(pipe, "flux", guided=False)
        prompt = arguments.pop("prompt")
        found = observe(pipe, [prompt], [AttentionNorms()], **arguments)
        assert own.is_attached
        assert found.coordinates["found"] == {"scheduler": 4}


# ----------------------------------------------------------------------- artifacts


@pytest.fixture
def header() -> ArtifactHeader:
    parts = tiny_components()
    return ArtifactHeader.of("plan", parts["transformer"], parts["scheduler"], (1, 2, 2), (0.9, 0.5, 0.1))


def test_artifacts_come_back(tmp_path, header: ArtifactHeader) -> None:
    path = tmp_path / "plan.safetensors"
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4)[::2]}
    write_artifact(path, header, tensors, data={"threshold": 0.25})
    read, loaded, data = read_artifact(path)
    assert read == header
    assert data == {"threshold": 0.25}
    assert set(loaded) == {"a", "b"}
    assert all(torch.equal(loaded[name], tensors[name]) for name in loaded)


def test_what_is_no_artifact_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no artifact at"):
        read_artifact(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ArtifactError, match="is no safetensors file"):
        read_artifact(tmp_path / "text.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "old.safetensors", {"format": "tessera-artifact-0"})
    with pytest.raises(ArtifactError, match="has the format 'tessera-artifact-0', expected 'tessera-artifact-1'"):
        read_artifact(tmp_path / "old.safetensors")


@pytest.mark.parametrize(
    "spoilt",
    [
        {"header": "[" * 100_000},
        {"header": "[1]"},
        {"header": "{}"},
        {"header": None},
        {"data": "{"},
        {"data": None},
        {"header": {"grid": 5}},
        {"header": {"grid": ["a", 1, 2]}},
        {"header": {"sigma_bins": ["high"]}},
        {"header": {"kind": 5}},
        {"header": {"surprise": 1}},
    ],
)
def test_damaged_headers_are_refused(spoilt, tmp_path, header: ArtifactHeader) -> None:
    path = tmp_path / "plan.safetensors"
    write_artifact(path, header, {"a": torch.ones(2)})
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    for name, value in spoilt.items():
        metadata.pop(name) if value is None else None
        if isinstance(value, dict):
            metadata[name] = json.dumps({**json.loads(metadata[name]), **value})
        elif value is not None:
            metadata[name] = value
    save_file({"a": torch.ones(2)}, path, metadata)
    with pytest.raises(ArtifactError, match="header that can't be read"):
        read_artifact(path)


def test_values_that_are_not_finite_are_refused(tmp_path, header: ArtifactHeader) -> None:
    write_artifact(tmp_path / "plan.safetensors", header, {"a": torch.tensor([1.0, torch.nan])})
    with pytest.raises(ArtifactError, match="values in a that are NaN"):
        read_artifact(tmp_path / "plan.safetensors")


def test_foreign_artifacts_are_refused_with_every_reason(header: ArtifactHeader) -> None:
    def here(kind="plan", model=None, scheduler=None, grid=(1, 2, 2)) -> ArtifactHeader:
        parts = tiny_components()
        return ArtifactHeader.of(
            kind, model or parts["transformer"], scheduler or parts["scheduler"], grid, header.sigma_bins
        )

    header.check(here())
    with pytest.raises(ArtifactError, match=r"it is a 'plan', expected a 'profile'; .* here are \(1, 4, 4\)"):
        header.check(here(kind="profile", grid=(1, 4, 4)))
    header.check(here(grid=(1, 4, 4)), any_grid=True)
    with pytest.raises(ArtifactError, match="another architecture"):
        header.check(here(model=tiny_pipeline("flux").transformer), any_weights=True)
    other = tiny_components(seed=1)["transformer"]
    with pytest.raises(ArtifactError, match="other weights of this architecture"):
        header.check(here(model=other))
    header.check(here(model=other), any_weights=True)
    with pytest.raises(ArtifactError, match="another scheduler"):
        header.check(here(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)))


def test_fingerprints_look_through_adapters_precision_and_compilation() -> None:
    model = tiny_components()["transformer"]
    plain = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == plain
    assert model_fingerprint(torch.compile(model)) == plain
    adapted = copy.deepcopy(model)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), adapted)
    assert model_fingerprint(adapted) == plain
    with torch.no_grad():
        model.transformer_blocks[1].ff.parameters().__next__().add_(1.0)
    changed = model_fingerprint(model)
    assert changed[0] == plain[0]
    assert changed[1] != plain[1]
    with pytest.raises(ValueError, match="is not in memory"):
        model_fingerprint(model.to("meta"))


def test_scheduler_fingerprint_sees_class_and_configuration() -> None:
    made = [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    ]
    assert len({scheduler_fingerprint(scheduler) for scheduler in made}) == 3
    again = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    again.set_timesteps(7)
    assert scheduler_fingerprint(again) == scheduler_fingerprint(made[0])


def test_bins_are_found_by_noise_level(header: ArtifactHeader) -> None:
    assert [header.bin_of(sigma) for sigma in (1.0, 0.95, 0.9, 0.6, 0.5, 0.2, 0.05)] == [0, 0, 0, 1, 1, 2, 3]
    with pytest.raises(ValueError, match="must fall strictly"):
        ArtifactHeader.of(
            "plan", tiny_components()["transformer"], tiny_components()["scheduler"], (1, 1, 1), (0.1, 0.5)
        )
    assert json.loads(json.dumps(header.sigma_bins)) == [0.9, 0.5, 0.1]


@pytest.mark.parametrize("name", ["dit", "class_dit"])
def test_class_labels_may_be_numbers(name: str) -> None:
    """DiTPipeline of diffusers takes lists only."""
    pipe, seen = tiny_pipeline(name), []
    for labels in ([1, 2], [[1], [2]]):
        energy = Energy()
        assert observe(pipe, labels, [energy], num_inference_steps=2).prompts == 2
        seen.append(energy.total)
    assert seen[0] == seen[1]
    assert seen[0]
