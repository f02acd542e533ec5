"""What other programs call settings, written beside ours: AUTOMATIC1111's text and ComfyUI's graph, in their places.

A PNG has them in the text chunks `parameters` and `prompt`; WebP and JPEG files have the text in the EXIF user comment.
They say less than our settings, so they are written for images of a prompt only, and read where ours are not there.
"""

from __future__ import annotations

from typing import Any, Protocol

from PIL import Image, PngImagePlugin

from apps.service.comfy_graph import read_graph, write_graph
from apps.service.infotext import read_infotext, write_infotext
from apps.service.recipe import Recipe

PARAMETERS, PROMPT = "parameters", "prompt"
"""Keywords of text chunks."""
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
CAMERA_MODEL, CAMERA_MAKE = 0x0110, 0x010F
"""EXIF tags in which ComfyUI writes `prompt:` and a graph into animations."""
UNICODE, ASCII = b"UNICODE\x00", b"ASCII\x00\x00\x00"
"""How EXIF names the code of a user comment."""
MAX_TEXT = 512 * 1_024
"""Characters of a foreign text; graphs of many nodes are long."""
SCHEDULER_CLASSES = {
    "FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun",
    "FlowMatchSDEScheduler": "sde", "DPMSolverMultistepScheduler": "dpm++", "UniPCMultistepScheduler": "unipc",
    "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "EulerDiscreteScheduler": "euler",
}  # fmt: skip
"""Which choice of ours a model's own scheduler is."""


class Settings(Protocol):
    """What is written down of `apps.service.metadata.PictureSettings`."""

    task: Any
    prompt: Any
    negative_prompt: Any
    seed: Any
    steps: Any
    guidance: Any
    width: Any
    height: Any
    frames: Any
    strength: Any
    sampler: Any
    scheduler: Any
    model: Any
    loras: Any
    versions: Any


def write_dialects(settings: Settings) -> dict[str, str]:
    """Return the foreign texts of an image by their keywords.

    Args:
        settings: of the image.

    Returns:
        No text for a clip or an image of a class; the graph only for an image from text that takes steps.
    """
    if not settings.prompt or settings.frames is not None:
        return {}
    sampler = settings.sampler or SCHEDULER_CLASSES.get(str(settings.scheduler.get("class")), "")
    recipe = Recipe(
        program="tessera",
        prompt=settings.prompt.replace("\0", ""),
        negative_prompt=settings.negative_prompt.replace("\0", ""),
        seed=settings.seed,
        steps=settings.steps,
        guidance=1.0 if settings.guidance is None else settings.guidance,
        width=settings.width,
        height=settings.height,
        denoise=settings.strength,
        model=settings.model,
        loras=[(one.name, one.scale) for one in settings.loras],
    )
    texts = {PARAMETERS: write_infotext(recipe, sampler, settings.versions.get("tessera", ""))}
    if settings.task == "text_to_image" and settings.steps is not None:
        texts[PROMPT] = write_graph(recipe, sampler)
    return texts


def add_to_png(texts: dict[str, str], chunks: PngImagePlugin.PngInfo) -> None:
    """Add foreign texts to the text chunks of a PNG."""
    for keyword, text in texts.items():
        chunks.add_text(keyword, text)  # as `iTXt` where Latin-1 has not all its letters


def add_to_exif(texts: dict[str, str], exif: Image.Exif) -> None:
    """Add the text of generation parameters to EXIF, as UTF-16 with the high byte first, as AUTOMATIC1111 has it."""
    if PARAMETERS in texts:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + texts[PARAMETERS].encode("utf-16-be")


def read_dialects(image: Image.Image) -> Recipe | None:
    """Read the foreign text of an opened image.

    Args:
        image: PNG, WebP or JPEG, of unknown origin; its pixels are not decoded.

    Returns:
        What it says; None if there is none that can be read.
    """
    parameters, graph = _texts(image)
    if parameters is not None and 0 < len(parameters) <= MAX_TEXT:  # where both are, it says what was computed
        recipe = read_infotext(parameters)
        if recipe.prompt or recipe.seed is not None:
            return recipe
    return read_graph(graph) if graph is not None and len(graph) <= MAX_TEXT else None


def _texts(image: Image.Image) -> tuple[str | None, str | None]:
    """Return AUTOMATIC1111's and ComfyUI's text of an image."""
    if image.format == "PNG":
        found = (image.info.get(keyword) for keyword in (PARAMETERS, PROMPT))
        first, second = (text if isinstance(text, str) else None for text in found)
        return first, second
    exif = image.getexif()
    graphs = [exif.get(tag) for tag in (CAMERA_MODEL, CAMERA_MAKE)]
    graph = next((text[7:] for text in graphs if isinstance(text, str) and text.lower().startswith("prompt:")), None)
    return _comment(exif.get_ifd(EXIF_IFD).get(USER_COMMENT)), graph


def _comment(value: object) -> str | None:
    """Return the text of an EXIF user comment."""
    if isinstance(value, str):
        return value or None
    if not isinstance(value, bytes) or len(value) > 4 * MAX_TEXT:
        return None
    if value.startswith(UNICODE):
        body = value.removeprefix(UNICODE)
        is_little = body[1::2].count(0) > body[::2].count(0)  # some programs write the low byte first
        return body.decode("utf-16-le" if is_little else "utf-16-be", errors="replace").strip("\0\ufeff") or None
    return value.removeprefix(ASCII).decode("utf-8", errors="replace").strip("\0") or None
