import ast
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import dit.runtime
from dit.runtime import demonstration
from dit.runtime.attachment import AttachError, Attachment, Mechanism, attachments
from dit.runtime.coordinates import Coordinates, coordinates_scope
from dit.runtime.demonstration import AttentionNorms
from dit.runtime.families import FAMILIES, family_of
from dit.runtime.stages import Resource, Stage
from sampling.resolve import CoordinateResolver
from tests.families.tiny import TINY_NAMES, VARIANTS, tiny_pipeline
from tests.pipes.tiny import tiny_components
from tests.runtime.truth import guided_call


class Scale(Mechanism):
    """Multiplies the first block's output and wraps its forward: a change that must vanish without a trace."""

    def __init__(self, name: str, stage: Stage, factor: float, exclusive: frozenset[Resource] = frozenset()) -> None:
        self.name, self.stage, self.factor, self.exclusive = name, stage, factor, exclusive
        self.seen: list[float] = []

    def install(self, attachment: Attachment) -> None:
        block = family_of(attachment.models["transformer"]).blocks(attachment.models["transformer"])[0][1]
        attachment.around(block, self.scaled)
        attachment.after(block, lambda module, args, kwargs, output: self.seen.append(output.mean().item()))

    def scaled(self, forward, *args, **kwargs):
        return forward(*args, **kwargs) * self.factor + self.stage


class Nothing(Mechanism):
    name = "nothing"

    def install(self, attachment: Attachment) -> None:
        pass


@pytest.fixture
def model() -> nn.Module:
    return tiny_components()["transformer"]


def run(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 3, 16, generator=generator)
    with torch.no_grad():
        return model(latents, text, torch.tensor([500.0]))[0]


