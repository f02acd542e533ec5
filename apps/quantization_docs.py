"""docs/quantization.md, made from the registries of recipes, formats and kernels.

`python -m apps.quantization_docs docs` writes it anew; a test compares it with the code.
"""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path

from dit.quant.formats import format_names, weight_format
from dit.quant.kernels.table import linear_kernels
from dit.quant.mixed_precision import MOST_CELLS
from dit.quant.recipes import RECIPES

ROWS, COLUMNS = 1152, 4608
"""Of the layer whose bytes are counted: the feed-forward layers of DiT-XL."""


def page() -> str:
    """Return the text of docs/quantization.md."""
    return TEXT.format(
        recipes="\n".join(_recipes()),
        formats="\n".join(_formats()),
        kernels="\n".join(_kernels()),
        cells=f"{MOST_CELLS:,}".replace(",", " "),
        rows=ROWS,
        columns=COLUMNS,
    )


def _recipes() -> list[str]:
    """Return a row for each recipe."""
    rows = []
    for one in RECIPES.values():
        paper = f"[{one.paper}](https://arxiv.org/abs/{one.paper})" if one.paper else "-"
        bits = ", ".join(f"`{bits}`" for bits in one.bits)
        data = "yes" if one.wants_calibration else "no"
        rows.append(f"| `{one.name}` | {one.summary} | {bits} | {data} | {paper} |")
    return rows


def _formats() -> list[str]:
    """Return a row for each format of weights, with the bits that a weight takes."""
    rows = []
    for name in format_names():
        form = weight_format(name)
        group = form.group or "row"
        shapes = form.stored_shapes(ROWS, COLUMNS, form.group).values()
        stored = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
        summary = (inspect.getdoc(type(form)) or "").splitlines()[0]
        rows.append(f"| `{name}` | {8 * stored / (ROWS * COLUMNS):.2f} | {group} | {summary} |")
    return rows


def _kernels() -> list[str]:
    """Return a row for each kernel, in the order in which they are tried."""
    rows = []
    for name, kernel in linear_kernels().items():
        module = inspect.getmodule(kernel.function)
        summary = (inspect.getdoc(module) or "").splitlines()[0]
        rows.append(f"| `{name}` | {summary} |")
    return rows


