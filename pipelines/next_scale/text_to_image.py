"""Text to image, scale by scale, with Infinity (arXiv 2412.04431) or a VAR that reads text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dit.layers.resolutions import NUM_SCALES, SCALE_SCHEDULES, nearest_ratio, published_schedules
from dit.layers.scales import Grid
from pipelines.base import OUTPUT_TYPES
from pipelines.call_defaults import takes_call_defaults
from pipelines.info.record import PipelineInfo
from pipelines.inputs.checks import check_choice, check_count, check_generators, check_number
from pipelines.inputs.conditioning import TextConditionedPipeline, text_limit
from pipelines.inputs.inpaint import MaskInput
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
from sampling.tokens import Generators, guide_logits, sample_tokens, top_k_top_p_filter

DEFAULTS: Mapping[str, float] = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 0.0}
"""Settings of a call that neither the call nor the pipeline's configuration names."""

PerScale = float | Sequence[float]
"""One value for all scales, or one for each."""


@dataclass(frozen=True, slots=True)
class ScaleSampling:
    """How each scale is drawn; see the arguments of the pipeline's call.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range.
    """

    guidance_scale: tuple[float, ...]
    temperature: tuple[float, ...]
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        for guidance, temperature in zip(self.guidance_scale, self.temperature, strict=True):
            check_number("guidance_scale", guidance, 0.0, 100.0)
            check_number("temperature", temperature, 0.01, 100.0)
        check_count("top_k", self.top_k, 0, 2**31 - 1)
        check_number("top_p", self.top_p, 0.0, 1.0)

    def sample(self, logits: Tensor, scale: int, generator: Generators) -> Tensor:
        """Draw a scale's tokens (B, N), or their bits (B, N, d), from logits (B, N, ..., V)."""
        return sample_tokens(top_k_top_p_filter(logits, self.top_k, self.top_p, self.temperature[scale]), generator)


