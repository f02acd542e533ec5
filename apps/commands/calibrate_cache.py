"""`tessera calibrate-cache`: learn which steps of a model can be forecast, for `--cache budget=...`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from apps.commands.loading import load_for_command
from apps.service.usage import UsageError
from apps.service.writable import check_writable
from pipelines.step_cache import PROFILE_FILE
from sampling.step_cache import calibrate_budget

PROMPTS = (
    "a red apple on a white background",
    "a cat face left of a rocket on blue",
    "three small frogs on yellow",
    "a large castle on purple",
)


def run(
    model: str = "stickers",
    *,
    prompts: Sequence[str] = (),
    steps: int | None = None,
    region: Literal["output", "blocks"] = "output",
    output: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Generate some prompts uncached and write the profile.

    Args:
        model: built-in name, folder or hub id.
        prompts: what to generate; four usual ones if empty. Class labels for class-conditional models.
        steps: of the runs; None is the pipeline's default.
        region: what is forecast, see `sampling.step_cache.calibrate_budget`.
        output: file ending in .safetensors; the model's own folder if None.
        device: where to generate.
        dtype: of the weights.

    Raises:
        ValueError: no output is given and the model has no folder here.
    """
    if output is not None:
        check_writable(output)
    pipe = load_for_command(model, device, dtype)
    folder = Path(pipe.name_or_path)
    if output is None and not folder.is_dir():
        raise UsageError(f"the model {model!r} has no folder of its own here: name a file with --output")
    wanted: list[Any] = [int(prompt) if prompt.isdecimal() else prompt for prompt in prompts or PROMPTS]
    profile = calibrate_budget(pipe, wanted, steps, region=region)
    path = output or folder / PROFILE_FILE
    profile.save(path)
    strip = "".join("C" if computed else "." for computed in profile.mask((), 0.35))
    learned = f"{len(profile.sigmas)} steps, {profile.prompts} prompts, region {profile.region}"
    Console().print(f"{path}: {learned}; at budget 0.35: {strip}")
