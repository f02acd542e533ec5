"""Key maps: every rule has an inverse that undoes it exactly, and nothing is lost silently."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.convert.keymap import (
    Constant,
    Drop,
    Fuse,
    KeyMapError,
    Merge,
    Rename,
    Repeat,
    Split,
    affine,
    convert,
    inverse,
)

TABLE = torch.linspace(-1, 1, 6)
RULES = (
    Rename("a", "first.a"),
    Split("fused", ("q", "k", "v")),
    Fuse(("up", "down"), "both", dim=1),
    Drop("table", lambda: TABLE),
    Merge(("copy.0", "copy.1"), "one"),
    *affine(Rename, "old", "new"),
)


def theirs(seed: int = 0, width: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    copy = draw(3)
    return {
        "a": draw(2, 2),
        "fused": draw(3 * width, 4),
        "up": draw(2, width),
        "down": draw(2, width),
        "table": TABLE.clone(),
        "copy.0": copy,
        "copy.1": copy.clone(),
        "old.weight": draw(2, 2),
        "old.bias": draw(2),
    }


@given(seed=st.integers(0, 1000), width=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_there_and_back_is_bit_exact(seed: int, width: int) -> None:
    state = theirs(seed, width)
    ours = convert(state, RULES)
    assert set(ours) == {"first.a", "q", "k", "v", "both", "one", "new.weight", "new.bias"}
    back = convert(ours, inverse(RULES))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_inverse_twice_is_the_map_itself() -> None:
    assert inverse(inverse(RULES)) == RULES
    assert {type(rule) for rule in inverse(RULES)} == {Rename, Fuse, Split, Constant, Repeat}


def test_split_parts_own_their_memory() -> None:
    """safetensors refuses tensors that share memory."""
    parts = convert({"fused": torch.randn(6, 2)}, [Split("fused", ("q", "k", "v"))])
    assert len({part.untyped_storage().data_ptr() for part in parts.values()}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.zeros(1)}, "extra"),
        ({"a": None}, "lacks the key 'a'"),
        ({"fused": torch.zeros(7, 2)}, "not divisible by 3"),
        ({"table": TABLE + 0.01}, "trained with another"),
        ({"table": TABLE * torch.nan}, "trained with another"),
        ({"table": TABLE[:3]}, "expected \\(6,\\)"),
        ({"copy.1": torch.zeros(3)}, "copy.1 differs"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {key: value for key, value in {**theirs(), **change}.items() if value is not None}
    with pytest.raises(KeyMapError, match=message):
        convert(state, RULES)


def test_a_dropped_table_may_be_rounded() -> None:
    """Half-precision checkpoints hold the same table, rounded."""
    assert convert({"table": TABLE.half()}, [Drop("table", lambda: TABLE)]) == {}
