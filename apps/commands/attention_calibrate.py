"""`tessera attention calibrate`: find a plan of sparse attention for a model, for `--attention-pattern plan`."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from apps.commands.calibrate_cache import PROMPTS
from apps.commands.loading import load_for_command
from apps.service.usage import UsageError
from apps.service.writable import check_writable
from pipelines.acceleration.parts import PLAN_FILE
from sampling.step_tracker import track_steps


def run(
    model: str = "stickers",
    *,
    prompts: Sequence[str] = (),
    error: float | None = None,
    density: float | None = None,
    min_psnr: float | None = None,
    dense_first: float = 0.2,
    steps: int | None = None,
    output: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Generate some prompts with dense attention, measure what patterns would change, and write the plan.

    Args:
        model: built-in name, folder or hub id.
        prompts: what to generate; four usual ones if empty. Class labels for class-conditional models.
        error: most relative distance of attention to dense attention; 0.05 if nothing is given.
        density: instead: most of the pairs that may be computed.
        min_psnr: the images must be so near to those of dense attention, in dB.
        dense_first: steps at the beginning that stay dense: a number, or below 1 a fraction.
        steps: of the runs; None is the pipeline's default.
        output: file ending in .safetensors; the model's own folder if None.
        device: where to generate.
        dtype: of the weights.

    Raises:
        UsageError: both an error and a density, no place to write to, or no plan that reaches what is asked for.
    """
    if error is not None and density is not None:
        raise UsageError(f"error {error:g} and density {density:g} exclude each other: give one of them")
    if output is not None:
        check_writable(output)
    pipe = load_for_command(model, device, dtype)
    folder = Path(pipe.name_or_path)
    if output is None and not folder.is_dir():
        raise UsageError(f"the model {model!r} has no folder of its own here: name a file with --output")
    wanted: list[Any] = [int(prompt) if prompt.isdecimal() else prompt for prompt in prompts or PROMPTS]
    path = output or folder / PLAN_FILE
    chart = path.with_suffix(".png")
    plan = _search(pipe, wanted, steps, dense_first, chart, error=error, density=density, min_psnr=min_psnr)
    plan.save(path)
    console = Console()
    console.print(f"{chart}: the choice of each head, and the error of other densities")
    console.print(f"{path}: {len(plan.choices)} choices, {len(plan.sigma_bins) + 1} ranges of noise levels")
    for choice, share in sorted(plan.shares().items(), key=lambda one: -one[1]):
        console.print(f"  {share:6.1%}  {choice}", markup=False)


def _search(
    pipe: Any, prompts: list[Any], steps: int | None, dense_first: float, chart: Path, **goals: float | None
) -> Any:
    """Return the plan that reaches the goals, and draw what was found.

    Raises:
        UsageError: there is none.
    """
    from apps.commands.attention_chart import draw_search
    from dit.attention.choices import Guards

    search: Any = import_module("dit.attention.search")
    tracker = track_steps(pipe)
    options = {} if steps is None else {"num_inference_steps": steps}
    try:
        survey = search.survey_attention(pipe, prompts, **options)
        plan = search.search_plan(
            pipe, prompts, guards=Guards(dense_first=dense_first), survey=survey, **goals, **options
        )
    except ValueError as reason:
        raise UsageError(str(reason)) from reason
    finally:
        if tracker is not None:
            tracker.detach()
    error, density = goals.get("error"), goals.get("density")
    table = survey.table(error=0.05 if (error, density) == (None, None) else error, density=density)
    draw_search(survey, table, chart)
    return plan
