"""The `tessera` command.

This file only parses: every command imports its implementation when it runs, so that `tessera --help` and a
mistyped option answer at once instead of after the import of torch.

Exit codes: 0 done, 1 the work failed, 2 wrong usage (`apps.service.usage.UsageError`), 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from apps.benchmarks.command import bench
from apps.commands.attention_group import attention
from apps.commands.models import models as models_group
from apps.commands.quantize_command import quantize
from apps.commands.shared_options import (
    AuthFile,
    Base,
    Device,
    DType,
    Guidance,
    ImagesPerDay,
    Json,
    LoraFolder,
    Mcp,
    ModelName,
    ModelsFolder,
    Offered,
    OfferedUpscalers,
    Offload,
    PictureFolder,
    Port,
    Precision,
    QueuedJobs,
    SecondsPerDay,
    Seed,
    Steps,
    StorageMB,
    TrainGB,
    TrainMegapixels,
    TrainMinutes,
    TrainUserGB,
    WildcardFolder,
)
from apps.commands.tune import tune
from apps.service.panels import CHECKPOINT, MEASURED, OUTPUT, SERVER, SPEED


class _Commands(TyperGroup):
    """The commands; parameters that derive from options are built when a command is called: they bring pydantic."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that arguments name, as click asks for it."""
        name, command, rest = super().resolve_command(ctx, args)
        if name == "generate":
            from apps.commands.generate_options import build_command

            return name, build_command(), rest
        if name == "compare":
            from apps.commands.compare_options import build_command as build_comparison

            return name, build_comparison(), rest
        if name == "train-lora":
            from apps.commands import train_lora_flags, train_lora_options

            return name, train_lora_options.build_command(), train_lora_flags.canonical(rest)
        return name, command, rest


app = typer.Typer(
    name="tessera",
    cls=_Commands,
    help="Generate images and videos from text with small, readable transformers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(attention, name="attention")
app.add_typer(models_group, name="models")


def _print_version(wanted: bool) -> None:
    """Print the version and leave, when `--version` was given."""
    if wanted:
        from dit import __version__

        typer.echo(f"tessera {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole trace of an error (may stand anywhere).")
    ] = False,
) -> None:
    """Hold the options of every command; `main` reads `--debug` itself, because it reports the errors."""


@app.command()
def studio(
    model: Offered = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; the default is reachable from here only.",
            rich_help_panel=SERVER,
        ),
    ] = ("127.0.0.1"),
    port: Port = 7860,
    output: PictureFolder = Path("outputs"),
    device: Device = "auto",
    dtype: Precision = "auto",
    offload: Offload = "none",
    base: Base = None,
    browser: Annotated[
        bool,
        typer.Option(
            help="Open the page in a browser.",
            rich_help_panel=SERVER,
        ),
    ] = True,
    auth_file: AuthFile = None,
    mcp: Mcp = False,
    lora: LoraFolder = None,
    wildcards: WildcardFolder = None,
    models: ModelsFolder = None,
    upscaler: OfferedUpscalers = None,
    train_minutes: TrainMinutes = 240,
    train_megapixels: TrainMegapixels = 4,
    train_user_gb: TrainUserGB = 10,
    train_gb: TrainGB = 50,
) -> None:
    """Start the studio: a web page that generates what you describe."""
    _serve(
        models=model or [],
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        offload=offload,
        base=base,
        open_browser=browser,
        output_dir=output,
        auth_file=auth_file,
        mcp=mcp,
        lora=lora,
        wildcards=wildcards,
        own_models=models,
        upscalers=upscaler or [],
        fine_tuning=(train_minutes, train_megapixels, train_user_gb, train_gb),
    )


@app.command()
def serve(
    model: Offered = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; any but loopback needs --auth-file.",
            rich_help_panel=SERVER,
        ),
    ] = "127.0.0.1",
    port: Port = 7860,
    output: PictureFolder = Path("outputs"),
    device: Device = "auto",
    dtype: Precision = "auto",
    offload: Offload = "none",
    base: Base = None,
    page: Annotated[
        bool,
        typer.Option(
            help="Serve the web page too.",
            rich_help_panel=SERVER,
        ),
    ] = True,
    auth_file: AuthFile = None,
    mcp: Mcp = False,
    lora: LoraFolder = None,
    wildcards: WildcardFolder = None,
    models: ModelsFolder = None,
    upscaler: OfferedUpscalers = None,
    train_minutes: TrainMinutes = 240,
    train_megapixels: TrainMegapixels = 4,
    train_user_gb: TrainUserGB = 10,
    train_gb: TrainGB = 50,
) -> None:
    """Serve the HTTP API (under /v1) and the studio."""
    _serve(
        models=model or [],
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        offload=offload,
        base=base,
        open_browser=False,
        output_dir=output,
        api=True,
        page=page,
        auth_file=auth_file,
        mcp=mcp,
        lora=lora,
        wildcards=wildcards,
        own_models=models,
        upscalers=upscaler or [],
        fine_tuning=(train_minutes, train_megapixels, train_user_gb, train_gb),
    )


