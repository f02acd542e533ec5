"""Table of transformer families: one row per network, the only source of facts about them.

No other file names a network of diffusers. A mechanism asks `family_of(model)` and gets blocks, attention layers,
the token grid, how guidance is batched and what the timestep means; `dit.runtime.families` is the only place to add
a family to.

`NextScaleTransformer` has no row, because a row tells what a denoising call means: it is not called with latents and a
timestep but through `step`, scale by scale, and its own pipelines guide it; its structure tells the rest.
"""

from torch import nn

from dit.runtime.families.detect import UnknownFamilyError, detect, detect_inputs
from dit.runtime.families.folding import Fold, FoldedGroup, Rescaling, Scaled
from dit.runtime.families.images import IMAGE_FAMILIES
from dit.runtime.families.modules import is_attention
from dit.runtime.families.schema import (
    AttentionLayer,
    AttentionPattern,
    BlockList,
    BranchLayout,
    Family,
    PipelineRow,
    TimestepScale,
)
from dit.runtime.families.tessera_models import OWN_FAMILIES
from dit.runtime.families.tokens import TokenLayout
from dit.runtime.families.videos import VIDEO_FAMILIES
from dit.runtime.state import unwrap

FAMILIES: tuple[Family, ...] = (*IMAGE_FAMILIES, *VIDEO_FAMILIES, *OWN_FAMILIES)
"""The table."""


def family(name: str) -> Family:
    """Return the family of that name.

    Args:
        name: e.g. "flux", see `FAMILIES`.

    Raises:
        ValueError: there is none.
    """
    for row in FAMILIES:
        if row.name == name:
            return row
    raise ValueError(f"there is no family {name!r}; use one of {', '.join(row.name for row in FAMILIES)}")


def family_of(model: nn.Module) -> Family:
    """Return the family of a transformer, found by its class or an ancestor's.

    Args:
        model: the transformer; PEFT, torch.compile and data parallelism around it don't matter.

    Returns:
        Its row; for a class that is not listed, one guessed from its structure, with `generic` set.

    Raises:
        UnknownFamilyError: the class is not listed and its structure tells too little.
    """
    bare = unwrap(model)
    return _listed(bare) or detect(bare)


def call_family_of(model: nn.Module) -> Family:
    """Return a transformer's family for what needs to know its calls only, not its blocks.

    Args:
        model: as for `family_of`.

    Returns:
        Its row; for a class that is not listed, one whose blocks and attention layers are left out, so that a network
        of any structure has one.
    """
    bare = unwrap(model)
    return _listed(bare) or detect_inputs(bare)


def _listed(bare: nn.Module) -> Family | None:
    rows = {(row.package, row.transformer): row for row in FAMILIES}
    for ancestor in type(bare).__mro__:
        package = "diffusers" if ancestor.__module__.startswith("diffusers.") else ancestor.__module__
        if (package, ancestor.__name__) in rows:
            return rows[package, ancestor.__name__]
    return None


__all__ = [
    "FAMILIES",
    "AttentionLayer",
    "AttentionPattern",
    "BlockList",
    "BranchLayout",
    "Family",
    "Fold",
    "FoldedGroup",
    "PipelineRow",
    "Rescaling",
    "Scaled",
    "TimestepScale",
    "TokenLayout",
    "UnknownFamilyError",
    "call_family_of",
    "family",
    "family_of",
    "is_attention",
]
