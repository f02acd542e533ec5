"""How an image is generated, as far as programs of different makers agree: what foreign metadata is read into.

A recipe is what a text says, unchecked but of the right types; `settings_of` makes settings of it that pass our checks
and notes what could not be kept.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, get_args

from apps.service import limits
from apps.service.option_values import SchedulerName
from apps.service.request_error import TranslatableError

MAX_NOTES = 12
A1111_SAMPLERS = {
    "euler": "Euler", "heun": "Heun", "sde": "Euler a", "dpm++": "DPM++ 2M", "unipc": "UniPC", "ddim": "DDIM",
    "ddpm": "DDPM",
}  # fmt: skip
"""Ours -> AUTOMATIC1111's, exact or nearest."""
COMFY_SAMPLERS = {
    "euler": "euler", "heun": "heun", "sde": "euler_ancestral", "dpm++": "dpmpp_2m", "unipc": "uni_pc",
    "ddim": "ddim", "ddpm": "ddpm",
}  # fmt: skip
"""Ours -> ComfyUI's, exact or nearest."""
SCHEDULES = re.compile(r" (karras|exponential|polyexponential|sgm uniform|simple|normal|beta|automatic)$")
"""Spacings of noise levels, which older versions name behind the sampler."""
SAME = {"euler": "euler", "heun": "heun", "dpm++ 2m": "dpm++", "unipc": "unipc", "ddim": "ddim", "ddpm": "ddpm"}
"""Normal form of a foreign name -> ours that computes the same."""
NEAREST = (
    (r"euler a.*|euler ancestral.*", "sde"), (r"dpm\+\+.*sde.*|dpm\+\+ 2s.*", "sde"),
    (r"er sde|seeds.*|sa solver.*", "sde"),
    (r"euler.*", "euler"), (r"heun.*|dpm2.*|dpm 2.*", "heun"), (r"unipc.*|uni pc.*", "unipc"),
    (r"dpm.*|lms|plms|ipndm.*|deis|res multistep.*", "dpm++"), (r"ddim.*", "ddim"), (r"ddpm.*", "ddpm"),
)  # fmt: skip
"""Patterns of normal forms -> ours that is nearest: with noise, of the same order, several steps behind."""
LORA_TAG = re.compile(r"<lora:([^:<>\n]{1,200})(?::([^<>\n]{0,100}))?>")
OTHER_TAG = re.compile(r"<(?:hypernet|lyco):[^<>\n]{1,300}>")
WEIGHTED = re.compile(r"\([^()\n]{1,200}:\s*\d*\.?\d+\)")
_NUMBER = re.compile(r"-?\d{1,6}(?:\.\d{1,12})?")


class Note(TranslatableError):
    """Something that could not be kept; see `TranslatableError` for its key and values. Never raised."""


