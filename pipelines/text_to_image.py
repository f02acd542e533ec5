"""Text to image by flow matching, with the call of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from pipelines.base import OUTPUT_TYPES
from pipelines.call_defaults import takes_call_defaults
from pipelines.flow_text import DEFAULT_GUIDANCE, DEFAULT_STEPS, DEFAULTS, FlowTextPipeline
from pipelines.info.record import PipelineInfo
from pipelines.inputs.checks import check_choice, check_count, check_generators, check_number, check_sigmas
from pipelines.inputs.inpaint import InpaintRegion, MaskInput, fill_in, read_mask
from pipelines.inputs.pixels import ImageInput, read_pixels
from sampling.timesteps import set_timesteps

Images = list[Image.Image] | np.ndarray | Tensor


class TextToImagePipeline(FlowTextPipeline):
    """Generate images from text with a flow-matching transformer.

    LoRA files of the transformer load and save through `load_lora_weights` and `save_lora_weights`.

    Args:
        transformer: predicts the velocity `noise - data`, e.g. `dit.models.text_dit.TextDiT`.
        text_encoder: a transformers encoder of the T5 or CLIP text kind.
        tokenizer: its tokenizer.
        vae: autoencoder, one of `dit.tokenizers` or of diffusers.
        scheduler: a flow-matching scheduler, e.g. `FlowMatchEulerDiscreteScheduler`.
        defaults: settings of a call that suit this model, by the names of `DEFAULTS`.

    Raises:
        ValueError: an unknown name among the defaults.

    Example:
        >>> from pipelines import load_pipeline
        >>> pipe = load_pipeline("stickers")
        >>> pipe("a red apple on a white background").images[0].save("apple.png")
    """

    tasks: ClassVar[tuple[str, ...]] = ("text_to_image", "image_to_image", "inpaint")
    call_arguments: ClassVar[Mapping[str, str]] = {
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "height": "height",
        "width": "width",
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "image": "image",
        "mask": "mask_image",
        "strength": "strength",
        "batch_size": "num_images_per_prompt",
        "seed": "generator",
    }
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "denoised_latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    ]

    def info(self) -> PipelineInfo:
        """Return what this pipeline is and can do."""
        rows, columns = self._default_cells()
        own: dict[str, Any] = {**DEFAULTS, **self.config["defaults"]}
        return self._declare(
            height=rows * self.vae_scale_factor,
            width=columns * self.vae_scale_factor,
            multiple=self.pixels_per_token,
            defaults=own,
            steps=int(own["num_inference_steps"]),
            guidance=float(own["guidance_scale"]),
            has_scheduler=self.scheduler is not None,
            can_load_lora=True,
            knows_words=True,
        )

    @takes_call_defaults
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        strength: float = 0.6,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = DEFAULT_GUIDANCE,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        mask_image: MaskInput | None = None,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Generate.

        Args:
            prompt: what to generate, one string or a list of P.
            negative_prompt: what to steer away from, one for all or one per prompt; needs guidance.
            image: start from this image (or P of them) instead of noise: PIL, or arrays/tensors in [0, 1].
            strength: how much of `image` is changed, 0 < strength <= 1 (1 ignores it).
            height: pixels; None is the size the model was trained for.
            width: pixels; None is the size the model was trained for.
            num_inference_steps: steps; with `image`, about `strength` of them are done.
            sigmas: custom noise levels instead, decreasing in (0, 1], before the scheduler's shift.
            guidance_scale: classifier-free guidance (arXiv 2207.12598); 1 or less turns it off.
            num_images_per_prompt: images per prompt; B = P times this.
            generator: seeded generator, or one per image; noise is drawn image by image on the CPU.
            latents: the starting noise itself, (B, C, H / f, W / f).
            prompt_embeds: text states instead of `prompt`, (P, L, Dt).
            prompt_attention_mask: (P, L), True on real tokens.
            negative_prompt_embeds: text states instead of `negative_prompt`, (P, L, Dt).
            negative_prompt_attention_mask: (P, L).
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent"
                (normalised latents).
            return_dict: whether to wrap the result.
            attention_kwargs: passed on to the transformer, e.g. `{"scale": 0.5}` for LoRAs.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; tensors it
                returns replace ours. It may set `pipe.interrupt = True`.
            callback_on_step_end_tensor_inputs: the tensors it gets; "denoised_latents" is the current guess of
                the finished latents, good for `pipe.preview`.
            max_sequence_length: tokens kept of a prompt; None is the model's limit.
            guidance_rescale: 0 to 1, see `sampling.guidance.rescale_to`.
            guidance_interval: lowest and highest sigma with guidance (arXiv 2404.07724); None is all.
            mask_image: with `image`: generate where it is white, keep every other pixel as it is, see
                `pipelines.inputs.inpaint`. `strength` is how much of what was there is changed; 1 forgets it.

        Returns:
            The images; none when the run was interrupted (then `pipe.interrupted` is True).

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range; the message says what is accepted.
        """
        self._interrupt = self._interrupted = self._finish_now = False
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        self.check_parts("transformer", *(() if output_type == "latent" and image is None else ("vae",)))
        check_count("num_inference_steps", num_inference_steps, 1, 1000)
        check_count("num_images_per_prompt", num_images_per_prompt, 1, 1024)
        check_number("guidance_scale", guidance_scale, 0.0, 100.0)
        check_number("guidance_rescale", guidance_rescale, 0.0, 1.0)
        check_number("strength", strength, 0.01, 1.0)
        if sigmas is not None:
            check_sigmas(sigmas)
        if mask_image is not None and image is None:
            raise ValueError("mask_image without image: pass the image whose other parts should be kept.")
        height, width = self._resolve_size(height, width, latents)
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._guidance_interval, self._attention_kwargs = guidance_interval, attention_kwargs
        device = self._execution_device

        embeds, mask, negative_embeds, negative_mask = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_images_per_prompt,
            device,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            max_sequence_length,
        )  # (B, L, Dt), (B, L), (B, L, Dt), (B, L)
        check_generators(generator, len(embeds))
        timesteps = set_timesteps(
            self.scheduler,
            num_inference_steps,
            num_tokens=height * width // self.pixels_per_token**2,
            device=device,
            sigmas=sigmas,
            strength=1.0 if image is None else strength,
        )
        noise = self._start_noise(len(embeds), height, width, generator, latents).to(device)  # (B, C, h, w)
        latents = self.prepare_latents(len(embeds), height, width, timesteps, None, noise, image)
        kept = None if mask_image is None else self._inpaint_region(image, mask_image, height, width, noise)

        latents = self._denoise(
            {"latents": latents, "prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds},
            mask if negative_mask is None else torch.cat([negative_mask, mask]),
            timesteps,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            None if kept is None else kept.blend,
        )  # (B, C, h, w)
        if self._interrupted or latents is None:
            images: Any = []
        elif output_type == "latent":
            images = latents
        else:
            pixels = self.decode_latents(latents)  # (B, 3, H, W)
            images = self.image_processor.postprocess(pixels if kept is None else kept.composite(pixels), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # -------------------------------------------------------------------- sizes

    def _resolve_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Fill in the size: that of the latents, else that of the training; then check it."""
        rows, columns = self._default_cells() if latents is None else latents.shape[-2:]
        height = rows * self.vae_scale_factor if height is None else height
        width = columns * self.vae_scale_factor if width is None else width
        self.check_size(height, width, self.pixels_per_token)
        return height, width

    # ------------------------------------------------------------------ latents

    def prepare_latents(
        self,
        count: int,
        height: int,
        width: int,
        timesteps: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
        image: ImageInput | None = None,
    ) -> Tensor:
        """Return where the run starts: noise, or an image noised to the first timestep.

        Args:
            count: number of images B.
            height: pixels.
            width: pixels.
            timesteps: those to visit, (S,).
            generator: see `prepare_noise`.
            noise: the noise itself, (B, C, h, w).
            image: the image to start from.

        Returns:
            Latents, (B, C, h, w), float32.

        Raises:
            ValueError: `noise` has another shape, or NaN in it.
        """
        noise = self._start_noise(count, height, width, generator, noise)
        noise = noise.to(timesteps.device, torch.float32)
        if image is None:
            return noise
        start = self.encode_image(image, height, width)  # (P, C, h, w)
        if count % len(start):
            raise ValueError(f"Got {len(start)} images for {count} output images: pass one, or one per prompt.")
        start = start.repeat_interleave(count // len(start), dim=0)  # (B, C, h, w)
        sigma = timesteps[0] / self.scheduler.config.num_train_timesteps
        return torch.lerp(start, noise, sigma)  # (1 - sigma) * data + sigma * noise

    def _start_noise(
        self,
        count: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: Tensor | None,
    ) -> Tensor:
        """Return the noise (B, C, h, w) of a run, drawn or given and checked."""
        f = self.vae_scale_factor
        shape = (self.transformer.config.in_channels, height // f, width // f)
        if noise is None:
            noise = self.prepare_noise(shape, count, generator)  # (B, C, h, w)
        elif noise.shape != (count, *shape) or not torch.isfinite(noise).all():
            raise ValueError(
                f"latents must be finite and of shape {(count, *shape)} (images, channels, height / {f}, "
                f"width / {f}), got {tuple(noise.shape)}."
            )
        return noise

    def _inpaint_region(
        self, image: Any, mask_image: MaskInput, height: int, width: int, noise: Tensor
    ) -> InpaintRegion:
        """Prepare what inpainting keeps of images (P of them), for the B images of a run."""
        pixels = self._read_pixels(image, height, width)  # (P, 3, H, W)
        mask = read_mask(mask_image, height, width).to(pixels.device)  # (P', 1, H, W)
        if len(noise) % len(pixels) or len(noise) % len(mask):
            raise ValueError(f"Got {len(pixels)} images and {len(mask)} masks for {len(noise)} output images.")
        pixels = pixels.repeat_interleave(len(noise) // len(pixels), dim=0)  # (B, 3, H, W)
        mask = mask.repeat_interleave(len(noise) // len(mask), dim=0)  # (B, 1, H, W)
        latents = self._encode_pixels(fill_in(pixels, mask))  # (B, C, h, w)
        return InpaintRegion(pixels, mask, latents, noise.to(latents))

    @torch.no_grad()
    def encode_image(self, image: ImageInput, height: int, width: int) -> Tensor:
        """Encode images to normalised latents; transparent parts become white.

        Args:
            image: PIL image, float array (H, W, 3) or tensor (3, H, W) in [0, 1], a batch or a list of them.
            height: pixels, to which the image is resized.
            width: pixels.

        Returns:
            Latents, (P, C, h, w), float32.

        Raises:
            TypeError: not an image.
            ValueError: values outside [0, 1].
        """
        return self._encode_pixels(self._read_pixels(image, height, width))

    def _read_pixels(self, image: ImageInput, height: int, width: int) -> Tensor:
        """Read and resize images: (P, 3, H, W) in [-1, 1]."""
        return read_pixels(image, height, width, self.image_processor).to(self._execution_device, torch.float32)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode pixels (P, 3, H, W) to normalised latents (P, C, h, w), float32."""
        tokenizer = self.visual_tokenizer
        latents = tokenizer.encode(pixels.to(self._execution_device, self.vae.dtype), return_dict=False)[0]
        return tokenizer.normalize_latents(latents).float()  # (P, C, h, w)
