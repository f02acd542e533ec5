"""The rows against the modules of the real networks, wrapped and not; and networks that have no row."""

import re
from dataclasses import replace

import diffusers
import peft
import pytest
import torch
from torch import nn

import pipelines
from dit.runtime.families import FAMILIES, Family, family, family_of, is_attention
from dit.runtime.state import named_layers
from tests.families.bare import BARE_NAMES, bare_inputs
from tests.families.networks import tiny_transformer
from tests.families.record import recorded

ROWS = pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    return dict(named_layers(model))


def test_names_are_unique() -> None:
    for names in ([row.name for row in FAMILIES], [(row.package, row.transformer) for row in FAMILIES]):
        assert len(set(names)) == len(names)


def test_the_table_is_complete() -> None:
    wanted = (
        "flux flux2 sd3 pixart dit sana lumina2 qwen_image z_image hunyuan_dit wan hunyuan_video cogvideox mochi ltx"
    )
    own = ("text_dit", "class_dit", *BARE_NAMES)
    assert {*wanted.split(), "latte", *own} == {row.name for row in FAMILIES}


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'fluxx'.*flux, flux2"):
        family("fluxx")


OPTIONAL_PARTS = {"text_dit": {"space_time": "factorised", "clip_conditioning": True}}
"""Arguments that give a network the layers which its row names, and which the tiny one is without."""


@ROWS
class TestRow:
    def test_finds_its_model(self, row: Family) -> None:
        assert family_of(tiny_transformer(row)) is row
        assert family(row.name) is row

    def test_subclasses_belong_to_it(self, row: Family) -> None:
        model = tiny_transformer(row)
        model.__class__ = type("Subclass", (type(model),), {})
        assert family_of(model) is row

    def test_pipelines_take_this_transformer(self, row: Family) -> None:
        assert bool(row.pipelines) != (row.name in BARE_NAMES)
        for listed in row.pipelines:
            cls = getattr(pipelines, listed.name) if row.package != "diffusers" else getattr(diffusers, listed.name)
            annotation = str(cls.__init__.__annotations__["transformer"])
            assert row.transformer in annotation or row.package != "diffusers", annotation

    def test_tiny_transformer_is_small_and_reproducible(self, row: Family) -> None:
        before = torch.random.get_rng_state()
        one, two, other = tiny_transformer(row), tiny_transformer(row), tiny_transformer(row, seed=1)
        assert torch.equal(before, torch.random.get_rng_state())
        assert sum(p.numel() for p in one.parameters()) < 500_000
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert all(parameter.any() for parameter in one.parameters())

    def test_every_attention_layer_has_one_kind(self, row: Family) -> None:
        model = tiny_transformer(row)
        found = [name for name, module in modules_of(model).items() if is_attention(module)]
        assert sorted(found) == sorted(layer.name for layer in row.attention_layers(model))
        for name in found:
            assert sum(bool(re.fullmatch(entry.pattern, name)) for entry in row.attention) == 1

    def test_nothing_matches_nothing(self, row: Family) -> None:
        model = tiny_transformer(row)
        modules = {**modules_of(model), **modules_of(tiny_transformer(row, **OPTIONAL_PARTS.get(row.name, {})))}
        for entry in row.attention:
            assert any(re.fullmatch(entry.pattern, name) for name in modules), entry
        for entry in row.block_lists:
            assert isinstance(modules[entry.path], nn.ModuleList)
            assert len(modules[entry.path]) >= 1
        for pattern in row.skip:
            owned = [m for name, m in modules.items() if re.match(rf"(?:{pattern})(?:\.|$)", name)]
            assert any(any(True for _ in m.parameters()) for m in owned) or "norm" in pattern, pattern
        for pattern in row.modulation:
            assert all(isinstance(modules[n], nn.Linear) for n in modules if re.fullmatch(pattern, n))
            assert any(re.fullmatch(pattern, name) for name in modules), pattern
        targets = row.lora_target_names(model)
        for ending in row.lora_targets:
            assert any(name == ending or name.endswith("." + ending) for name in targets), ending

    def test_blocks_are_all_in_order(self, row: Family) -> None:
        model = tiny_transformer(row)
        names = [name for name, _ in row.blocks(model)]
        modules = modules_of(model)
        assert len(names) == len(set(names)) == sum(len(modules[entry.path]) for entry in row.block_lists)
        trunk = [name for name, _ in row.blocks(model, refiners=False)]
        refined = [entry.path for entry in row.block_lists if entry.refiner]
        assert trunk == [name for name in names if not name.startswith(tuple(refined) or "-")]
        assert trunk

    def test_precision_sensitive_layers_are_not_in_the_blocks(self, row: Family) -> None:
        model = tiny_transformer(row)
        for layer in row.attention_layers(model):
            refiner = row.name == "hunyuan_video" and layer.kind == "text"
            assert row.skips(layer.name + ".to_q") == refiner
        assert not row.skips("nowhere.at.all")

    def test_peft_does_not_hide_it(self, row: Family) -> None:
        plain = tiny_transformer(row)
        config = peft.LoraConfig(r=2, target_modules=row.lora_target_names(plain))
        wrapped = peft.get_peft_model(tiny_transformer(row), config)
        assert family_of(wrapped) is row
        self.assert_same(row, plain, wrapped)
        assert row.lora_target_names(wrapped) == row.lora_target_names(plain)

    def test_compiling_does_not_hide_it(self, row: Family) -> None:
        plain = tiny_transformer(row)
        compiled = torch.compile(tiny_transformer(row), backend="eager")
        assert family_of(compiled) is row
        self.assert_same(row, plain, compiled)

    @staticmethod
    def assert_same(row: Family, plain: nn.Module, wrapped: nn.Module) -> None:
        layers = [(layer.name, layer.kind, layer.axes) for layer in row.attention_layers(plain)]
        assert [(layer.name, layer.kind, layer.axes) for layer in row.attention_layers(wrapped)] == layers
        assert [name for name, _ in row.blocks(wrapped)] == [name for name, _ in row.blocks(plain)]
        assert [group.producers for group in row.folds(wrapped)] == [group.producers for group in row.folds(plain)]


