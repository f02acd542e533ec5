"""Hash the images, clips and tokens of fixed seeds, to see that a change of structure changed no number.

    python -m tests.golden before.json                    # on the commit before
    python -m tests.golden after.json --against before.json

Both runs must be on one machine: other processors round differently, which is why no hash is committed. Compared are
pixels as the command line writes them, for the built-in models with their step caches, KV policies and searches, and
what the pipelines of all families return on tiny random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from apps import cli
from pipelines import load_pipeline
from tests.families.tiny import TINY_NAMES, VARIANTS, tiny_call, tiny_pipeline

STICKERS = {
    "default": [],
    "few steps": ["--steps", "6"],
    "no guidance": ["--guidance", "1", "--steps", "6"],
    "negative prompt": ["--negative-prompt", "a cat", "--steps", "6"],
    "several": ["--num", "3", "--batch-size", "2", "--steps", "6"],
    "size": ["--size", "192x128", "--steps", "6"],
    "bfloat16": ["--dtype", "bfloat16", "--steps", "6"],
    **{f"scheduler {name}": ["--scheduler", name, "--steps", "8"] for name in ("euler", "heun", "dpm++", "unipc")},
    **{
        f"cache {name}": ["--cache", name]
        for name in ("budget=0.35", "taylorseer", "hicache", "fora", "foca", "fbcache", "easycache", "dicache", "speca")
    },
    "style": ["--preset", "draft"],
    "image to image": ["--image", "first.png", "--strength", "0.6", "--steps", "8"],
    "inpaint": ["--image", "first.png", "--mask", "mask.png", "--steps", "8"],
    "soft mask": ["--image", "first.png", "--mask", "mask.png", "--mask-grow", "4", "--mask-blur", "6", "--steps", "8"],
    "expand": ["--image", "first.png", "--expand", "left=0.25,right=0.25", "--steps", "8"],
    "settings": ["--settings", "first.png"],
}
"""Name -> options of `tessera generate` for the model `stickers`."""

STICKERS_VAR = {
    "default": [],
    "guidance": ["--guidance", "3"],
    "several": ["--num", "3", "--batch-size", "2"],
    "sampling": ["--temperature", "1.5", "--top-k", "200", "--top-p", "0.9"],
    **{
        f"kv {name}": ["--kv-policy", name, "--kv-budget", "0.25"]
        for name in ("scalekv", "snapkv", "pyramidkv", "streaming", "window")
    },
    **{f"search {name}": ["--search", name, "--candidates", "3"] for name in ("best_of", "tts", "beam")},
    "inpaint": ["--image", "first.png", "--mask", "mask.png"],
    "expand": ["--image", "first.png", "--expand", "right=0.5"],
    "settings": ["--settings", "first.png"],
}
"""The same for `stickers-var`."""


def hash_array(array: np.ndarray) -> str:
    """Hash shape, type and values of an array."""
    head = f"{array.shape}{array.dtype}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def hash_value(value: object) -> str:
    """Hash what a pipeline returns: a tensor, an array, images, or a list of them."""
    if isinstance(value, torch.Tensor):
        return hash_array(value.detach().to("cpu", torch.float32).numpy())
    if isinstance(value, list | tuple):
        return hashlib.sha256("".join(map(hash_value, value)).encode()).hexdigest()[:16]
    return hash_array(np.asarray(value))


def generated(folder: Path, words: list[str]) -> str:
    """Run `tessera generate` and hash the pixels of all that it writes."""
    for file in folder.glob("out*"):
        file.unlink()
    told = io.StringIO()
    arguments = [str(folder / word) if word in ("first.png", "mask.png") else word for word in words]
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            cli.main(["generate", *arguments, "--device", "cpu", "-o", str(folder / "out.png")])
        except SystemExit as left:
            if left.code:
                return f"left with {left.code}: {told.getvalue()[-200:]}"
    return hash_value([np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.glob("out*.png"))])


def command_line(model: str, prompt: str, cases: dict[str, list[str]]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the cases of a built-in model by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        basis = ["generate", prompt, "--model", model, "--seed", "5", "--device", "cpu"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            cli.main([*basis, "-o", str(folder / "first.png")])
        side = Image.open(folder / "first.png").size
        mask = Image.new("L", side)
        mask.paste(255, (side[0] // 4, side[1] // 4, side[0] // 2, side[1] // 2))
        mask.save(folder / "mask.png")
        for case, options in cases.items():
            words = [*options, "--model", model]
            words = words if "--settings" in words else [prompt, *words, "--seed", "7"]
            yield f"{model}: {case}", lambda words=words: generated(folder, words)


def families() -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield a pipeline of each family on tiny random weights."""
    for name in (*TINY_NAMES, *VARIANTS):
        yield f"family {name}", lambda name=name: hash_value(_output(name))


def _output(name: str) -> object:
    output = tiny_pipeline(name)(**tiny_call(name))
    return output.frames if hasattr(output, "frames") else output.images


def tokens() -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the tokens and latents of the built-in next-scale model, before any decoder."""

    def latents(output_type: str) -> str:
        pipe = load_pipeline("stickers-var")
        generator = torch.Generator().manual_seed(3)
        return hash_value(pipe("a fox left of a key", generator=generator, output_type=output_type).images)

    for kind in ("latent", "pt"):
        yield f"stickers-var: output {kind}", lambda kind=kind: latents(kind)


def main() -> int:
    """Run from the command line; returns 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file for the hashes")
    parser.add_argument("--against", type=Path, help="hashes of an earlier run to compare with")
    parser.add_argument("--only", default="", help="run the cases whose name begins so")
    options = parser.parse_args()
    found: dict[str, str] = {}
    sources = (
        command_line("stickers", "a fox on blue", STICKERS),
        command_line("stickers-var", "a fox left of a key", STICKERS_VAR),
        tokens(),
        families(),
    )
    for source in sources:
        for name, run in source:
            if name.startswith(options.only):
                found[name] = run()
                sys.stderr.write(f"{found[name]:<18}{name}\n")
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    differ = [name for name in found if before.get(name) != found[name]]
    for name in differ:
        sys.stdout.write(f"differs: {name}: {before.get(name)} before, {found[name]} now\n")
    sys.stdout.write(f"{len(found) - len(differ)} of {len(found)} equal\n")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
