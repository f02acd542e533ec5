"""Completion of clips: any region of space and time is generated, all else stays as it is (VDT, arXiv 2305.13311)."""

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
    DEFAULT_OVERLAP,
    DEFAULT_WINDOW,
    Callback,
    FlowVideoPipeline,
    Frames,
    VideoCall,
    VideoPipelineOutput,
)
from pipelines.inputs.known_clip import KnownClip, VideoInput
from pipelines.inputs.video_mask import VideoMask


class VideoCompletionPipeline(FlowVideoPipeline):
    """Predict, interpolate, animate, inpaint and extend clips; what is known comes out bit by bit as it was.

    A transformer that was trained for it sees the known part without noise, and where it is; any other one is steered
    by replacing the known part at every noise level, as inpainting of images does.

    Example:
        >>> from pipelines import VideoCompletionPipeline, VideoMask, load_pipeline
        >>> pipe = VideoCompletionPipeline.from_pipe(load_pipeline("stickers-video"))
        >>> more = pipe("a fox moving left on white", video=frames, mask=VideoMask.predict(5)).frames[0]
        >>> between = pipe("a fox", video={0: first, -1: last}, num_frames=16).frames[0]
    """

    call_arguments: ClassVar[Mapping[str, str]] = CALL_ARGUMENTS
    tasks: ClassVar[tuple[str, ...]] = ("video_completion",)
    defaults_left_out: ClassVar[tuple[str, ...]] = ("num_frames",)  # a clip that is given has its own length

    @takes_call_defaults
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        video: VideoInput | None = None,
        mask: VideoMask | str | Any | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
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
        """Generate what is missing of a clip.

        Args:
            prompt: what the clip shows, one string or a list of P.
            negative_prompt: see `TextToVideoPipeline`.
            video: the clip: PIL images, an array (T, H, W, 3) or a tensor (T, 3, H, W) in [0, 1]; or single frames by
                index, negative ones from the end, all others of which are generated.
            mask: where to generate: a `VideoMask`, its text such as "predict(5)", or a mask clip as `VideoMask.inpaint`
                takes it; None generates what `video` doesn't give.
            height: pixels to which the clip is resized; None is the size the model was trained for.
            width: pixels; None is the size the model was trained for.
            num_frames: length of the clip; None is that of `video`.
            frame_rate: see `TextToVideoPipeline`, as all that follow.
            num_inference_steps: steps.
            sigmas: custom noise levels.
            guidance_scale: classifier-free guidance.
            num_videos_per_prompt: clips per prompt.
            generator: seeded generator, or one per clip.
            latents: the starting noise.
            prompt_embeds: text states.
            prompt_attention_mask: theirs.
            negative_prompt_embeds: text states of the negative side.
            negative_prompt_attention_mask: theirs.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to wrap the result.
            attention_kwargs: passed on to the transformer.
            callback_on_step_end: called after each step.
            callback_on_step_end_tensor_inputs: the tensors it gets.
            max_sequence_length: tokens kept of a prompt.
            guidance_rescale: 0 to 1.
            guidance_interval: lowest and highest sigma with guidance.
            prompt_schedule: prompts that follow each other.
            window_frames: frames that are generated at once.
            window_overlap: frames that a window takes over.

        Returns:
            The clips; none when the run was interrupted.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range, or there is no frame to complete.
        """
        return self._collect(self._settled(locals()), output_type, return_dict)

    def _settled(self, arguments: Mapping[str, Any]) -> VideoCall:
        """Return the call that arguments ask for, its length and its mask settled."""
        video, num_frames = arguments.get("video"), arguments.get("num_frames")
        if video is None or len(video) == 0:
            raise ValueError("video is missing: pass the clip to complete, or single frames of it by index.")
        if num_frames is None:
            if isinstance(video, Mapping):
                raise ValueError("num_frames is missing: single frames don't tell how long the clip is to be.")
            num_frames = len(video)
        mask = _read_mask(arguments.get("mask"))
        return super()._settled({**arguments, "num_frames": num_frames, "mask": mask})

    def _known_clip(self, call: VideoCall, height: int, width: int) -> KnownClip:
        """Return what the caller gives of the clip, (1, 3, T, H, W)."""
        region = call.mask or VideoMask.generate()
        known = self._read_known(call.video, region, call, height, width)
        if not known.mask.any():
            raise ValueError("the mask generates nothing of this clip: every pixel is known already.")
        return known


def _read_mask(mask: VideoMask | str | Any | None) -> VideoMask:
    """Return the mask of a call, however it was given."""
    if mask is None or isinstance(mask, VideoMask):
        return VideoMask.generate() if mask is None else mask
    return VideoMask.parse(mask) if isinstance(mask, str) else VideoMask.inpaint(mask)
