"""The canary: what we use of diffusers' private parts is still there, and nobody else touches them."""

import ast

import diffusers
import pytest
import torch
from diffusers.hooks import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig

from dit.models.dit import DiTBlock
from dit.models.text_dit import TextDiTBlock
from dit.runtime import diffusers_compat as compat
from tests.architecture.sources import ROOT, parse, python_files, where
from tests.families.tiny import tiny_pipeline
from tests.runtime.truth import guided_call


def test_diffusers_still_has_what_the_bridge_touches() -> None:
    assert compat.missing() == [], "diffusers moved private names: update dit/runtime/diffusers_compat.py"


def test_the_tested_version_is_the_installed_one() -> None:
    assert diffusers.__version__.startswith(compat.TESTED + "."), (
        f"diffusers {diffusers.__version__} is installed, diffusers_compat.py was written for {compat.TESTED}: "
        "look at what it uses, then raise TESTED and the cap in pyproject.toml"
    )


def test_the_message_names_version_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ("diffusers.hooks._helpers", "NoSuchRegistry.register")
    monkeypatch.setattr(compat, "PRIVATE_NAMES", (*compat.PRIVATE_NAMES, gone, ("diffusers.no_such_module", "thing")))
    messages = compat.missing()
    assert len(messages) == 2
    for message in messages:
        assert diffusers.__version__ in message
        assert f"diffusers~={compat.TESTED}.0" in message
    assert "diffusers.hooks._helpers.NoSuchRegistry.register" in messages[0]


def private_touches(tree: ast.Module) -> list[ast.AST]:
    """Imports of private names of diffusers, and words that only its inner workings use."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffusers":
            parts = [*node.module.split("."), *(name.name for name in node.names)]
        elif isinstance(node, ast.Import):
            parts = [part for name in node.names if name.name.startswith("diffusers") for part in name.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("diffusers."):
            parts = node.value.split(".")
        elif isinstance(node, ast.Attribute) and node.attr in ("_diffusers_hook", "_cache_config", "_hook_order"):
            parts = [node.attr]
        else:
            continue
        if any(part.startswith("_") and not part.startswith("__") for part in parts):
            found.append(node)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "from diffusers.hooks._helpers import TransformerBlockRegistry",
        "from diffusers.models.attention_dispatch import _AttentionBackendRegistry",
        "import diffusers.hooks._common",
        "import_module('diffusers.hooks._helpers')",
        "model._diffusers_hook",
    ],
)
def test_the_rule_sees_private_touches(source: str) -> None:
    assert len(private_touches(ast.parse(source))) == 1


def test_only_the_bridge_touches_private_parts() -> None:
    files = [path for path in python_files(tests=False) if path != ROOT / "dit" / "runtime" / "diffusers_compat.py"]
    found = [where(path, node) for path in files for node in private_touches(parse(path))]
    assert not found, f"move it to dit/runtime/diffusers_compat.py: {found}"


@pytest.mark.parametrize("block", [DiTBlock, TextDiTBlock])
def test_our_blocks_are_registered_where_they_are_defined(block: type) -> None:
    assert compat.block_streams(block) == (("hidden_states", "encoder_hidden_states"), (0, None))


def test_faster_cache_learns_of_another_halved_argument() -> None:
    config = FasterCacheConfig(tensor_format="BCHW")
    changed = compat.with_halved_input(compat.with_halved_input(config, "class_labels"), "class_labels")
    names = changed._unconditional_conditional_input_kwargs_identifiers
    assert names.count("class_labels") == 1
    assert "timestep" in names
    assert changed.tensor_format == "BCHW"
    assert "class_labels" not in config._unconditional_conditional_input_kwargs_identifiers
    other = FirstBlockCacheConfig()
    assert compat.with_halved_input(other, "class_labels") is other


def calls_of_blocks(name: str, config: object | None, steps: int) -> list[int]:
    """How often each block runs in a run of a tiny pipeline."""
    pipe = tiny_pipeline(name)
    counts = [0] * len(pipe.transformer.transformer_blocks)
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        projection = block.attn.to_q  # inside the block: hooks of the block itself run when it is skipped, too

        def count(*_, index: int = index) -> None:
            counts[index] += 1

        projection.register_forward_pre_hook(count)
    if config is not None:
        pipe.transformer.enable_cache(config)
    output = pipe(**guided_call(pipe, name, guided=True, num_inference_steps=steps))[0]
    assert torch.isfinite(torch.as_tensor(output)).all()
    return counts


@pytest.mark.parametrize("name", ["text_dit", "class_dit"])
def test_first_block_cache_skips_on_our_networks(name: str) -> None:
    assert set(calls_of_blocks(name, None, 6)) == {6}
    assert set(calls_of_blocks(name, FirstBlockCacheConfig(threshold=0.0), 6)) == {6}
    first, *rest = calls_of_blocks(name, FirstBlockCacheConfig(threshold=1e3), 6)
    assert first == 6
    assert set(rest) == {1}, "all but the first step were to skip"


@pytest.mark.parametrize("name", ["text_dit", "class_dit"])
def test_mag_cache_skips_on_our_networks(name: str) -> None:
    config = MagCacheConfig(
        threshold=1.0, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=6, mag_ratios=torch.ones(6)
    )
    counts = calls_of_blocks(name, config, 6)
    assert 0 < counts[-1] < 6
