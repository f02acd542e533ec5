"""Class label to image with DiT (diffusion) or SiT (flow), with the call of diffusers' DiTPipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from pipelines.base import OUTPUT_TYPES, TesseraPipeline
from pipelines.call_defaults import takes_call_defaults
from pipelines.info.record import PipelineInfo, class_table
from pipelines.inputs.checks import check_choice, check_count, check_generators, check_number
from pipelines.inputs.labels import Label, label_ids, names_of
from pipelines.lora.mixin import TransformerLoraMixin
from sampling.denoise import Denoiser, State, denoise
from sampling.diffusion_targets import is_flow
from sampling.guidance import classifier_free_guidance
from sampling.timesteps import set_timesteps

DEFAULT_STEPS, DEFAULT_GUIDANCE = 50, 4.0
"""Of a call that names none."""


class ClassToImagePipeline(TesseraPipeline, TransformerLoraMixin):
    """Generate images of a class.

    A transformer with the objective "epsilon" (DiT) takes diffusion schedulers: DDPM with the learned variance
    ("learned_range"), DDIM, DPM-Solver. One with "velocity" (SiT) takes flow schedulers: diffusers' `FlowMatch...`
    for the ODE, `sampling.schedulers.flow_match_sde.FlowMatchSDEScheduler` for the SDE.

    Args:
        transformer: a `dit.models.dit.DiT`.
        vae: autoencoder, one of `dit.tokenizers` or of diffusers; without one only latents come out.
        scheduler: one that fits the transformer's objective.
        id2label: name of each class, several names separated by commas; then calls take names too.

    Example:
        >>> pipe = load_pipeline("DiT-XL-2-256")  # a folder written by `tessera convert`
        >>> pipe([207, 360], guidance_scale=4.0).images[0].save("retriever.png")
    """

    tasks: ClassVar[tuple[str, ...]] = ("class_to_image",)
    call_arguments: ClassVar[Mapping[str, str]] = {
        "label": "class_labels",
        "height": "height",
        "width": "width",
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "batch_size": "num_images_per_prompt",
        "seed": "generator",
    }
    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]  # a converted checkpoint may come without one
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "denoised_latents"]
    _attention_kwargs: dict[str, Any] | None = None
    _cfg_channels: int | None = None

    def __init__(
        self,
        transformer: ModelMixin,
        vae: ModelMixin | None,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label={str(label): name for label, name in (id2label or {}).items()} or None)
        self.labels = names_of(id2label)
        self.vae_scale_factor = 8 if vae is None else self.visual_tokenizer.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def info(self) -> PipelineInfo:
        """Return what this pipeline is and can do."""
        config = self.transformer.config
        side = config.sample_size * self.vae_scale_factor
        return self._declare(
            height=side,
            width=side,
            multiple=self.vae_scale_factor * config.patch_size,
            steps=DEFAULT_STEPS,
            guidance=DEFAULT_GUIDANCE,
            labels=class_table(config.num_classes, self.labels),
            label_ids=self.labels,
            has_scheduler=self.scheduler is not None,
            can_load_lora=True,
        )

    @takes_call_defaults
    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor,
        guidance_scale: float = DEFAULT_GUIDANCE,
        num_inference_steps: int = DEFAULT_STEPS,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cfg_channels: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | Tensor]:
        """Generate.

        Args:
            class_labels: one label or a list of P: class numbers, or names if the pipeline knows them.
            guidance_scale: classifier-free guidance (arXiv 2207.12598); 1 or less turns it off.
            num_inference_steps: steps.
            height: pixels; None is the size the model was trained for.
            width: pixels; None is the size the model was trained for.
            num_images_per_prompt: images per label; B = P times this.
            generator: seeded generator, or one per image; image i does not depend on the batch size.
            latents: the starting noise itself, (B, C, H / f, W / f).
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent"
                (normalised latents).
            return_dict: whether to wrap the result.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; tensors it
                returns replace ours. It may set `pipe.interrupt = True`.
            callback_on_step_end_tensor_inputs: the tensors it gets; "denoised_latents" is the current guess of
                the finished latents, good for `pipe.preview`.
            cfg_channels: guide only the first so many latent channels; None guides all. The released samplers of
                DiT and SiT guide 3 of 4.
            attention_kwargs: passed on to the transformer, e.g. `{"scale": 0.5}` for LoRAs.

        Returns:
            The images; none when the run was interrupted (then `pipe.interrupted` is True).

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range, or the scheduler does not fit the transformer.
        """
        self._interrupt = self._interrupted = self._finish_now = False
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._cfg_channels = cfg_channels
        height, width = self._resolve_size(height, width, latents)
        self._check_call(num_inference_steps, num_images_per_prompt, output_type)
        self._check_scheduler()
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)

        device = self._execution_device
        labels = self.get_label_ids(class_labels).repeat_interleave(num_images_per_prompt).to(device)  # (B,)
        check_generators(generator, len(labels))
        shape = (self.transformer.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        step_generators = _generator_per_image(generator, len(labels))  # before the start noise advances it
        latents = self._prepare_latents(shape, len(labels), generator, latents, device)  # (B, C, h, w)
        timesteps = self._set_timesteps(num_inference_steps, shape, device)  # (S,)

        latents = self._denoise(
            latents,
            labels,
            timesteps,
            step_generators,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )  # (B, C, h, w)
        if self._interrupted or latents is None:
            images: Any = []
        elif output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents).float(), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def get_label_ids(self, labels: Label | Sequence[Label] | Tensor) -> Tensor:
        """Return class numbers of labels given as numbers or names.

        Args:
            labels: one or a list of P.

        Returns:
            (P,), int64.

        Raises:
            TypeError: something else than ints and strings.
            ValueError: no labels, an unknown name, or a number that the model has no row for.
        """
        # The row after the last class is 'no class', which may be generated too.
        last = self.transformer.config.num_classes - (self.transformer.config.class_dropout_prob == 0)
        return label_ids(labels, self.labels, last)

    # ------------------------------------------------------------------- checks

    def _resolve_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Return height and width in pixels: as asked, else of the given latents, else of the model's training."""
        sides = [self.transformer.config.sample_size] * 2 if latents is None else latents.shape[-2:]
        height = height or int(sides[0]) * self.vae_scale_factor
        width = width or int(sides[1]) * self.vae_scale_factor
        self.check_size(height, width, self.vae_scale_factor * self.transformer.config.patch_size)
        return height, width

    def _check_call(self, steps: int, per_label: int, output_type: str) -> None:
        """Raise for arguments out of range."""
        config = self.transformer.config
        check_count("num_inference_steps", steps, 1, 1000)
        check_count("num_images_per_prompt", per_label, 1, 1024)
        check_number("guidance_scale", self._guidance_scale, 0.0, 100.0)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if self.vae is None and output_type != "latent":
            raise ValueError(
                f"output_type={output_type!r} needs an autoencoder and this pipeline has none: load it with "
                "load_pipeline(folder, vae=AutoencoderKL.from_pretrained(...)), or use output_type='latent'."
            )
        if self._cfg_channels is not None:
            check_count("cfg_channels", self._cfg_channels, 1, config.in_channels)
        if self.do_classifier_free_guidance and config.class_dropout_prob == 0:
            raise ValueError(
                f"guidance_scale={self._guidance_scale:g} needs a model that was trained with dropped labels; "
                "this one has no row for 'no class'. Use guidance_scale=1."
            )

    @property
    def _is_flow(self) -> bool:
        """Whether the transformer predicts a velocity along a flow (SiT) rather than noise (DiT)."""
        return self.transformer.config.objective == "velocity"

    def _check_scheduler(self) -> None:
        """Raise when scheduler and transformer speak of different processes; the result would be noise."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if is_flow(self.scheduler) != self._is_flow:
            wanted = "FlowMatchEulerDiscreteScheduler" if self._is_flow else "DDPMScheduler or DDIMScheduler"
            raise ValueError(
                f"{name} does not fit a transformer with the objective {self.transformer.config.objective!r}: "
                f"use {wanted}."
            )
        learned = config.get("variance_type") in ("learned", "learned_range")
        if learned and name.startswith(("DPMSolver", "SASolver")):
            raise ValueError(
                f"{name} with variance_type={config['variance_type']!r} keeps 3 channels of the noise whatever the "
                f"model has: make it with {name}.from_config(config, variance_type=None)."
            )

    # --------------------------------------------------------------------- loop

    def _prepare_latents(
        self,
        shape: tuple[int, int, int],
        count: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """Return the starting noise (B, C, h, w), float32, scaled as the scheduler wants it."""
        if latents is None:
            latents = self.prepare_noise(shape, count, generator)  # (B, C, h, w)
        elif latents.shape != (count, *shape) or not torch.isfinite(latents).all():
            f = self.vae_scale_factor
            raise ValueError(
                f"latents must be finite and of shape {(count, *shape)} (images, channels, height / {f}, "
                f"width / {f}), got {tuple(latents.shape)}."
            )
        return latents.to(device, torch.float32) * float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def _set_timesteps(self, steps: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """Set the scheduler's timesteps (S,): even flow times for SiT, the scheduler's own spacing for DiT."""
        if self._is_flow:
            tokens = shape[1] * shape[2] // self.transformer.config.patch_size**2
            timesteps = set_timesteps(self.scheduler, steps, num_tokens=tokens, device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
            timesteps = self.scheduler.timesteps
        return timesteps

    def _denoise(
        self,
        latents: Tensor,
        labels: Tensor,
        timesteps: Tensor,
        generators: list[torch.Generator] | None,
        callback: Callable[..., dict[str, Tensor] | None] | None,
        callback_inputs: Sequence[str],
    ) -> Tensor | None:
        """Take the latents (B, C, h, w) through the timesteps (S,); arithmetic outside the transformer is float32.

        Returns:
            (B, C, h, w); None if the run was interrupted.
        """
        step_arguments = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_arguments["generator"] = generators
        model = Denoiser(
            network=self.transformer,
            guides=lambda sigma: self.do_classifier_free_guidance,
            predict=partial(self._predict, labels),
            guide=self._guide,
            to_scheduler=self._to_scheduler,
            estimate=self._estimate,
        )
        with self._steps(timesteps, callback, callback_inputs) as control:
            return denoise({"latents": latents}, timesteps, self.scheduler, model, control, step_arguments)

    def _predict(self, labels: Tensor, state: State, timestep: Tensor, guides: bool) -> Tensor:
        """Return the transformer's prediction, float32.

        Args:
            labels: (B,).
            state: "latents", (B, C, h, w).
            timestep: the scheduler's, ().
            guides: whether to predict for 'no class' too.

        Returns:
            (B, C', h, w), or (2B, C', h, w) with 'no class' first; C' is 2 C where the network learned a variance.
        """
        sample = state["latents"]  # (B, C, h, w)
        if hasattr(self.scheduler, "scale_model_input"):
            sample = self.scheduler.scale_model_input(sample, timestep)  # (B, C, h, w)
        if guides:
            no_class = torch.full_like(labels, self.transformer.config.num_classes)
            sample, labels = torch.cat([sample, sample]), torch.cat([no_class, labels])  # (2B, ...)
        return self.transformer(
            sample.to(self.transformer.dtype),
            timestep=self._model_time(timestep).expand(len(labels)),  # a row each: FasterCache halves the batch
            class_labels=labels,
            attention_kwargs=self._attention_kwargs,
            return_dict=False,
        )[0].float()

    def _to_scheduler(self, prediction: Tensor) -> Tensor:
        """Return what the scheduler's step takes of a prediction (B, C', h, w).

        SiT's time runs from noise (0) to data (1) and its velocity points to the data; diffusers' flow schedulers
        count the other way, hence `1 - sigma` in `_model_time` and the minus sign here.
        """
        if self._is_flow:
            return -prediction
        # Only DDPM has the attribute and takes the channels of the variance; others may inherit the config entry,
        # which diffusers' getattr would find too.
        takes_variance = vars(self.scheduler).get("variance_type") in ("learned", "learned_range")
        return prediction if takes_variance else prediction[:, : self.transformer.config.in_channels]

    def _guide(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """Guide the first channels; the others, the variance among them, are those of `cond`; (B, C', h, w)."""
        n = self._cfg_channels or self.transformer.config.in_channels
        head = classifier_free_guidance(cond[:, :n], uncond[:, :n], self._guidance_scale)  # (B, n, h, w)
        return torch.cat([head, cond[:, n:]], dim=1)  # (B, C', h, w)

    def _model_time(self, timestep: Tensor) -> Tensor:
        """Return the transformer's time, (), of a scheduler's timestep."""
        if not self._is_flow:
            return timestep
        return 1.0 - timestep.float() / self.scheduler.config.num_train_timesteps

    def _estimate(self, output: Any, prediction: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
        """Predict the clean latents, (B, C, h, w)."""
        guess = getattr(output, "pred_original_sample", None)
        if guess is not None:
            return guess.float()
        if self._is_flow:
            return latents - (1.0 - self._model_time(timestep)) * prediction
        return output.prev_sample.float()  # solvers that keep their guess to themselves


def _generator_per_image(
    generator: torch.Generator | list[torch.Generator] | None, count: int
) -> list[torch.Generator] | None:
    """Return one generator an image for the noise of stochastic steps, so that image i is the same in any batch.

    A single generator and a list of it mean the same: what the steps draw follows from the state that it has before the
    start noise is drawn.

    Args:
        generator: what the caller gave; left as it is.
        count: number of images B.

    Returns:
        B new generators, each seeded from a copy of the caller's for its image; None stays None.
    """
    if generator is None:
        return None
    given = list(generator) if isinstance(generator, list | tuple) else [generator] * count
    copies = {id(one): one.clone_state() for one in given}  # one for several images goes on from each to the next
    return [_seeded_from(copies[id(one)]) for one in given]


def _seeded_from(source: torch.Generator) -> torch.Generator:
    """Make a generator whose seed is the next draw of another one."""
    seed = torch.randint(2**63 - 1, (1,), generator=source, device=source.device).item()
    return torch.Generator(source.device).manual_seed(int(seed))
