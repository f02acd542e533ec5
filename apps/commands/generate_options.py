"""The options of `tessera generate`; like `apps.cli` it only parses."""

from pathlib import Path
from typing import Annotated

import typer

from apps.commands.shared_options import (
    BASE_HELP,
    COUNT,
    EDITING,
    FILES,
    OUTPUT,
    PROMPT,
    SAMPLING,
    SCALES,
    SPEED,
    Device,
    Guidance,
    Json,
    MemoryName,
    Offload,
    Precision,
    SearchMethod,
    Steps,
)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Prompt; a class name or number for models of classes.")] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="Negative prompt: what the image should not show.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Built-in name, folder, file, hub id or OWNER/NAME@COMMIT.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP, rich_help_panel=PROMPT)] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Take the settings of this image, clip or JSON file.",
            rich_help_panel=FILES,
        ),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSONL (or text) file with an image a line; goes on where it was.",
            rich_help_panel=FILES,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Seed of the noise: the same seed gives the same image.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels: 128, or WIDTHxHEIGHT such as 192x128.",
            rich_help_panel=COUNT,
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of images.",
            rich_help_panel=COUNT,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Batch size: how many of them at once.",
            rich_help_panel=COUNT,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames of a clip; the model's default if absent.",
            rich_help_panel=COUNT,
        ),
    ] = None,
    style: Annotated[
        str | None,
        typer.Option(
            help="Name of a style, see apps/service/presets/styles.json.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Named settings, see apps/service/presets/presets.json: draft, fine ...",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="euler, heun, sde, dpm++, unipc, ddim or ddpm.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Compute some steps, forecast the rest: budget=0.35, taylorseer, fbcache:threshold=0.1 ...",
            rich_help_panel=SPEED,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Next-scale models: below 1 is bolder, above more varied.",
            rich_help_panel=SCALES,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Next-scale models: draw among so many tokens.",
            rich_help_panel=SCALES,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Next-scale models: among the likeliest that hold this share.",
            rich_help_panel=SCALES,
        ),
    ] = None,
    kv_policy: Annotated[
        str | None,
        typer.Option(
            help="Next-scale models, of earlier scales keep: full, scalekv, snapkv, window ...", rich_help_panel=SCALES
        ),
    ] = None,
    kv_budget: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            help="With --kv-policy: which share.",
            rich_help_panel=SCALES,
        ),
    ] = None,
    search: Annotated[
        SearchMethod | None,
        typer.Option(
            help="Next-scale models: generate several candidates; the scorer beside the model chooses.",
            rich_help_panel=SCALES,
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="With --search: images to pay for. best_of generates so many; tts and beam spend their tokens early.",
            rich_help_panel=SCALES,
        ),
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Put this LoRA file (safetensors) on the model.", rich_help_panel=PROMPT
        ),
    ] = None,
    lora_scale: Annotated[
        float | None,
        typer.Option(
            min=-4.0,
            max=4.0,
            help="With --lora: how much of it; 1 is as trained.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Start from this image; a clip begins with it.", rich_help_panel=EDITING
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="With --image: change only where it is white.", rich_help_panel=EDITING
        ),
    ] = None,
    mask_grow: Annotated[
        int | None,
        typer.Option(min=0, help="With --mask: grow it by so many pixels on every side.", rich_help_panel=EDITING),
    ] = None,
    mask_blur: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --mask: width of its soft edge in pixels; 0 keeps all outside bit-identical.",
            rich_help_panel=EDITING,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0.05,
            max=1.0,
            help="With --image: strength, how much of it changes.",
            rich_help_panel=EDITING,
        ),
    ] = None,
    expand: Annotated[
        str | None,
        typer.Option(
            help="With --image: extend it (outpainting): 0.25, or left=0.5,top=0.25.",
            rich_help_panel=EDITING,
        ),
    ] = None,
    memory: Annotated[
        MemoryName | None,
        typer.Option(
            help="fast, tiles (decode piece by piece), balanced or low; tessera info says what works here.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Attention backend: native, flex, xformers ...; see tessera info.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    offload: Offload = "none",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="PNG, WebP or MP4 file to write; a file that exists is replaced. A folder with --batch.",
            show_default="tessera.png, or the next name that is free",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    keep_settings: Annotated[
        bool,
        typer.Option(
            "--keep-settings/--no-settings",
            help="Write what reproduces an image into its file.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    sidecar: Annotated[
        bool,
        typer.Option(
            "--sidecar",
            help="Write it into a JSON file beside the image.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Generate an image from a prompt, repeat one from its settings, or work through a file of prompts."""
    from apps.commands.generate import Machine, Wishes, run

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
        mask_grow=mask_grow,
        mask_blur=mask_blur,
        strength=strength,
        expand=expand,
        memory=memory,
        dtype=None if dtype == "auto" else dtype,
        attention=attention,
    )
    machine = Machine(device=device, dtype=dtype, offload=offload, base=base)
    if prompt is None and settings is None and batch is None:
        raise typer.BadParameter("There is nothing to generate: give a prompt, --settings or --batch.")
    if batch is None:
        run(wishes, output, machine, settings, json_output, keep_settings, sidecar)
        return
    if prompt is not None or settings is not None:
        raise typer.BadParameter("--batch has its prompts in the file; leave out the prompt and --settings.")
    from apps.commands.batch import run_batch

    folder = Path("outputs") / batch.stem if output is None else output
    run_batch(batch, folder, wishes, machine, json_output, keep_settings, sidecar)
