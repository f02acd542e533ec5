"""Runs workflows as ComfyUI's executor does, written anew from its rules: inputs are checked, outputs are kept.

A node is run again when one of its inputs has changed, or what it is connected to. A value for an input is a link
`[node, slot]`, or a constant that is checked by the declared type: INT and FLOAT by their bounds, a list by membership.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class InvalidError(ValueError):
    """A workflow that ComfyUI would not begin."""


class SaveImage:
    """Stands for ComfyUI's node that ends a workflow."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "x"})}}

    def save(self, images, filename_prefix):
        return {"ui": {"images": [images]}}


class Runner:
    """An executor with its cache.

    Args:
        nodes: class by name.
    """

    def __init__(self, nodes: Mapping[str, type]) -> None:
        self.nodes = {**nodes, "SaveImage": SaveImage}
        self._kept: dict[str, tuple[str, Any]] = {}
        self.ran: list[str] = []

    def run(self, workflow: Mapping[str, Any]) -> dict[str, Any]:
        """Check and run a workflow in API format; returns the outputs by node."""
        self.ran = []
        for name in workflow:
            self._check(workflow, name)
        return {name: self._result(workflow, name) for name in workflow}

    def _check(self, workflow: Mapping[str, Any], name: str) -> None:
        one = workflow[name]
        kind = self.nodes[one["class_type"]]
        declared = kind.INPUT_TYPES()
        known = {**declared.get("required", {}), **declared.get("optional", {})}
        if missing := declared.get("required", {}).keys() - one["inputs"].keys():
            raise InvalidError(f"{name}: {sorted(missing)} missing")
        for field, value in one["inputs"].items():
            spec = known.get(field)
            if spec is None:
                continue  # ComfyUI passes over inputs that no node has
            kind_of, options = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(value, list):
                other, slot = value
                given = self.nodes[workflow[other]["class_type"]].RETURN_TYPES[slot]
                if given != kind_of:
                    raise InvalidError(f"{name}.{field}: {given} != {kind_of}")
            elif isinstance(kind_of, list):
                if value not in kind_of:
                    raise InvalidError(f"{name}.{field}: {value!r} not in list")
            elif kind_of in ("INT", "FLOAT"):
                number = int(value) if kind_of == "INT" else float(value)
                if not options.get("min", number) <= number <= options.get("max", number):
                    raise InvalidError(f"{name}.{field}: {value} out of bounds")

    def _result(self, workflow: Mapping[str, Any], name: str) -> Any:
        key = self._key(workflow, name)
        if name in self._kept and self._kept[name][0] == key:
            return self._kept[name][1]
        one = workflow[name]
        kind = self.nodes[one["class_type"]]
        declared = kind.INPUT_TYPES()
        known = {**declared.get("required", {}), **declared.get("optional", {})}
        given = {
            field: self._result(workflow, value[0])[value[1]] if isinstance(value, list) else value
            for field, value in one["inputs"].items()
            if field in known
        }
        result = getattr(kind(), kind.FUNCTION)(**given)
        if not isinstance(result, dict):
            assert len(result) == len(kind.RETURN_TYPES)
        self.ran.append(name)
        self._kept[name] = key, result
        return result

    def _key(self, workflow: Mapping[str, Any], name: str) -> str:
        """Return all that a node's outputs depend on."""
        one = workflow[name]
        inputs = {
            field: [self._key(workflow, value[0]), value[1]] if isinstance(value, list) else value
            for field, value in one["inputs"].items()
        }
        return json.dumps([one["class_type"], inputs], sort_keys=True)
