"""Gaps in every place of networks with several lists of blocks: what runs, what is forecast, and in which order."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dit.runtime.families import family_of
from dit.runtime.hooks import AttachError
from dit.runtime.step_context import StepContext, next_run, step_scope
from sampling.step_cache import StepCache
from sampling.step_cache.forecasters import Reuse
from sampling.step_cache.gates import FirstBlock, Mask, Probe
from sampling.step_cache.regions import Blocks
from sampling.step_cache.values import flatten

JOINT, SINGLE, TOKENS, WORDS = 2, 2, 6, 5
MASK = (True, False)
Case = tuple[Mapping[str, Any], Callable[[], dict[str, Any]]]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(channels: int, text: int, **more: Any) -> Callable[[], dict[str, Any]]:
    """Inputs of networks that take packed latents, and tell their places by ids."""

    def make() -> dict[str, Any]:
        return {
            "hidden_states": randn(1, TOKENS, channels),
            "encoder_hidden_states": randn(1, WORDS, text),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)).float(),
            "txt_ids": torch.zeros(WORDS, 3),
            **more,
        }

    return make


ROPE = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
LISTS = {"num_layers": JOINT, "num_single_layers": SINGLE}
FLUX_LIKE = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 32, **ROPE, **LISTS}
CLIP = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "patch_size": 1, "patch_size_t": 1}
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 4, "rope_max_seq_len": 32, "out_channels": 4,
}  # fmt: skip


def clip_inputs() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 2, 2, 2),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, WORDS, 16),
        "encoder_attention_mask": torch.ones(1, WORDS, dtype=torch.bool),
    }


TWO_LISTS: dict[str, Case] = {
    "FluxTransformer2DModel": (
        {**FLUX_LIKE, "pooled_projection_dim": 16},
        packed(4, 32, pooled_projections=randn(1, 16)),
    ),
    "ChromaTransformer2DModel": (
        {**FLUX_LIKE, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        packed(4, 32),
    ),
    "BriaTransformer2DModel": ({**FLUX_LIKE, "pooled_projection_dim": None}, packed(4, 32)),
    "LongCatImageTransformer2DModel": ({**FLUX_LIKE, "pooled_projection_dim": 32}, packed(4, 32)),
    "OvisImageTransformer2DModel": ({**FLUX_LIKE, "out_channels": 4}, packed(4, 32)),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 8, "num_mmdit_layers": JOINT, "num_single_dit_layers": SINGLE, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 16,
        },
        lambda: {
            "hidden_states": randn(1, 4, 8, 8),
            "encoder_hidden_states": randn(1, WORDS, 16),
            "timestep": torch.tensor([0.5]),
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "attention_head_dim": 8, "num_attention_heads": 4,
            "caption_channels": [8, 4], "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": (0, 1, 0, 1),
            "force_inference_output": True, **LISTS,
        },
        lambda: {
            "hidden_states": randn(1, 4, 8, 8),
            "encoder_hidden_states_t5": randn(1, WORDS, 8),
            "encoder_hidden_states_llama3": randn(2, 1, WORDS, 4),
            "pooled_embeds": randn(1, 8),
            "timesteps": torch.tensor([500]),
        },
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **CLIP, **LISTS, "attention_head_dim": 10, "num_refiner_layers": 1, "guidance_embeds": False,
            "text_embed_dim": 16, "pooled_projection_dim": 16, "rope_axes_dim": (2, 4, 4),
        },
        lambda: {**clip_inputs(), "pooled_projections": randn(1, 16)},
    ),
    "MotifVideoTransformer3DModel": (
        {
            **CLIP, **LISTS, "num_decoder_layers": 0, "attention_head_dim": 12, "text_embed_dim": 16,
            "image_embed_dim": None, "rope_axes_dim": (4, 4, 4), "enable_text_cross_attention_dual": False,
            "enable_text_cross_attention_single": False,
        },
        clip_inputs,
    ),
}  # fmt: skip

BESIDE: dict[str, Case] = {
    "WanVACETransformer3DModel": (
        {**WAN, "in_channels": 4, "vace_layers": [0, 2], "vace_in_channels": 12},
        lambda: {
            "hidden_states": randn(1, 4, 2, 4, 4),
            "encoder_hidden_states": randn(1, WORDS, 16),
            "control_hidden_states": randn(1, 12, 2, 4, 4),
            "control_hidden_states_scale": torch.ones(2),
            "timestep": torch.tensor([500]),
        },
    ),
}
"""Networks with lists of blocks that are not part of the trunk."""


@cache
def build(name: str) -> tuple[nn.Module, dict[str, Any], list[Tensor]]:
    """A network, inputs for it, and what it makes of them without a cache."""
    config, inputs = {**TWO_LISTS, **BESIDE}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, name)(**config).eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model, inputs(), outputs(model, inputs())


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """One output a step; the inputs are the same in all of them, so a right forecast is the output itself."""
    found, run = [], next_run()
    for step in range(len(MASK)):
        with step_scope(StepContext(run, step, len(MASK), 1 - step / len(MASK), 500.0, "cond")):
            found.append(flatten(model(**inputs, return_dict=False))[0][0].clone())
    return found


def splits(count: int) -> list[tuple[int, int]]:
    return [(head, tail) for head in range(count) for tail in range(count - head)]


@pytest.mark.parametrize("name", [*TWO_LISTS, *BESIDE])
def test_blocks_run_in_the_order_of_their_lists(name: str) -> None:
    model, inputs, _ = build(name)
    called, handles = [], []
    blocks = family_of(model).blocks(model, refiners=False)
    for block_name, block in blocks:
        handles.append(block.register_forward_pre_hook(lambda *_, block_name=block_name: called.append(block_name)))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert called == [block_name for block_name, _ in blocks]
    assert len(called) == (JOINT + SINGLE if name in TWO_LISTS else 4)


@pytest.mark.parametrize(("head", "tail"), splits(JOINT + SINGLE))
@pytest.mark.parametrize("name", [*TWO_LISTS, *BESIDE])
def test_every_gap_forecasts_what_the_blocks_in_it_add(name: str, head: int, tail: int) -> None:
    model, inputs, plain = build(name)
    called: list[int] = []
    handles = []
    layers = family_of(model).attention_layers(model)
    for index, (block, _) in enumerate(family_of(model).blocks(model, refiners=False)):
        inside = next(layer.module for layer in layers if layer.name.startswith(block + "."))
        handles.append(inside.register_forward_pre_hook(lambda *_, index=index: called.append(index)))
    with StepCache(Mask(MASK), Reuse(), Blocks(head, tail)).attach(model) as attached:
        cached = outputs(model, inputs)
        report = attached.report()
    for handle in handles:
        handle.remove()
    assert report["strip"] == {"cond": "C."}
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)
    count = JOINT + SINGLE
    kept = [*range(head), *range(count - tail, count)]
    assert called == [*range(count), *kept]


@pytest.mark.parametrize("gate", [FirstBlock(1e-3), Probe(1e-3)], ids=["first block", "probe"])
@pytest.mark.parametrize("head", range(1, JOINT + SINGLE))
@pytest.mark.parametrize("name", [*TWO_LISTS, *BESIDE])
def test_gates_see_the_picture_behind_every_head(name: str, head: int, gate: Any) -> None:
    """With the same inputs at all steps the head moves nothing, so that all but the first step are forecast."""
    model, inputs, plain = build(name)
    with StepCache(gate, Reuse(), Blocks(head)).attach(model) as attached:
        cached = outputs(model, inputs)
        strip = attached.report()["strip"]["cond"]
    assert strip == "C."
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)
    with StepCache(gate, Reuse(), Blocks(head)).attach(model) as attached:
        moving(model, inputs)
        assert "C" in attached.report()["strip"]["cond"][1:], "the gate does not see the picture move"


@torch.no_grad()
def moving(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Steps whose latents are other ones each."""
    run = next_run()
    for step in range(3):
        other = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(step))
        given = {**inputs, "hidden_states": other}
        with step_scope(StepContext(run, step, 3, 1 - step / 3, 500.0, "cond")):
            model(**given, return_dict=False)


class Backwards(nn.Module):
    """Runs its blocks in another order than it made them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            hidden_states = block(hidden_states)
        return hidden_states


class Layer(nn.Module):
    """A block with an attention layer in diffusers' names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        for name in ("to_q", "to_k", "to_v"):
            self.attn.add_module(name, nn.Linear(4, 4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.attn.to_v(hidden_states)  # pyright: ignore


def test_another_order_of_blocks_is_refused_at_the_first_step() -> None:
    model = Backwards()
    here = StepContext(next_run(), 0, 4, 1.0, 1000.0, "cond")
    attached = StepCache(Mask((True, False) * 2), Reuse(), Blocks(0)).attach(model)
    refused = pytest.raises(AttachError, match=r"order.*Layer.*Output\(\)")
    with attached, step_scope(here), torch.no_grad(), refused:
        model(randn(1, 3, 4), torch.ones(1))
