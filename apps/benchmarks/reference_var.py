"""`tessera bench released FOLDER`: our VAR beside its authors' code, in turns, with the same random weights.

The folder is a clone of github.com/FoundationVision/VAR; its code runs as it stands. No weights are needed: what a
image costs does not depend on them. Times are the processor's, of one image with tokens drawn as its demo draws.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apps.benchmarks.next_scale import Asked
from apps.environment import describe_machine
from apps.service.usage import UsageError
from dit.convert.var import tokenizer_from_official, transformer_from_official
from dit.runtime.metrics import relative_error
from dit.runtime.timing import measure
from pipelines import NextScaleClassToImagePipeline

DEPTH, GUIDANCE, TOP_K, TOP_P, LABEL, SEED = 16, 1.5, 900, 0.96, 207, 0
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
ROOMS = ("models", "dist", "utils")
"""What the released code calls its modules."""


def bench_released(asked: Asked) -> dict[str, Any]:
    """Time an image of VAR-d16 by both codes, in float32 and bfloat16, with and without guidance.

    Raises:
        ValueError: no clone of the released code was named.
    """
    folder = Path(asked.model or "")
    if not (folder / "models" / "var.py").is_file():
        raise UsageError(
            "name the folder of the released code: git clone https://github.com/FoundationVision/VAR, then "
            f"tessera bench released VAR (in {str(folder)!r} there is no models/var.py)"
        )
    depth, scales = (2, SCALES[:4]) if asked.smoke else (DEPTH, SCALES)
    with released_code(folder) as models:
        vae, var = random_weights(models, depth, scales)
        candidates: dict[str, Callable[[], Any]] = {
            "released, float32": lambda: generate_released(var, torch.float32, GUIDANCE),
            "released, bfloat16 autocast": lambda: generate_released(var, torch.bfloat16, GUIDANCE),
        }
        for dtype in (torch.float32, torch.bfloat16):
            pipe, name = ours(var, vae, dtype, scales), str(dtype).removeprefix("torch.")
            candidates[f"ours, {name}"] = lambda pipe=pipe: generate_ours(pipe, GUIDANCE)
            candidates[f"ours, {name}, no guidance"] = lambda pipe=pipe: generate_ours(pipe, 0.0)
        difference = relative_error(candidates["ours, float32"](), candidates["released, float32"]())
        timed = measure(candidates, asked.repeats)
    rows = []
    for name, timing in timed.timings.items():
        baseline = "released, float32" if "float32" in name else "released, bfloat16 autocast"
        ratio = timing.process_min / timed.timings[baseline].process_min
        rows.append({"code": name, "processor seconds": round(timing.process_min, 3), "of released": round(ratio, 3)})
    return {
        "machine": describe_machine(torch.device("cpu"), torch.float32),
        "repeats": asked.repeats,
        "difference of the pictures, float32": difference,
        "tables": {f"VAR-d{depth}, {16 * scales[-1]} pixels, batch 1 (least of {asked.repeats} rounds)": rows},
    }


@contextlib.contextmanager
def released_code(folder: Path) -> Iterator[Any]:
    """Return the released package `models`, for a while: it changes torch's initialisation and takes common names."""
    layers = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Conv1d, nn.ConvTranspose1d, nn.ConvTranspose2d)
    layers += (nn.BatchNorm2d, nn.SyncBatchNorm)
    resets = {layer: vars(layer).get("reset_parameters") for layer in layers}
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield importlib.import_module("models")
    finally:
        sys.path.remove(str(folder.resolve()))
        for layer, reset in resets.items():
            if reset is not None:
                layer.reset_parameters = reset
            elif "reset_parameters" in vars(layer):
                del layer.reset_parameters
        for name in [name for name in sys.modules if name.partition(".")[0] in ROOMS]:
            del sys.modules[name]


def random_weights(models: Any, depth: int, scales: tuple[int, ...]) -> tuple[nn.Module, Any]:
    """Return the released tokenizer and transformer; the first gets weights, as it is left uninitialised."""
    torch.manual_seed(SEED)
    with contextlib.redirect_stdout(io.StringIO()):
        vae, var = models.build_vae_var(device="cpu", patch_nums=scales, depth=depth, shared_aln=False)
    for part in vae.modules():
        own = dict(part.named_parameters(recurse=False))
        for name, weight in own.items():
            if isinstance(part, nn.GroupNorm) and name == "weight":
                nn.init.ones_(weight)
            elif weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)
            else:
                nn.init.zeros_(weight)
    return vae.eval(), var.eval()


def ours(var: nn.Module, vae: nn.Module, dtype: torch.dtype, scales: tuple[int, ...]) -> Any:
    """Our pipeline with the released weights."""
    transformer: Any = transformer_from_official(var.state_dict())
    tokenizer: Any = tokenizer_from_official(vae.state_dict(), scales)
    pipe = NextScaleClassToImagePipeline(transformer.to(dtype).eval(), tokenizer.to(dtype).eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_ours(pipe: Any, guidance: float) -> Tensor:
    """Return an image (1, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(SEED)
    return pipe([LABEL], cfg=guidance, top_k=TOP_K, top_p=TOP_P, generator=generator, output_type="pt").images


@torch.inference_mode()
def generate_released(var: Any, dtype: torch.dtype, guidance: float) -> Tensor:
    """Return an image (1, 3, H, W) in [0, 1]."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return var.autoregressive_infer_cfg(
            1, torch.tensor([LABEL]), g_seed=SEED, cfg=guidance, top_k=TOP_K, top_p=TOP_P
        )
