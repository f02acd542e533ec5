"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from apps.service.panels import MODELS, OUTPUT, SAMPLING, SERVER, SPEED

DType = Literal["auto", "float32", "bfloat16", "float16"]
OffloadName = Literal["none", "model", "group", "sequential"]

Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: auto, cpu, cuda, cuda:1, mps.",
        rich_help_panel=SPEED,
    ),
]
Precision = Annotated[
    DType,
    typer.Option(
        help="Number format of the weights; auto suits the device.",
        rich_help_panel=SPEED,
    ),
]
Offload = Annotated[
    OffloadName,
    typer.Option(
        help="What waits on the CPU, for a GPU with little memory; none is fastest.",
        rich_help_panel=SPEED,
    ),
]
BASE_HELP = "For a file with a transformer only (GGUF): folder or hub id of the pipeline it belongs to."
Base = Annotated[str | None, typer.Option(help=BASE_HELP, rich_help_panel=MODELS)]
ModelName = Annotated[str, typer.Argument(help="Built-in name, folder, hub id or OWNER/NAME@COMMIT.")]
Offered = Annotated[
    list[str] | None,
    typer.Option(
        help="Offer this too: built-in name, folder, file, hub id, OWNER/NAME@COMMIT. May be repeated.",
        rich_help_panel=MODELS,
    ),
]
Port = Annotated[
    int,
    typer.Option(
        min=0,
        max=65535,
        help="Port to listen on.",
        rich_help_panel=SERVER,
    ),
]
PictureFolder = Annotated[
    Path,
    typer.Option(
        file_okay=False,
        help="Folder that receives the images.",
        rich_help_panel=OUTPUT,
    ),
]
AuthFile = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="Users and their tokens, made by `tessera token`; asks everybody for one.",
        rich_help_panel=SERVER,
    ),
]
Mcp = Annotated[
    bool,
    typer.Option(
        "--mcp",
        help="Offer the engine as tools of the Model Context Protocol too, at /mcp; needs the extra mcp.",
        rich_help_panel=SERVER,
    ),
]
WildcardFolder = Annotated[
    Path | None,
    typer.Option(
        "--wildcards",
        exists=True,
        file_okay=False,
        help="Folder of text files, of which __name__ in a prompt takes a line.",
        show_default="wildcards in the output folder",
        rich_help_panel=MODELS,
    ),
]
ModelsFolder = Annotated[
    Path | None,
    typer.Option(
        "--models",
        file_okay=False,
        help="Folder of models of your own: diffusers folders, .safetensors, .gguf, and LoRA files.",
        show_default="models beside the output folder",
        rich_help_panel=MODELS,
    ),
]
LoraFolder = Annotated[
    Path | None,
    typer.Option(
        "--lora", file_okay=False, help="Offer the LoRA files (safetensors) of this folder.", rich_help_panel=MODELS
    ),
]
OfferedUpscalers = Annotated[
    list[str] | None,
    typer.Option(
        "--upscaler",
        help="Offer this upscaler too: folder, hub id, OWNER/NAME@COMMIT. May be repeated.",
        rich_help_panel=MODELS,
    ),
]
TrainMinutes = Annotated[
    float, typer.Option(min=1, help="A fine-tuning stops after so long and can be resumed.", rich_help_panel=SERVER)
]
TrainMegapixels = Annotated[
    float,
    typer.Option(
        min=0.01,
        help="Of a fine-tuning: resolution squared times batch size, in 1024 x 1024 pixels.",
        rich_help_panel=SERVER,
    ),
]
TrainUserGB = Annotated[
    float, typer.Option(min=0.01, help="The fine-tuning runs of a user take so much at most.", rich_help_panel=SERVER)
]
TrainGB = Annotated[
    float, typer.Option(min=0.01, help="All fine-tuning runs take so much at most.", rich_help_panel=SERVER)
]
ImagesPerDay = Annotated[
    str | None, typer.Option(metavar="N", help="Images and clips a day at most; none for no limit.")
]
SecondsPerDay = Annotated[
    str | None, typer.Option(metavar="SECONDS", help="Device seconds a day at most; none for no limit.")
]
QueuedJobs = Annotated[
    str | None, typer.Option(metavar="N", help="Requests that wait at once at most; none for no limit.")
]
StorageMB = Annotated[
    str | None, typer.Option(metavar="MB", help="Megabytes of images and clips at most; none for no limit.")
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object instead of text.",
        rich_help_panel=OUTPUT,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Denoising steps; the model's own default if absent.",
        rich_help_panel=SAMPLING,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Guidance scale; 1 or less turns guidance off.",
        rich_help_panel=SAMPLING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Seed of the noise: the same seed gives the same image.",
        rich_help_panel=SAMPLING,
    ),
]