def _serve(*, models: list[str], output_dir: Path, base: str | None, upscalers: list[str], **settings: Any) -> None:
    """Start a server, once the names of its models and its folder are checked."""
    from apps.commands.serve import run
    from apps.service.model_pool import check_sources, check_upscaler
    from apps.service.usage import checking
    from apps.service.writable import check_folder

    check_folder(output_dir)
    check_sources(models, base)
    for name in upscalers:
        check_upscaler(name)
    with checking():  # every ValueError there is about an option
        run(models=models, output_dir=output_dir, base=base, upscalers=upscalers, **settings)


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Of the user: letters, digits and _.-")],
    auth_file: Annotated[Path, typer.Option(dir_okay=False, help="File of users; created if absent.")],
    role: Annotated[str, typer.Option(help="view: see own jobs; generate: submit jobs; admin: all jobs.")] = "generate",
    images_per_day: ImagesPerDay = None,
    seconds_per_day: SecondsPerDay = None,
    queued_jobs: QueuedJobs = None,
    storage_mb: StorageMB = None,
) -> None:
    """Add a user of the server, or give one a new token; it is shown once. Quotas not given stay as they are."""
    from apps.api.tokens import add_user
    from apps.service.quotas import read_quotas
    from apps.service.usage import checking

    given = {"images_per_day": images_per_day, "seconds_per_day": seconds_per_day, "queued_jobs": queued_jobs}
    with checking():  # every ValueError there is about the name, a quota or the file
        typer.echo(add_user(auth_file, name, role, read_quotas({**given, "storage_mb": storage_mb})))


@app.command()
def generate() -> None:
    """Generate an image from a prompt, repeat one from its settings, or work through a file of prompts."""