TEXT = """# Quantization

This page is generated: `python -m apps.quantization_docs docs`. A test compares it with the code.

The linear layers inside a network's blocks, and those that make its modulation, hold their weights in few bits;
embedders and the output layer stay as they are. Where activations are quantized too, products are computed on integers
(or float8), which is what saves time. A quantized model is a model of diffusers like any other: it is saved with
`save_pretrained`, also in shards, and loads with `from_pretrained` (after `import pipelines`) and `load_pipeline`.

## Three ways

```python
from pipelines import load_pipeline

pipe = load_pipeline("stickers", quantization="w8a8")            # 1. while it is loaded: without data, or by the
pipe = load_pipeline("stickers", quantization="svdquant:w4a8")   #    calibration in the model's folder

from dit.quant import calibrate, quantize_                       # 2. in memory, calibrated on prompts
pipe = load_pipeline("stickers")
report = quantize_(pipe, "viditq", "w4a8", calibrate(pipe, ["a red apple", "a blue fish"]))
pipe.save_pretrained("stickers-w4a8")
```

```
# 3. into a folder, with a report
tessera quantize stickers --recipe viditq --bits w4a8 --calib prompts.txt -o stickers-w4a8
tessera generate "a red apple" --model stickers-w4a8
tessera generate "a red apple" --quantization w8a8
```

The third way, `tessera quantize`, calibrates on a file of prompts (`--data-free` on none; without either, on prompts of
the model's own vocabulary or classes), saves the model, and writes a report beside it: `report.md` and `report.json`
with sizes, the time of a step and the error of each layer, `errors.png`, and `comparison.webp` with images before and
after, from the same noise. `--save-calib` keeps the calibration for other recipes and formats. Step caches' profiles
and attention plans in the model's folder are carried over. The studio shows such models with formats and size.

Requests have the same as an option (`--quantization`, `"quantization"` over HTTP, Advanced on the page), which images
record. It is a part of `AccelerationConfig`, so it is undone to the last bit and goes together with the other parts:

```python
from pipelines.acceleration import AccelerationConfig

part = {{"bits": "w8a8", "full_precision_first": 1, "full_precision_last": 2}}
with AccelerationConfig(quantization=part, step_cache="budget=0.5").apply(pipe) as acceleration:
    pipe("a red apple")
print(acceleration.report().text())  # layers, bytes, kernels, steps with 16-bit activations, and why if it did nothing
```

- **Precision by step**: at the first and last steps activations keep 16 bits; the weights are the same bytes. Both
  branches of guidance of a step are computed alike. The numbers are kept in the model's configuration as diffusers'
  `diffusion_step_policy`, and `load_pipeline` follows them.
- **LoRA**: adapters go on a quantized model, and a model with adapters can be quantized. Fusing one into quantized
  layers is refused, because their weights are codes: fuse it into the plain model and quantize that.
- **Offload**: a model is quantized first, then offloaded; `load_pipeline` does it in this order.
- **Memory**: weights that are quantized when they are loaded pass through the CPU's memory whole; an accelerator only
  has to hold them quantized. A model that was saved quantized is read as it is.
- Text encoders and autoencoders are quantized if they are named as `components`.

## Recipes

A recipe says of every layer how it is prepared, in which format it is held and how it is rounded. Text like `w4a8` is
the format alone, with the usual recipe; `svdquant:w4a8` names both. Formats are `w` and the bits of the weights, `a`
and the bits of the activations (16: as they are), or the names of a format of weights and one of activations:
`e2m1-int6`.
Recipes that want a calibration work without one too: channels are then not balanced, and weights are rounded to the
least error of their own.

| recipe | what it does | formats | wants a calibration | paper |
|---|---|---|---|---|
{recipes}

A calibration (`calibrate`, `tessera quantize --save-calib`) holds what each layer reads by noise level and branch of
guidance, by scale for next-scale models. As `quantization_statistics.safetensors` in a model's folder `load_pipeline`
finds it. It is bound to its network: another one refuses it.

## Mixed precision

Layers that the predictions depend on most have more bits, within a budget (`viditq_mp`, `fp4dit_mp`):

```
tessera quantize stickers --recipe viditq_mp --bits w8a8,w6a8,w4a8 --budget 5.5bits -o stickers-mixed
```

```python
from dit.quant import calibrate, measure_sensitivity, plan_precision, quantize_

prompts, bits = ["a red apple", "a blue fish"], "w8a8,w6a8,w4a8"
calibration = calibrate(pipe, prompts, gram=True)
sensitivity = measure_sensitivity(pipe, prompts, calibration, bits=bits)
plan = plan_precision(sensitivity, "5.5bits")        # again for other budgets, without measuring anew
quantize_(pipe, "viditq_mp", bits, calibration, plan=plan)
quantize_(pipe, "viditq_mp", bits, prompts, budget="5.5bits")  # instead of all these
```

A budget is bits of a weight on average (`5.5bits`, scales counted), a size (`40MB`), or a share of the time that these
layers take in 16 bits here (`60%time`, measured in seconds). `w16a16` among the formats leaves layers as they are. The
command writes the plan (`plan.json`) and draws it (`plan.png`: format, bytes and sensitivity of each layer). The plan
is in the model's configuration, too. `viditq_mp:w8a8,w4a8@5.5bits` is the same for `load_pipeline` and requests; it
wants a calibration in the model's folder.

Layers that read one input are a unit. Sensitivity is measured at four steps of a run by one of three methods:

- `calls`: the network is called with one unit quantized. Squared errors are weighed by the length of the step and by
  what the rest of the run leaves of them.
- `relevance`: the relative error of the unit's output, times the relevance of that output: output times gradient of
  random projections of the prediction, after LRP-QViT ([2401.11243](https://arxiv.org/abs/2401.11243)).
- `layer`: the relative error of the unit's output on the rows of a calibration, behind the GELU where one follows.
  The network isn't called, so it is the only one for next-scale models.

ViDiT-Q divides the budget among groups of layers by the error of the output, and inside of each by a measure of the
group's own: text alignment for cross-attention, quality for self-attention and feed-forward, motion for attention over
time. Here these are the error of what the condition changes, of the prediction's high-pass band, and of differences of
frames, instead of learned scores. Both levels are solved as knapsacks, which is exact where bytes are counted in at
most {cells} steps.

PSNR in dB to the images in bfloat16, `stickers`, 8 prompts that no calibration saw, formats w8a8, w6a8 and w4a8, the
same quantized layers in all rows (`tessera bench quantization-mixed --prompts 8`,
[all figures](results/quantization/mixed.json)):

| formats | 5.0 bits | 5.5 bits |
|---|---|---|
| planned by `calls` | **39.7** | **43.9** |
| planned by `relevance` | 39.2 | 42.3 |
| planned by `layer` | 39.2 | 41.4 |
| one format for each kind of layer, the best afterwards | 38.8 | 40.2 |
| random, mean of 8 | 37.9 | 39.0 |

All layers in w4a8 (4.45 bits) have 36.8, in w6a8 (6.37 bits) 45.8, in w8a8 (8.19 bits) 49.1. This network has one
group of layers, so its figures say nothing about the division among groups; the measure of the group instead of the
prediction's gives 0.3 dB at 5.0 bits and nothing at 5.5.

## Formats of weights

Bits of a weight with its scales, for a layer of {rows} x {columns}; a group is what shares a scale.

| format | bits | group | stored as |
|---|---|---|---|
{formats}

## Checkpoints of other libraries

`dit.quant.importers` reads quantized checkpoints of Black Forest Labs and ModelOpt (float8, NVFP4), nunchaku
(SVDQuant), torchao, SDNQ and bitsandbytes into the same layers, which run on any device and are saved like the others:

```python
from dit.quant.importers import import_quantized, read_checkpoint

checkpoint = read_checkpoint("svdq-int4_r32-model.safetensors")
import_quantized(pipe.transformer, checkpoint.tensors, checkpoint.config, metadata=checkpoint.metadata)
```

## What runs where

The first kernel that can multiply a layer's formats on its device does; `QuantLinear.kernel` names another. The report
of an acceleration counts them, and says so where only `dequantize` was left, which saves memory and no time.

| kernel | what it does |
|---|---|
{kernels}
"""


def main(arguments: list[str]) -> None:
    """Write the page.

    Args:
        arguments: the folder.

    Raises:
        SystemExit: another number of arguments.
    """
    if len(arguments) != 1:
        raise SystemExit("usage: python -m apps.quantization_docs FOLDER")
    (Path(arguments[0]) / "quantization.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
