"""ComfyUI's `prompt`: the graph of nodes that computed an image, in the form of its API, read without running anything.

    {"3": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 20, "cfg": 8, "model": ["4", 0], ...}}, ...}

An input is a value, or a link: the name of a node and the number of its output. Reading goes from the node that saves
the image back to its sampler, and from there to prompts, size and model; each walk visits a node once.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from apps.service.recipe import COMFY_SAMPLERS, Recipe, number, whole_number

PROGRAM = "ComfyUI"
MAX_NODES = 5_000
TEXTS = ("text", "t5xxl", "text_g", "clip_l", "text_l", "prompt", "string", "value", "text_positive")
"""Inputs of nodes that hold texts, the fullest first."""
NUMBERS = ("value", "int", "float", "seed", "noise_seed", "number", "Number")
"""Inputs of nodes that hold nothing but a number."""
EMPTY = "ConditioningZeroOut"
"""Says nothing, whatever it is given."""

Node = dict[str, Any]


def write_graph(recipe: Recipe, sampler: str) -> str:
    """Write a recipe as the smallest graph of standard nodes that computes it.

    Args:
        recipe: of an image from text, with steps and guidance.
        sampler: of ours.

    Returns:
        JSON in ASCII.
    """
    model, clip, nodes = ["4", 0], ["4", 1], {}
    for place, (name, scale) in enumerate(recipe.loras, 10):
        inputs = {"lora_name": f"{name}.safetensors", "strength_model": scale, "strength_clip": scale}
        nodes[str(place)] = _node("LoraLoader", **inputs, model=model, clip=clip)
        model, clip = [str(place), 0], [str(place), 1]
    nodes |= {
        "3": _node(
            "KSampler", seed=recipe.seed, steps=recipe.steps, cfg=recipe.guidance, denoise=1.0, scheduler="normal",
            sampler_name=COMFY_SAMPLERS.get(sampler, "euler"), model=model, positive=["6", 0], negative=["7", 0],
            latent_image=["5", 0],
        ),
        "4": _node("CheckpointLoaderSimple", ckpt_name=recipe.model),
        "5": _node("EmptyLatentImage", width=recipe.width, height=recipe.height, batch_size=1),
        "6": _node("CLIPTextEncode", text=recipe.prompt, clip=clip),
        "7": _node("CLIPTextEncode", text=recipe.negative_prompt, clip=clip),
        "8": _node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": _node("SaveImage", filename_prefix="tessera", images=["8", 0]),
    }  # fmt: skip
    return json.dumps(nodes)


def _node(kind: str, **inputs: Any) -> Node:
    return {"class_type": kind, "inputs": inputs}


def read_graph(text: str) -> Recipe | None:
    """Read a graph.

    Args:
        text: of unknown origin, of bounded length.

    Returns:
        What could be found in it; None for what is no graph.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or len(found) > MAX_NODES:
        return None
    nodes = {
        str(name): node
        for name, node in found.items()
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    }
    graph = _Graph(nodes)
    sampler = graph.sampler()
    if sampler is None:
        return None
    recipe = Recipe(PROGRAM)
    if len(graph.samplers()) > 1:
        recipe.note("samplers", "The graph has several samplers; the settings are those of the first one.")
    _fill(recipe, graph, sampler)
    return recipe


def _fill(recipe: Recipe, graph: _Graph, sampler: Node) -> None:
    """Put into a recipe what a sampler is given."""
    recipe.steps = whole_number(graph.find(sampler, "steps", through=("sigmas",)))
    recipe.guidance = number(graph.find(sampler, "cfg", "guidance", through=("guider", "positive", "conditioning")))
    recipe.denoise = number(graph.find(sampler, "denoise", through=("sigmas",)))
    recipe.seed = whole_number(graph.find(sampler, "seed", "noise_seed", through=("noise",)))
    name = graph.find(sampler, "sampler_name", through=("sampler",))
    recipe.sampler = name if isinstance(name, str) else None
    latent = ("latent_image", "latent", "samples", "image", "pixels")
    recipe.width = whole_number(graph.find(sampler, "width", through=latent))
    recipe.height = whole_number(graph.find(sampler, "height", through=latent))
    guided = graph.linked(sampler, "guider") or sampler
    recipe.prompt = graph.text(guided, "positive", "conditioning")
    recipe.negative_prompt = graph.text(guided, "negative")
    for node in graph.upstream(guided, ("model",)):
        lora, scale = node["inputs"].get("lora_name"), number(graph.value(node["inputs"].get("strength_model", 1.0)))
        if isinstance(lora, str) and scale is not None:
            recipe.loras.insert(0, (_stem(lora), scale))
        file = next((node["inputs"][key] for key in ("ckpt_name", "unet_name") if key in node["inputs"]), None)
        if isinstance(file, str) and recipe.model is None:
            recipe.model = _stem(file)
    if any("control_net" in node["inputs"] for node in graph.nodes.values()):
        recipe.note("control", "The graph uses a ControlNet, which is left out.")


