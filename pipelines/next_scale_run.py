"""What all next-scale pipelines do between the conditions and the images: cache, search, accelerations, editing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from dit.cache import KV_DTYPES, POLICIES, KVCalibrator, KVProfile, KVReport, ScaleKVCache
from dit.layers.scales import Grid, token_counts
from dit.runtime.compare import psnr, relative_error
from pipelines.base import TesseraPipeline
from pipelines.checks import check_choice, check_count, check_number
from pipelines.inpaint import MaskInput, read_mask
from pipelines.loaded import is_finite
from pipelines.lora import TransformerLoraMixin
from pipelines.next_scale_edit import KeptTokens
from pipelines.scorers import read_reward
from sampling.next_scale import Guide, ScaleWalk, generate
from sampling.scale_acceleration import AppliedAcceleration, ScaleAcceleration
from sampling.test_time_search import Reward, ScaleSearch, SearchResult, TTSConfig
from sampling.tokens import Generators

logger = logging.getLogger(__name__)

Pictures = list[Image.Image] | np.ndarray | Tensor
Callback = Callable[..., dict[str, Tensor] | None]

PROFILE_FILE, SCORER_FOLDER = "kv_profile.safetensors", "scorer"
"""What a model's folder may hold: a calibration for ScaleKV, and a CLIP-like model as the reward of searches."""


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
            raise ValueError("kv_budget=0 would forget everything: expected a share above 0 and up to 1, such as 0.1")
        for name, value, kind in (
            ("acceleration", self.acceleration, ScaleAcceleration),
            ("search", self.search, TTSConfig),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}.")
        if (self.image is None) != (self.mask_image is None):
            raise ValueError("image and mask_image belong together: the picture, and white where it shall be painted.")
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
        guide: joins both branches, by the pipeline's present `_guidance_scale`.
        draw: from a scale's logits, its index and the generator to indices and what to add up.
        grids: schedule of scales.
        flexible: whether the tokenizer takes the schedule at each call.
    """

    prepare: Callable[[Any, Tensor], Any]
    prompts: Sequence[str]
    images_per_prompt: int
    guided: bool
    guidance: Sequence[float]
    guide: Guide
    draw: Callable[[Tensor, int, Generators], tuple[Tensor, Tensor]]
    grids: tuple[Grid, ...]
    flexible: bool = False

    @property
    def count(self) -> int:
        """Images B."""
        return len(self.prompts)


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
    _attention_kwargs: dict[str, Any] | None = None
    _is_guided: bool = False  # what the running call began with
    _kv_profile: KVProfile | None = None
    _calibration: dict[str, int] | None = None
    _calibrator: KVCalibrator | None = None
    _seconds: float = 0.0  # of the network and the draws, in the last run
    kv_report: KVReport | None = None
    last_options: ScaleOptions | None = None
    _read_reward: tuple[tuple[Any, torch.device], Reward] | None = None
    acceleration_report: dict[str, Any] | None = None

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running (or last) call evaluates the unconditional branch: it does if any scale is guided."""
        return self._is_guided

    @staticmethod
    def _guides(guidance_scale: float) -> bool:
        """Whether a scale with this guidance needs the unconditional branch."""
        return guidance_scale > 1

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
        self._calibration, self._calibrator = {"observe": observe, "pool": pool}, None
        try:
            call: Any = self  # subclasses can be called
            plain = {"kv_policy": "full", "kv_dtype": "auto", "output_type": "latent"}
            call(*arguments, **{"acceleration": None, **keywords, **plain})  # whatever the defaults of calls are now
            if self._calibrator is None:
                raise ValueError("the call painted nothing to calibrate on")
            self._kv_profile = self._calibrator.profile()
        finally:
            self._calibration = self._calibrator = None
        if path is not None:
            self._kv_profile.save(path, self.transformer)
        return self._kv_profile

    def _make_cache(self, transformer: Any, rows: int, task: ScaleTask, options: ScaleOptions, scales: int) -> Any:
        """An empty cache for rows of a network, for the first scales of a schedule."""
        observer, profile = None, None
        if transformer is self.transformer and self._calibration is not None:
            if self._calibrator is None:
                layers = transformer.config.num_layers
                self._calibrator = KVCalibrator(task.grids, layers, **self._calibration)
            observer = self._calibrator
        if transformer is self.transformer and options.kv_policy == "scalekv":
            profile = self.kv_profile
            if profile is not None and profile.grids != task.grids:
                raise ValueError(
                    f"the calibration for ScaleKV is of the schedule {list(profile.grids)}, painted is "
                    f"{list(task.grids)}: run `calibrate_kv` on it"
                )
        plan = transformer.plan_cache(
            options.kv_policy, options.kv_budget, task.grids, profile, observe=options.kv_observe
        )
        return transformer.make_cache(
            rows, grids=task.grids, plan=plan.first(scales), kv_dtype=options.kv_dtype, observer=observer
        )

    # ------------------------------------------------------------------ the run

    def _paint(
        self,
        task: ScaleTask,
        options: ScaleOptions,
        generator: Generators,
        callback: Callback | None,
        callback_inputs: Sequence[str],
    ) -> tuple[Tensor, KeptTokens | None, list[SearchResult] | None]:
        """Generate a task.

        Returns:
            Latents (B, C, h, w), what was kept of an edited image, and what a search found.
        """
        kept = self._read_kept(options, task)
        self.last_options = replace(options, image=None, mask_image=None)
        self.acceleration_report = None
        exact = options.acceleration is not None and options.acceleration.measure_drift
        reference, spent = None, 0.0
        if exact:
            with _same_draws(generator):
                plain = replace(options, acceleration=None)
                reference, _ = self._paint_once(task, plain, kept, generator, None, ())  # (B, C, h, w)
                spent = self._seconds
        latents, found = self._paint_once(task, options, kept, generator, callback, callback_inputs)  # (B, C, h, w)
        if self.acceleration_report is not None and reference is not None and not self._interrupted:
            pictures, aims = (self.decode_latents(one).clamp(-1, 1) / 2 + 0.5 for one in (latents, reference))
            self.acceleration_report |= {
                "exact_seconds": spent,
                "drift": {"psnr": psnr(pictures, aims), "latent_error": relative_error(latents, reference)},
            }
        return latents, kept, found

    def _paint_once(
        self,
        task: ScaleTask,
        options: ScaleOptions,
        kept: KeptTokens | None,
        generator: Generators,
        callback: Callback | None,
        callback_inputs: Sequence[str],
    ) -> tuple[Tensor, list[SearchResult] | None]:
        """Walk through the scales once; with a search once for each prompt."""
        acceleration = options.acceleration
        applied = None if acceleration is None else acceleration.at(task.grids)
        scales = len(task.grids) if applied is None else applied.num_scales
        self._num_timesteps = scales
        self.kv_report, self._seconds = None, 0.0
        painter = self.transformer if acceleration is None else acceleration.refiner or self.transformer
        pruning = nullcontext() if applied is None or applied.pruning is None else applied.pruning.attach(painter)
        steps: list[tuple[int, int]] = []
        with pruning:
            if options.search is None:
                rows = torch.arange(task.count)  # (B,)
                with self._stepping(scales) as bar:
                    walk = self._begin(task, options, kept, rows, generator, scales)
                    self._walk(walk, _Scales(self, bar, task, options, applied, rows, None, callback, callback_inputs))
                latents, found, steps = walk.latents, None, walk.steps
            else:
                latents, found = self._search(
                    options.search, task, options, applied, kept, generator, callback, callback_inputs, steps
                )
        if applied is not None:
            tokens, counts = sum(rows * count for rows, count in steps), token_counts(task.grids)
            branches = 2 if task.guided else 1
            self.acceleration_report = {
                "scales": [scales, len(task.grids)],
                "token_share": tokens / (sum(counts) * branches * max(len(latents), 1)),
                "seconds": self._seconds,
                "pruning": None if applied.pruning is None else applied.pruning.counts(),
                "inactive": applied.inactive(task.guided),
            }
            for part, reason in self.acceleration_report["inactive"].items():
                logger.warning("acceleration: %s does nothing: %s", part, reason)
        return latents, found

    def _begin(
        self,
        task: ScaleTask,
        options: ScaleOptions,
        kept: KeptTokens | None,
        rows: Tensor,
        generator: Generators,
        scales: int,
    ) -> ScaleWalk:
        """Set out with some images (B',) of a task."""

        def draw(logits: Tensor, scale: int) -> tuple[Tensor, Tensor]:
            if not is_finite(logits):  # to draw from NaN would leave a CUDA device unusable
                raise ValueError(
                    f"The network's logits at scale {scale} hold NaN or infinite values: its weights are damaged, or "
                    "overflow the number format. Try dtype float32 or bfloat16."
                )
            return task.draw(logits, scale, generator)

        def overrule(tokens: Tensor, scale: int) -> Tensor:
            return tokens if kept is None else kept.overrule(tokens, scale, rows[: len(tokens)].to(tokens.device))

        rows = rows.to(self._execution_device)
        grids = task.grids if task.flexible else None
        total = len(rows) * (2 if task.guided else 1)
        return ScaleWalk(
            self.transformer,
            self.vae,
            task.prepare(self.transformer, rows),
            self._make_cache(self.transformer, total, task, options, scales),
            self.vae.start_latents(len(rows)) if grids is None else self.vae.start_latents(len(rows), grids),
            guided=task.guided,
            guide=task.guide,
            draw=draw,
            num_scales=len(task.grids),
            grids=grids,
            step_arguments={"attention_kwargs": self._attention_kwargs},
            overrule=None if kept is None else overrule,
            keep_inputs=options.acceleration is not None and options.acceleration.refiner is not None,
        )

    def _walk(self, walk: ScaleWalk, control: _Scales) -> None:
        """Generate scale by scale and keep the report of the cache."""
        applied = control.applied
        generate(walk, walk.num_scales if applied is None else applied.num_scales, control)
        self._interrupted = self._interrupt
        self._report_cache(walk.cache, control.peak)

    def _check_changed_guidance(self, walk: ScaleWalk) -> None:
        """Check the guidance that a callback has set for the scales to come."""
        check_number("guidance_scale", self._guidance_scale, 0.0, 100.0)
        if self._guides(self._guidance_scale) and not walk.guided:
            raise ValueError(
                f"_guidance_scale={self._guidance_scale:g} was set while the unconditional branch does not run: begin "
                "the call with guidance_scale above 1, and without an acceleration that ends guidance."
            )

    def _accelerate(
        self,
        walk: ScaleWalk,
        task: ScaleTask,
        options: ScaleOptions,
        applied: AppliedAcceleration,
        rows: Tensor,
        scale: int,
    ) -> None:
        """Do what an acceleration does ahead of a scale: hand over, drop the unconditional rows."""
        if scale == 0 and applied.unguided:
            inner = walk.guide
            walk.guide = lambda cond, uncond, at: cond if at in applied.unguided else inner(cond, uncond, at)
        if scale == applied.guided_until:
            walk.drop_guidance()
        if scale == applied.handover and options.acceleration is not None:
            refiner = options.acceleration.refiner
            condition = task.prepare(refiner, rows[: walk.batch_size].to(walk.latents.device))
            if task.guided and not walk.guided:
                condition = condition.select(torch.arange(walk.batch_size, device=walk.latents.device))
            total = walk.batch_size * (2 if walk.guided else 1)
            walk.hand_over(refiner, condition, self._make_cache(refiner, total, task, options, applied.num_scales))

    def _report_cache(self, cache: ScaleKVCache, peak: int) -> None:
        """Keep the largest report of a call."""
        report = replace(cache.report(), peak_bytes=peak)
        if self.kv_report is None or report.peak_bytes > self.kv_report.peak_bytes:
            self.kv_report = report

    # ------------------------------------------------------------------- search

    def _search(
        self,
        config: TTSConfig,
        task: ScaleTask,
        options: ScaleOptions,
        applied: AppliedAcceleration | None,
        kept: KeptTokens | None,
        generator: Generators,
        callback: Callback | None,
        callback_inputs: Sequence[str],
        steps: list[tuple[int, int]],
    ) -> tuple[Tensor, list[SearchResult]]:
        """Search for each prompt in turn; returns the best latents (B, C, h, w), and all results."""
        reward = self._reward(self.scorer if config.reward is None else config.reward)
        schedule = config.at(len(task.grids))
        scales = len(task.grids) if applied is None else applied.num_scales
        if schedule.batch_sizes[scales - 1] < task.images_per_prompt:
            raise ValueError(
                f"the search ends with {schedule.batch_sizes[scales - 1]} candidates, asked for are "
                f"{task.images_per_prompt} pictures a prompt: raise batch_sizes or lower num_images_per_prompt"
            )
        latents, found = [], []
        firsts = range(0, task.count, task.images_per_prompt)
        per_picture = sum(token_counts(task.grids)) * (2 if task.guided else 1)
        with self._stepping(scales * len(firsts)) as bar:
            for first in firsts:
                own = generator[first] if isinstance(generator, Sequence) else generator
                rows = torch.full((max(schedule.batch_sizes),), first)  # (N,)
                walk = self._begin(task, options, kept, rows[: schedule.batch_sizes[0]], own, scales)
                search = ScaleSearch(
                    config, reward, task.prompts[first], len(task.grids), self._shower(kept, first), own
                )
                self._walk(walk, _Scales(self, bar, task, options, applied, rows, search, callback, callback_inputs))
                steps += walk.steps
                if self._interrupted:
                    break
                result = search.finish(walk)
                result.token_cost = sum(count * tokens for count, tokens in walk.steps) / per_picture
                latents.append(walk.latents[: task.images_per_prompt])
                found.append(result)
        return (torch.cat(latents) if latents else self.vae.start_latents(0)), found

    def _shower(self, kept: KeptTokens | None, row: int) -> Callable[[Tensor], Tensor]:
        """From latents (B, C, h, w) of one prompt's candidates to images (B, 3, H, W) in [0, 1]."""

        def show(latents: Tensor) -> Tensor:
            pictures = self.decode_latents(latents)  # (B, 3, H, W)
            if kept is not None:
                pictures = kept.lay_over(pictures, torch.full((len(pictures),), row))
            return pictures.clamp(-1, 1) / 2 + 0.5

        return show

    def _reward(self, wanted: Any) -> Reward:
        """The reward of a search; a model that is named is read once for calls that follow one another."""
        if wanted is None:
            raise ValueError(
                "this model comes without a scorer: give the search a reward, a callable (pictures, prompts) -> (B,) "
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

    def _read_kept(self, options: ScaleOptions, task: ScaleTask) -> KeptTokens | None:
        """Encode an image to be edited, once for each of the task's images."""
        if options.image is None or options.mask_image is None:
            return None
        side = self.vae_scale_factor * (self.transformer.config.get("patchify", 1) if task.flexible else 1)
        height, width = (one * side for one in task.grids[-1])
        pixels = self.image_processor.preprocess(options.image, height, width).float()  # (P, 3, H, W) in [-1, 1]
        mask = read_mask(options.mask_image, height, width)  # (P', 1, H, W)
        for name, part in (("image", pixels), ("mask_image", mask)):
            if len(part) not in (1, task.count):
                raise ValueError(f"{name} holds {len(part)} pictures for {task.count}: pass one, or one per picture.")
        device = self._execution_device
        pixels = pixels.expand(task.count, -1, -1, -1).to(device)  # (B, 3, H, W)
        mask = mask.expand(task.count, -1, -1, -1).to(device)  # (B, 1, H, W)
        return KeptTokens.read(self.vae, pixels, mask, task.grids, task.flexible)

    def _finish(
        self,
        painted: tuple[Tensor, KeptTokens | None, list[SearchResult] | None],
        output_type: str,
        return_dict: bool,
    ) -> NextScaleOutput | tuple[Pictures]:
        """Turn what `_paint` returned into what the caller asked for."""
        latents, kept, found = painted
        if self._interrupted:
            images: Any = []
        elif output_type == "latent":
            images = latents
        else:
            pictures = self.decode_latents(latents)  # (B, 3, H, W)
            if kept is not None:
                pictures = kept.lay_over(pictures, torch.arange(len(pictures)))
            images = self.image_processor.postprocess(pictures, output_type)
        self.maybe_free_model_hooks()
        return NextScaleOutput(images=images, search=found) if return_dict else (images,)


@dataclass(slots=True)
class _Scales:
    """Hears of the scales of a pipeline's call, see `sampling.next_scale.ScaleControl`.

    Attributes:
        pipe: whose call.
        bar: of progress.
        task: what is generated.
        options: how.
        applied: an acceleration, or None.
        rows: indices of the task's images, (B',).
        search: chooses among candidates, or None.
        callback: of the caller, or None.
        callback_inputs: the tensors that it wants.
        guidance: scale of guidance at each scale; a callback may change those to come.
        peak: largest size of the cache, bytes.
        begun: when the present scale began.
    """

    pipe: NextScalePipeline
    bar: Any
    task: ScaleTask
    options: ScaleOptions
    applied: AppliedAcceleration | None
    rows: Tensor
    search: ScaleSearch | None
    callback: Callback | None
    callback_inputs: Sequence[str]
    guidance: list[float] = field(init=False)
    peak: int = 0
    begun: float = 0.0

    def __post_init__(self) -> None:
        self.guidance = list(self.task.guidance)

    def begin_scale(self, walk: ScaleWalk, scale: int) -> bool:
        """See `ScaleControl.begin_scale`."""
        pipe = self.pipe
        if pipe.interrupt:
            return False
        pipe._current_timestep, pipe._guidance_scale = torch.tensor(scale), self.guidance[scale]
        if self.search is not None:
            self.search.before(walk, scale)
        if self.applied is not None:
            pipe._accelerate(walk, self.task, self.options, self.applied, self.rows, scale)
        self.peak = max(self.peak, walk.cache.peak_nbytes)
        self.begun = time.perf_counter()
        return True

    def end_scale(self, walk: ScaleWalk, scale: int, indices: Tensor) -> None:
        """See `ScaleControl.end_scale`."""
        pipe = self.pipe
        pipe._seconds += time.perf_counter() - self.begun
        tensors = {"latents": walk.latents, "denoised_latents": walk.latents, "indices": indices}
        returned = pipe.run_callback(self.callback, scale, torch.tensor(scale), self.callback_inputs, tensors)
        walk.latents = returned["latents"]
        if pipe._guidance_scale != self.guidance[scale]:
            pipe._check_changed_guidance(walk)
            self.guidance[scale + 1 :] = [pipe._guidance_scale] * (len(self.guidance) - scale - 1)
        self.bar.update()

    @property
    def finish_now(self) -> bool:
        """See `ScaleControl.finish_now`."""
        return self.pipe.finish_now


@contextmanager
def _same_draws(generator: Generators) -> Generator[None]:
    """Put generators (or torch's global one) back to where they stood."""
    given = generator if isinstance(generator, Sequence) else [generator]
    states = [torch.get_rng_state() if one is None else one.get_state() for one in given]
    try:
        yield
    finally:
        for one, state in zip(given, states, strict=True):
            if one is None:
                torch.set_rng_state(state)
            else:
                one.set_state(state)