@app.command()
def compare() -> None:
    """Generate one prompt with several settings: images side by side, differences, time, memory, PSNR and SSIM."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="TOML file that describes the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. run.steps=1000. May be repeated."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="latest|FOLDER", help="Go on from a checkpoint, exactly where it stopped."),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Rehearse: two steps on little data.")] = False,
) -> None:
    """Train a model; Ctrl-C saves a checkpoint before it stops."""
    from apps.commands.train import run

    run(config_path=config, overrides=overrides or [], resume=resume, smoke=smoke)


@app.command("train-lora")
def train_lora() -> None:
    """Fine-tune a model on a few images or clips of your own, by LoRA."""


@app.command()
def evaluate(
    model: ModelName,
    prompts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts of each kind to generate and judge.",
            rich_help_panel=MEASURED,
        ),
    ] = 500,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Generate only this set of prompts, e.g. single, or of clips moving or predict. May be repeated.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            file_okay=False,
            help="Folder for the report and the contact sheets.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            help="starter, common, all, or a file with one sticker name a line; the model's own if absent.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Batch size: images generated at once.",
            rich_help_panel=SPEED,
        ),
    ] = 32,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    lora: Annotated[
        Path | None,
        typer.Option(exists=True, help="LoRA file to put on the model.", rich_help_panel=MEASURED),
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    json_output: Json = False,
) -> None:
    """Generate many prompts, let the exact judge read the images or clips, and measure how well they are drawn."""
    from apps.commands.evaluate import run

    run(
        model=model,
        prompts=prompts,
        sets=sets or (),
        output=output,
        vocabulary=vocabulary,
        batch_size=batch_size,
        steps=steps,
        guidance=guidance,
        seed=seed,
        device=device,
        dtype=dtype,
        lora=lora,
        json_output=json_output,
    )


app.command()(bench)
app.command()(quantize)
app.command()(tune)


@app.command("calibrate-cache")
def calibrate_cache(
    model: ModelName = "stickers",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to learn from; one to four are enough.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="File to write; the model's folder if absent.")
    ] = None,
    steps: Steps = None,
    region: Annotated[
        Literal["output", "blocks"],
        typer.Option(help="Forecast the prediction, or what the blocks add to it (better far apart, more memory)."),
    ] = "output",
    device: Device = "auto",
    dtype: Precision = "auto",
) -> None:
    """Learn which steps of a model can be forecast, for --cache budget=0.35."""
    from apps.commands.calibrate_cache import run

    run(model, prompts=prompt or (), steps=steps, region=region, output=output, device=device, dtype=dtype)


@app.command()
def convert(
    family: Annotated[
        Literal["dit", "sit", "var", "infinity", "realesrgan", "st_vae", "vdt", "latte", "pt_dit", "mvdit"],
        typer.Option(
            help="Model family of the checkpoint.",
            rich_help_panel=CHECKPOINT,
        ),
    ],
    checkpoint: Annotated[
        Path,
        typer.Option(
            exists=True,
            help="Published file (.pth, .safetensors, a wheel) or folder, a diffusers DiT folder, or a folder of ours.",
            rich_help_panel=CHECKPOINT,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder (or official file) to write.",
            rich_help_panel=OUTPUT,
        ),
    ],
    vae: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of an AutoencoderKL to include; var, infinity: file of the tokenizer.",
            rich_help_panel=CHECKPOINT,
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="For infinity: local folder of flan-t5-xl to include; not needed to convert.",
            rich_help_panel=CHECKPOINT,
        ),
    ] = None,
    resolution: Annotated[
        Literal["0.06M", "0.25M", "0.60M", "1M"],
        typer.Option(
            help="For infinity: pixels of its images, e.g. 0.25M for the model of 512 x 512.",
            rich_help_panel=CHECKPOINT,
        ),
    ] = "1M",
    dtype: Annotated[
        DType,
        typer.Option(
            help="Number format; auto keeps the checkpoint's.",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    weights: Annotated[
        Literal["ema", "model"],
        typer.Option(
            help="Which weights of a trainer's checkpoint.",
            rich_help_panel=CHECKPOINT,
        ),
    ] = "ema",
    heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Attention heads, for a size that was never published.",
            rich_help_panel=CHECKPOINT,
        ),
    ] = None,
    to_official: Annotated[
        bool,
        typer.Option(
            "--to-official", help="The other way: a folder of ours to the official layout.", rich_help_panel=OUTPUT
        ),
    ] = False,
) -> None:
    """Turn a published checkpoint into a folder that loads here, or back."""
    from apps.conversion.convert import run

    run(
        family=family,
        checkpoint=checkpoint,
        output=output,
        vae=vae,
        text_encoder=text_encoder,
        resolution=resolution,
        dtype=dtype,
        weights=weights,
        heads=heads,
        to_official=to_official,
    )


@app.command("convert-lora")
def convert_lora(
    file: Annotated[
        Path,
        typer.Argument(exists=True, help="LoRA file (.safetensors) of any dialect, or a folder with one."),
    ],
    to: Annotated[
        Literal["diffusers", "peft", "comfyui", "kohya", "onetrainer"],
        typer.Option(help="Dialect to write; docs/lora_dialects.md describes them."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, for peft also a folder; NAME-DIALECT beside it if absent."),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="Family of the model, e.g. flux, where the names of the layers leave a choice."),
    ] = None,
) -> None:
    """Write a LoRA file in the dialect of another tool; no key is lost."""
    from apps.commands.convert_lora import run

    run(file, to=to, output=output, family=family)


@app.command()
def info(
    file: Annotated[
        Path | None, typer.Argument(help="Image or clip: show how it was made, and by which model.", dir_okay=False)
    ] = None,
    json_output: Json = False,
) -> None:
    """Show versions, devices, what is installed and what stands in the way; or how a file was generated."""
    if file is not None:
        from apps.commands.file_info import run as run_on_file

        run_on_file(file, json_output=json_output)
        return
    from apps.commands.info import run

    run(json_output=json_output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    Args:
        arguments: Words after the program's name; those of this process if None.

    Raises:
        SystemExit: Always, with the exit code. Wrong usage prints one line and exits with 2, work that failed
            (ValueError, OSError, a missing extra, too little memory) with 1; any other error is a defect and keeps its
            trace.
    """
    from apps.allocator import keep_freed_memory
    from apps.service.usage import UsageError

    keep_freed_memory()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        app(args=[word for word in words if word != "--debug"], prog_name="tessera")
    except (ValueError, OSError, ImportError, MemoryError) as error:
        if debug:
            raise
        typer.echo(f"error: {error}  (--debug shows the trace)", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
