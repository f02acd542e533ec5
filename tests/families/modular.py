"""Tiny modular pipelines: the components of a family's standard pipeline under the blocks of diffusers."""

import diffusers

from tests.families.tiny import tiny_pipeline

MODULAR = {
    "flux": "FluxModularPipeline",
    "flux2": "Flux2ModularPipeline",
    "sd3": "StableDiffusion3ModularPipeline",
    "qwen_image": "QwenImageModularPipeline",
    "ltx": "LTXModularPipeline",
}
"""Families of the table, and the modular pipelines over the same networks."""


def tiny_modular(name: str, seed: int = 0) -> diffusers.ModularPipeline:
    """Return a family's tiny modular pipeline, on the CPU."""
    pipe = getattr(diffusers, MODULAR[name])()
    parts = tiny_pipeline(name, seed).components
    pipe.update_components(**{one: parts[one] for one in pipe.pretrained_component_names if parts.get(one) is not None})
    return pipe
