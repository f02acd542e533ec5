"""Run our pipelines with each step cache of diffusers, and tell what happened as JSON.

`python -m tests.pipes.diffusers_caches` does it in a fresh process, which knows nothing but what importing brought.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from tests.families.tiny import tiny_pipeline
from tests.runtime.truth import guided_call

STEPS = 6
PIPELINES = ("text_dit", "class_dit", "class_sit")
CONFIGS: dict[str, Callable[[Any], Any]] = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=1e3),
    "MagCache": lambda pipe: MagCacheConfig(1.0, 2, 0.2, STEPS, torch.ones(STEPS)),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1),
    "PAB": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    ),
    "FasterCache": lambda pipe: FasterCacheConfig(
        tensor_format="BCHW", current_timestep_callback=lambda: pipe.current_timestep
    ),
}


def run(name: str, cache: str) -> dict[str, Any]:
    """Generate without a cache, with it, and without it again."""
    pipe = tiny_pipeline(name)
    tokens = [0]
    projection = pipe.transformer.transformer_blocks[-1].attn.to_q

    def count(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        tokens[0] += len(inputs[0])

    projection.register_forward_pre_hook(count)

    def generate() -> tuple[torch.Tensor, int]:
        tokens[0] = 0
        call = guided_call(pipe, name, guided=True, num_inference_steps=STEPS)
        images = pipe(**{**call, "generator": torch.Generator().manual_seed(0)})[0]
        return torch.as_tensor(images), tokens[0]

    plain, rows = generate()
    pipe.transformer.enable_cache(CONFIGS[cache](pipe))
    cached, cached_rows = generate()
    pipe.transformer.disable_cache()
    again, again_rows = generate()
    return {
        "rows": [rows, cached_rows, again_rows],
        "is_finite": bool(torch.isfinite(cached).all()),
        "is_same_after": torch.equal(plain, again),
        "timestep_after": pipe.current_timestep,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps({f"{name} {cache}": run(name, cache) for name in PIPELINES for cache in CONFIGS}))
