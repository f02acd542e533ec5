"""The nodes: load a model, put LoRAs and a setting of speed on it, generate images and clips."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from .generation import generate, to_tensor
from .model import Model

CATEGORY = "tessera"
MODEL = "TESSERA_MODEL"
MAX_SEED = 2**32 - 1
OWN = "the model's own"
PROFILES = ("none", "balanced", "faithful", "fastest", "low-memory")
FORMATS = ("none", "w8a8", "w4a8", "w8a16", "w4a16", "fp8", "nvfp4")


def _files(kind: str) -> list[str]:
    """Return the names of files that ComfyUI knows of a kind; none outside of ComfyUI."""
    try:
        return list(importlib.import_module("folder_paths").get_filename_list(kind))
    except ModuleNotFoundError:
        return []


def _path(kind: str, name: str) -> str:
    """Return where a file lies.

    Raises:
        ValueError: ComfyUI has none of this name.
    """
    found = importlib.import_module("folder_paths").get_full_path(kind, name) if name in _files(kind) else None
    if found is None:
        raise ValueError(f"There is no {kind} file {name!r} in ComfyUI's folders; choose one of the list.")
    return str(Path(found))


class LoadModel:
    """Load a built-in model, a diffusers folder, a single file or a hub id; safetensors and GGUF only."""

    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Names a model for tessera. It is read into memory by the first node that generates with it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        """Return the inputs as ComfyUI wants them."""
        from pipelines import builtin_models

        return {
            "required": {
                "name": ([*builtin_models(), "other"],),
                "device": (["auto", "cpu", "cuda", "mps"],),
                "dtype": (["auto", "float32", "bfloat16", "float16"],),
                "offload": (["none", "model", "group", "sequential"],),
                "quantization": (list(FORMATS),),
            },
            "optional": {
                "other": ("STRING", {"default": "", "tooltip": "Folder, file or hub id, where the name is 'other'."}),
            },
        }

    def load(
        self, name: str, device: str, dtype: str, offload: str, quantization: str, other: str = ""
    ) -> tuple[Model]:
        """Return the description of a model.

        Raises:
            ValueError: "other" without a name.
        """
        source = other.strip() if name == "other" else name
        if not source:
            raise ValueError("name is 'other', and other is empty; give a folder, a file or a hub id.")
        return (Model(source, device, dtype, offload, quantization),)


class LoadLora:
    """Put a LoRA file of ComfyUI's folder `loras` on a model."""

    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Puts a LoRA on a model; several of them one after another."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs as ComfyUI wants them."""
        weight = {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05}
        return {"required": {"model": (MODEL,), "lora": (_files("loras"),), "weight": ("FLOAT", weight)}}

    def load(self, model: Model, lora: str, weight: float) -> tuple[Model]:
        """Return the model with the LoRA."""
        return (model.with_lora(_path("loras", lora), weight),)


class SpeedUp:
    """Make a model faster: by a profile that `tessera tune` found, or by an acceleration as JSON."""

    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "speed_up"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Step caches, sparse attention, guidance caches ... by a profile or as JSON; the report tells what they did."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs as ComfyUI wants them."""
        hint = '{"step_cache": "budget=0.35", "guidance_cache": {"every": 2}}; in place of a profile.'
        return {
            "required": {"model": (MODEL,), "profile": (list(PROFILES), {"default": "balanced"})},
            "optional": {"acceleration": ("STRING", {"default": "", "multiline": True, "tooltip": hint})},
        }

    def speed_up(self, model: Model, profile: str, acceleration: str = "") -> tuple[Model]:
        """Return the model with the setting.

        Raises:
            ValueError: both, or neither, are given.
        """
        has_profile, has_json = profile != "none", bool(acceleration.strip())
        if has_profile == has_json:
            raise ValueError("Give either a profile or an acceleration; set the other one to 'none' or empty.")
        return (model.with_speed(profile if has_profile else "", acceleration.strip()),)


def _number(kind: str, default: float, low: float, high: float, tooltip: str, step: float = 1) -> tuple[str, dict]:
    return kind, {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}


