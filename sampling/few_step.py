"""Models distilled to a few steps: which scheduler, timesteps and guidance belong to a LoRA, as data.

Step caches have nothing to give there (each step differs much from the last), so these presets go without.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class FewStep:
    """How a distilled model is sampled.

    Args:
        source: who says so.
        scheduler: class of diffusers.
        config: what differs from the pipeline's scheduler.
        steps: calls of the network.
        guidance: scale; 0 and 1 are none.
        lora_scale: weight of the LoRA.
        flow: whether it belongs to flow models (else to those with a schedule of noise variances).
        timesteps: the very timesteps, where training used these.
    """

    source: str
    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    guidance: float = 0.0
    lora_scale: float = 1.0
    flow: bool = False
    timesteps: tuple[int, ...] = ()

    def apply(self, pipeline: Any) -> dict[str, Any]:
        """Give a pipeline the scheduler, and return the arguments of its calls. Load the LoRA yourself.

        Args:
            pipeline: of diffusers or ours.

        Returns:
            Number of steps (or the timesteps) and the guidance scale.

        Raises:
            ValueError: the pipeline's model is of the other kind.
        """
        config = dict(pipeline.scheduler.config)
        is_flow = "beta_start" not in config or bool(config.get("use_flow_sigmas"))
        if is_flow != self.flow:
            kind = "flow models" if self.flow else "models with a noise schedule (beta_start ...)"
            raise ValueError(f"this preset is for {kind}; {type(pipeline.scheduler).__name__} is of the other kind")
        known = {key: value for key, value in config.items() if not key.startswith("_")}
        import diffusers

        scheduler = getattr(diffusers, self.scheduler)
        pipeline.scheduler = scheduler.from_config({**known, **self.config})
        steps: dict[str, Any] = {"timesteps": list(self.timesteps)} if self.timesteps else {
            "num_inference_steps": self.steps}  # fmt: skip
        return {**steps, "guidance_scale": self.guidance}


def few_step_names() -> tuple[str, ...]:
    """Names of the presets, as the data file has them."""
    return tuple(_presets())


def few_step(name: str) -> FewStep:
    """Return a preset.

    Args:
        name: one of `few_step_names()`.

    Raises:
        ValueError: an unknown name.
    """
    known = _presets()
    if name not in known:
        raise ValueError(f"there is no few-step preset {name!r}; use one of {', '.join(known)}")
    values = known[name]
    return FewStep(**{**values, "timesteps": tuple(values.get("timesteps", ()))})


def _presets() -> dict[str, dict[str, Any]]:
    return json.loads((files("sampling") / "data" / "few_step.json").read_text(encoding="utf-8"))
