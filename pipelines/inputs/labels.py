"""Class labels given as numbers or names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.inputs.checks import check_count

Label = int | str
"""A class number, or one of its names."""


def names_of(id2label: Mapping[Any, str] | None) -> dict[str, int]:
    """Return class numbers by name, from a table of names separated by commas (JSON turns its keys into strings)."""
    table = {int(label): names for label, names in (id2label or {}).items()}
    return {name.strip(): label for label, names in table.items() for name in names.split(",")}


def label_ids(labels: Label | Sequence[Label] | Tensor, names: Mapping[str, int], last: int) -> Tensor:
    """Return class numbers of labels given as numbers or names.

    Args:
        labels: one or a list of P.
        names: see `names_of`.
        last: the largest number that the model has a row for.

    Returns:
        (P,), int64.

    Raises:
        TypeError: something else than ints and strings.
        ValueError: no labels, an unknown name, or a number out of range.
    """
    if isinstance(labels, Tensor):
        labels = labels.reshape(-1).tolist()
    given: Sequence[Any] = labels if isinstance(labels, list | tuple) else [labels]
    if not given:
        raise ValueError("class_labels is an empty list: pass at least one class number or name.")
    return torch.tensor([_label_id(label, names, last) for label in given])  # (P,)


def _label_id(label: Label, names: Mapping[str, int], last: int) -> int:
    if isinstance(label, str):
        if label not in names:
            known = ", ".join(sorted(names)[:5]) or "none; pass class numbers"
            raise ValueError(f"Class name {label!r} is not known. Known names ({len(names)}): {known} ...")
        return names[label]
    check_count("class label", label, 0, last)
    return label
