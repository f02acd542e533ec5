"""The entries of a `model_index.json`: which component is of which class, and which modules of ours they may name."""

from __future__ import annotations

import importlib
from typing import Any

OWN_PACKAGES = ("dit", "sampling", "pipelines", "apps")

COMPONENT_MODULES = frozenset(
    {
        "dit.models.compact_upscaler",
        "dit.models.dit",
        "dit.models.mvdit",
        "dit.models.next_scale",
        "dit.models.pt_dit",
        "dit.models.space_time_dit",
        "dit.models.text_dit",
        "dit.tokenizers.causal_video",
        "dit.tokenizers.multi_scale_bsq",
        "dit.tokenizers.multi_scale_vq",
        "dit.tokenizers.st_vae",
        "dit.tokenizers.vit_autoencoder",
        "sampling.schedulers.flow_match_ab2",
        "sampling.schedulers.flow_match_sde",
    }
)
"""Modules of ours that a `model_index.json` may name; no other is ever imported for a checkpoint."""

PIPELINE_MODULES = {
    "ClassToImagePipeline": "pipelines.class_to_image",
    "NextScaleClassToImagePipeline": "pipelines.next_scale",
    "NextScaleTextToImagePipeline": "pipelines.next_scale",
    "TextToImagePipeline": "pipelines.text_to_image",
    "TextToVideoPipeline": "pipelines.text_to_video",
    "VideoCompletionPipeline": "pipelines.video_completion",
}
"""Our pipeline classes by the `_class_name` of a `model_index.json`; other names are diffusers' business."""

RENAMED_MODULES: dict[str, str] = {}
"""Old module path -> today's. A component class that moves gets an entry, so that old checkpoints still load."""


def component_entries(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the filled component slots of a `model_index.json`: name -> (library, class name)."""
    entries: dict[str, tuple[str, str]] = {}
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, (list, tuple)) and len(value) == 2:
            library, class_name = value
            if isinstance(library, str) and isinstance(class_name, str):
                entries[name] = (library, class_name)
    return entries


def resolve_components(index: dict[str, Any]) -> None:
    """Translate moved module paths of a model index in place and import our component modules it names.

    Args:
        index: content of a `model_index.json`.

    Raises:
        ValueError: an entry names a module of ours that is not in `COMPONENT_MODULES`.
    """
    for name, (recorded, class_name) in component_entries(index).items():
        library = RENAMED_MODULES.get(recorded, recorded)
        index[name] = [library, class_name]
        if not is_own(library):
            continue
        if library not in COMPONENT_MODULES:
            raise ValueError(
                f"Component {name!r} of the checkpoint names the module {library!r}, which holds no component "
                f"(allowed: {', '.join(sorted(COMPONENT_MODULES))}). It may need a newer version of tessera."
            )
        importlib.import_module(library)


def is_own(library: str) -> bool:
    """Return whether a module path is one of ours."""
    return library.split(".", maxsplit=1)[0] in OWN_PACKAGES
