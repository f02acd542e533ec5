"""One run of a next-scale pipeline: all scales of all images, or a search for each prompt.

Everything that lasts no longer than the call is kept here, not on the pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dit.cache import KVReport, ScaleKVCache
from dit.layers.scales import token_counts
from pipelines.base import TesseraPipeline
from pipelines.inputs.checks import check_number
from pipelines.loading.weight_values import is_finite
from pipelines.next_scale.inpaint import InpaintTokens
from pipelines.next_scale.options import Callback, ScaleOptions, ScaleTask, needs_unconditional
from sampling.inference_search import Reward, ScaleSearch, SearchResult, TTSConfig
from sampling.next_scale import ScaleState, generate
from sampling.scale_acceleration import AppliedAcceleration
from sampling.tokens import Generators

MakeCache = Callable[[Any, int, int], ScaleKVCache]
"""From a network, its rows and the scales it will run to an empty cache."""


@dataclass
class ScaleRun:
    """A task on its way through the scales.

    Args:
        pipe: whose call: it is asked whether to stop, shows progress, and its callback sees it.
        task: what to generate.
        options: how.
        make_cache: makes a network's empty cache.
        generator: of the draws.
        kept: what stays of an edited image, or None.
        callback: called after each scale, or None.
        callback_inputs: the tensors that it wants.

    Attributes:
        applied: the acceleration on the task's schedule, or None.
        seconds: of the network and the draws.
        kv_report: the largest of the caches.
        steps: rows and tokens of each scale that ran.
    """

    pipe: TesseraPipeline
    task: ScaleTask
    options: ScaleOptions
    make_cache: MakeCache
    generator: Generators
    kept: InpaintTokens | None = None
    callback: Callback | None = None
    callback_inputs: Sequence[str] = ()
    applied: AppliedAcceleration | None = field(init=False)
    seconds: float = field(init=False, default=0.0)
    kv_report: KVReport | None = field(init=False, default=None)
    steps: list[tuple[int, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        acceleration = self.options.acceleration
        self.applied = None if acceleration is None else acceleration.at(self.task.grids)

    @property
    def num_scales(self) -> int:
        """Scales that run."""
        return len(self.task.grids) if self.applied is None else self.applied.num_scales

    def generate_all(self) -> Tensor:
        """Generate all images at once; returns their latents (B, C, h, w)."""
        rows = torch.arange(self.task.count)  # (B,)
        with self._pruning(), self.pipe._stepping(self.num_scales) as bar:
            state = self._begin(rows, self.generator)
            self._walk(state, _Scales(self, bar, rows, None))
        return state.latents

    def search(self, config: TTSConfig, reward: Reward) -> tuple[Tensor, list[SearchResult]]:
        """Search for each prompt in turn.

        Args:
            config: how.
            reward: what candidates are judged by.

        Returns:
            The best latents, (B, C, h, w), and what was found for each prompt.

        Raises:
            ValueError: the search ends with fewer candidates than images are asked for.
        """
        task = self.task
        batch_sizes = config.at(len(task.grids)).batch_sizes
        if batch_sizes[self.num_scales - 1] < task.images_per_prompt:
            raise ValueError(
                f"the search ends with {batch_sizes[self.num_scales - 1]} candidates, asked for are "
                f"{task.images_per_prompt} images per prompt: raise batch_sizes or lower num_images_per_prompt"
            )
        latents, found = [], []
        firsts = range(0, task.count, task.images_per_prompt)
        tokens_per_image = sum(token_counts(task.grids)) * (2 if task.guided else 1)
        with self._pruning(), self.pipe._stepping(self.num_scales * len(firsts)) as bar:
            for first in firsts:
                own = self.generator[first] if isinstance(self.generator, Sequence) else self.generator
                rows = torch.full((max(batch_sizes),), first)  # (N,)
                state = self._begin(rows[: batch_sizes[0]], own)
                search = ScaleSearch(
                    config, reward, task.prompts[first], len(task.grids), self._image_decoder(first), own
                )
                self._walk(state, _Scales(self, bar, rows, search))
                if self.pipe.interrupted:
                    break
                result = search.finish(state)
                result.token_cost = sum(count * tokens for count, tokens in state.steps) / tokens_per_image
                latents.append(state.latents[: task.images_per_prompt])
                found.append(result)
        return (torch.cat(latents) if latents else self.pipe.vae.start_latents(0)), found

    def report(self, images: int) -> dict[str, Any] | None:
        """Report what the acceleration left out of a run that gave so many images; None without one."""
        if self.applied is None:
            return None
        tokens, counts = sum(rows * count for rows, count in self.steps), token_counts(self.task.grids)
        branches = 2 if self.task.guided else 1
        return {
            "scales": [self.num_scales, len(self.task.grids)],
            "token_share": tokens / (sum(counts) * branches * max(images, 1)),
            "seconds": self.seconds,
            "pruning": None if self.applied.pruning is None else self.applied.pruning.counts(),
            "inactive": self.applied.inactive(self.task.guided),
        }

    # --------------------------------------------------------------- one walk

    def _begin(self, rows: Tensor, generator: Generators) -> ScaleState:
        """Set out with some images (B',) of the task."""
        pipe, task, kept = self.pipe, self.task, self.kept

        def guide(cond: Tensor, uncond: Tensor, scale: int) -> Tensor:
            return task.guide(cond, uncond, scale, pipe.guidance_scale)

        def sample(logits: Tensor, scale: int) -> tuple[Tensor, Tensor]:
            if not is_finite(logits):  # to draw from NaN would leave a CUDA device unusable
                raise ValueError(
                    f"The network's logits at scale {scale} hold NaN or infinite values: its weights are damaged, or "
                    "overflow the number format. Try dtype float32 or bfloat16."
                )
            return task.sample(logits, scale, generator)

        def token_override(tokens: Tensor, scale: int) -> Tensor:
            return tokens if kept is None else kept.token_override(tokens, scale, rows[: len(tokens)].to(tokens.device))

        rows = rows.to(pipe._execution_device)
        grids = task.grids if task.flexible else None
        total = len(rows) * (2 if task.guided else 1)
        return ScaleState(
            pipe.transformer,
            pipe.vae,
            task.prepare(pipe.transformer, rows),
            self.make_cache(pipe.transformer, total, self.num_scales),
            pipe.vae.start_latents(len(rows)) if grids is None else pipe.vae.start_latents(len(rows), grids),
            guided=task.guided,
            guide=guide,
            sample=sample,
            num_scales=len(task.grids),
            grids=grids,
            step_arguments={"attention_kwargs": task.attention_kwargs},
            token_override=None if kept is None else token_override,
            keep_inputs=self.options.acceleration is not None and self.options.acceleration.refiner is not None,
        )

    def _walk(self, state: ScaleState, control: _Scales) -> None:
        """Generate scale by scale, and keep the largest report of the cache."""
        generate(state, self.num_scales, control)
        self.pipe._interrupted = self.pipe.interrupt
        self.steps += state.steps
        report = replace(state.cache.report(), peak_bytes=control.peak)
        if self.kv_report is None or report.peak_bytes > self.kv_report.peak_bytes:
            self.kv_report = report

    def _pruning(self) -> AbstractContextManager[Any]:
        """Attach the acceleration's token pruning, if it has one, to the network that generates."""
        acceleration, applied = self.options.acceleration, self.applied
        if acceleration is None or applied is None or applied.pruning is None:
            return nullcontext()
        return applied.pruning.attach(acceleration.refiner or self.pipe.transformer)

    def _image_decoder(self, row: int) -> Callable[[Tensor], Tensor]:
        """Return a decoder of one prompt's candidates: latents (B, C, h, w) to images (B, 3, H, W) in [0, 1]."""

        def show(latents: Tensor) -> Tensor:
            pixels = self.pipe.decode_latents(latents)  # (B, 3, H, W)
            if self.kept is not None:
                pixels = self.kept.composite(pixels, torch.full((len(pixels),), row))
            return pixels.clamp(-1, 1) / 2 + 0.5

        return show


@dataclass(slots=True)
class _Scales:
    """Hears of the scales of one walk, see `sampling.next_scale.ScaleControl`.

    Args:
        run: whose walk.
        bar: of progress.
        rows: indices of the task's images, (B',).
        search: chooses among candidates, or None.

    Attributes:
        guidance: scale of guidance at each scale; a callback may change those to come.
        peak: largest size of the cache, bytes.
        begun: when the present scale began.
    """

    run: ScaleRun
    bar: Any
    rows: Tensor
    search: ScaleSearch | None
    guidance: list[float] = field(init=False)
    peak: int = field(init=False, default=0)
    begun: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.guidance = list(self.run.task.guidance)

    def begin_scale(self, state: ScaleState, scale: int) -> bool:
        """Select candidates and apply the acceleration; return False once interrupted."""
        pipe = self.run.pipe
        if pipe.interrupt:
            return False
        pipe._current_timestep, pipe._guidance_scale = torch.tensor(scale), self.guidance[scale]
        if self.search is not None:
            self.search.select_candidates(state, scale)
        if self.run.applied is not None:
            self._accelerate(state, self.run.applied, scale)
        self.peak = max(self.peak, state.cache.peak_nbytes)
        self.begun = time.perf_counter()
        return True

    def end_scale(self, state: ScaleState, scale: int, indices: Tensor) -> None:
        """Call the caller's callback and advance the progress bar."""
        run, pipe = self.run, self.run.pipe
        run.seconds += time.perf_counter() - self.begun
        tensors = {"latents": state.latents, "denoised_latents": state.latents, "indices": indices}
        returned = pipe.run_callback(run.callback, scale, torch.tensor(scale), run.callback_inputs, tensors)
        state.latents = returned["latents"]
        if pipe.guidance_scale != self.guidance[scale]:
            self._check_changed_guidance(state, pipe.guidance_scale)
            self.guidance[scale + 1 :] = [pipe.guidance_scale] * (len(self.guidance) - scale - 1)
        self.bar.update()

    @property
    def finish_now(self) -> bool:
        """See `ScaleControl.finish_now`."""
        return self.run.pipe.finish_now

    def _accelerate(self, state: ScaleState, applied: AppliedAcceleration, scale: int) -> None:
        """Apply an acceleration ahead of a scale: switch the model, drop the unconditional rows."""
        task, acceleration = self.run.task, self.run.options.acceleration
        if scale == 0 and applied.unguided:
            inner = state.guide
            state.guide = lambda cond, uncond, at: cond if at in applied.unguided else inner(cond, uncond, at)
        if scale == applied.guided_until:
            state.drop_guidance()
        if scale == applied.handover and acceleration is not None:
            refiner = acceleration.refiner
            condition = task.prepare(refiner, self.rows[: state.batch_size].to(state.latents.device))
            if task.guided and not state.guided:
                condition = condition.select(torch.arange(state.batch_size, device=state.latents.device))
            total = state.batch_size * (2 if state.guided else 1)
            state.switch_model(refiner, condition, self.run.make_cache(refiner, total, applied.num_scales))

    @staticmethod
    def _check_changed_guidance(state: ScaleState, guidance_scale: float) -> None:
        """Check the guidance that a callback has set for the scales to come."""
        check_number("guidance_scale", guidance_scale, 0.0, 100.0)
        if needs_unconditional(guidance_scale) and not state.guided:
            raise ValueError(
                f"_guidance_scale={guidance_scale:g} was set while the unconditional branch does not run: begin "
                "the call with guidance_scale above 1, and without an acceleration that ends guidance."
            )


@contextmanager
def same_random_state(generator: Generators) -> Generator[None]:
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
