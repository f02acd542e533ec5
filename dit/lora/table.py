"""The table of docs/lora_dialects.md, made from the rules that files are converted by.

`python -m dit.lora.table docs/lora_dialects.md` writes it anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dit.lora.dialects import DIALECTS
from dit.lora.names import RULES
from dit.runtime.families import FAMILIES

INTRODUCTION = """# Dialects of LoRA files

This file is generated: `python -m dit.lora.table docs/lora_dialects.md`. A test compares it with the code.

`tessera convert-lora FILE --to DIALECT` and `dit.lora.convert(path, to=...)` read a file of any dialect and write
another. What the LoRA does to a weight stays the same, and a key without a place in the other dialect is an error that
lists it.

| dialect | a key of it | alpha stands in |
|---|---|---|
| `diffusers` | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` | the metadata |
| `peft` | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight` | `adapter_config.json` beside the file |
| `comfyui` | `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight` | `LAYER.alpha`, unless it is the rank |
| `kohya` | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` | `LAYER.alpha` |
| `onetrainer` | `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight` | `LAYER.alpha` |

Read are also: names without any prefix, `model.diffusion_model.` and `lycoris_`; either names of layers behind every
prefix; `lora_down` and `lora_A` behind every prefix; `.default` inside keys.
"""

NOTES = """
`yes`: every layer. `partly`: the layers that have a name in the original code; a file with others is refused. `no`: the
original names are not known here, or no tool uses them. Files with diffusers' names are read in every dialect for every
family; *reads original names* says whether the other names are too.

## What is exact

- A fused layer (query, key and value in one) is split by the rows of its second factor; its parts share the first.
- Parts are fused with the same rank if they share the first factor, scale and rank, else with the sum of the ranks: the
  first factors one above the other, the second ones along the diagonal. Splitting that again gives the parts back.
- Parts that the LoRA leaves alone get rows of zeros. Scales that differ between the parts of one layer by no power of
  two are rounded once.
- The order of shift and scale in adaptive norms, and of value and gate in Mochi, differs between the codes; the rows
  follow it.
- Alpha is kept to the last bit: any double where layers stay whole, any value of float32 where they are fused or split.
  Rank-stabilised LoRAs get the alpha that gives the same scale.
- DoRA's magnitudes are carried (`lora_magnitude_vector`, `dora_scale`), one a row. Parts of a fused layer must all have
  one. Trained biases are carried (`lora_B.bias`, `diff_b`).

## What is refused

- LoKr, LoHa, OFT, convolutions in Tucker form, LoRAs of embeddings: they are no product of two factors.
  `pipelines.load_lora` puts LoHa and LoKr on a pipeline if they are a folder of PEFT's.
- LoRAs of text encoders, and whole differences of weights (`.diff`): the message lists the keys.
- DoRA with one magnitude for each input (LyCORIS without `wd_on_output`).
- Files whose layers fit several families that call them differently: say `--family`. Before that, the metadata and the
  number of blocks of the published networks are asked.
"""


def writes(family: str, dialect: str) -> str:
    """Return whether a family's layers can be written in a dialect: "yes", "partly" or "no"."""
    if not DIALECTS[dialect].original:
        return "yes"
    nameless, named = _nameless(family), any(rule.original for rule in RULES[family])
    return ("partly" if nameless else "yes") if named else "no"


def reads_original(family: str) -> str:
    """Return whether the original names of a family's layers are read: "yes", "no" or "the same"."""
    rules = RULES[family]
    if all(rule.parts == (rule.original,) for rule in rules):
        return "the same"
    return "yes" if any(rule.original for rule in rules) else "no"


def dialect_document() -> str:
    """Return the document: each family, what is read of it and written, and what is fused."""
    networks = {row.name: row.transformer for row in FAMILIES} | {"next_scale": "NextScaleTransformer"}
    titles = ["family", "network", "reads original names", *(f"writes {name}" for name in DIALECTS), "fused layers"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for family in RULES:
        fused = sorted({str(rule.original) for rule in RULES[family] if len(rule.parts) > 1})
        cells = [
            family,
            f"`{networks[family]}`",
            reads_original(family),
            *(writes(family, name) for name in DIALECTS),
            ", ".join(f"`{name.replace('.#.', '.N.')}`" for name in fused) or "none",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    partly = [name for name in RULES if "partly" in {writes(name, dialect) for dialect in DIALECTS}]
    rest = [
        f"- {name}: {', '.join(f'`{part}`' for part in _nameless(name))} have no original name here." for name in partly
    ]
    legend, exact = NOTES.split("\n## ", 1)
    return "\n".join([INTRODUCTION, *lines, legend, *rest, "", f"## {exact}"])


def _nameless(family: str) -> list[str]:
    return [part for rule in RULES[family] if rule.original is None for part in rule.parts]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(dialect_document(), encoding="utf-8")
