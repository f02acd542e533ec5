"""`tessera bench cache`: step caches and fewer steps on the built-in model, rivals by their own code, in one run.

Steps, size, scheduler and guidance are fixed. The cost is the share of the uncached run's operations in the network
(matrix products, as torch counts them), so it is the same measure for all and knows what a forecast step still runs:
embeddings, head blocks, the last projection. Caches that look at the first block pay for it at every step, which
weighs more in a network of five blocks than in one of fifty: the share of steps whose middle block ran stands beside.
Likeness is the PSNR of the images, mean over prompts that no calibration saw: (a) to the uncached run of as many
steps, (b) to a run of very many steps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from apps.benchmarks import baselines as cache_rivals
from apps.benchmarks.baselines import Candidate
from apps.benchmarks.runs import SAVING
from apps.commands.loading import load_for_command
from apps.environment import describe_machine
from apps.stickers import Scene, load_sprites
from apps.stickers.judge import Judge, score
from apps.stickers.prompt_sets import SETS, Request, draw_requests
from apps.training.data.stickers import read_vocabulary
from dit.runtime.metrics import psnr
from dit.runtime.timing import measure
from pipelines import info_of
from sampling.step_cache import Profile, StepCache, calibrate_budget

REGIONS = ("blocks", "output")
"""Of our profiles: that of the shipped one first."""
KINDS = ("single", "pair", "count")
CALIBRATION_SEED, TEST_SEED = 9_000_000, 1_000
COSTS = (0.5, 0.35, 0.25)
STEPS = 28
SLACK = 0.018
"""How far above a cost a candidate may be and still count as reaching it: half a step of 28."""


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of attention on CPU, which torch's counter leaves out, from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


@dataclass
class Workload:
    """A pipeline, prompts that calibration does not see, and how they are generated."""

    pipe: Any
    requests: list[Request]
    steps: int
    guidance: float
    batch_size: int = 64  # one batch: caches of others keep no state of texts of another length

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> torch.Tensor:
        """Generate prompts: (B, 3, H, W) in [0, 1]."""
        settings = {"num_inference_steps": steps or self.steps, "guidance_scale": self.guidance, "output_type": "pt"}
        pictures = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            noise = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            pictures.append(self.pipe(prompt=list(prompts[part]), generator=noise, **settings).images.float().cpu())
        return torch.cat(pictures)

    def generate_all(self, steps: int | None = None) -> torch.Tensor:
        """Generate the test prompts."""
        prompts = [request.prompt for request in self.requests]
        return self.generate(prompts, [TEST_SEED + i for i in range(len(prompts))], steps)

    @contextmanager
    def counting(self) -> Iterator[Callable[[], tuple[float, float]]]:
        """Count operations; yields a function that returns those of the network, and the calls of its middle block."""
        layers = [part for name, part in self.pipe.transformer.named_modules() if name.endswith(".attn")]
        calls: list[object] = []
        handle = layers[len(layers) // 2].register_forward_pre_hook(lambda *_: calls.append(1))
        network = type(self.pipe.transformer).__name__
        also = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
        try:
            with FlopCounterMode(display=False, custom_mapping=also) as counter:
                yield lambda: (sum(counter.get_flop_counts()[network].values()), len(calls))
        finally:
            handle.remove()


def draw(pipe: Any, count: int, seed: int) -> list[Request]:
    """Draw prompts of all kinds in turns."""
    sheet = load_sprites()
    names = read_vocabulary(str(Path(pipe.name_or_path) / "vocabulary.txt"))
    sets = [draw_requests(SETS[kind], -(-count // len(KINDS)), sheet, names, seed) for kind in KINDS]
    return [request for turn in zip(*sets, strict=True) for request in turn][:count]


def bench_cache(
    model: str, repeats: int, device: str | None, dtype: str | None, prompts: int = 64, steps: int | None = None
) -> dict[str, Any]:
    """Compare.

    Args:
        model: built-in name, or a folder with a vocabulary.
        repeats: 1 rehearses with few prompts and candidates; more measures.
        device: where to run.
        dtype: of the weights.
        prompts: how many are generated.
        steps: of the uncached run; None is 28, more than built-in models need, so that there is something to skip.
    """
    console = Console(stderr=True, soft_wrap=True)
    smoke = repeats == 1
    pipe = load_for_command(model, device, dtype)
    work = Workload(pipe, draw(pipe, 4 if smoke else prompts, 7), steps or (8 if smoke else STEPS), own_guidance(pipe))
    learned = [request.prompt for request in draw(pipe, 4, 1_000_003)]
    settings: dict[str, Any] = {"seed": CALIBRATION_SEED, "guidance_scale": work.guidance}
    profiles = [calibrate_budget(pipe, learned, work.steps, region=region, **settings) for region in REGIONS]
    uncached, whole = _painted(work, Candidate("uncached", {}, nullcontext))
    finest = _painted(work, cache_rivals.reference(24 if smoke else 84))[0]
    for rival in cache_rivals.missing():
        console.print(f"[yellow]not compared with {rival}[/]")
    rows = []
    for candidate in _candidates(work, profiles, learned[0], smoke):
        pictures, found = _painted(work, candidate)
        cost = [one / all_of_it for one, all_of_it in zip(found, whole, strict=True)]
        rows.append(
            {
                "method": candidate.method,
                "settings": candidate.settings,
                "cost": round(cost[0], 4),
                "computed_steps": round(cost[1], 4),
                "to_uncached_db": round(mean_psnr(pictures, uncached), 2),
                "to_reference_db": round(mean_psnr(pictures, finest), 2),
            }
        )
        row = rows[-1]
        if candidate.method.startswith("tessera"):
            row["judge"] = judged(work.requests, pictures)
        console.print(f"{row['method']} {row['settings']}: cost {row['cost']}, {row['to_uncached_db']} dB, "
                   f"{row['to_reference_db']} dB to the reference", highlight=False)  # fmt: skip
    return {
        "machine": describe_machine(torch.device(pipe.device), pipe.transformer.dtype),
        "prompts": len(work.requests),
        "calibration_prompts": len(learned),
        "steps": work.steps,
        "guidance": work.guidance,
        "missing": cache_rivals.missing(),
        "uncached": {
            "to_reference_db": round(mean_psnr(uncached, finest), 2),
            "judge": judged(work.requests, uncached),
        },
        "rows": rows,
        "best": best(rows, "cost"),
        "best_if_head_blocks_were_free": best(rows, "computed_steps"),
        "seconds": wall_saving(work, profiles[0], max(repeats, 2)),
    }


def _candidates(work: Workload, profiles: Sequence[Profile], prompt: str, smoke: bool) -> list[Candidate]:
    steps = work.steps
    counts = sorted({round(cost * steps) for cost in (*COSTS, 0.2)})
    magnitudes = cache_rivals.magnitudes_by_diffusers(work.pipe, prompt, steps, work.generate)
    groups = [
        *(cache_rivals.ours(profile, [count / steps for count in counts]) for profile in profiles),
        cache_rivals.of_diffusers(magnitudes, steps),
        cache_rivals.of_cache_dit(steps),
        cache_rivals.fewer_steps(counts),
    ]
    return [candidate for group in groups for candidate in (group[:1] if smoke else group)]


def _painted(work: Workload, candidate: Candidate) -> tuple[torch.Tensor, tuple[float, float]]:
    """Images of a candidate, its operations in the network, and how often the middle block ran."""
    with ExitStack() as stack:
        cost = stack.enter_context(work.counting())
        stack.enter_context(candidate.on(work.pipe))
        return work.generate_all(candidate.steps), cost()


def own_guidance(pipe: Any) -> float:
    """Return the guidance that a pipeline uses where a call names none."""
    return float(info_of(pipe).defaults["guidance_scale"])


def mean_psnr(pictures: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over the images; equal ones count as 100 dB."""
    values = [min(psnr(one, other), 100.0) for one, other in zip(pictures, reference, strict=True)]
    return sum(values) / len(values)