def traces(model: nn.Module) -> list[tuple]:
    return [(name, sorted(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
            for name, part in model.named_modules()]  # fmt: skip


# -------------------------------------------------------------------- demonstration


def test_demonstration_is_short_and_names_no_family() -> None:
    source = Path(demonstration.__file__).read_text()
    assert len(source.splitlines()) < 60
    words = {row.transformer for row in FAMILIES} | {usual.name for row in FAMILIES for usual in row.pipelines}
    assert not [word for word in words if word in source]
    imported = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if "diffusers" in name or "families" in name]


@pytest.mark.parametrize("name", [*TINY_NAMES, *VARIANTS])
def test_demonstration_attaches_to_every_family(name: str) -> None:
    pipe = tiny_pipeline(name)
    arguments = guided_call(pipe, name, guided=True)

    def paint() -> torch.Tensor:
        return torch.as_tensor(pipe(**{**arguments, "generator": torch.Generator().manual_seed(5)})[0])

    before, clean = paint(), traces(pipe.transformer)
    with CoordinateResolver().attach(pipe) as coordinates, AttentionNorms().attach(pipe) as norms:
        assert torch.equal(paint(), before), "watching changed the picture"
        report = norms.report()
        assert report["beside"] == ["coordinates"]
        assert coordinates.report()["beside"] == ["attention_norms"]
    layers = family_of(pipe.transformer).attention_layers(pipe.transformer)
    assert list(report["norms"]) == [layer.name for layer in layers]
    steps = arguments["num_inference_steps"]
    branches = {"batched": {"all"}, "none": {"cond"}, "two_calls": {"cond", "uncond"}}
    for recorded in report["norms"].values():
        assert set(recorded) == branches[family_of(pipe.transformer).branches(pipe).kind]
        for values in recorded.values():
            assert len(values) == steps
            assert all(0 < value < float("inf") for value in values)
    assert report["inactive"] == {}
    assert report["places"] == len(layers)
    assert report["calls"] == len(layers) * steps * len(recorded)
    assert traces(pipe.transformer) == clean
    assert torch.equal(paint(), before), "detaching left something behind"


def test_recorded_norm_is_that_of_the_output(model: nn.Module) -> None:
    kept = []
    model.transformer_blocks[1].attn.register_forward_hook(lambda module, args, output: kept.append(output))
    with AttentionNorms().attach(model) as attachment, coordinates_scope(Coordinates(1, 2, 3, 0.5, 500.0, "cond")):
        run(model)
        norms = attachment.report()["norms"]["transformer_blocks.1.attn"]["cond"]
    assert norms[2] == pytest.approx(kept[0].square().mean().sqrt().item())
    assert norms[0] != norms[0], "a step that did not come is NaN"


def test_without_coordinates_nothing_is_recorded_and_that_is_said(model: nn.Module) -> None:
    with AttentionNorms().attach(model) as attachment:
        run(model)
        report = attachment.report()
    assert report["norms"] == {}
    assert report["inactive"] == {"no coordinates": 2}


# ------------------------------------------------------------------------ the pile


def test_order_of_the_pile_whatever_the_order_of_attaching(model: nn.Module) -> None:
    plain = run(model)
    low, high = Scale("low", Stage.QUANTIZATION, 2.0), Scale("high", Stage.ATTENTION, 3.0)
    with low.attach(model), high.attach(model):
        expected = run(model)
    with high.attach(model), low.attach(model):
        assert [one.mechanism.name for one in attachments(model)] == ["low", "high"]
        assert torch.equal(run(model), expected)
    assert low.seen == high.seen, "both hooks see the finished output"
    assert not torch.equal(expected, plain)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("first_out", ["low", "middle", "high"])
def test_detach_in_any_order_is_exact(model: nn.Module, first_out: str) -> None:
    plain, clean = run(model), traces(model)
    mechanisms = {name: Scale(name, stage, 1.5) for name, stage in zip(("low", "middle", "high"), Stage, strict=False)}
    others = [mechanism for name, mechanism in mechanisms.items() if name != first_out]
    with others[0].attach(model), others[1].attach(model):
        expected = run(model)
    attached = {name: mechanism.attach(model) for name, mechanism in mechanisms.items()}
    attached[first_out].detach()
    assert torch.equal(run(model), expected)
    assert attached[first_out].report()["attached"] is False
    for attachment in attached.values():
        attachment.detach()
        attachment.detach()
    assert torch.equal(run(model), plain)
    assert traces(model) == clean


def test_equal_orders_keep_the_order_of_arrival(model: nn.Module) -> None:
    plain = run(model)
    first, second = Scale("first", Stage.CACHE, 2.0).attach(model), Scale("second", Stage.CACHE, 3.0).attach(model)
    first.detach()
    assert second.is_attached
    with Scale("third", Stage.CACHE, 1.0).attach(model):
        assert [one.mechanism.name for one in attachments(model)] == ["second", "third"]
    second.detach()
    assert torch.equal(run(model), plain)


def test_two_that_exclude_each_other(model: nn.Module) -> None:
    own = frozenset({Resource.ATTENTION_OUTPUT, Resource.STEP})
    clean = traces(model)
    with Scale("a", Stage.ATTENTION, 2.0, own).attach(model):
        with pytest.raises(AttachError, match=r"'b' and mechanism 'a' both need attention.output for themselves"):
            Scale("b", Stage.CACHE, 2.0, frozenset({Resource.ATTENTION_OUTPUT})).attach(model)
        with pytest.raises(AttachError, match="already has a mechanism of this name"):
            Scale("a", Stage.OTHER, 2.0).attach(model)
        assert [one.mechanism.name for one in attachments(model)] == ["a"]
    assert traces(model) == clean


@pytest.mark.parametrize(
    "wrong",
    [{"stage": 40}, {"order": 40}, {"exclusive": frozenset({"attention.outptu"})}],
    ids=lambda each: next(iter(each)),
)
def test_numbers_and_free_text_are_refused(model: nn.Module, wrong: dict) -> None:
    mechanism = Scale("a", Stage.CACHE, 2.0)
    vars(mechanism).update(wrong)
    with pytest.raises(TypeError, match=next(iter(wrong))):
        mechanism.attach(model)
    assert attachments(model) == []


def test_a_failed_attach_leaves_all_as_it_was(model: nn.Module) -> None:
    class Failing(Scale):
        def install(self, attachment):
            super().install(attachment)
            raise OSError("half way")

    with Scale("high", Stage.OBSERVER, 2.0).attach(model):
        before, clean = run(model), traces(model)
        with pytest.raises(OSError, match="half way"):
            Failing("low", Stage.CACHE, 5.0).attach(model)
        assert torch.equal(run(model), before)
        assert traces(model) == clean


def test_attaching_to_nothing_raises(model: nn.Module) -> None:
    with pytest.raises(AttachError, match="found nothing to attach to in TextDiT"):
        Nothing().attach(model)
    with pytest.raises(AttachError, match="expected a transformer, or a pipeline"):
        Nothing().attach("stickers")
    with pytest.raises(AttachError, match="no attention layer of kind cross in TextDiT"):
        _Crosses().attach(model)
    assert attachments(model) == []


class Doubled(Mechanism):
    """Doubles the first result of the networks that it is asked for."""

    def __init__(self, *components: str) -> None:
        self.name, self.components = "doubled", components

    def install(self, attachment: Attachment) -> None:
        for model in attachment.models.values():
            attachment.after(model, lambda module, args, kwargs, output: 2 * output[0])


def test_other_networks_of_a_pipeline_can_be_asked_for() -> None:
    pipe = tiny_pipeline("wan")
    tokens = torch.tensor([[1, 2, 3]])  # (B, N)
    clean = {name: traces(pipe.components[name]) for name in ("text_encoder", "vae", "transformer")}
    with torch.no_grad():
        text = pipe.text_encoder(tokens)[0]
        with Doubled("text_encoder", "vae").attach(pipe) as attachment:
            assert set(attachment.models) == {"text_encoder", "vae"}
            assert attachment.report()["networks"]["vae"] == type(pipe.vae).__name__
            assert torch.equal(pipe.text_encoder(tokens), 2 * text)
            assert attachments(pipe) == []
            assert attachments(pipe, ("vae",)) == [attachment]
            assert traces(pipe.transformer) == clean["transformer"]
            with pytest.raises(AttachError, match="doubled"):
                Doubled("vae").attach(pipe)
        assert torch.equal(pipe.text_encoder(tokens)[0], text)
    assert {name: traces(pipe.components[name]) for name in clean} == clean


@pytest.mark.parametrize("names", [("text_encoder_7",), ("vae", "scheduler"), ()])
def test_a_component_that_is_no_network_is_refused(names: tuple[str, ...]) -> None:
    pipe = tiny_pipeline("wan")
    with pytest.raises(AttachError, match=rf"{names[-1] if names else 'none were named'}.*vae, text_encoder"):
        Doubled(*names).attach(pipe)
    with pytest.raises(AttachError, match="expected a pipeline"):
        Doubled(*names).attach(pipe.transformer)


class _Crosses(Mechanism):
    name = "crosses"

    def install(self, attachment: Attachment) -> None:
        attachment.layers("cross")


def test_someone_else_wrapped_it_meanwhile(model: nn.Module) -> None:
    plain = run(model)
    attachment = Scale("a", Stage.CACHE, 2.0).attach(model)
    block = model.transformer_blocks[0]
    ours = block.forward
    block.forward = partial(ours)
    with pytest.raises(AttachError, match=r"someone else replaced TextDiTBlock\.forward meanwhile"):
        attachment.detach()
    assert attachment.is_attached
    block.forward = ours
    attachment.detach()
    assert torch.equal(run(model), plain)


def test_replaced_submodules_come_back(model: nn.Module) -> None:
    class Swap(Mechanism):
        name = "swap"

        def install(self, attachment):
            attention = attachment.layers()[0].module
            attachment.replace(attention, "to_q", nn.Linear(32, 32))

    plain, names = run(model), list(model.state_dict())
    old = model.transformer_blocks[0].attn.to_q
    with Swap().attach(model):
        assert not torch.equal(run(model), plain)
    assert model.transformer_blocks[0].attn.to_q is old
    assert list(model.state_dict()) == names
    assert torch.equal(run(model), plain)


def test_state_is_shared_counted_and_freed(model: nn.Module) -> None:
    one, two = AttentionNorms().attach(model), Scale("scale", Stage.CACHE, 1.0).attach(model)
    assert one.state is two.state
    with coordinates_scope(Coordinates(1, 0, 3, 0.5, 500.0)):
        run(model)
    assert one.report()["state_bytes"] == 2 * 3 * 4
    assert two.report()["state_bytes"] == 0
    one.detach()
    assert two.state.nbytes() == 0
    assert one.report()["state_bytes"] == 24, "the last report says how things stood"
    two.detach()


def test_two_networks_of_a_pipeline_are_told_apart() -> None:
    pipe = tiny_pipeline("wan")
    pipe.register_modules(transformer_2=tiny_pipeline("wan", seed=1).transformer)
    with AttentionNorms().attach(pipe) as attachment:
        report = attachment.report()
        names = [layer.name for layer in attachment.layers()]
    assert set(report["networks"]) == {"transformer", "transformer_2"}
    assert len(set(names)) == len(names)
    assert names[-1].startswith("transformer_2.")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_compiled_networks(how: str) -> None:
    """Code that was compiled before sees the mechanism come and go."""
    torch.compiler.reset()
    pipe = tiny_pipeline("flux")
    arguments = {**guided_call(pipe, "flux", guided=False), "output_type": "latent"}
    if how == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    elif how == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager")

    def paint() -> torch.Tensor:
        return pipe(**{**arguments, "generator": torch.Generator().manual_seed(0)})[0]

    before = paint()
    with CoordinateResolver().attach(pipe) as coordinates, AttentionNorms().attach(pipe) as norms:
        assert torch.equal(paint(), before)
        report = norms.report()
        assert coordinates.report()["found"] == {"scheduler": 4}
    assert report["inactive"] == {}
    assert report["calls"] == 4 * report["places"]
    assert all(len(recorded["cond"]) == 4 for recorded in report["norms"].values())
    assert torch.equal(paint(), before)
    assert norms.calls == report["calls"], "a detached mechanism is still called"


def test_public_names() -> None:
    assert dit.runtime.Attachment is Attachment
    assert dit.runtime.Coordinates is Coordinates
    assert dit.runtime.families.family_of is family_of
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dit.runtime.nonsense
