"""Base of next-scale pipelines: calibration of the KV cache, scorers, images in and out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from torch import Tensor

from dit.cache import POLICIES, KVCalibrator, KVProfile, KVReport
from dit.runtime.metrics import psnr, relative_error
from dit.tokenizers.multi_scale_bsq import MultiScaleBSQ
from pipelines.base import TesseraPipeline
from pipelines.info.record import PipelineInfo
from pipelines.inputs.inpaint import read_mask
from pipelines.lora.mixin import TransformerLoraMixin
from pipelines.next_scale.inpaint import InpaintTokens
from pipelines.next_scale.options import Callback, Images, NextScaleOutput, ScaleOptions, ScaleTask
from pipelines.next_scale.run import ScaleRun, same_random_state
from pipelines.next_scale.scorers import read_reward
from sampling.inference_search import Reward, SearchResult
from sampling.tokens import Generators

logger = logging.getLogger(__name__)

PROFILE_FILE, SCORER_FOLDER = "kv_profile.safetensors", "scorer"
"""What a model's folder may hold: a calibration for ScaleKV, and a CLIP-like model as the reward of searches."""


@dataclass
class _Calibration:
    """A calibration under way: its settings, and what watches the caches of the call once it has begun."""

    observe: int
    pool: int
    calibrator: KVCalibrator | None = None


@dataclass(frozen=True)
class Generated:
    """What a call has generated.

    Args:
        latents: (B, C, h, w).
        kept: what stays of an edited image, or None.
        search: what a search found for each prompt, or None.
    """

    latents: Tensor
    kept: InpaintTokens | None
    search: list[SearchResult] | None


