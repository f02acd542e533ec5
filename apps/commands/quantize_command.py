"""`tessera quantize`: its options; it imports what it runs."""

from pathlib import Path
from typing import Annotated

import typer

from apps.commands.shared_options import Device, Guidance, Json, ModelName, Precision, Seed, Steps
from apps.service.panels import FILES, MEASURED, OUTPUT, SPEED


def quantize(
    model: ModelName,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            file_okay=False,
            help="Folder to write: the quantized model and its report. A new one, or an empty one.",
            rich_help_panel=OUTPUT,
        ),
    ],
    bits: Annotated[
        str,
        typer.Option(
            help="Formats of weights and activations: w8a8, w6a8, w4a8, w4a6, w4a4, w8a16, w4a16, fp8, nvfp4 ... "
            "Several by commas are those that mixed precision chooses among: w8a8,w6a8,w4a8.",
            rich_help_panel=SPEED,
        ),
    ] = "w8a8",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="viditq, svdquant, fp4dit, int8 ...; docs/quantization.md lists all. The usual one for the formats if "
            "absent.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Of mixed precision (viditq_mp): bits of a weight on average (5bits), a size (40MB) or a share of the "
            "time in 16 bits (60%time). Layers that the images depend on most have more bits.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text file of prompts, one a line, to calibrate on; or a calibration that --save-calib wrote.",
            rich_help_panel=FILES,
        ),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Calibrate on nothing, in seconds.", rich_help_panel=FILES)
    ] = False,
    save_calib: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Keep the calibration in this file (.safetensors), for other recipes and formats.",
            rich_help_panel=FILES,
        ),
    ] = None,
    components: Annotated[
        list[str] | None,
        typer.Option(
            "--components",
            "--component",
            help="Quantize this component, e.g. text_encoder, instead of the networks that denoise; several by commas.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave layers as they are whose names begin like this regular expression. May be repeated.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    full_precision_first: Annotated[
        int,
        typer.Option(min=0, help="Steps at the beginning whose activations keep 16 bits.", rich_help_panel=SPEED),
    ] = 0,
    full_precision_last: Annotated[int, typer.Option(min=0, help="Likewise at the end.", rich_help_panel=SPEED)] = 0,
    compare: Annotated[
        int,
        typer.Option(
            min=0,
            max=16,
            help="Images to generate before and after, side by side, with PSNR and time; 0 compares nothing.",
            rich_help_panel=MEASURED,
        ),
    ] = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = "auto",
    json_output: Json = False,
) -> None:
    """Quantize a model into a folder that loads like any other, with a report: sizes, errors, images side by side."""
    from apps.commands.quantize import QuantizeOptions, run

    run(
        QuantizeOptions(
            model=model,
            output=output,
            bits=bits,
            recipe=recipe,
            budget=budget,
            calib=calib,
            data_free=data_free,
            save_calib=save_calib,
            components=tuple(name.strip() for one in components or () for name in one.split(",")),
            skip=tuple(skip or ()),
            full_precision_first=full_precision_first,
            full_precision_last=full_precision_last,
            compare=compare,
            steps=steps,
            guidance=guidance,
            seed=seed,
            device=device,
            dtype=dtype,
        ),
        json_output=json_output,
    )
