"""What pipelines of clips share: windows of long clips, what is known of them, and the stream of finished frames.

A clip longer than the model was trained on is generated window by window. The last frames of a window are encoded
anew as the known beginning of the next one, so that every window looks to the model like a clip of its own, memory
doesn't grow with the length, and finished frames can be shown while later ones are made. Causal transformers make a
clip chunk by chunk instead, see `pipelines.rolling_video`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from pipelines.base import OUTPUT_TYPES
from pipelines.call_defaults import call_defaults
from pipelines.flow_text import DEFAULT_GUIDANCE, DEFAULT_STEPS, FlowTextPipeline
from pipelines.info.record import PipelineInfo
from pipelines.inputs.checks import check_choice, check_count, check_generators, check_number, check_sigmas
from pipelines.inputs.known_clip import KnownClip, read_known_clip
from pipelines.inputs.known_latents import known_latents
from pipelines.inputs.pixels import ImageInput, read_pixels
from pipelines.inputs.video_mask import VideoMask
from pipelines.inputs.windows import PromptSchedule, Window, plan_windows, read_schedule, reuse_noise
from pipelines.rolling_video import RollingRun, plan_chunks
from sampling.timesteps import set_timesteps

DEFAULT_FRAMES, DEFAULT_FRAME_RATE = 16, 8.0
DEFAULT_WINDOW, DEFAULT_OVERLAP = 21, 5
MAX_FRAMES = 4096
CALL_ARGUMENTS: Mapping[str, str] = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "batch_size": "num_videos_per_prompt",
    "seed": "generator",
}
"""Fields of requests that all pipelines of clips take; see `PipelineInfo`."""

Frames = list[list[Image.Image]] | np.ndarray | Tensor
Callback = Callable[..., dict[str, Tensor] | None]


@dataclass
class VideoPipelineOutput(BaseOutput):
    """What a call gives.

    Attributes:
        frames: B clips: lists of PIL images, an array (B, T, H, W, 3) or a tensor (B, T, 3, H, W) in [0, 1], or latents
            (B, C, T', h, w).
    """

    frames: Frames


@dataclass(frozen=True, slots=True)
class VideoChunk:
    """Frames that are finished.

    Attributes:
        start: index of the first one.
        frames: of B clips, (B, T, 3, H, W) in [0, 1], float32, on the CPU; none if only latents were asked for.
        latents: of the window that made them, (B, C, T', h, w).
    """

    start: int
    frames: Tensor
    latents: Tensor


@dataclass(frozen=True, kw_only=True)
class VideoCall:
    """The arguments of a call; see `pipelines.text_to_video.TextToVideoPipeline.__call__`."""

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    image: ImageInput | None = None
    last_image: ImageInput | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int = DEFAULT_FRAMES
    frame_rate: float = DEFAULT_FRAME_RATE
    num_inference_steps: int = DEFAULT_STEPS
    sigmas: Sequence[float] | None = None
    guidance_scale: float = DEFAULT_GUIDANCE
    num_videos_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    prompt_schedule: Sequence[tuple[int, str]] | None = None
    window_frames: int = DEFAULT_WINDOW
    window_overlap: int = DEFAULT_OVERLAP
    attention_kwargs: dict[str, Any] | None = None
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    max_sequence_length: int | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    video: Any = None
    mask: VideoMask | None = None


class FlowVideoPipeline(FlowTextPipeline):
    """Base of pipelines that make clips, window by window.

    Args: see `FlowTextPipeline`; `defaults` may also name `num_frames`, `frame_rate`, `window_frames`, `window_overlap`
        and `negative_prompt`, such as one that keeps clips from standing still.
    """

    default_names: ClassVar[tuple[str, ...]] = (
        *FlowTextPipeline.default_names,
        "num_frames",
        "frame_rate",
        "window_frames",
        "window_overlap",
        "negative_prompt",
    )
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "denoised_latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    ]
    _num_windows: int = 1

    def info(self) -> PipelineInfo:
        """Return what this pipeline is and can do."""
        rows, columns = self._default_cells()
        own: dict[str, Any] = {"num_inference_steps": DEFAULT_STEPS, "guidance_scale": DEFAULT_GUIDANCE}
        own |= {"num_frames": DEFAULT_FRAMES, "frame_rate": DEFAULT_FRAME_RATE, **self.config["defaults"]}
        return self._declare(
            height=rows * self.vae_scale_factor,
            width=columns * self.vae_scale_factor,
            multiple=self.pixels_per_token,
            defaults=own,
            steps=int(own["num_inference_steps"]),
            guidance=float(own["guidance_scale"]),
            frames=int(own["num_frames"]),
            fps=float(own["frame_rate"]),
            output="frames",
            has_scheduler=self.scheduler is not None,
            can_load_lora=True,
            can_stream=True,
            knows_words=True,
        )

    def stream(self, prompt: str | list[str] | None = None, **options: Any) -> Generator[VideoChunk]:
        """Generate a clip and yield its frames as they are finished, window by window.

        Args:
            prompt: what to generate.
            **options: see `__call__`; not `output_type`, `return_dict`.

        Yields:
            The frames in order, each once.
        """
        unknown = sorted(set(options) - set(VideoCall.__dataclass_fields__))
        if unknown:
            raise TypeError(
                f"stream() takes no {', '.join(unknown)}; it takes what a call takes but the output's form."
            )
        yield from self._chunks(self._settled({"prompt": prompt, **call_defaults(self), **options}))

    def num_windows(self, num_frames: int) -> int:
        """Return in how many parts a clip of as many frames is generated, by the model's own windows."""
        if self._is_causal:
            return len(self._plan_chunks(num_frames))
        own = {"window_frames": DEFAULT_WINDOW, "window_overlap": DEFAULT_OVERLAP, **self.config["defaults"]}
        return len(plan_windows(num_frames, own["window_frames"], own["window_overlap"]))

    # -------------------------------------------------------------------- windows

    def _settled(self, arguments: Mapping[str, Any]) -> VideoCall:
        """Return the call that arguments ask for; those that are no field of one are left out."""
        return VideoCall(**{name: value for name, value in arguments.items() if name in VideoCall.__dataclass_fields__})

    def _collect(self, call: VideoCall, output_type: str, return_dict: bool) -> VideoPipelineOutput | tuple[Frames]:
        """Run a call to its end and bring its frames into the wanted form."""
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "latent" and call.num_frames > call.window_frames and not self._is_causal:
            raise ValueError(
                f'output_type="latent" with num_frames={call.num_frames}: only a clip of one window has latents; pass '
                f"at most window_frames={call.window_frames} frames."
            )
        chunks = list(self._chunks(call, decode=output_type != "latent"))
        if self._interrupted or not chunks:
            frames: Any = []
        elif output_type == "latent":
            frames = chunks[0].latents
        else:
            clips = torch.cat([chunk.frames for chunk in chunks], dim=1)  # (B, T, 3, H, W)
            frames = clips if output_type == "pt" else clips.permute(0, 1, 3, 4, 2).numpy()
            if output_type == "pil":
                frames = [self.image_processor.numpy_to_pil(clip) for clip in frames]
        return VideoPipelineOutput(frames=frames) if return_dict else (frames,)

    @torch.no_grad()
    def _chunks(self, call: VideoCall, decode: bool = True) -> Generator[VideoChunk]:
        """Generate the windows of a clip, one after the other; without decoding, a single one, which has no frames."""
        self._begin(call)
        height, width = self._resolve_size(call.height, call.width)
        if self._is_causal:
            yield from self._rolled(call, height, width, decode)
            return
        windows = plan_windows(call.num_frames, call.window_frames, call.window_overlap)
        schedule = _schedule(call, windows)
        known = self._known_clip(call, height, width)  # (1, 3, T, H, W)
        self._num_windows = len(windows)
        noise = last = None
        try:
            for window in windows:
                text = self._encode_text(call, schedule, window)
                if noise is None:
                    noise = self._noise(call, len(text["prompt_embeds"]), windows[0], height, width)
                part = _spread(known.part(window.start, window.stop), len(noise))
                part = part if last is None else part.with_beginning(last[:, :, -window.known :])
                latents = self._run_window(call, window, text, noise, part)  # (B, C, T', h, w)
                if latents is None:
                    break
                if not decode:
                    yield VideoChunk(0, latents.new_zeros(len(latents), 0, 3, height, width), latents)
                    break
                pixels = part.composite(self.decode_latents(latents)[:, :, : window.length])  # (B, 3, T, H, W)
                last = pixels
                frames = (pixels[:, :, window.known :] / 2 + 0.5).clamp(0, 1).transpose(1, 2).cpu()  # (B, T, 3, H, W)
                yield VideoChunk(window.start + window.known, frames, latents)
                if self._finish_now:
                    break
        finally:  # a stream may be left before its end
            self.maybe_free_model_hooks()

    def _rolled(self, call: VideoCall, height: int, width: int, decode: bool) -> Generator[VideoChunk]:
        """Generate the chunks of a clip with a causal transformer."""
        chunks = self._plan_chunks(call.num_frames)
        schedule = _schedule(call, chunks)
        run = RollingRun(self, call, (height, width), chunks)
        self._num_windows, done = max(run.num_runs, 1), len(chunks) - run.num_runs
        self._network_arguments = {**self._network_arguments, "memory": run.memory}
        text: dict[str, Any] = {}
        made = []
        try:
            for chunk in chunks:
                if schedule is not None or not text:
                    text = self._encode_text(call, schedule, chunk)

                def denoise(noise: Tensor, text: dict[str, Any] = text, chunk: Window = chunk) -> Tensor | None:
                    return self._run_loop(call, noise, text, chunk.index - done)

                latents = run.latents(chunk, text, denoise)  # (B, C, T', h, w)
                if latents is None:
                    break
                if decode:
                    frames = (run.pixels(chunk, latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2).cpu()  # (B, T, 3, H, W)
                    yield VideoChunk(chunk.start, frames, latents)
                else:
                    made.append(latents)
                if self._finish_now:
                    break
            if made:
                latents = torch.cat(made, dim=2)
                yield VideoChunk(0, latents.new_zeros(len(latents), 0, 3, height, width), latents)
        finally:  # a stream may be left before its end
            self._network_arguments = {}
            self.maybe_free_model_hooks()

    def _plan_chunks(self, num_frames: int) -> list[Window]:
        ratio = self.visual_tokenizer.temporal_compression_ratio
        return plan_chunks(num_frames, ratio, self.transformer.config.chunk_frames)

    @property
    def _is_causal(self) -> bool:
        """Whether the transformer makes clips chunk by chunk."""
        return self.transformer.config.get("space_time") == "causal"

    def _begin(self, call: VideoCall) -> None:
        """Check a call, and remember what the loop asks for."""
        self._interrupt = self._interrupted = self._finish_now = False
        self.check_callback_inputs(call.callback_on_step_end_tensor_inputs)
        self.check_parts("transformer", "vae")
        check_count("num_inference_steps", call.num_inference_steps, 1, 1000)
        check_count("num_videos_per_prompt", call.num_videos_per_prompt, 1, 1024)
        check_count("num_frames", call.num_frames, 1, MAX_FRAMES)
        check_count("window_frames", call.window_frames, 2, MAX_FRAMES)
        check_number("frame_rate", call.frame_rate, 0.1, 240.0)
        check_number("guidance_scale", call.guidance_scale, 0.0, 100.0)
        check_number("guidance_rescale", call.guidance_rescale, 0.0, 1.0)
        if call.sigmas is not None:
            check_sigmas(call.sigmas)
        self._guidance_scale, self._guidance_rescale = call.guidance_scale, call.guidance_rescale
        self._guidance_interval, self._attention_kwargs = call.guidance_interval, call.attention_kwargs
        told = self.transformer.config.get("clip_conditioning", False)
        length = self.latent_frames(call.num_frames)  # of the whole clip: windows share its pace
        rate = call.frame_rate if call.num_frames > 1 else 0.0  # an image has none
        self._network_arguments = {"frame_rate": rate, "clip_frames": float(length)} if told else {}

    def _resolve_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Fill in the size that the model was trained on, and check it."""
        rows, columns = self._default_cells()
        height = rows * self.vae_scale_factor if height is None else height
        width = columns * self.vae_scale_factor if width is None else width
        self.check_size(height, width, self.pixels_per_token)
        return height, width

    def _encode_text(self, call: VideoCall, schedule: PromptSchedule | None, window: Window) -> dict[str, Any]:
        """Return the text of a window: states (B, L, Dt) of both sides, and their mask (B, L) or (2B, L)."""
        prompt = call.prompt
        if schedule is not None:
            if prompt is not None or call.prompt_embeds is not None:
                raise ValueError("Pass either prompt or prompt_schedule, got both.")
            prompt = schedule.at(window)
        # Given states take the place of the model's own negative prompt; of two that the caller names, one is too many.
        is_own = call.negative_prompt == call_defaults(self).get("negative_prompt")
        embeds, mask, negative, negative_mask = self.encode_prompt(
            prompt,
            None if is_own and call.negative_prompt_embeds is not None else call.negative_prompt,
            self.do_classifier_free_guidance,
            call.num_videos_per_prompt,
            self._execution_device,
            call.prompt_embeds,
            call.prompt_attention_mask,
            call.negative_prompt_embeds,
            call.negative_prompt_attention_mask,
            call.max_sequence_length,
        )
        joint = mask if negative_mask is None else torch.cat([negative_mask, mask])
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "mask": joint}

    # -------------------------------------------------------------------- latents

    def latent_frames(self, num_frames: int) -> int:
        """Return how many latent frames a clip has: one for its first frame, one for each further group."""
        return 1 + -(-(num_frames - 1) // self.visual_tokenizer.temporal_compression_ratio)

    @property
    def _sees_known(self) -> bool:
        """Whether the transformer was trained to complete clips; see `pipelines.inputs.known_latents`."""
        ratio = self.visual_tokenizer.temporal_compression_ratio
        return self.transformer.config.in_channels == 2 * self.transformer.out_channels + ratio

    def _noise(self, call: VideoCall, count: int, first: Window, height: int, width: int) -> Tensor:
        """Return the noise of the first window, (B, C, T', h, w), drawn or given and checked."""
        check_generators(call.generator, count)
        f = self.vae_scale_factor
        shape = (self.transformer.out_channels, self.latent_frames(first.length), height // f, width // f)
        noise = self.prepare_noise(shape, count, call.generator) if call.latents is None else call.latents
        if noise.shape != (count, *shape) or not torch.isfinite(noise).all():
            raise ValueError(
                f"latents must be finite and of shape {(count, *shape)} (clips, channels, latent frames, height / {f}, "
                f"width / {f}), got {tuple(noise.shape)}."
            )
        return noise.to(self._execution_device, torch.float32)

    def _known_clip(self, call: VideoCall, height: int, width: int) -> KnownClip:
        """Return what the caller gives of the clip, (1, 3, T, H, W); each class reads its own arguments."""
        raise NotImplementedError

    def _read_known(self, video: Any, mask: VideoMask, call: VideoCall, height: int, width: int) -> KnownClip:
        """Read a clip, or frames of it, and its mask."""

        def read(frames: list[Any]) -> Tensor:
            return read_pixels(frames, height, width, self.image_processor)  # (T, 3, H, W)

        return read_known_clip(video, mask, call.num_frames, height, width, read)

    def encode_clip(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, T, H, W) in [-1, 1] to normalised latents (B, C, T', h, w), float32."""
        tokenizer, ratio = self.visual_tokenizer, self.visual_tokenizer.temporal_compression_ratio
        missing = -(pixels.shape[2] - 1) % ratio
        last = pixels[:, :, -1:].expand(-1, -1, missing, -1, -1)  # a last group of frames may be incomplete
        pixels = torch.cat([pixels, last], dim=2)  # (B, 3, 1 + ratio (T' - 1), H, W)
        latents = tokenizer.encode(pixels.to(self._execution_device, self.vae.dtype), return_dict=False)[0]
        return tokenizer.normalize_latents(latents).float()  # (B, C, T', h, w)

    def _run_window(
        self,
        call: VideoCall,
        window: Window,
        text: dict[str, Any],
        noise: Tensor,
        part: KnownClip,
    ) -> Tensor | None:
        """Denoise one window: (B, C, T', h, w); None if the run was interrupted."""
        noise = reuse_noise(noise, window, self.latent_frames(window.length))  # (B, C, T', h, w)
        ratio = self.visual_tokenizer.temporal_compression_ratio
        known = known_latents(part, noise, ratio, self.encode_clip)
        restore = None if part.is_empty else known.blend
        return self._run_loop(call, noise, text, window.index, restore, known.beside if self._sees_known else None)

    def _run_loop(
        self,
        call: VideoCall,
        noise: Tensor,
        text: dict[str, Any],
        index: int,
        restore: Callable[[Tensor, float], Tensor] | None = None,
        compose: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """Denoise part `index` of a clip: (B, C, T', h, w); None if the run was interrupted."""
        timesteps = set_timesteps(
            self.scheduler,
            call.num_inference_steps,
            num_tokens=noise[0, 0].numel() // self.transformer.config.patch_size**2,
            device=noise.device,
            sigmas=call.sigmas,
        )
        return self._denoise(
            {"latents": noise, **{name: text[name] for name in ("prompt_embeds", "negative_prompt_embeds")}},
            text["mask"],
            timesteps,
            call.generator,
            _counting_on(call.callback_on_step_end, index * len(timesteps)),
            call.callback_on_step_end_tensor_inputs,
            restore,
            compose,
        )

    def decode_next(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Decode the next latents of a clip, for autoencoders that do so in chunks.

        Args:
            latents: normalised, (B, C, T', h, w).
            state: what the chunk before returned; None at the start of a clip.

        Returns:
            Pixels, (B, 3, T, H, W), about [-1, 1], float32, and the state to go on with.
        """
        normal = self.visual_tokenizer.denormalize_latents(latents).to(self.vae.dtype)
        pixels, state = self.vae.decode_chunk(normal, state)
        return pixels.float(), state

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running (or last) call, in all its windows."""
        return self._num_timesteps * self._num_windows


def _schedule(call: VideoCall, parts: Sequence[Window]) -> PromptSchedule | None:
    """Return the prompts of the parts of a clip, if the call gives several."""
    if call.prompt_schedule is None:
        return None
    schedule = read_schedule(call.prompt_schedule, call.num_frames)
    schedule.check(parts)
    return schedule


def _counting_on(callback: Callback | None, before: int) -> Callback | None:
    """Have a callback count the steps of a window on from those of the windows before it."""
    if callback is None or before == 0:
        return callback

    def counted(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return callback(pipe, before + step, timestep, tensors)

    return counted


def _spread(clip: KnownClip, count: int) -> KnownClip:
    """Repeat what is known for all clips of a batch."""
    return replace(clip, pixels=clip.pixels.expand(count, -1, -1, -1, -1))