class NextScalePipeline(TesseraPipeline, TransformerLoraMixin):
    """A pipeline with a `NextScaleTransformer` and a multi-scale tokenizer; each scale is a step of the call.

    Attributes:
        kv_report: what the cache of the last call kept and took, a `dit.cache.KVReport`.
        last_options: how the last call ran, without its images.
        acceleration_report: what the acceleration of the last call left out, under "inactive" which of its parts left
            out nothing and why, and how far it drifted if that was measured; None without one.
    """

    _exclude_from_cpu_offload: ClassVar[list[str]] = ["vae"]  # small, and every scale goes through it
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "denoised_latents", "indices"]
    kv_report: KVReport | None = None
    last_options: ScaleOptions | None = None
    acceleration_report: dict[str, Any] | None = None
    _is_guided: bool = False  # what the running call began with
    _kv_profile: KVProfile | None = None
    _calibration: _Calibration | None = None  # while `calibrate_kv` runs
    _read_reward: tuple[tuple[Any, torch.device], Reward] | None = None  # of the last search, for the next one

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running (or last) call evaluates the unconditional branch: it does if any scale is guided."""
        return self._is_guided

    @property
    def default_height(self) -> int:
        """Height in pixels of the images of the network's own schedule."""
        return self.transformer.grids[-1][0] * self.transformer.config.patchify * self.vae_scale_factor

    @property
    def default_width(self) -> int:
        """Width in pixels of the images of the network's own schedule."""
        return self.transformer.grids[-1][1] * self.transformer.config.patchify * self.vae_scale_factor

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of all images that can be generated, the model's own first."""
        return ((self.default_height, self.default_width),)

    def _declare(self, **own: Any) -> PipelineInfo:
        """Complete what a class declares of itself by what next-scale pipelines have in common."""
        return super()._declare(
            height=self.default_height,
            width=self.default_width,
            multiple=self.vae_scale_factor * self.transformer.config.patchify,
            sizes=tuple((width, height) for height, width in self.sizes),
            grids=tuple(self.transformer.grids),
            kv_policies=tuple(POLICIES),
            can_search=self.scorer is not None,
            can_load_lora=True,
            **own,
        )

    # -------------------------------------------------------------- calibration

    @property
    def kv_profile(self) -> KVProfile | None:
        """Which layers need their history, for `kv_policy="scalekv"`; of the model's folder if it holds one."""
        path = Path(self.name_or_path or "") / PROFILE_FILE
        if self._kv_profile is None and self.name_or_path and path.is_file():
            self._kv_profile = KVProfile.load(path, self.transformer)
        return self._kv_profile

    def load_kv_profile(self, path: str | PathLike[str], any_weights: bool = False) -> None:
        """Read a calibration for `kv_policy="scalekv"`.

        Args:
            path: file that `calibrate_kv` wrote.
            any_weights: accept other weights of the same architecture, such as a fine-tuned model's.

        Raises:
            ArtifactError: it was measured on another network.
            FileNotFoundError: there is no such file.
        """
        self._kv_profile = KVProfile.load(path, self.transformer, any_weights)

    def calibrate_kv(
        self,
        *arguments: Any,
        path: str | PathLike[str] | None = None,
        observe: int = 16,
        pool: int = 5,
        **keywords: Any,
    ) -> KVProfile:
        """Generate some images, measure which layers need their history, and use that for `kv_policy="scalekv"`.

        Args:
            *arguments: of the call; 16 different prompts or labels are plenty.
            path: where to write the result, or None.
            observe: queries that rank the history.
            pool: width of the maximum over neighbours.
            **keywords: of the call.

        Returns:
            The profile, also at `kv_profile`.
        """
        self._calibration = calibration = _Calibration(observe, pool)
        try:
            call: Any = self  # subclasses can be called
            plain = {"kv_policy": "full", "kv_dtype": "auto", "output_type": "latent"}
            call(*arguments, **{"acceleration": None, **keywords, **plain})  # whatever the defaults of calls are now
        finally:
            self._calibration = None
        if calibration.calibrator is None:
            raise ValueError("the call generated nothing to calibrate on")
        self._kv_profile = calibration.calibrator.profile()
        if path is not None:
            self._kv_profile.save(path, self.transformer)
        return self._kv_profile

    def _make_cache(self, transformer: Any, rows: int, task: ScaleTask, options: ScaleOptions, scales: int) -> Any:
        """Return an empty cache for rows of a network, for the first scales of a schedule."""
        observer, profile, calibration = None, None, self._calibration
        if transformer is self.transformer and calibration is not None:
            if calibration.calibrator is None:
                layers = transformer.config.num_layers
                calibration.calibrator = KVCalibrator(task.grids, layers, calibration.observe, calibration.pool)
            observer = calibration.calibrator
        if transformer is self.transformer and options.kv_policy == "scalekv":
            profile = self.kv_profile
            if profile is not None and profile.grids != task.grids:
                raise ValueError(
                    f"the calibration for ScaleKV is of the schedule {list(profile.grids)}, generated is "
                    f"{list(task.grids)}: run `calibrate_kv` on it"
                )
        plan = transformer.plan_cache(
            options.kv_policy, options.kv_budget, task.grids, profile, observe=options.kv_observe
        )
        return transformer.make_cache(
            rows, grids=task.grids, plan=plan.first(scales), kv_dtype=options.kv_dtype, observer=observer
        )

    # ------------------------------------------------------------------ the run

    def _generate(
        self,
        task: ScaleTask,
        options: ScaleOptions,
        generator: Generators,
        callback: Callback | None,
        callback_inputs: Sequence[str],
    ) -> Generated:
        """Generate a task, and before it the same without acceleration if the drift is to be measured."""
        kept = self._inpaint_tokens(options, task)
        self.last_options = replace(options, image=None, mask_image=None)
        self.acceleration_report = None
        measured: dict[str, Any] = {}
        reference = None
        if options.acceleration is not None and options.acceleration.measure_drift:
            with same_random_state(generator):
                run = self._run(task, replace(options, acceleration=None), generator, kept)
                reference, _ = self._execute(run)  # (B, C, h, w)
                measured["exact_seconds"] = run.seconds
        run = self._run(task, options, generator, kept, callback, callback_inputs)
        latents, found = self._execute(run)  # (B, C, h, w)
        self.acceleration_report = run.report(len(latents))
        if self.acceleration_report is not None:
            for part, reason in self.acceleration_report["inactive"].items():
                logger.warning("acceleration: %s does nothing: %s", part, reason)
            if reference is not None and not self._interrupted:
                pixels, aims = (self.decode_latents(one).clamp(-1, 1) / 2 + 0.5 for one in (latents, reference))
                drift = {"psnr": psnr(pixels, aims), "latent_error": relative_error(latents, reference)}
                self.acceleration_report |= {**measured, "drift": drift}
        return Generated(latents, kept, found)

    def _run(
        self,
        task: ScaleTask,
        options: ScaleOptions,
        generator: Generators,
        kept: InpaintTokens | None,
        callback: Callback | None = None,
        callback_inputs: Sequence[str] = (),
    ) -> ScaleRun:
        """Make a run of a task, with the caches that the options ask for."""

        def make_cache(transformer: Any, rows: int, scales: int) -> Any:
            return self._make_cache(transformer, rows, task, options, scales)

        return ScaleRun(self, task, options, make_cache, generator, kept, callback, callback_inputs)

    def _execute(self, run: ScaleRun) -> tuple[Tensor, list[SearchResult] | None]:
        """Go through the scales once, or with a search once for each prompt; keep the report of the cache."""
        self._num_timesteps, self.kv_report = run.num_scales, None
        search = run.options.search
        if search is None:
            latents, found = run.generate_all(), None
        else:
            latents, found = run.search(search, self._reward(self.scorer if search.reward is None else search.reward))
        self.kv_report = run.kv_report
        return latents, found

    # ------------------------------------------------------------------- search

    def _reward(self, wanted: Any) -> Reward:
        """Return the reward of a search; a model that is named is read once for calls that follow one another."""
        if wanted is None:
            raise ValueError(
                "this model comes without a scorer: give the search a reward, a callable (images, prompts) -> (B,) "
                "or the folder or hub id of a CLIP-like model, as in search=TTSConfig(reward=...)"
            )
        key = (wanted, self._execution_device)
        if self._read_reward is None or self._read_reward[0] != key:
            self._read_reward = (key, read_reward(*key))
        return self._read_reward[1]

    @property
    def scorer(self) -> str | None:
        """Folder of the scorer that comes with the model: in its folder, or beside it under its name."""
        own = Path(self.name_or_path or "")
        found = [own / SCORER_FOLDER, own.with_name(f"{own.name}-{SCORER_FOLDER}")] if own.name else []
        return next((str(folder) for folder in found if folder.is_dir()), None)

    # ---------------------------------------------------------------- in and out

    def _inpaint_tokens(self, options: ScaleOptions, task: ScaleTask) -> InpaintTokens | None:
        """Encode an image to be edited, once for each of the task's images."""
        if options.image is None or options.mask_image is None:
            return None
        side = self.vae_scale_factor * (self.transformer.config.get("patchify", 1) if task.flexible else 1)
        height, width = (one * side for one in task.grids[-1])
        pixels = self.image_processor.preprocess(options.image, height, width).float()  # (P, 3, H, W) in [-1, 1]
        mask = read_mask(options.mask_image, height, width)  # (P', 1, H, W)
        for name, part in (("image", pixels), ("mask_image", mask)):
            if len(part) not in (1, task.count):
                raise ValueError(
                    f"{name} holds {len(part)} images for {task.count} images: pass one, or one per image."
                )
        device = self._execution_device
        pixels = pixels.expand(task.count, -1, -1, -1).to(device)  # (B, 3, H, W)
        mask = mask.expand(task.count, -1, -1, -1).to(device)  # (B, 1, H, W)
        return InpaintTokens.read(self.vae, pixels, mask, task.grids, task.flexible)

    def _finish(self, generated: Generated, output_type: str, return_dict: bool) -> NextScaleOutput | tuple[Images]:
        """Turn what a call has generated into what the caller asked for."""
        latents, kept = generated.latents, generated.kept
        if self._interrupted:
            images: Any = []
        elif output_type == "latent":
            images = latents
        else:
            pixels = self.decode_latents(latents)  # (B, 3, H, W)
            if kept is not None:
                pixels = kept.composite(pixels, torch.arange(len(pixels)))
            images = self.image_processor.postprocess(pixels, output_type)
        self.maybe_free_model_hooks()
        return NextScaleOutput(images=images, search=generated.search) if return_dict else (images,)


def check_pair(transformer: ModelMixin, vae: ModelMixin, wants_text: bool) -> None:
    """Raise when a transformer speaks of other tokens than its tokenizer, or is generated by the other pipeline."""
    theirs, ours = transformer.config, vae.config
    if "bitwise" not in theirs:
        raise ValueError(f"{type(transformer).__name__} predicts no scales: expected a NextScaleTransformer")
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