# Equal numbers of heads, so that values and outputs of attention have one width.
UNGROUPED = {"lumina2": {"num_kv_heads": 2}}


def _cases() -> list[tuple[Family, dict, dict]]:
    """Rows with configurations and inputs under which each of their folds exists."""
    picture = {"image_dim": 16, "added_kv_proj_dim": 24}
    states = {"encoder_hidden_states": torch.randn(1, 512, 16), "encoder_hidden_states_image": torch.randn(1, 7, 16)}
    cases = [(row, UNGROUPED.get(row.name, {}), {}) for row in FAMILIES]
    return [
        *cases,
        (family("wan"), picture, states),
        (family("space_time_dit"), {"arrangement": "temporal_first"}, {}),
    ]


@pytest.mark.parametrize(("row", "overrides", "changed"), [pytest.param(*case, id=case[0].name) for case in _cases()])
def test_folding_leaves_the_result(row: Family, overrides: dict, changed: dict) -> None:
    """Each group is exact, and scaling only its consumers is not."""
    called = bare_inputs(row.name) if row.name in BARE_NAMES else recorded(row.name)[1][0].inputs
    inputs = _double({**called, **changed})
    model = tiny_transformer(row, **overrides).double()
    modules = modules_of(model)
    with torch.no_grad():
        before = _output(model(**inputs))
        for fold in row.fold:
            effects, errors = [], []
            for group in replace(row, fold=(fold,)).folds(model):
                scale = torch.rand(group.width, dtype=torch.float64) + 0.5
                for name in group.consumers:
                    modules[name].weight.mul_(scale)
                effects.append(_distance(model(**inputs), before))
                for name in group.consumers:
                    modules[name].weight.div_(scale)
                group.apply(modules, scale)
                errors.append(_distance(model(**inputs), before))
            if effects:
                assert max(effects) > 5e-5, fold
                assert max(errors) < 1e-3 * max(effects), fold  # some norms calculate in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in FAMILIES if row.fold])
def test_a_rescaling_is_undone_to_the_last_bit(row: Family, dtype: torch.dtype) -> None:
    """Groups share layers, and dividing by the scale again would not give back the bits."""
    model = tiny_transformer(row, **UNGROUPED.get(row.name, {})).to(dtype)
    modules, parameters = modules_of(model), dict(model.named_parameters())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    groups = row.folds(model)
    rescalings = [group.apply(modules, torch.rand(group.width, generator=generator) + 0.5) for group in groups]
    assert [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    for rescaling in reversed(rescalings):
        rescaling.undo()
        rescaling.undo()  # does nothing
        assert rescaling.nbytes == 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(found is parameters[name] for name, found in model.named_parameters())


def test_a_rescaling_is_not_undone_under_a_later_change() -> None:
    row = family("sd3")
    model = tiny_transformer(row)
    modules, group = modules_of(model), row.folds(model)[0]
    weight = modules[group.consumers[0]].weight
    original = weight.clone()
    first = group.apply(modules, torch.full((group.width,), 3.0))
    second = group.apply(modules, torch.full((group.width,), 7.0))
    rescaled = weight.clone()
    with pytest.raises(ValueError, match=re.escape(group.producers[0].name)):
        first.undo()
    assert torch.equal(weight, rescaled)
    second.undo()
    first.undo()
    assert torch.equal(weight, original)


def test_a_rescaling_is_undone_after_a_conversion() -> None:
    row = family("sd3")
    model, expected = tiny_transformer(row), tiny_transformer(row).half()
    group = row.folds(model)[0]
    rescaling = group.apply(modules_of(model), torch.full((group.width,), 3.0))
    model.half()
    rescaling.undo()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters(), strict=True))


def test_every_fold_exists_somewhere() -> None:
    found: dict[str, set] = {row.name: set() for row in FAMILIES}
    for row, overrides, _ in _cases():
        model = tiny_transformer(row, **overrides)
        found[row.name] |= {fold for fold in row.fold if replace(row, fold=(fold,)).folds(model)}
    assert found == {row.name: set(row.fold) for row in FAMILIES}


def test_folding_refuses_adapters() -> None:
    row = family("sd3")
    model = tiny_transformer(row)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["attn.to_q"]))
    with pytest.raises(ValueError, match=r"attn\.to_q has an adapter"):
        row.folds(model)[0].apply(modules_of(model), torch.ones(row.folds(model)[0].width))


def test_folding_refuses_a_wrong_scale() -> None:
    row = family("sd3")
    model = tiny_transformer(row)
    group = row.folds(model)[0]
    with pytest.raises(ValueError, match="positive and of shape"):
        group.apply(modules_of(model), torch.ones(group.width + 1))
    with pytest.raises(ValueError, match="positive and of shape"):
        group.apply(modules_of(model), torch.zeros(group.width))


def _double(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_double(item) for item in value)
    return value


def _distance(output: object, expected: torch.Tensor) -> float:
    return float((_output(output) - expected).abs().max())


def _output(output: object) -> torch.Tensor:
    sample = output[0]
    return torch.stack(list(sample)) if isinstance(sample, list) else sample
