"""AUTOMATIC1111's text of generation parameters: the `parameters` chunk of a PNG, the EXIF user comment elsewhere.

    a red apple <lora:sketch:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b, Model: name

Written as that program's `create_infotext` does, read by the rules of its `parse_generation_parameters`.
"""

from __future__ import annotations

import json
import re

from apps.service.recipe import A1111_SAMPLERS, Recipe, number, whole_number

PROGRAM = "AUTOMATIC1111"
NEGATIVE = "Negative prompt:"
MAX_LINE = 16 * 1_024
"""Characters of the line of parameters that are looked at, because the search for them may go over it often."""
PARAMETER = re.compile(r'\s*(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
LEAST = 3
"""Parameters that the last line must have, or else it belongs to the prompt."""
SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
IGNORED = frozenset({"Model hash", "VAE hash", "Version", "Lora hashes", "TI hashes", "RNG", "Schedule type",
                     "Batch size", "Batch pos", "User", "Clip skip", "VAE"})  # fmt: skip
"""Parameters that change nothing here, or that nothing can be made of."""
KNOWN = frozenset({"Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Denoising strength"})


def write_infotext(recipe: Recipe, sampler: str, version: str) -> str:
    """Write a recipe as AUTOMATIC1111 does.

    Args:
        recipe: its sampler is one of ours.
        sampler: of ours, or '' for one that has no name there.
        version: of this program.
    """
    tags = "".join(f" <lora:{name}:{scale:g}>" for name, scale in recipe.loras if not set("<>:\n") & set(name))
    parameters = {
        "Steps": recipe.steps,
        "Sampler": A1111_SAMPLERS.get(sampler),
        "CFG scale": None if recipe.guidance is None else f"{recipe.guidance:g}",
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model": recipe.model,
        "Denoising strength": None if recipe.denoise is None else f"{recipe.denoise:g}",
        "Version": f"tessera {version}",
    }
    line = ", ".join(f"{name}: {_quote(str(value))}" for name, value in parameters.items() if value is not None)
    negative = f"\n{NEGATIVE} {recipe.negative_prompt}" if recipe.negative_prompt else ""
    return f"{recipe.prompt}{tags}{negative}\n{line}".strip()


def read_infotext(text: str) -> Recipe:
    """Read a text of generation parameters.

    Args:
        text: of unknown origin, of bounded length.
    """
    recipe = Recipe(PROGRAM)
    *lines, last = text.strip().split("\n")
    found = PARAMETER.findall(last[:MAX_LINE])
    if len(found) < LEAST:
        lines, found = [*lines, last], []
    prompts: dict[bool, list[str]] = {False: [], True: []}
    is_negative = False
    for line in map(str.strip, lines):
        if line.startswith(NEGATIVE):
            is_negative, line = True, line.removeprefix(NEGATIVE).strip()
        prompts[is_negative].append(line)
    recipe.prompt, recipe.negative_prompt = ("\n".join(prompts[which]).strip() for which in (False, True))
    values = {name: _unquote(value.strip()) for name, value in found}
    recipe.steps, recipe.seed = whole_number(values.get("Steps")), whole_number(values.get("Seed"))
    recipe.guidance, recipe.denoise = number(values.get("CFG scale")), number(values.get("Denoising strength"))
    size = SIZE.fullmatch(values.get("Size", ""))
    if size is not None:
        recipe.width, recipe.height = int(size[1]), int(size[2])
    recipe.sampler, recipe.model = values.get("Sampler") or None, values.get("Model") or None
    others = [name for name in values if name not in KNOWN | IGNORED]
    if others:
        named = ", ".join(name[:40] for name in others[:8])
        recipe.note("ignored", f"Not understood here, and left out: {named}.", names=named)
    return recipe


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if set(",\n:") & set(text) else text


def _unquote(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, str) else text
