"""What pipelines of flow-matching transformers with a text encoder share: components, defaults, the guided loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.inputs.conditioning import TextConditionedPipeline
from pipelines.lora.mixin import TransformerLoraMixin
from sampling.denoise import Denoiser, State, denoise
from sampling.guidance import classifier_free_guidance, in_interval

DEFAULT_STEPS, DEFAULT_GUIDANCE = 28, 4.0
DEFAULTS: Mapping[str, Any] = {"num_inference_steps": DEFAULT_STEPS, "guidance_scale": DEFAULT_GUIDANCE}
"""Of a call that names none, of a model that has none of its own."""


class FlowTextPipeline(TextConditionedPipeline, TransformerLoraMixin):
    """Base of pipelines that follow a flow from noise to latents, guided by text.

    Args:
        transformer: predicts the velocity `noise - data`, e.g. `dit.models.text_dit.TextDiT`.
        text_encoder: a transformers encoder of the T5 or CLIP text kind.
        tokenizer: its tokenizer.
        vae: autoencoder, one of `dit.tokenizers` or of diffusers.
        scheduler: a flow-matching scheduler, e.g. `FlowMatchEulerDiscreteScheduler`.
        defaults: settings of a call that suit this model, by the names of `default_names`.

    Raises:
        ValueError: an unknown name among the defaults.
    """

    default_names: ClassVar[tuple[str, ...]] = tuple(DEFAULTS)
    """What `defaults` may name."""
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _attention_kwargs: dict[str, Any] | None = None
    _network_arguments: Mapping[str, Any] = MappingProxyType({})
    _guidance_rescale: float = 0.0
    _guidance_interval: tuple[float, float] | None = None

    def __init__(
        self,
        transformer: ModelMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(defaults or {}) - set(self.default_names))
        if unknown:
            raise ValueError(f"defaults name {unknown}; expected some of {sorted(self.default_names)}")
        self.register_to_config(defaults=dict(defaults or {}))
        self.register_modules(
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            vae=vae,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 8 if vae is None else self.visual_tokenizer.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True)

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What the running call passes on to the transformer, e.g. `{"scale": 0.5}` for LoRAs."""
        return self._attention_kwargs

    @property
    def pixels_per_token(self) -> int:
        """Pixels that one token of the transformer covers along a side."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    def _default_cells(self) -> tuple[int, int]:
        """Return rows and columns of the latents that the transformer was trained on."""
        cells = self.transformer.config.sample_size
        rows, columns = cells if isinstance(cells, list | tuple) else (cells, cells)
        return int(rows), int(columns)

    def _denoise(
        self,
        tensors: dict[str, Any],
        mask: Tensor,
        timesteps: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[..., dict[str, Tensor] | None] | None,
        callback_inputs: Sequence[str],
        restore: Callable[[Tensor, float], Tensor] | None = None,
        compose: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """Take the latents through the timesteps; all arithmetic outside the transformer is float32.

        Args:
            tensors: "latents" (B, C, ..., h, w), "prompt_embeds" and "negative_prompt_embeds".
            mask: of the text tokens, (B, L), with guidance (2B, L), the negative ones first.
            timesteps: to visit, (S,).
            generator: of schedulers that draw noise.
            callback: see `run_callback`.
            callback_inputs: the tensors it wants.
            restore: keeps what is known, see `Denoiser.restore`.
            compose: latents to what the transformer sees, (B, C', ..., h, w); None shows them as they are.

        Returns:
            (B, C, ..., h, w); None if the run was interrupted.
        """
        step_arguments = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_arguments["generator"] = list(generator) if isinstance(generator, tuple) else generator
        # Attention without a mask is faster; asked once, not every step.
        shown = None if bool(mask.all()) else mask
        model = Denoiser(
            network=self.transformer,
            guides=lambda sigma: self.do_classifier_free_guidance and in_interval(sigma, self._guidance_interval),
            predict=partial(self._velocity, shown, compose),
            guide=lambda uncond, cond: classifier_free_guidance(
                cond, uncond, self._guidance_scale, self._guidance_rescale
            ),
            estimate=self._estimate,
            restore=restore,
        )
        with self._steps(timesteps, callback, callback_inputs) as control:
            return denoise(tensors, timesteps, self.scheduler, model, control, step_arguments)

    def _velocity(
        self,
        mask: Tensor | None,
        compose: Callable[[Tensor], Tensor] | None,
        state: State,
        timestep: Tensor,
        guides: bool,
    ) -> Tensor:
        """Predict the velocity (B, C, ..., h, w); with guidance (2B, C, ..., h, w), the negative prompts first."""
        latents, text = state["latents"], state["prompt_embeds"]  # (B, C, ..., h, w), (B, L, Dt)
        latents = latents if compose is None else compose(latents)
        if guides:
            negative = state["negative_prompt_embeds"]  # (B, L, Dt)
            if negative is None:
                raise ValueError(
                    f"_guidance_scale={self._guidance_scale:g} was set during a call that began without guidance: "
                    "begin it with guidance_scale above 1, so that the negative prompt is encoded."
                )
            latents, text = torch.cat([latents, latents]), torch.cat([negative, text])  # (2B, ...)
        # Left out, not None: FasterCache of diffusers halves all arguments of this name.
        masked = {} if mask is None else {"encoder_attention_mask": mask[-len(latents) :]}
        return self.transformer(
            latents.to(self.transformer.dtype),
            encoder_hidden_states=text,
            timestep=timestep.expand(len(latents)),
            attention_kwargs=self._attention_kwargs,
            return_dict=False,
            **masked,
            **self._network_arguments,
        )[0].float()

    def _estimate(self, output: Any, velocity: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
        """Follow the velocity to the data in one step: the present estimate of the result, (B, C, ..., h, w)."""
        sigma = timestep / self.scheduler.config.num_train_timesteps
        return latents - sigma * velocity
