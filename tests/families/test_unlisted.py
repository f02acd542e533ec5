"""Networks without a row, and the corners of the layouts."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dit.models.next_scale import NextScaleTransformer
from dit.runtime.families import Family, UnknownFamilyError, family, family_of
from dit.runtime.families.tokens import TokenLayout
from tests.families.networks import tiny_transformer


class Attention(nn.Module):
    """An attention layer in diffusers' names."""

    def __init__(self, width: int = 8, key_width: int = 8) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(width, 8), nn.Linear(key_width, 8), nn.Linear(key_width, 8)


class Block(nn.Module):
    """Self-attention and cross-attention on wider text."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.attn1 = Attention()
        self.attn2 = Attention(key_width=12) if cross else None


class Unlisted(nn.Module):
    """A network that nobody knows."""

    def __init__(self, cross: bool = True) -> None:
        super().__init__()
        self.config = {"patch_size": 2}
        self.single_blocks = nn.ModuleList(Block(cross) for _ in range(1))
        self.blocks = nn.ModuleList(Block(cross) for _ in range(2))
        self.embeddings = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return hidden_states + timestep


def test_structure_tells_blocks_and_kinds() -> None:
    model = Unlisted()
    row = family_of(model)
    assert row.generic
    assert row.name == "generic:Unlisted"
    assert [name for name, _ in row.blocks(model)] == ["blocks.0", "blocks.1", "single_blocks.0"]
    kinds = {layer.name: layer.kind for layer in row.attention_layers(model)}
    assert kinds["blocks.1.attn1"] == "self"
    assert kinds["blocks.1.attn2"] == "cross"
    assert len(kinds) == 6
    assert row.timestep_scale(model) is None
    assert row.branches() is None


def test_structure_tells_enough_of_a_next_scale_network() -> None:
    """It has no row; blocks, attention layers and LoRA targets are found, and nobody takes it for a denoiser."""
    size = {"scales": (1, 2), "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    model = NextScaleTransformer(**size, text_dim=16, text_pool_heads=2)
    row = family_of(model)
    assert row.generic
    assert [name for name, _ in row.blocks(model)] == ["transformer_blocks.0", "transformer_blocks.1"]
    kinds = {layer.name.rpartition(".")[2]: layer.kind for layer in row.attention_layers(model)}
    assert kinds == {"attn": "self", "cross_attn": "cross"}
    layers = [f"transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn", "cross_attn")]
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    assert {*row.lora_target_names(model)} >= {f"{layer}.{end}" for layer in layers for end in ends}
    assert (row.branches(), row.timestep_scale(model)) == (None, None)
    with pytest.raises(UnknownFamilyError, match="token grid of NextScaleTransformer is not known"):
        row.token_grid(model, {"hidden_states": torch.zeros(1, 4, 32)})


def test_generic_grid_of_plain_latents() -> None:
    model = Unlisted()
    row = family_of(model)
    inputs = row.bind(
        model, (torch.zeros(2, 4, 3, 6, 8), torch.ones(2)), {"encoder_hidden_states": torch.ones(2, 5, 12)}
    )
    assert row.token_grid(model, inputs) == TokenLayout((3, 3, 4), 5, "unknown")
    assert row.scheduler_timestep(model, inputs) is None
    with pytest.raises(UnknownFamilyError, match=r"hidden_states.*patch_size"):
        row.token_grid(model, {"hidden_states": torch.zeros(2, 12, 4)})


def test_a_text_that_may_be_in_the_sequence_is_not_guessed() -> None:
    model = Unlisted(cross=False)
    layers = family_of(model).attention_layers(model)
    assert {layer.kind for layer in layers} == {"unknown"}
    with pytest.raises(ValueError, match="unknown"):
        TokenLayout((1, 2, 2)).lengths("unknown")


@pytest.mark.parametrize("lists", [{}, {"layers": nn.ModuleList([nn.Linear(2, 2)])}], ids=["none", "no attention"])
def test_a_network_without_attention_blocks_is_refused(lists: dict[str, nn.Module]) -> None:
    model = nn.Module()
    for name, module in lists.items():
        model.add_module(name, module)
    with pytest.raises(UnknownFamilyError, match=r"looked for a list of blocks.*to_q.*found .*Add a row") as error:
        family_of(model)
    assert ("none in layers" if lists else "no ModuleList") in str(error.value)


DIFFUSERS: dict[str, tuple[Mapping[str, Any], set[str]]] = {
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        {"joint", "unknown"},
    ),
    "AllegroTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 4,
        },
        {"self", "cross"},
    ),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_unlisted_networks_of_diffusers(name: str) -> None:
    config, kinds = DIFFUSERS[name]
    model = getattr(diffusers, name)(**config)
    row = family_of(model)
    assert row.generic
    assert {layer.kind for layer in row.attention_layers(model)} == kinds
    assert row.blocks(model)


# ----------------------------------------------------------------------- layouts


def image_ids(picture: int, rows: int, columns: int) -> Tensor:
    """(image, row, column) of every token."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.full((rows * columns, 1), picture), grid], dim=1).float()