def _stem(file: str) -> str:
    """Return the name of a file of weights without folders and ending."""
    name = file.replace("\\", "/").rsplit("/", 1)[-1]
    stem, _, ending = name.rpartition(".")
    return stem if stem and ending in ("safetensors", "ckpt", "pt", "gguf") else name


class _Graph:
    """Nodes by their names, and walks against the links."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes

    def samplers(self) -> list[Node]:
        """Return the nodes that denoise."""
        return [node for node in self.nodes.values() if self._is_sampler(node)]

    def _is_sampler(self, node: Node) -> bool:
        inputs = node["inputs"]
        return ("positive" in inputs and ("steps" in inputs or "sampler_name" in inputs)) or (
            "latent_image" in inputs and ("guider" in inputs or "sampler" in inputs)
        )

    def sampler(self) -> Node | None:
        """Return the sampler that begins the image which is saved: what follows it refines the image."""
        saves = [node for node in self.nodes.values() if node["class_type"].startswith(("Save", "Preview"))]
        for start in saves:
            reached = [node for node in self.upstream(start) if self._is_sampler(node)]
            if reached:
                return reached[-1]
        return next(iter(self.samplers()), None)

    def linked(self, node: Node, name: str) -> Node | None:
        """Return the node that an input comes from."""
        return self._target(node["inputs"].get(name))

    def _target(self, value: object) -> Node | None:
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str | int):
            return None
        return self.nodes.get(str(value[0])[:100])

    def upstream(self, start: Node, through: tuple[str, ...] | None = None) -> Iterator[Node]:
        """Yield a node and all that it depends on, the nearest first.

        Args:
            start: the node.
            through: names of inputs whose links are followed; None for all.
        """
        yield from self._walk(start, lambda name, node: through is None or name in through)

    def _walk(self, start: Node, is_followed: Callable[[str, Node], bool]) -> Iterator[Node]:
        seen, queue = {id(start)}, deque([start])
        while queue:
            node = queue.popleft()
            yield node
            for name, value in node["inputs"].items():
                target = self._target(value)
                if target is not None and id(target) not in seen and is_followed(name, node):
                    seen.add(id(target))
                    queue.append(target)

    def value(self, value: object) -> object:
        """Return a value, followed through links to a node that holds one."""
        for _ in range(len(self.nodes) + 1):  # links may go in circles
            target = self._target(value)
            if target is None:
                return value
            inputs = target["inputs"]
            value = next((inputs[key] for key in NUMBERS if key in inputs), None)
        return None

    def find(self, start: Node, *names: str, through: tuple[str, ...]) -> object:
        """Return the first value of an input of these names, at a node or at those behind some of its links."""
        for node in self.upstream(start, through):
            for name in names:
                found = self.value(node["inputs"].get(name))
                if found is not None:
                    return found
        return None

    def text(self, node: Node, *names: str) -> str:
        """Return the text that a conditioning is made of."""
        start = next((found for name in names if (found := self.linked(node, name)) is not None), None)
        if start is None:
            return ""
        others = ("clip", "model", "vae")
        for one in self._walk(start, lambda name, node: name not in others and node["class_type"] != EMPTY):
            if one["class_type"] == EMPTY:
                return ""
            for key in TEXTS:
                found = one["inputs"].get(key)
                if isinstance(found, str) and found:
                    return found
        return ""