def _common() -> dict[str, Any]:
    """Return the inputs that images and clips share."""
    return {
        "model": (MODEL,),
        "prompt": ("STRING", {"multiline": True, "default": ""}),
        "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
        "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
        "steps": _number("INT", 0, 0, 100, f"0 is {OWN}"),
        "guidance": _number("FLOAT", -1.0, -1.0, 30.0, f"-1 is {OWN}", 0.1),
        "width": _number("INT", 0, 0, 4096, f"0 is {OWN}", 16),
        "height": _number("INT", 0, 0, 4096, f"0 is {OWN}", 16),
    }


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request, with None for what is the model's own."""
    own = {"steps": 0, "guidance": -1.0, "width": 0, "height": 0, "frames": 0, "fps": 0.0, "strength": 0.0}
    own["negative_prompt"] = ""
    return {name: None if name in own and value == own[name] else value for name, value in given.items()}


class GenerateImage:
    """Generate images from a prompt, from an image, or in a part of one."""

    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "report")
    FUNCTION = "generate"
    CATEGORY = CATEGORY
    DESCRIPTION = "With an image: changes it. With a mask too: only there, every other pixel stays as it is."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs as ComfyUI wants them."""
        strength = _number("FLOAT", 0.0, 0.0, 1.0, f"How much of the image, or the part, changes; 0 is {OWN}.", 0.05)
        return {
            "required": {**_common(), "batch_size": _number("INT", 1, 1, 8, "Images of one call")},
            "optional": {"image": ("IMAGE",), "mask": ("MASK",), "strength": strength},
        }

    def generate(
        self,
        model: Model,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 0.0,
        batch_size: int = 1,
        **given: Any,
    ) -> tuple[Tensor, str]:
        """Return the images, (B, H, W, 3), and what accelerators did.

        Raises:
            ValueError: a mask without an image, or the engine refuses the request.
        """
        if mask is not None and image is None:
            raise ValueError("mask is connected, and image is not; connect the image that it belongs to.")
        if strength and image is None:
            raise ValueError("strength is set, and image is not connected; connect one, or set strength to 0.")
        asked = {**given, "strength": strength}
        fields = _asked(asked) | {"num_images": batch_size, "batch_size": batch_size}
        found = generate(model, fields, {"image": image, "mask": mask})
        return to_tensor([one.image for one in found]), _report(found)


class GenerateVideo:
    """Generate a clip from a prompt, between a first and a last frame if they are connected."""

    RETURN_TYPES = ("IMAGE", "FLOAT", "STRING")
    RETURN_NAMES = ("frames", "fps", "report")
    FUNCTION = "generate"
    CATEGORY = CATEGORY
    DESCRIPTION = "The frames of a clip, for ComfyUI's video nodes."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs as ComfyUI wants them."""
        length = {
            "frames": _number("INT", 0, 0, 257, f"0 is {OWN}"),
            "fps": _number("FLOAT", 0.0, 0.0, 120.0, f"0 is {OWN}", 1.0),
        }
        return {
            "required": {**_common(), **length},
            "optional": {"first_image": ("IMAGE",), "last_image": ("IMAGE",)},
        }

    def generate(
        self, model: Model, first_image: Tensor | None = None, last_image: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, float, str]:
        """Return the frames, (T, H, W, 3), how many there are a second, and what accelerators did.

        Raises:
            ValueError: the model makes no clips, or the engine refuses the request.
        """
        found = generate(model, _asked(given), {"image": first_image, "last_image": last_image})
        clip = found[0].clip
        if clip is None:
            raise ValueError(f"{model.source} makes images, not clips; use the node Generate Image.")
        return to_tensor(clip.frames), clip.fps, _report(found)


def _report(found: list[Any]) -> str:
    """Return what repeats the images, and what accelerators did, as JSON."""
    told = [
        {"seed": one.seed, "seconds": round(one.seconds, 3), "report": one.report, "notes": list(one.notes)}
        for one in found
    ]
    return json.dumps(told, indent=1)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "TesseraLoadModel": LoadModel,
    "TesseraLoadLora": LoadLora,
    "TesseraSpeedUp": SpeedUp,
    "TesseraGenerateImage": GenerateImage,
    "TesseraGenerateVideo": GenerateVideo,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "TesseraLoadModel": "Load Model (tessera)",
    "TesseraLoadLora": "Load LoRA (tessera)",
    "TesseraSpeedUp": "Speed Up (tessera)",
    "TesseraGenerateImage": "Generate Image (tessera)",
    "TesseraGenerateVideo": "Generate Video (tessera)",
}
