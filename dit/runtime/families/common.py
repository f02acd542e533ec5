"""Building blocks of several rows: names of projections, attention by name, rescalings in a block."""

from dit.runtime.families.folding import Fold, Scaled
from dit.runtime.families.schema import AttentionPattern


def qkv(attention: str) -> tuple[str, ...]:
    """Return projections of the image's queries, keys and values."""
    return tuple(f"{attention}.to_{letter}" for letter in "qkv")


def added_qkv(attention: str) -> tuple[str, ...]:
    """Return projections of the text's queries, keys and values in a joint attention."""
    return tuple(f"{attention}.add_{letter}_proj" for letter in "qkv")


def self_and_cross(blocks: str) -> tuple[AttentionPattern, ...]:
    """Describe blocks with separate text: `attn1` is self-attention of the image, `attn2` attends to the text."""
    return (
        AttentionPattern(rf"{blocks}\.\d+\.attn1", "self"),
        AttentionPattern(rf"{blocks}\.\d+\.attn2", "cross"),
    )


def modulated(name: str, shift: int, scale: int, count: int) -> tuple[Scaled, Scaled]:
    """Return producers of `norm(x) * (1 + scale) + shift`, both parts of the output of the linear layer `name`."""
    return Scaled(name, (shift, count)), Scaled(name, (scale, count), plus_one=True)


def adaln_zero(name: str, projections: tuple[str, ...], feed_forward: str, count: int = 6) -> tuple[Fold, Fold]:
    """Return the folds of a DiT block (arXiv 2212.09748): `name` makes shift, scale, gate of attention, then of MLP.

    Args:
        name: the linear layer that makes them from the timestep.
        projections: what takes the attention's modulated input.
        feed_forward: the first layer of the MLP.
        count: equal parts of the output of `name`; those behind the sixth serve something else.
    """
    return (
        Fold(modulated(name, 0, 1, count), projections),
        Fold(modulated(name, 3, 4, count), (feed_forward,)),
    )


def value(attention: str, added: bool = False) -> Fold:
    """Return values and the projection behind the attention: attention mixes tokens, never channels."""
    if added:
        producers = (Scaled(f"{attention}.to_v"), Scaled(f"{attention}.add_v_proj"))
        return Fold(producers, (f"{attention}.to_out.0", f"{attention}.to_add_out"))
    return Fold((Scaled(f"{attention}.to_v"),), (f"{attention}.to_out.0",), unless=f"{attention}.add_v_proj")
