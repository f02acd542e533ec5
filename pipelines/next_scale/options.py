"""Options, task and output of a next-scale call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from dit.cache import KV_DTYPES, POLICIES
from dit.layers.scales import Grid
from pipelines.inputs.checks import check_choice, check_count, check_number
from pipelines.inputs.inpaint import MaskInput
from sampling.inference_search import SearchResult, TTSConfig
from sampling.scale_acceleration import ScaleAcceleration
from sampling.tokens import Generators

Images = list[Image.Image] | np.ndarray | Tensor
Callback = Callable[..., dict[str, Tensor] | None]

SCALE_ARGUMENTS: Mapping[str, str] = {
    "guidance": "guidance_scale",
    "top_k": "top_k",
    "top_p": "top_p",
    "temperature": "temperature",
    "kv_policy": "kv_policy",
    "kv_budget": "kv_budget",
    "kv_dtype": "kv_dtype",
    "search": "search",
    "image": "image",
    "mask": "mask_image",
    "batch_size": "num_images_per_prompt",
    "seed": "generator",
}
"""Field of a request -> argument of the calls of all next-scale pipelines."""


@dataclass
class NextScaleOutput(ImagePipelineOutput):
    """Images of a next-scale pipeline.

    Attributes:
        images: as asked for.
        search: with `search=`: what was found for each prompt, candidates included; else None.
    """

    search: list[SearchResult] | None = None


@dataclass(frozen=True)
class ScaleOptions:
    """How to run, apart from what to generate; see the arguments of the pipelines' calls.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range, or options that exclude each other.
    """

    kv_policy: str = "full"
    kv_budget: float = 0.1
    kv_dtype: str = "auto"
    kv_observe: int = 16
    acceleration: ScaleAcceleration | None = None
    search: TTSConfig | None = None
    image: Any = None
    mask_image: MaskInput | None = None

    def __post_init__(self) -> None:
        check_choice("kv_policy", self.kv_policy, POLICIES)
        check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        check_number("kv_budget", self.kv_budget, 0.0, 1.0)
        check_count("kv_observe", self.kv_observe, 1, 65536)
        if self.kv_budget == 0:
            raise ValueError("kv_budget=0 would forget everything: expected a fraction up to 1, such as 0.1")
        for name, value, kind in (
            ("acceleration", self.acceleration, ScaleAcceleration),
            ("search", self.search, TTSConfig),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}.")
        if (self.image is None) != (self.mask_image is None):
            raise ValueError("image and mask_image belong together: the image, and white where to generate.")
        if self.search is not None and self.acceleration is not None and self.acceleration.prune:
            raise ValueError("search chooses among candidates, whose pruned tokens don't move with them: drop `prune`.")


@dataclass(frozen=True)
class ScaleTask:
    """What to generate: B images, `images_per_prompt` of each prompt side by side.

    Args:
        prepare: from a transformer and image indices (B',) to its condition; with guidance the unconditional rows
            stand behind the others.
        prompts: of each image, for rewards.
        images_per_prompt: see above.
        guided: whether there are unconditional rows.
        guidance: guidance scale of each scale, unless a callback changes it.
        guide: joins conditional and unconditional logits (B, N, V), by the index of the scale and its guidance scale.
        sample: from a scale's logits, its index and the generator to indices and what to add up.
        grids: schedule of scales.
        flexible: whether the tokenizer takes the schedule at each call.
        attention_kwargs: passed on to the transformer.
    """

    prepare: Callable[[Any, Tensor], Any]
    prompts: Sequence[str]
    images_per_prompt: int
    guided: bool
    guidance: Sequence[float]
    guide: Callable[[Tensor, Tensor, int, float], Tensor]
    sample: Callable[[Tensor, int, Generators], tuple[Tensor, Tensor]]
    grids: tuple[Grid, ...]
    flexible: bool = False
    attention_kwargs: dict[str, Any] | None = None

    @property
    def count(self) -> int:
        """Images B."""
        return len(self.prompts)


def needs_unconditional(guidance_scale: float) -> bool:
    """Return whether a scale with this guidance needs the unconditional branch."""
    return guidance_scale > 1