def flux_layout(ids: Tensor) -> TokenLayout:
    row = family("flux")
    return row.token_grid(tiny_transformer(row), {"img_ids": ids, "encoder_hidden_states": torch.zeros(1, 7, 16)})


def test_a_reference_picture_stands_behind_the_grid() -> None:
    ids = torch.cat([image_ids(0, 3, 4), image_ids(1, 2, 5)])
    layout = flux_layout(ids)
    assert layout == TokenLayout((1, 3, 4), 7, "before", extra=10)
    assert layout == flux_layout(ids[None])
    assert (layout.image_slice(), layout.text_slice()) == (slice(7, 19), slice(0, 7))
    assert layout.sequence_length == 29


def test_ids_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"11 tokens.*not 3 x 4"):
        flux_layout(image_ids(0, 3, 4)[:-1])
    mixed = torch.cat([image_ids(0, 1, 2), image_ids(1, 1, 2), image_ids(0, 1, 2)])
    with pytest.raises(ValueError, match="several images"):
        flux_layout(mixed)


def test_edited_pictures_of_shape_lists() -> None:
    row = family("qwen_image")
    inputs = {"img_shapes": [[(1, 4, 6), (1, 2, 3)]], "encoder_hidden_states": torch.zeros(1, 5, 16)}
    assert row.token_grid(tiny_transformer(row), inputs) == TokenLayout((1, 4, 6), 5, "before", extra=6)


def test_clips_told_by_coordinates() -> None:
    row = family("ltx")
    model = tiny_transformer(row)
    coords = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).T[None].float()
    inputs = {"hidden_states": torch.zeros(1, 24, 8), "encoder_hidden_states": torch.zeros(1, 5, 16)}
    assert row.token_grid(model, {**inputs, "video_coords": coords}).grid == (2, 3, 4)
    with pytest.raises(ValueError, match="video_coords"):
        row.token_grid(model, inputs)
    with pytest.raises(ValueError, match="more tokens than the 24"):
        row.token_grid(model, {**inputs, "num_frames": 2, "height": 4, "width": 4})


def test_frames_of_a_patch() -> None:
    row = family("cogvideox")
    model = tiny_transformer(row, patch_size_t=2, sample_frames=8, use_rotary_positional_embeddings=True)
    inputs = {"hidden_states": torch.zeros(1, 4, 4, 8, 12), "encoder_hidden_states": torch.zeros(1, 5, 16)}
    assert row.token_grid(model, inputs) == TokenLayout((2, 4, 6), 5, "before")


def test_several_pictures_in_a_sample_are_refused() -> None:
    row = family("z_image")
    with pytest.raises(ValueError, match="omni"):
        row.token_grid(tiny_transformer(row), {"x": [[torch.zeros(4, 1, 4, 4)]], "cap_feats": [torch.zeros(3, 16)]})


# --------------------------------------------------------------------- timesteps


def test_clean_tokens_do_not_hide_the_timestep() -> None:
    """Clips that continue an image give its tokens the timestep 0."""
    row = family("wan")
    inputs = {"timestep": torch.tensor([[0.0, 0.0, 812.0, 812.0]])}
    assert row.scheduler_timestep(tiny_transformer(row), inputs) == 812.0


def test_scales_of_configurations() -> None:
    sana, own = family("sana"), family("class_dit")
    assert sana.timestep_scale(tiny_transformer(sana, timestep_scale=0.001)).received(500.0) == 0.5
    assert own.timestep_scale(tiny_transformer(own, objective="velocity")).received(250.0) == 0.75
    assert own.timestep_scale(tiny_transformer(own)).received(250.0) == 250.0


def test_pipelines_are_found_by_ancestry_and_name() -> None:
    row: Family = family("flux2")
    klein = row.pipeline("Flux2KleinPipeline")
    assert row.pipeline() is row.pipelines[0]
    assert row.branches("Flux2KleinPipeline").kind == "two_calls"
    sub = type("Mine", (diffusers.Flux2KleinPipeline,), {})
    assert row.pipeline(sub.__new__(sub)) is klein
    assert row.pipeline("SomebodyElsesPipeline") is None
    assert row.branches(SimpleNamespace()) is None


def test_calls_are_bound_by_name_or_refused() -> None:
    row = family("z_image")
    model = tiny_transformer(row)
    bound = row.bind(model, ([torch.zeros(4, 1, 4, 4)], torch.ones(1)), {"cap_feats": [torch.zeros(3, 16)]})
    assert bound["patch_size"] == 2
    assert row.latents(bound).shape == (1, 4, 1, 4, 4)
    with pytest.raises(TypeError):
        row.bind(model, (), {"nonsense": 1})