def judged(requests: Sequence[Request], pictures: torch.Tensor) -> dict[str, float]:
    """Shares of right images by kind, by the measure of the kind's set, in percent."""
    judge, right = Judge(load_sprites()), {kind: [] for kind in KINDS}
    scenes: list[Scene] = [request.scene for request in requests]
    for scene, reading in zip(scenes, judge.read(pictures * 2 - 1), strict=True):
        right[scene.kind].append(score(scene, reading)[SETS[scene.kind].metric])
    return {kind: round(100 * sum(found) / len(found), 2) for kind, found in right.items() if found}


def best(rows: Sequence[dict[str, Any]], measure_of_cost: str) -> dict[str, dict[str, dict[str, Any]]]:
    """For each cost and method the best likeness to the uncached run, and to the reference, of all its settings."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cost in COSTS:
        for row in rows:
            if row[measure_of_cost] <= cost + SLACK:
                entry = found.setdefault(f"{cost:g}", {}).setdefault(row["method"], {})
                for measure_name in ("to_uncached_db", "to_reference_db"):
                    entry[measure_name] = max(entry.get(measure_name, 0.0), row[measure_name])
    return found


def bench_time(model: str, repeats: int, device: str | None, dtype: str | None) -> dict[str, Any]:
    """Measure how much of the operations that the cache saves at a budget of 0.35 is saved in time.

    Args:
        model: built-in name, or a folder with a vocabulary.
        repeats: counted rounds; 1 rehearses with few steps.
        device: where to run.
        dtype: of the weights.
    """
    pipe = load_for_command(model, device, dtype)
    work = Workload(pipe, draw(pipe, 16, 7), 8 if repeats == 1 else STEPS, own_guidance(pipe))
    learned = [request.prompt for request in draw(pipe, 4, 1_000_003)]
    profile = calibrate_budget(
        pipe, learned, work.steps, region=REGIONS[0], seed=CALIBRATION_SEED, guidance_scale=work.guidance
    )
    *seconds, (_, saving) = wall_saving(work, profile, max(repeats, 2)).items()
    row = {"budget": "0.35", **{name: round(value, 3) for name, value in seconds}, SAVING: round(saving, 3)}
    machine = describe_machine(pipe.device, pipe.transformer.dtype)
    return {"machine": machine, "tables": {f"denoising of {len(work.requests)} images, {work.steps} steps": [row]}}


def wall_saving(work: Workload, profile: Any, repeats: int) -> dict[str, float]:
    """Median seconds of the denoising of one batch, uncached and at 0.35, by processor time (steady under load)."""
    prompts = [request.prompt for request in work.requests[: work.batch_size]]
    encoded = work.pipe.encode_prompt(prompts, None, True, 1, work.pipe.device)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    settings = dict(zip(names, encoded, strict=True))

    def denoise() -> None:
        noise = torch.Generator().manual_seed(0)
        work.pipe(
            **settings,
            generator=noise,
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            output_type="latent",
        )

    def cached() -> None:
        cache = StepCache.preset("budget", budget=0.35, profile=profile)
        with cache.attach(work.pipe):
            denoise()

    operations = []
    for run in (denoise, cached):
        with work.counting() as counted:
            run()
            operations.append(counted()[0])
    times = measure({"denoising, uncached": denoise, "denoising, budget 0.35": cached}, repeats)
    share = times.ratio("denoising, budget 0.35", "denoising, uncached", "process")
    seconds = {name: timing.process_median for name, timing in times.timings.items()}
    return {**seconds, SAVING: (1 - share) / (1 - operations[1] / operations[0])}
