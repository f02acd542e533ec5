"""`tessera bench`: its options; it imports what it runs."""

from pathlib import Path
from typing import Annotated

import typer

from apps.commands.shared_options import Device, Guidance, Json, Precision, Steps
from apps.service.panels import MEASURED, OUTPUT


def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="image (an image and its parts), start (imports), costs (single operations), cache, cache-time and "
            "cache-transfer (step caches), clips (a step cache, and length), kv, shortcuts and search (next-scale "
            "models), released (our VAR beside its authors' code), lora-style, lora-object and lora-motion (what a "
            "LoRA learned), style-control (what 24 images tell of a style), attention (dense and sparse, on a CPU), "
            "attention-plan (a searched plan on clips), attention-corrections (what stands for pairs that are left "
            "out), attention-gpu (the kernel on a GPU), quantization (layers and a block, on a CPU), "
            "quantization-gpu (the same on a GPU), quantization-quality (what quantized built-in models generate), "
            "quantization-mixed (formats chosen by measuring, at equal bytes), "
            "speed-up (the tuner's setting beside what is put together by hand), speed-up-shapes (the tuner's "
            "predictions for a network of published size), or "
            "training (validation losses of several configurations)."
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="As --model; for released the clone's folder; for training configuration files, the baseline first; "
            "for quantization tables (linear, block, pipeline, size, error).",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Built-in name, folder, hub id or OWNER/NAME@COMMIT.",
            show_default="stickers",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    prompts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Images to compare, for cache, kv and search.",
            rich_help_panel=MEASURED,
        ),
    ] = 64,
    repeats: Annotated[
        int,
        typer.Option(
            min=1,
            help="Rounds that count.",
            rich_help_panel=MEASURED,
        ),
    ] = 7,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            dir_okay=False,
            help="JSON file for the report.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="One round only, to see that it runs.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    lora: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="LoRA file, for lora-style, lora-object and lora-motion.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help="What asks for what the LoRA learned: words behind the prompts of lora-style ('' for none), or the "
            "sticker of lora-object.",
            show_default="plastic, dodo",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="LoRA file that is on all the time, without --lora too, such as one for few steps; for lora-style and "
            "lora-object.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Time things on this machine, in turns."""
    from apps.benchmarks.run import run

    names = names or []
    if what not in ("training", "quantization") and len(names) > 1:
        raise typer.BadParameter(f"{what} measures one model, not {len(names)}: {', '.join(names)}")
    run(
        what=what,
        model=None if what == "training" else next(iter(names), model),
        names=names,
        prompts=prompts,
        repeats=repeats,
        output=output,
        device=device,
        dtype=dtype,
        smoke=smoke,
        lora=lora,
        trigger=trigger,
        steps=steps,
        guidance=guidance,
        beside=beside,
        json_output=json_output,
    )