@dataclass(slots=True)
class Recipe:
    """How an image is generated.

    Attributes:
        program: that wrote it down, such as `AUTOMATIC1111`.
        prompt: without tags of LoRAs.
        negative_prompt: what to keep away from.
        seed: of the noise.
        steps: of denoising.
        guidance: classifier-free guidance.
        width: pixels.
        height: pixels.
        sampler: as the program calls it.
        denoise: share of the noise that was added to an image; None or 1 for an image from text alone.
        model: file or name of the model.
        loras: names and weights.
        notes: what was not understood.
    """

    program: str
    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    denoise: float | None = None
    model: str | None = None
    loras: list[tuple[str, float]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def note(self, key: str, message: str, **values: object) -> None:
        """Note something once, at most `MAX_NOTES` times."""
        if len(self.notes) < MAX_NOTES and all(str(one) != message for one in self.notes):
            self.notes.append(Note(f"foreign.{key}", message, **values))


def whole_number(value: object) -> int | None:
    """Return a whole number, from a number or digits; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value.strip()):
        return int(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value if isinstance(value, int) and abs(value) < 2**64 else None


def number(value: object) -> float | None:
    """Return a finite number, from a number or digits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not re.fullmatch(r"\s*-?[0-9]{0,9}\.?[0-9]{0,20}(?:e-?[0-9]{1,2})?\s*", value):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def take_tags(recipe: Recipe) -> None:
    """Take the tags of LoRAs out of the prompt, and note what only the other program understands."""

    def take(match: re.Match[str]) -> str:
        weight = _NUMBER.search(match[2] or "")
        recipe.loras.append((match[1].strip(), float(weight[0]) if weight else 1.0))
        return ""

    text = LORA_TAG.sub(take, recipe.prompt)
    if text != recipe.prompt:
        text = re.sub(r",(?:[ \t]*,)+", ",", text)  # a tag stood between two commas
    if OTHER_TAG.search(text):
        recipe.note("tags", "Tags of hypernetworks in the prompt are left out; there are none here.")
        text = OTHER_TAG.sub("", text)
    if WEIGHTED.search(text):
        recipe.note("weights", "Weights in the prompt, such as (word:1.2), are read as words here.")
    recipe.prompt = re.sub(r" {2,}", " ", text).strip().rstrip(",").rstrip()


def nearest_sampler(name: str) -> tuple[SchedulerName | None, bool]:
    """Return the scheduler of ours that is nearest to a foreign one, and whether it computes the same.

    Args:
        name: such as `DPM++ 2M Karras` or `dpmpp_2m`.

    Returns:
        Our name, None if there is nothing like it.
    """
    plain = " ".join(name.lower().replace("dpmpp", "dpm++").replace("_", " ").split())
    plain = re.sub(r"^k (?=\w)| gpu$", "", plain)
    stripped = SCHEDULES.sub("", plain)
    key = {"uni pc": "unipc"}.get(stripped, stripped)
    if key in SAME:
        return _ours(SAME[key]), stripped == plain
    found = next((ours for pattern, ours in NEAREST if re.fullmatch(pattern, key)), None)
    return (None if found is None else _ours(found)), False


def _ours(name: str) -> SchedulerName:
    assert name in get_args(SchedulerName)
    return name  # pyright: ignore[reportReturnType]


def fields_of(recipe: Recipe, shown: tuple[int, int]) -> dict[str, Any]:
    """Return the fields of our settings for a recipe; what does not fit our limits is noted and left out.

    Args:
        recipe: notes are added to it.
        shown: width and height of the image that it came with, which stand for those it does not name.
    """
    take_tags(recipe)
    fields: dict[str, Any] = {"seed": _seed(recipe)}
    for name in ("prompt", "negative_prompt"):
        text = getattr(recipe, name)
        if len(text) > limits.MAX_PROMPT_CHARS:
            most = limits.MAX_PROMPT_CHARS
            recipe.note("long", f"The {name} has {len(text)} characters; the first {most} are taken.", most=most)
        fields[name] = text[: limits.MAX_PROMPT_CHARS]
    fields["width"], fields["height"] = _size(recipe, shown)
    steps, guidance = recipe.steps, recipe.guidance
    if steps is not None and not 1 <= steps <= limits.MAX_STEPS:
        recipe.note("steps", f"{steps} steps are not done here; the model's own number is taken.", value=steps)
        steps = None
    if guidance is not None and not 0 <= guidance <= limits.MAX_GUIDANCE:
        recipe.note(
            "guidance", f"A guidance of {guidance:g} is not done here; the model's own is taken.", value=guidance
        )
        guidance = None
    fields |= {"steps": steps, "guidance": guidance, "sampler": _sampler(recipe), "loras": _loras(recipe)}
    if recipe.denoise is not None and recipe.denoise < 1:
        recipe.note("denoise", "It was started from another image, which the file does not hold; start from one here.")
    fields["model"] = (recipe.model or recipe.program).replace("\\", "/").rsplit("/", 1)[-1][:200] or recipe.program
    return fields


def _seed(recipe: Recipe) -> int:
    if recipe.seed is not None and 0 <= recipe.seed <= limits.MAX_SEED:
        return recipe.seed
    if recipe.seed is None:
        recipe.note("no_seed", "No seed is named; 0 is taken.")
        return 0
    taken = recipe.seed % (limits.MAX_SEED + 1)
    recipe.note(
        "seed", f"The seed {recipe.seed} is too large for here; {taken} is taken.", value=recipe.seed, taken=taken
    )
    return taken


def _size(recipe: Recipe, shown: tuple[int, int]) -> tuple[int, int]:
    width, height = recipe.width or shown[0], recipe.height or shown[1]
    wanted = (width, height)
    if width < 1 or height < 1:
        width, height = shown
    scale = min(1.0, math.sqrt(limits.MAX_PIXELS / (width * height)))
    fit = [
        min(max(int(side * scale) // limits.SIDE_MULTIPLE * limits.SIDE_MULTIPLE, limits.MIN_SIDE), limits.MAX_SIDE)
        for side in (width, height)
    ]
    if fit[0] * fit[1] > limits.MAX_PIXELS:  # a strip that is far too long
        fit = [min(side, limits.MIN_SIDE * limits.SIDE_MULTIPLE) for side in fit]
    if (fit[0], fit[1]) != wanted:
        message = f"{wanted[0]} x {wanted[1]} pixels are not generated here; {fit[0]} x {fit[1]} are taken."
        recipe.note("size", message, value=f"{wanted[0]} x {wanted[1]}", taken=f"{fit[0]} x {fit[1]}")
    return fit[0], fit[1]


def _sampler(recipe: Recipe) -> SchedulerName | None:
    if recipe.sampler is None:
        return None
    named = recipe.sampler[:60]
    found, is_same = nearest_sampler(named)
    if found is None:
        recipe.note("no_sampler", f"There is no sampler like {named!r} here; the model's own is taken.", value=named)
    elif not is_same:
        recipe.note("sampler", f"The sampler {named!r} is not here; {found!r} is nearest.", value=named, taken=found)
    return found


def _loras(recipe: Recipe) -> list[dict[str, Any]]:
    taken: dict[str, float] = {}
    for name, scale in recipe.loras:
        if len(taken) < limits.MAX_LORAS and -4 <= scale <= 4 and name and name not in taken:
            taken[name[:200]] = scale
        else:
            recipe.note("loras", "Some LoRAs are left out: too many, chosen twice, or with a weight outside -4 to 4.")
    return [{"name": name, "scale": scale} for name, scale in taken.items()]
