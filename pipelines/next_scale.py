"""Class label to picture, scale by scale, with VAR (arXiv 2404.02905); and what text pipelines share with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from dit.cache import POLICIES
from dit.tokenizers.multi_scale_bsq import MultiScaleBSQ
from pipelines.base import OUTPUT_TYPES, TesseraPipeline
from pipelines.checks import check_choice, check_count, check_number
from pipelines.labels import Label, label_ids, names_of
from pipelines.lora import TransformerLoraMixin
from sampling.next_scale import ScaleWalk
from sampling.tokens import Generators, draw_tokens, guide_logits, mix_codes, ramp, truncate

Pictures = list[Image.Image] | np.ndarray | Tensor


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


class NextScalePipeline(TesseraPipeline, TransformerLoraMixin):
    """A pipeline with a `NextScaleTransformer` and a multi-scale tokenizer; each scale is a step of the call."""

    _exclude_from_cpu_offload: ClassVar[list[str]] = ["vae"]  # small, and every scale goes through it
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "denoised_latents", "indices"]
    _attention_kwargs: dict[str, Any] | None = None

    def _walk(
        self,
        walk: ScaleWalk,
        callback: Callable[..., dict[str, Tensor] | None] | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """Go through the scales, with progress bar, callback and interruption; returns the latents (B, C, h, w)."""
        self._num_timesteps = walk.num_scales
        with self.progress_bar(total=walk.num_scales) as bar:
            for scale in range(walk.num_scales):
                if self._interrupt:
                    break
                indices = walk.step(scale)
                tensors = {"latents": walk.latents, "denoised_latents": walk.latents, "indices": indices}
                returned = self.run_callback(callback, scale, torch.tensor(scale), callback_inputs, tensors)
                walk.latents = returned["latents"]
                bar.update()
                if self._finish_now:
                    break
        self._interrupted = self._interrupt
        return walk.latents

    def _finish(self, latents: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple[Pictures]:
        """Turn the latents (B, C, h, w) of a run into what the caller asked for."""
        if self._interrupted:
            images: Any = []
        elif output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class NextScaleClassToImagePipeline(NextScalePipeline):
    """Paint pictures of a class, coarse to fine: each scale is one pass of the network and one step of the call.

    Args:
        transformer: a `dit.models.next_scale.NextScaleTransformer`.
        vae: the tokenizer that the transformer was trained on, a `dit.tokenizers.multi_scale_vq.MultiScaleVQ`.
        id2label: name of each class, several names separated by commas; then calls take names too.

    Raises:
        ValueError: transformer and tokenizer don't belong together.

    Example:
        >>> pipe = load_pipeline("VAR-d16")  # a folder written by `tessera convert --family var`
        >>> pipe([207, 360], guidance_scale=4.0).images[0].save("retriever.png")
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: ModelMixin, vae: ModelMixin, id2label: dict[int, str] | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.labels = names_of(id2label)
        self.register_to_config(id2label={str(label): name for label, name in (id2label or {}).items()} or None)
        check_pair(transformer, vae, wants_text=False)
        self.vae_scale_factor = vae.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional branch is evaluated too: any guidance needs it, and 0 is none."""
        return self._guidance_scale > 0

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor,
        guidance_scale: float = 4.0,
        top_k: int = 900,
        top_p: float = 0.95,
        temperature: float = 1.0,
        smooth: bool = False,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        kv_policy: str = "full",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple[Pictures]:
        """Paint.

        Args:
            class_labels: one label or a list of P: class numbers, or names if the pipeline knows them.
            guidance_scale: strength of the guidance at the last scale; it grows evenly from 0 at the first one. As in
                the released sampler, 0 turns it off (and halves the work); 1.5 scores best, 4 looks best.
            top_k: draw among so many entries of the codebook only; 0 is all.
            top_p: draw among the likeliest entries that hold this share of the probability; 0 is all.
            temperature: divides the logits; below 1 is bolder, above 1 more varied.
            smooth: mix codebook entries in place of choosing one; good to look at.
            num_images_per_prompt: pictures per label; B = P times this.
            generator: a single one draws for all pictures at once, as the released sampler does; of a list of B, each
                draws for its own picture, which then does not depend on the batch.
            kv_policy: what to keep of earlier scales, one of `dit.cache.POLICIES`.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, C, h, w).
            return_dict: whether to wrap the result.
            callback_on_step_end: called as `callback(pipe, scale, timestep, tensors)` after each scale; latents it
                returns replace ours. It may set `pipe.interrupt = True`.
            callback_on_step_end_tensor_inputs: the tensors it gets: "latents" or "denoised_latents" (the picture so
                far, for `pipe.preview` or `pipe.decode_latents`), "indices" (the scale's tokens, (B, N)).
            attention_kwargs: passed on to the transformer, e.g. `{"scale": 0.5}` for LoRAs.

        Returns:
            The pictures; none when the run was interrupted (then `pipe.interrupted` is True).

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range.
        """
        self._interrupt = self._interrupted = self._finish_now = False
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        how = TokenSampling(guidance_scale, top_k, top_p, temperature, smooth)
        check_count("num_images_per_prompt", num_images_per_prompt, 1, 1024)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_choice("kv_policy", kv_policy, POLICIES)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        labels = self.get_label_ids(class_labels).repeat_interleave(num_images_per_prompt)  # (B,)
        check_generators(generator, len(labels))

        latents = self._paint(
            labels.to(self._execution_device),
            how,
            generator,
            kv_policy,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )  # (B, C, h, w)
        return self._finish(latents, output_type, return_dict)

    def get_label_ids(self, labels: Label | Sequence[Label] | Tensor) -> Tensor:
        """Class numbers (P,) of labels given as numbers or names; the number after the last class is 'no class'."""
        return label_ids(labels, self.labels, self.transformer.config.num_classes)

    def _paint(
        self,
        labels: Tensor,
        how: TokenSampling,
        generator: Generators,
        kv_policy: str,
        callback: Callable[..., dict[str, Tensor] | None] | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """Walk through the scales; returns the latents (B, C, h, w)."""
        no_class = torch.full_like(labels, self.transformer.config.num_classes)
        rows = torch.cat([labels, no_class]) if self.do_classifier_free_guidance else labels  # (B,) or (2B,)
        count = len(self.vae.grids)
        walk = ScaleWalk(
            self.transformer,
            self.vae,
            self.transformer.prepare_condition(rows),
            self.transformer.make_cache(len(rows), kv_policy),
            self.vae.start_latents(len(labels)),
            guided=self.do_classifier_free_guidance,
            guide=lambda cond, uncond, scale: guide_logits(cond, uncond, self._guidance_scale * ramp(scale, count)),
            draw=lambda logits, scale: self._draw(logits, ramp(scale, count), how, generator),
            num_scales=count,
            step_arguments={"attention_kwargs": self._attention_kwargs},
        )
        return self._walk(walk, callback, callback_inputs)

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
            Indices (B, N), and what to add to the picture: the same, or mixed codebook entries (B, N, C).
        """
        logits = truncate(logits, how.top_k, how.top_p, how.temperature)  # (B, N, V)
        indices = draw_tokens(logits, generator)  # (B, N)
        if not how.smooth:
            return indices, indices
        return indices, mix_codes(logits, self.vae.quantizer.codebook.weight, progress, generator)  # (B, N, C)


def check_pair(transformer: ModelMixin, vae: ModelMixin, wants_text: bool) -> None:
    """Raise when a transformer speaks of other tokens than its tokenizer, or is painted by the other pipeline."""
    theirs, ours = transformer.config, vae.config
    if (theirs.text_dim is not None) != wants_text:
        kind, name = ("text", "Text") if theirs.text_dim is not None else ("class labels", "Class")
        raise ValueError(f"this transformer reads {kind}: use NextScale{name}ToImagePipeline")
    pairs = {
        "tokens": ("bits" if theirs.bitwise else "indices", "bits" if isinstance(vae, MultiScaleBSQ) else "indices"),
        "latent channels": (theirs.latent_channels, ours.latent_channels),
        "latent pixels a token": (theirs.patchify, ours.get("patchify", 1)),
    }
    if not theirs.bitwise:  # bits have no codebook, and their tokenizer takes any schedule
        pairs["schedules of scales"] = (list(transformer.grids), list(vae.grids))
        pairs["codebook sizes"] = (theirs.vocab_size, ours.get("vocab_size"))
    for what, (one, other) in pairs.items():
        if one != other:
            raise ValueError(
                f"transformer and vae have different {what}: {one} and {other}. Use the tokenizer that the "
                "transformer was trained on; `tessera convert` makes a pair that fits."
            )


def check_generators(generator: object, count: int) -> None:
    """Raise for anything but None, a generator, or one generator a picture."""
    given = generator if isinstance(generator, list | tuple) else [generator] * count
    if len(given) != count:
        raise ValueError(f"Got {len(given)} generators for {count} pictures: pass one, or one per picture.")
    for one in given:
        if one is not None and not isinstance(one, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or a list of them, got {type(one).__name__}. "
                "From a seed: torch.Generator().manual_seed(seed)."
            )