class NextScaleTextToImagePipeline(NextScalePipeline, TextConditionedPipeline):
    """Generate images from text, coarse to fine: each scale is one pass of the network and one step of the call.

    Args:
        transformer: a `dit.models.next_scale.NextScaleTransformer` with `text_dim`.
        text_encoder: a transformers encoder of the T5 kind (released models: the encoder of flan-t5-xl); None if calls
            bring `prompt_embeds`.
        tokenizer: its tokenizer, or None.
        vae: the image tokenizer that the transformer was trained on: `dit.tokenizers.multi_scale_bsq.MultiScaleBSQ`
            for bits, `dit.tokenizers.multi_scale_vq.MultiScaleVQ` for entries of a codebook.
        defaults: settings of a call that suit this model, by the names of `DEFAULTS`.

    Raises:
        ValueError: transformer and tokenizer don't belong together; an unknown name among the defaults.

    Example:
        >>> pipe = load_pipeline("infinity-2b")  # a folder written by `tessera convert --family infinity`
        >>> pipe("a cat holds a board with the text 'hello'", aspect_ratio=16 / 9).images[0].save("cat.png")
    """

    tasks: ClassVar[tuple[str, ...]] = ("next_scale_text",)
    call_arguments: ClassVar[Mapping[str, str]] = {
        **SCALE_ARGUMENTS,
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "height": "height",
        "width": "width",
    }
    model_cpu_offload_seq = "text_encoder->transformer"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: ModelMixin | None,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        vae: ModelMixin | None,
        defaults: Mapping[str, Any] | None = None,  # whole numbers too; diffusers checks, and takes no union here
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae)
        unknown = sorted(set(defaults or {}) - set(DEFAULTS))
        if unknown:
            raise ValueError(f"defaults name {unknown}; expected some of {sorted(DEFAULTS)}")
        self.register_to_config(defaults=dict(defaults or {}))
        if transformer is not None and vae is not None:  # without one of them only `encode_prompt` works
            check_pair(transformer, vae, wants_text=True)
        self.vae_scale_factor = 16 if vae is None else vae.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def info(self) -> PipelineInfo:
        """Return what this pipeline is and can do."""
        own: dict[str, Any] = {**DEFAULTS, **self.config["defaults"]}
        guidance = own["guidance_scale"]
        return self._declare(
            defaults=own,
            guidance=float(guidance) if isinstance(guidance, int | float) else None,
            knows_words=True,
        )

    @takes_call_defaults
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: float | None = None,
        guidance_scale: PerScale | None = None,
        temperature: PerScale | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
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
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_kwargs: dict[str, Any] | None = None,
    ) -> NextScaleOutput | tuple[Images]:
        """Generate.

        Args:
            prompt: what to generate, one string or a list of P; "" is whatever the model makes of an empty text.
            negative_prompt: what to steer away from, one for all or one per prompt; None steers away from the learned
                empty text.
            height: pixels; height and width together name one of the published sizes. None is the model's size.
            width: pixels.
            aspect_ratio: width over height, instead of a size; the nearest published one at the model's number of
                pixels is generated.
            guidance_scale: classifier-free guidance, for all scales or one a scale: 1 or less turns it off (off at all
                scales halves the work). This and the next three are the model's own setting if None.
            temperature: divides the logits, for all scales or one a scale; the released code calls it tau. Below 1 is
                bolder, above 1 more varied.
            top_k: draw among so many entries of the codebook only; 0 is all. Means nothing for bits.
            top_p: draw among the likeliest entries (or values of a bit) that hold this fraction of the probability; 0
                is all.
            num_images_per_prompt: images per prompt; B = P times this.
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
            prompt_embeds: text states instead of `prompt`, (P, M, Dt).
            prompt_attention_mask: (P, M), True on real tokens.
            negative_prompt_embeds: text states instead of `negative_prompt`, (P, M, Dt).
            negative_prompt_attention_mask: (P, M).
            max_sequence_length: tokens kept of a prompt; None is the model's limit.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, C, h, w).
            return_dict: whether to wrap the result.
            callback_on_step_end: called as `callback(pipe, scale, timestep, tensors)` after each scale; latents it
                returns replace ours. It may set `pipe.interrupt = True`.
            callback_on_step_end_tensor_inputs: the tensors it gets: "latents" or "denoised_latents" (the image so
                far, for `pipe.preview` or `pipe.decode_latents`), "indices" (the scale's tokens (B, N), or bits
                (B, N, d)).
            attention_kwargs: passed on to the transformer, e.g. `{"scale": 0.5}` for LoRAs.

        Returns:
            The images; none when the run was interrupted (then `pipe.interrupted` is True).

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range.
        """
        self._interrupt = self._interrupted = self._finish_now = False
        self.check_parts("transformer", "vae")
        grids = self.resolve_schedule(height, width, aspect_ratio)
        how = self._sampling(len(grids), guidance_scale, temperature, top_k, top_p)
        self._guidance_scale = how.guidance_scale[0]
        self._is_guided = any(map(needs_unconditional, how.guidance_scale))
        check_count("num_images_per_prompt", num_images_per_prompt, 1, 1024)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        options = ScaleOptions(kv_policy, kv_budget, kv_dtype, kv_observe, acceleration, search, image, mask_image)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)

        rows, mask = self._encode_branches(
            (prompt, prompt_embeds, prompt_attention_mask),
            (negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask),
            num_images_per_prompt,
            max_sequence_length,
        )  # (B or 2B, M, Dt), (B or 2B, M)
        count = len(rows) // (2 if self._is_guided else 1)
        check_generators(generator, count)
        task = self._task(rows, mask, prompt, count, num_images_per_prompt, grids, how, attention_kwargs)
        generated = self._generate(task, options, generator, callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self._finish(generated, output_type, return_dict)

    # ----------------------------------------------------------------- settings

    def _sampling(
        self,
        num_scales: int,
        guidance_scale: PerScale | None,
        temperature: PerScale | None,
        top_k: int | None,
        top_p: float | None,
    ) -> ScaleSampling:
        """Fill in what the call left open, and give every scale its value."""
        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        named = {name: value for name, value in given.items() if value is not None}
        full: dict[str, Any] = {**DEFAULTS, **self.config["defaults"], **named}
        for name in ("guidance_scale", "temperature"):
            values = full[name] if isinstance(full[name], Sequence) else [full[name]] * num_scales
            if len(values) != num_scales:
                raise ValueError(
                    f"{name} has {len(values)} values; expected one, or one for each of {num_scales} scales"
                )
            full[name] = tuple(values)
        return ScaleSampling(**full)

    @property
    def pixels_per_token(self) -> int:
        """Pixels that one token covers along a side."""
        return self.vae_scale_factor * self.transformer.config.patchify

    def resolve_schedule(
        self, height: int | None = None, width: int | None = None, aspect_ratio: float | None = None
    ) -> tuple[Grid, ...]:
        """Find the schedule of scales for an image.

        Args:
            height: pixels, given together with the width.
            width: pixels.
            aspect_ratio: width over height, instead of a size.

        Returns:
            Rows and columns of each scale.

        Raises:
            ValueError: a size that no schedule has, or half a size; for models with one schedule, another size.
        """
        own = self.transformer.grids
        size = self.pixels_per_token
        if aspect_ratio is not None:
            check_number("aspect_ratio", aspect_ratio, 0.1, 10.0)
            if height is not None or width is not None:
                raise ValueError("give aspect_ratio, or height and width, not both")
            return self._schedule_of_ratio(1 / aspect_ratio)
        if height is None and width is None:
            return own
        if height is None or width is None:
            raise ValueError(f"got height={height} and width={width}: give both, or aspect_ratio")
        self.check_size(height, width, size)
        last = (height // size, width // size)
        offered = self._offered()
        if last not in offered:
            near = min(offered, key=lambda grid: (abs(grid[0] - last[0]) + abs(grid[1] - last[1]), grid))
            raise ValueError(
                f"no schedule of scales ends in {height} x {width} pixels (height x width). Nearest: "
                f"height={near[0] * size}, width={near[1] * size}."
            )
        return offered[last]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of all images that can be generated, the model's own first."""
        own, side = self.transformer.grids[-1], self.pixels_per_token
        others = [grid for grid in self._offered() if grid != own]
        return tuple((rows * side, columns * side) for rows, columns in (own, *others))

    def _offered(self) -> dict[Grid, tuple[Grid, ...]]:
        """Return schedules by the grid of their last scale."""
        own = self.transformer.grids
        return {**(published_schedules() if self._is_flexible else {}), own[-1]: own}

    @property
    def _is_flexible(self) -> bool:
        """Whether images of other sizes than the model's own can be generated."""
        return self.transformer.config.bitwise and self.transformer.config.positions == "rotary"

    def _schedule_of_ratio(self, height_over_width: float) -> tuple[Grid, ...]:
        """Return the published schedule of the nearest ratio, with as many scales as the model's own."""
        own = self.transformer.grids
        if not self._is_flexible or len(own) not in NUM_SCALES.values():
            rows, columns = (side * self.pixels_per_token for side in own[-1])
            raise ValueError(f"this model generates {rows} x {columns} pixels only: leave aspect_ratio away")
        return SCALE_SCHEDULES[nearest_ratio(height_over_width)][: len(own)]

    # --------------------------------------------------------------------- text

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Encode prompts as `TextConditionedPipeline.encode_prompt` does; with no negative side unless one is given.

        The network has an empty text of its own, from which a call without a negative prompt steers away.

        Returns:
            States (B, L, Dt) and mask (B, L), bool, then those of the negative side or None.
        """
        says_no = negative_prompt is not None or negative_prompt_embeds is not None
        return super().encode_prompt(
            prompt,
            negative_prompt,
            do_classifier_free_guidance and says_no,
            num_images_per_prompt,
            device,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            self._text_limit() if max_sequence_length is None else max_sequence_length,
        )

    def _text_limit(self) -> int | None:
        """Return the token limit of a prompt: the smaller of encoder's and network's; None if one is missing."""
        if self.text_encoder is None or self.tokenizer is None or self.transformer is None:
            return None
        return min(text_limit(self.tokenizer, self.text_encoder), self.transformer.config.text_max_length)

    def _encode_branches(
        self,
        positive: tuple[Any, Tensor | None, Tensor | None],
        negative: tuple[Any, Tensor | None, Tensor | None],
        num_images_per_prompt: int,
        max_length: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode the text of the images and, with guidance behind it, what to steer away from.

        Args:
            positive: prompt, its states, its mask.
            negative: the same; all None for the learned empty text.
            num_images_per_prompt: images per prompt.
            max_length: tokens kept of a prompt.

        Returns:
            States (B or 2B, M, Dt) and mask (B or 2B, M), None where all tokens are real.
        """
        guided = self._is_guided
        cond, mask, uncond, uncond_mask = self.encode_prompt(
            positive[0],
            negative[0],
            guided,
            num_images_per_prompt,
            None,
            *positive[1:],
            *negative[1:],
            max_length,
        )  # (B, M, Dt), (B, M), and the same again or None
        if guided and uncond is None:
            uncond = self.transformer.null_text_embeds(cond.shape[1], len(cond)).to(cond)  # (B, M, Dt)
            uncond_mask = mask  # as long as the text it stands beside
        states, masks = cond, mask
        if uncond is not None and uncond_mask is not None:
            states, masks = torch.cat([cond, uncond]), torch.cat([mask, uncond_mask])  # (2B, M, Dt), (2B, M)
        if not masks.any(dim=1).all():
            raise ValueError("a prompt has no token at all: the tokenizer adds no end token to it. Say something.")
        return states, None if masks.all() else masks

    # --------------------------------------------------------------------- loop

    def _task(
        self,
        states: Tensor,
        mask: Tensor | None,
        prompt: str | list[str] | None,
        count: int,
        images_per_prompt: int,
        grids: tuple[Grid, ...],
        how: ScaleSampling,
        attention_kwargs: dict[str, Any] | None,
    ) -> ScaleTask:
        """Return what to generate: `count` images B from text states (B or 2B, M, Dt)."""
        guided = len(states) > count
        prompts = [prompt or ""] * (count // images_per_prompt) if not isinstance(prompt, list) else prompt

        def prepare(transformer: Any, rows: Tensor) -> Any:
            both = torch.cat([rows, rows + count]) if guided else rows  # (B',) or (2B',)
            return transformer.prepare_condition(
                encoder_hidden_states=states[both],
                encoder_attention_mask=None if mask is None else mask[both],
                grids=grids,
                attention_kwargs=attention_kwargs,
            )

        def sample(logits: Tensor, scale: int, generator: Generators) -> tuple[Tensor, Tensor]:
            tokens = how.sample(logits, scale, generator)  # (B, N) or (B, N, d)
            return tokens, tokens

        return ScaleTask(
            prepare,
            prompts=[one for one in prompts for _ in range(images_per_prompt)],
            images_per_prompt=images_per_prompt,
            guided=guided,
            guidance=how.guidance_scale,
            guide=lambda cond, uncond, _scale, guidance_scale: guide_logits(cond, uncond, max(guidance_scale - 1, 0.0)),
            sample=sample,
            grids=grids,
            flexible=self.transformer.config.bitwise,
            attention_kwargs=attention_kwargs,
        )
