"""Attention that networks are trained with, in place of dense attention.

    from dit.attention.trainable import replace_attention

    replace_attention(network, "agent", agents=(1, 4, 4), window=(16, 16))

puts it into all blocks of a network of ours; `attention` and `attention_params` among the settings of `DiT` and
`TextDiT` do the same when one is made or loaded. Each file holds one idea, a processor as diffusers has them, whose
weights carry the names of the published code. Text and extra tokens of a grid are exact where a method has a notion of
it: they see all tokens and are seen by all.
"""

from dit.attention.trainable.contract import (
    REPLACEMENTS,
    Replacement,
    register_replacement,
    replace_attention,
    replacement,
    replacement_names,
)

__all__ = [
    "REPLACEMENTS",
    "Replacement",
    "register_replacement",
    "replace_attention",
    "replacement",
    "replacement_names",
]
