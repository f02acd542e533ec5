"""The `tessera` command.

This file only parses: every command imports its implementation when it runs, so that `tessera --help` and a
mistyped option answer at once instead of after the import of torch.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

DType = Literal["auto", "float32", "bfloat16", "float16"]
OffloadName = Literal["none", "model", "group", "sequential"]
MemoryName = Literal["fast", "tiles", "balanced", "low"]
SearchMethod = Literal["best_of", "tts", "beam"]

Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[DType, typer.Option(help="Number format of the weights; auto suits the device.")]
Offload = Annotated[
    OffloadName,
    typer.Option(help="What waits on the CPU, for a GPU with little memory; none is fastest."),
]
Base = Annotated[
    str | None,
    typer.Option(help="For a file with a transformer only (GGUF): folder or hub id of the pipeline it belongs to."),
]
ModelName = Annotated[str, typer.Argument(help="Built-in name, folder, hub id or OWNER/NAME@COMMIT.")]
Offered = Annotated[
    list[str] | None,
    typer.Option(help="Offer this too: built-in name, folder, file, hub id, OWNER/NAME@COMMIT. May be repeated."),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")]
PictureFolder = Annotated[Path, typer.Option(file_okay=False, help="Folder that receives the pictures.")]
AuthFile = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help="Users and their tokens, made by `tessera token`; asks everybody for one."),
]
LoraFolder = Annotated[
    Path | None, typer.Option("--lora", file_okay=False, help="Offer the LoRA files (safetensors) of this folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; the model's own default if absent.")]
Guidance = Annotated[float | None, typer.Option(min=0.0, help="Guidance scale; 1 turns guidance off.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise: the same seed gives the same picture.")]

app = typer.Typer(
    name="tessera",
    help="Text to picture and video with small, readable transformers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reachable from here only.")] = (
        "127.0.0.1"
    ),
    port: Port = 7860,
    output: PictureFolder = Path("outputs"),
    device: Device = "auto",
    dtype: Precision = "auto",
    offload: Offload = "none",
    base: Base = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    auth_file: AuthFile = None,
    lora: LoraFolder = None,
) -> None:
    """Start the studio: a web page that paints what you type."""
    from apps.serve import run

    run(
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
        lora=lora,
    )


@app.command()
def serve(
    model: Offered = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs --auth-file.")] = "127.0.0.1",
    port: Port = 7860,
    output: PictureFolder = Path("outputs"),
    device: Device = "auto",
    dtype: Precision = "auto",
    offload: Offload = "none",
    base: Base = None,
    page: Annotated[bool, typer.Option(help="Serve the web page too.")] = True,
    auth_file: AuthFile = None,
    lora: LoraFolder = None,
) -> None:
    """Serve the HTTP API (under /v1) and the studio."""
    from apps.serve import run

    run(
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
        lora=lora,
    )


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Of the user: letters, digits and _.-")],
    auth_file: Annotated[Path, typer.Option(dir_okay=False, help="File of users; created if absent.")],
    role: Annotated[
        Literal["watch", "paint", "admin"], typer.Option(help="watch: see one's jobs; paint: submit; admin: all jobs.")
    ] = "paint",
) -> None:
    """Add a user of the server, or give one a new token; it is shown once."""
    from apps.api.tokens import add_user

    typer.echo(add_user(auth_file, name, role))


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to paint; a class name or number for models of classes.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="PNG, WebP or MP4 file to write; a folder with --batch."),
    ] = Path("tessera.png"),
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    model: Annotated[str | None, typer.Option(help="Built-in name, folder, file, hub id or OWNER/NAME@COMMIT.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the noise: the same seed gives the same picture.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[str | None, typer.Option(help="Pixels: 128, or WIDTHxHEIGHT such as 192x128.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="How many pictures.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="How many of them are painted at once.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip; the model's default if absent.")] = None,
    style: Annotated[str | None, typer.Option(help="Name of a style, see apps/presets/styles.json.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Named settings, see apps/presets/presets.json: draft, fine ...")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="euler, heun, sde, dpm++, unipc, ddim or ddpm.")] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Compute some steps, forecast the rest: budget=0.35, taylorseer, fbcache:threshold=0.1 ..."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="Next-scale models: below 1 is bolder, above more varied.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Next-scale models: draw among so many tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Next-scale models: among the likeliest that hold this share."),
    ] = None,
    kv_policy: Annotated[
        str | None, typer.Option(help="Next-scale models, of earlier scales keep: full, scalekv, snapkv, window ...")
    ] = None,
    kv_budget: Annotated[float | None, typer.Option(min=0.01, max=1.0, help="With --kv-policy: which share.")] = None,
    search: Annotated[
        SearchMethod | None,
        typer.Option(help="Next-scale models: paint several candidates; the scorer beside the model chooses."),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="With --search: pictures to pay for. best_of paints so many; tts and beam spend their tokens early.",
        ),
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Put this LoRA file (safetensors) on the model.")
    ] = None,
    lora_scale: Annotated[
        float | None, typer.Option(min=-4.0, max=4.0, help="With --lora: how much of it; 1 is as trained.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Start from this picture; a clip begins with it.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="With --image: paint only where it is white.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0.05, max=1.0, help="With --image: how much of it is repainted.")
    ] = None,
    expand: Annotated[
        str | None,
        typer.Option(help="With --image: let it grow and paint what is added: 0.25, or left=0.5,top=0.25."),
    ] = None,
    mask_grow: Annotated[
        int | None, typer.Option(min=0, help="With --mask: grow it by so many pixels on every side.")
    ] = None,
    mask_blur: Annotated[
        int | None,
        typer.Option(min=0, help="With --mask: width of its soft edge in pixels; 0 keeps all outside bit-identical."),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Take the settings of this picture, clip or JSON file."),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="JSONL (or text) file with a picture a line; goes on where it was."
        ),
    ] = None,
    keep_settings: Annotated[
        bool, typer.Option("--keep-settings/--no-settings", help="Write what reproduces a picture into its file.")
    ] = True,
    sidecar: Annotated[bool, typer.Option("--sidecar", help="Write it into a JSON file beside the picture.")] = False,
    memory: Annotated[
        MemoryName | None,
        typer.Option(help="fast, tiles (decode piece by piece), balanced or low; tessera info says what works here."),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention backend: native, flex, xformers ...; see tessera info.")
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    offload: Offload = "none",
    base: Base = None,
    json_output: Json = False,
) -> None:
    """Paint a prompt into a file, repeat a picture from its settings, or work through a file of prompts."""
    from apps.generate import Machine, Wishes, run

    wishes = Wishes(
        prompt=prompt,
        negative_prompt=negative_prompt,
        model=model,
        seed=seed,
        steps=steps,
        guidance=guidance,
        size=size,
        num=num,
        batch_size=batch_size,
        frames=frames,
        style=style,
        preset=preset,
        scheduler=scheduler,
        cache=cache,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        kv_policy=kv_policy,
        kv_budget=kv_budget,
        search=search,
        candidates=candidates,
        lora=lora,
        lora_scale=lora_scale,
        image=image,
        mask=mask,
        strength=strength,
        expand=expand,
        mask_grow=mask_grow,
        mask_blur=mask_blur,
        memory=memory,
        dtype=None if dtype == "auto" else dtype,
        attention=attention,
    )
    machine = Machine(device=device, dtype=dtype, offload=offload, base=base)
    if prompt is None and settings is None and batch is None:
        raise typer.BadParameter("There is nothing to paint: give a prompt, --settings or --batch.")
    if batch is None:
        run(wishes, output, machine, settings, json_output, keep_settings, sidecar)
        return
    if prompt is not None or settings is not None:
        raise typer.BadParameter("--batch has its prompts in the file; leave out the prompt and --settings.")
    from apps.batch import run_batch

    folder = Path("outputs") / batch.stem if output == Path("tessera.png") else output
    run_batch(batch, folder, wishes, machine, json_output, keep_settings, sidecar)


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
    from apps.train import run

    run(config_path=config, overrides=overrides or [], resume=resume, smoke=smoke)


@app.command()
def evaluate(
    model: ModelName,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each kind to paint and judge.")] = 500,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Paint only this set of prompts, e.g. single. May be repeated.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", file_okay=False, help="Folder for the report and the contact sheet."),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(help="starter, all, or a file with one sticker name a line; the model's own if absent."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures painted at once.")] = 32,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = "auto",
    json_output: Json = False,
) -> None:
    """Paint many prompts and let the exact judge read the pictures."""
    from apps.evaluate import run

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
        json_output=json_output,
    )


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="paint (a picture and its parts), start (imports), costs (single operations), cache and "
            "cache-transfer (step caches), kv, shortcuts and search (what next-scale models lose by forgetting and "
            "skipping, and gain by searching), or released (our VAR beside a clone of its authors' code)."
        ),
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As --model; for released the clone's folder.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Built-in name, folder, hub id or OWNER/NAME@COMMIT.", show_default="stickers")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Pictures to compare, for cache, kv and search.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 7,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="JSON file for the report.")
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    smoke: Annotated[bool, typer.Option("--smoke", help="One round only, to see that it runs.")] = False,
    json_output: Json = False,
) -> None:
    """Time things on this machine, in turns."""
    from apps.bench import run

    run(
        what=what,
        model=name or model,
        prompts=prompts,
        repeats=repeats,
        output=output,
        device=device,
        dtype=dtype,
        smoke=smoke,
        json_output=json_output,
    )


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
    from apps.calibrate_cache import run

    run(model, prompts=prompt or (), steps=steps, region=region, output=output, device=device, dtype=dtype)


@app.command()
def convert(
    family: Annotated[Literal["dit", "sit", "var", "infinity"], typer.Option(help="Model family of the checkpoint.")],
    checkpoint: Annotated[
        Path, typer.Option(exists=True, help="Published file or folder, a diffusers DiT folder, or a folder of ours.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder (or official file) to write.")],
    vae: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of an AutoencoderKL to include; var, infinity: file of the tokenizer."),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="For infinity: local folder of flan-t5-xl to include; not needed to convert.")
    ] = None,
    resolution: Annotated[
        Literal["0.06M", "0.25M", "0.60M", "1M"],
        typer.Option(help="For infinity: pixels of its pictures, e.g. 0.25M for the model of 512 x 512."),
    ] = "1M",
    dtype: Annotated[DType, typer.Option(help="Number format; auto keeps the checkpoint's.")] = "auto",
    weights: Annotated[Literal["ema", "model"], typer.Option(help="Which weights of a trainer's checkpoint.")] = "ema",
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, for a size that was never published.")
    ] = None,
    to_official: Annotated[
        bool, typer.Option("--to-official", help="The other way: a folder of ours to the official layout.")
    ] = False,
) -> None:
    """Turn a published checkpoint into a folder that loads here, or back."""
    from apps.convert import run

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


@app.command()
def info(json_output: Json = False) -> None:
    """Show versions, devices, what is installed and what stands in the way."""
    from apps.info import run

    run(json_output=json_output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    Args:
        arguments: Words after the program's name; those of this process if None.

    Raises:
        SystemExit: Always, with the exit code. What the user can mend (ValueError, OSError, a missing extra, too
            little memory) prints one line and exits with 1; any other error is a defect and keeps its trace.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        app(args=[word for word in words if word != "--debug"], prog_name="tessera")
    except (ValueError, OSError, ImportError, MemoryError) as error:
        if debug:
            raise
        typer.echo(f"error: {error}  (--debug shows the trace)", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
