"""Text to video by flow matching, with the call of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipelines.call_defaults import takes_call_defaults
from pipelines.flow_text import DEFAULT_GUIDANCE, DEFAULT_STEPS
from pipelines.flow_video import (
    CALL_ARGUMENTS,
    DEFAULT_FRAME_RATE,
    DEFAULT_FRAMES,
    DEFAULT_OVERLAP,
    DEFAULT_WINDOW,
    Callback,
    FlowVideoPipeline,
    Frames,
    VideoCall,
    VideoPipelineOutput,
)
from pipelines.inputs.known_clip import KnownClip
from pipelines.inputs.pixels import ImageInput
from pipelines.inputs.video_mask import VideoMask
from pipelines.video_completion import VideoCompletionPipeline


class TextToVideoPipeline(FlowVideoPipeline):
    """Generate clips from text, and from their first and last image, with a flow-matching transformer.

    Args: see `FlowVideoPipeline`.

    Example:
        >>> from pipelines import load_pipeline
        >>> pipe = load_pipeline("stickers-video")
        >>> frames = pipe("a dolphin leaping on blue", num_frames=16).frames[0]
        >>> frames[0].save("dolphin.webp", save_all=True, append_images=frames[1:], duration=125, loop=0)
    """

    tasks: ClassVar[tuple[str, ...]] = ("text_to_image", "image_to_image")
    call_arguments: ClassVar[Mapping[str, str]] = {**CALL_ARGUMENTS, "image": "image"}

    def related(self) -> dict[str, Any]:
        """Return the pipeline that completes clips with the same components."""
        # Not by `from_pipe`, which casts the components, and both pipelines share them, to float32.
        completing = VideoCompletionPipeline(**self.components, defaults=self.config["defaults"])
        completing.register_to_config(_name_or_path=self.name_or_path)
        completing.known_words = self.known_words
        return {"video_completion": completing}

    @takes_call_defaults
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        last_image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = DEFAULT_FRAMES,
        frame_rate: float = DEFAULT_FRAME_RATE,
        num_inference_steps: int = DEFAULT_STEPS,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = DEFAULT_GUIDANCE,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        prompt_schedule: Sequence[tuple[int, str]] | None = None,
        window_frames: int = DEFAULT_WINDOW,
        window_overlap: int = DEFAULT_OVERLAP,
    ) -> VideoPipelineOutput | tuple[Frames]:
        """Generate.

        Args:
            prompt: what to generate, one string or a list of P.
            negative_prompt: what to steer away from, one for all or one per prompt; needs guidance.
            image: first frame of the clip; it comes out as it is, at the clip's size.
            last_image: last frame of the clip, in the same way.
            height: pixels; None is the size the model was trained for.
            width: pixels; None is the size the model was trained for.
            num_frames: length of the clip.
            frame_rate: frames a second, for models that are told it.
            num_inference_steps: steps, for each window.
            sigmas: custom noise levels instead, decreasing in (0, 1], before the scheduler's shift.
            guidance_scale: classifier-free guidance (arXiv 2207.12598); 1 or less turns it off.
            num_videos_per_prompt: clips per prompt; B = P times this.
            generator: seeded generator, or one per clip; noise is drawn clip by clip on the CPU.
            latents: the starting noise itself, of the first window, (B, C, T', H / f, W / f).
            prompt_embeds: text states instead of `prompt`, (P, L, Dt).
            prompt_attention_mask: (P, L), True on real tokens.
            negative_prompt_embeds: text states instead of `negative_prompt`, (P, L, Dt).
            negative_prompt_attention_mask: (P, L).
            output_type: "pil", "np" (B, T, H, W, 3) in [0, 1], "pt" (B, T, 3, H, W) in [0, 1], or "latent" (normalised
                latents, of clips of one window).
            return_dict: whether to wrap the result.
            attention_kwargs: passed on to the transformer, e.g. `{"scale": 0.5}` for LoRAs.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step, which counts over
                all windows; tensors it returns replace ours. It may set `pipe.interrupt = True`.
            callback_on_step_end_tensor_inputs: the tensors it gets; see `TextToImagePipeline`.
            max_sequence_length: tokens kept of a prompt; None is the model's limit.
            guidance_rescale: 0 to 1, see `sampling.guidance.rescale_to`.
            guidance_interval: lowest and highest sigma with guidance (arXiv 2404.07724); None is all.
            prompt_schedule: instead of `prompt`, prompts that follow each other: pairs (first frame, prompt).
            window_frames: frames that are generated at once; longer clips are made in several windows.
            window_overlap: frames that a window takes over from the one before it.

        Returns:
            The clips; none when the run was interrupted (then `pipe.interrupted` is True).

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range; the message says what is accepted.
        """
        return self._collect(self._settled(locals()), output_type, return_dict)

    def _known_clip(self, call: VideoCall, height: int, width: int) -> KnownClip:
        """Return what the caller gives of the clip, (1, 3, T, H, W)."""
        given = {0: call.image, call.num_frames - 1: call.last_image}
        video = {frame: image for frame, image in given.items() if image is not None}
        return self._read_known(video, VideoMask.generate(), call, height, width)
