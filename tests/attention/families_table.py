"""Make the table of docs/attention_families.md: `python -m tests.attention.families_table`.

Each row is a call of a tiny network, the guided one of its pipeline where it has one, under a plan.
"""

from pathlib import Path

import torch

from dit.attention.plan import AttentionPlan
from dit.attention.processors import attends_itself
from dit.runtime.families import family_of
from tests.attention.tiny_networks import LISTED, NAMES, call, case

FILE = Path(__file__).resolve().parents[2] / "docs" / "attention_families.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
HEAD = (
    "| network | grid (T, H, W), text | how | layers | sparse calls | pairs computed | dense plan, detached |\n"
    "|---|---|---|---|---|---|---|\n"
)


def row(name: str) -> str:
    """Return the row of one network."""
    model, inputs = case(name)
    before = call(model, inputs)
    with AttentionPlan.uniform("dense").attach(model) as handle:
        same = torch.equal(call(model, inputs), before)
        layers = [layer.module for layer in handle.layers() if layer.name in handle.report()["layers"]]
    with AttentionPlan.uniform("skip", block=4, correction="none").attach(model) as handle:
        call(model, inputs)
        report = handle.report()
    same = same and torch.equal(call(model, inputs), before)
    family = family_of(model)
    tokens = family.token_grid(model, family.bind(model, (), inputs))
    # `skip` leaves image tokens nothing but text, so what is computed is what stays exact.
    own = any(attends_itself(layer.processor) for layer in layers)
    how = "processor that asks" if own else "backend of the layer"
    text = {"before": "first", "after": "last"}.get(tokens.text_position, "none")
    density = "-" if report["density"] is None else f"{report['density']:.0%}"
    calls = f"{report['sparse']} of {report['sparse'] + report['dense']}"
    kind = "" if name in LISTED else " *"
    bits = "same bits" if same else "DIFFERENT"
    name = type(model).__name__ + kind
    return f"| {name} | {tokens.grid}, {text} | {how} | {len(layers)} | {calls} | {density} | {bits} |"


def table() -> str:
    """Return the whole table."""
    return HEAD + "\n".join(row(name) for name in NAMES) + "\n"


def main() -> None:
    """Put the table into the document."""
    text = FILE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    FILE.write_text(f"{before}{BEGIN}\n{table()}{END}{after}")


if __name__ == "__main__":
    main()
