"""The rows' facts about networks without a pipeline, against what a call of the network does."""

from typing import Any

import pytest
import torch
from torch import nn

from dit.runtime.families import family
from dit.runtime.families.tokens import TokenLayout
from tests.families.bare import BARE_NAMES, bare_inputs
from tests.families.networks import tiny_transformer
from tests.families.record import Call, Recorder

CASES = [pytest.param(name, {}, id=name) for name in BARE_NAMES]
CASES.append(pytest.param("space_time_dit", {"arrangement": "temporal_first"}, id="temporal_first"))


def call(name: str, overrides: dict[str, Any], **changed: Any) -> tuple[nn.Module, Call]:
    model = tiny_transformer(name, **overrides)
    with Recorder(family(name), model).watching() as recorder, torch.no_grad():
        model(**{**bare_inputs(name), **changed})
    return model, recorder.calls[0]


def sequences(layout: TokenLayout, axes: str, text_places: int) -> int:
    """How many sequences of these axes a sample has."""
    frames, rows, columns = layout.grid
    windows = -(-frames // 1) * -(-rows // 2) * -(-columns // 4)  # of the tiny network
    places = rows * columns + text_places
    return {"thw": 1, "hw": frames, "t": places, "window": windows, "proxies": 1, "thw_to_proxies": 1}[axes]


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_attention_layers_see_what_the_row_says(name: str, overrides: dict[str, Any]) -> None:
    row = family(name)
    model, seen = call(name, overrides)
    assert seen.layout.grid == (3, 2, 4)
    layers = row.attention_layers(model)
    assert list(seen.lengths) == [layer.name for layer in layers], "in the order of execution"
    text_places = seen.layout.text_length if name == "mvdit" else 0
    for layer in layers:
        ((batch, *lengths),) = seen.lengths[layer.name]
        assert tuple(lengths) == seen.layout.lengths(layer.kind, layer.axes), layer.name
        assert batch == 2 * sequences(seen.layout, layer.axes, text_places), layer.name


def test_incomplete_windows_count() -> None:
    """6 x 5 tokens are 3 x 2 windows of 2 x 4 in each frame."""
    latents = torch.randn(2, 4, 2, 12, 10)
    model, seen = call("pt_dit", {}, hidden_states=latents)
    assert (seen.layout.window, seen.layout.proxies) == (8, 2 * 3 * 2 * 2)
    for layer in family("pt_dit").attention_layers(model):
        assert seen.lengths[layer.name][0][1:] == seen.layout.lengths(layer.kind, layer.axes), layer.name


def test_text_of_two_streams_stands_behind_the_frame() -> None:
    """Other latents change the values of a frame's tokens, and of no text token."""
    one, two = (call("mvdit", {}, hidden_states=bare_inputs("mvdit")["hidden_states"] + by)[1] for by in (0, 1))
    changed = (one.values[0] != two.values[0]).any(-1).any(1).any(0)  # (S + L,)
    places = one.layout.grid[1] * one.layout.grid[2]
    assert changed.tolist() == [True] * places + [False] * one.layout.text_length


@pytest.mark.parametrize("name", BARE_NAMES)
def test_timestep_is_the_schedulers(name: str) -> None:
    model = tiny_transformer(name)
    assert family(name).scheduler_timestep(model, bare_inputs(name)).item() == 900.0
    assert family(name).branches() is None
