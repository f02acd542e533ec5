"""Class label to image, scale by scale, with VAR (arXiv 2404.02905)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from pipelines.base import OUTPUT_TYPES
from pipelines.call_defaults import takes_call_defaults
from pipelines.info.record import PipelineInfo, class_table
from pipelines.inputs.checks import check_choice, check_count, check_generators, check_number
from pipelines.inputs.inpaint import MaskInput
from pipelines.inputs.labels import Label, label_ids, names_of
from pipelines.next_scale.base import NextScalePipeline, check_pair
from pipelines.next_scale.options import (
    SCALE_ARGUMENTS,
    Callback,
    Images,
    NextScaleOutput,
    ScaleOptions,
    ScaleTask,
    needs_unconditional,
)
from sampling.inference_search import TTSConfig
from sampling.scale_acceleration import ScaleAcceleration
from sampling.tokens import Generators, guide_logits, mix_codes, ramp, sample_tokens, top_k_top_p_filter

DEFAULT_GUIDANCE = 5.0
"""Guidance scale of a call that names none."""


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """How tokens are drawn; see the arguments of the pipeline's call.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range.
    """

    guidance_scale: float
    top_k: int
    top_p: float
    temperature: float
    smooth: bool

    def __post_init__(self) -> None:
        check_number("guidance_scale", self.guidance_scale, 0.0, 100.0)
        check_count("top_k", self.top_k, 0, 2**31 - 1)
        check_number("top_p", self.top_p, 0.0, 1.0)
        check_number("temperature", self.temperature, 0.01, 100.0)


class NextScaleClassToImagePipeline(NextScalePipeline):
    """Generate images of a class, coarse to fine: each scale is one pass of the network and one step of the call.

    Args:
        transformer: a `dit.models.next_scale.NextScaleTransformer`.
        vae: the tokenizer that the transformer was trained on, a `dit.tokenizers.multi_scale_vq.MultiScaleVQ`.
        id2label: name of each class, several names separated by commas; then calls take names too.

    Raises:
        ValueError: transformer and tokenizer don't belong together.

    Example:
        >>> pipe = load_pipeline("VAR-d16")  # a folder written by `tessera convert --family var`
        >>> pipe([207, 360], guidance_scale=5.0).images[0].save("retriever.png")
    """

    tasks: ClassVar[tuple[str, ...]] = ("next_scale_class",)
    call_arguments: ClassVar[Mapping[str, str]] = {**SCALE_ARGUMENTS, "label": "class_labels", "smooth": "smooth"}
    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: ModelMixin, vae: ModelMixin, id2label: dict[int, str] | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.labels = names_of(id2label)
        self.register_to_config(id2label={str(label): name for label, name in (id2label or {}).items()} or None)
        check_pair(transformer, vae, wants_text=False)
        self.vae_scale_factor = vae.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def info(self) -> PipelineInfo:
        """Return what this pipeline is and can do."""
        return self._declare(
            guidance=DEFAULT_GUIDANCE,
            labels=class_table(self.transformer.config.num_classes, self.labels),
            label_ids=self.labels,
        )

    @takes_call_defaults
    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor,
        guidance_scale: float = DEFAULT_GUIDANCE,
        top_k: int = 900,
        top_p: float = 0.95,
        temperature: float = 1.0,
        smooth: bool = False,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        kv_policy: str = "full",
        kv_budget: float = 0.1,
        kv_dtype: str = "auto",
        kv_observe: int = 16,
        acceleration: ScaleAcceleration | None = None,
        search: TTSConfig | None = None,
        image: Any = None,
        mask_image: MaskInput | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_kwargs: dict[str, Any] | None = None,
        cfg: float | None = None,
    ) -> NextScaleOutput | tuple[Images]:
        """Generate.

        Args:
            class_labels: one label or a list of P: class numbers, or names if the pipeline knows them.
            guidance_scale: classifier-free guidance (arXiv 2207.12598) at the last scale; it grows evenly from 1, none,
                at the first one. 1 or less turns it off (and halves the work); 2.5 scores best, 5 looks best.
            top_k: draw among so many entries of the codebook only; 0 is all.
            top_p: draw among the likeliest entries that hold this fraction of the probability; 0 is all.
            temperature: divides the logits; below 1 is bolder, above 1 more varied.
            smooth: mix codebook entries instead of choosing one; good to look at.
            num_images_per_prompt: images per label; B = P times this.
            generator: a single one draws for all images at once, as the released sampler does; of a list of B, each
                draws for its own image, which then does not depend on the batch.
            kv_policy: what to keep of earlier scales, one of `dit.cache.POLICIES`; `pipe.kv_report` tells what it took.
            kv_budget: fraction of the history to keep on average over the layers, 0.1 = 10 %; "full" keeps all.
            kv_dtype: how to store it, one of `dit.cache.KV_DTYPES`.
            kv_observe: tokens of the current scale whose queries choose what is kept, for the policies that ask.
            acceleration: what to leave out to be faster, see `ScaleAcceleration`; `pipe.acceleration_report` tells.
            search: generate several candidates and go on with the best, see `TTSConfig`; the output's `search` holds
                them. Its draws come from the generator of a prompt's first image.
            image: change a part of this image (or of B images): PIL, or arrays/tensors in [0, 1].
            mask_image: with `image`: generate where it is white, keep every other pixel as it is.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, C, h, w).
            return_dict: whether to wrap the result.
            callback_on_step_end: called as `callback(pipe, scale, timestep, tensors)` after each scale; latents it
                returns replace ours. It may set `pipe.interrupt = True`.
            callback_on_step_end_tensor_inputs: the tensors it gets: "latents" or "denoised_latents" (the image so
                far, for `pipe.preview` or `pipe.decode_latents`), "indices" (the scale's tokens, (B, N)).
            attention_kwargs: passed on to the transformer, e.g. `{"scale": 0.5}` for LoRAs.
            cfg: the guidance in the convention of VAR's released sampler, instead of `guidance_scale`, which is 1
                more: 0 is none, 1.5 scores best, 4 looks best.

        Returns:
            The images; none when the run was interrupted (then `pipe.interrupted` is True).

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range, or both `cfg` and `guidance_scale` are given.
        """
        self._interrupt = self._interrupted = self._finish_now = False
        guidance_scale = _from_cfg(cfg, guidance_scale)
        how = TokenSampling(guidance_scale, top_k, top_p, temperature, smooth)
        check_count("num_images_per_prompt", num_images_per_prompt, 1, 1024)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        self._guidance_scale, self._is_guided = guidance_scale, needs_unconditional(guidance_scale)
        options = ScaleOptions(kv_policy, kv_budget, kv_dtype, kv_observe, acceleration, search, image, mask_image)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        labels = self.get_label_ids(class_labels).repeat_interleave(num_images_per_prompt)  # (B,)
        check_generators(generator, len(labels))

        task = self._task(labels.to(self._execution_device), how, num_images_per_prompt, attention_kwargs)
        generated = self._generate(task, options, generator, callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self._finish(generated, output_type, return_dict)

    def get_label_ids(self, labels: Label | Sequence[Label] | Tensor) -> Tensor:
        """Return the class numbers (P,) of labels given as numbers or names; the one after the last is 'no class'."""
        return label_ids(labels, self.labels, self.transformer.config.num_classes)

    def _task(
        self, labels: Tensor, how: TokenSampling, images_per_prompt: int, attention_kwargs: dict[str, Any] | None
    ) -> ScaleTask:
        """Return what to generate for labels (B,)."""
        count, none, guided = len(self.vae.grids), self.transformer.config.num_classes, self._is_guided
        names = {int(label): each.split(",")[0].strip() for label, each in (self.config["id2label"] or {}).items()}

        def prepare(transformer: Any, rows: Tensor) -> Any:
            wanted = labels[rows]  # (B',)
            both = torch.cat([wanted, torch.full_like(wanted, none)])  # (2B',)
            return transformer.prepare_condition(both if guided else wanted, attention_kwargs=attention_kwargs)

        def guide(cond: Tensor, uncond: Tensor, scale: int, guidance_scale: float) -> Tensor:
            return guide_logits(cond, uncond, _strength(guidance_scale) * ramp(scale, count))

        return ScaleTask(
            prepare,
            prompts=[names.get(label, str(label)) for label in labels.tolist()],
            images_per_prompt=images_per_prompt,
            guided=guided,
            guidance=(how.guidance_scale,) * count,
            guide=guide,
            sample=lambda logits, scale, generator: self._draw(logits, ramp(scale, count), how, generator),
            grids=tuple(self.vae.grids),
            attention_kwargs=attention_kwargs,
        )

    def _draw(
        self, logits: Tensor, progress: float, how: TokenSampling, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """Draw a scale's tokens.

        Args:
            logits: (B, N, V).
            progress: 0 at the first scale, 1 at the last.
            how: the settings.
            generator: of the caller.

        Returns:
            Indices (B, N), and what to add to the image: the same, or mixed codebook entries (B, N, C).
        """
        logits = top_k_top_p_filter(logits, how.top_k, how.top_p, how.temperature)  # (B, N, V)
        indices = sample_tokens(logits, generator)  # (B, N)
        if not how.smooth:
            return indices, indices
        return indices, mix_codes(logits, self.vae.quantizer.codebook.weight, progress, generator)  # (B, N, C)


def _from_cfg(cfg: float | None, guidance_scale: float) -> float:
    """Return the guidance scale of a call that may give VAR's `cfg` instead of it."""
    if cfg is None:
        return guidance_scale
    check_number("cfg", cfg, 0.0, 99.0)
    if guidance_scale != DEFAULT_GUIDANCE:
        raise ValueError(f"cfg={cfg:g} and guidance_scale={guidance_scale:g} are the same setting: give one of them.")
    return 1 + cfg


def _strength(guidance_scale: float) -> float:
    """Return VAR's `cfg` of a guidance scale, exactly the number that 1 was added to if it had up to 12 decimals."""
    return max(round(guidance_scale - 1, 12), 0.0)
