"""The LoRA of one layer: two factors, a scale, and what DoRA and trained biases add.

    output = W x + b + (alpha / rank) * (up (down x) + bias)

With a magnitude (DoRA) every row of W + (alpha / rank) * up down is brought to that length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real

import torch
from torch import Tensor

from dit.lora.files import LoraFile, LoraFileError

PARTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(lora_A|lora_A\.default|lora_down|lora\.down|lora_linear_layer\.down)\.weight$"), "down"),
    (re.compile(r"\.(lora_B|lora_B\.default|lora_up|lora\.up|lora_linear_layer\.up)\.weight$"), "up"),
    (re.compile(r"\.(lora_B|lora_B\.default|lora_up|lora\.up)\.bias$"), "bias"),
    (re.compile(r"\.diff_b$"), "bias"),
    (re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$"), "magnitude"),
    (re.compile(r"\.dora_scale$"), "magnitude"),
    (re.compile(r"\.alpha$"), "alpha"),
)
"""Ends of keys, and what part of a layer's LoRA they are."""


@dataclass(frozen=True)
class LoraParts:
    """The tensors of one layer, as a file holds them; `keys` are those of the file, by part.

    Attributes:
        down: first factor, (rank, inputs, *kernel).
        up: second factor, (outputs, rank, *ones).
        bias: (outputs,).
        magnitude: (outputs,).
        alpha: one value.
        keys: part -> key.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    alpha: Tensor | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors, once `gather` has seen that they are there."""
        if self.down is None or self.up is None:
            raise LoraFileError(f"a factor is missing beside {sorted(self.keys.values())}")
        return self.down, self.up

    @property
    def rank(self) -> int:
        """Rows of the first factor."""
        return self.factors[0].shape[0]


@dataclass(frozen=True)
class LoraLayer:
    """The LoRA of one layer, complete.

    Attributes:
        down: first factor, (rank, inputs, *kernel).
        up: second factor, (outputs, rank, *ones).
        alpha: the scale is alpha / rank.
        bias: (outputs,); scaled as the factors are.
        magnitude: of DoRA, (outputs,).
        keys: part -> key of the file that it was read from.
    """

    down: Tensor
    up: Tensor
    alpha: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Rows of the first factor."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    @property
    def ratio(self) -> float:
        """Outputs divided by inputs."""
        return self.up.shape[0] / self.down.shape[1]

    def delta(self) -> Tensor:
        """Return what is added to the weight without DoRA, (outputs, inputs, *kernel), float64."""
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return (self.scale * product).reshape(self.up.shape[0], *self.down.shape[1:])


# ------------------------------------------------------------------------ reading


def gather(lora: LoraFile) -> tuple[dict[str, LoraParts], list[str]]:
    """Gather the parts of each layer, by the name that the file gives it; and list the keys that are no parts.

    Raises:
        LoraFileError: a factor without the other, or a part twice.
    """
    found: dict[str, LoraParts] = {}
    unknown = []
    for key, tensor in lora.tensors.items():
        layer, part = split_key(key)
        if part is None:
            unknown.append(key)
            continue
        before = found.get(layer, LoraParts())
        if part in before.keys:
            raise LoraFileError(f"{lora.name} holds {before.keys[part]} and {key}, which are the same part of a layer.")
        value = _magnitude(lora.name, key, tensor) if part == "magnitude" else tensor
        found[layer] = replace(before, **{part: value}, keys={**before.keys, part: key})
    for layer, parts in found.items():
        missing = [name for name, tensor in (("A (down)", parts.down), ("B (up)", parts.up)) if tensor is None]
        if missing:
            raise LoraFileError(
                f"{lora.name}: the layer {layer} lacks its factor {' and '.join(missing)} beside "
                f"{', '.join(sorted(parts.keys.values()))}; the file is incomplete."
            )
    return found, unknown


def split_key(key: str) -> tuple[str, str | None]:
    """Cut a key into the name of its layer and what part of the LoRA it is; None for none that is known."""
    for pattern, part in PARTS:
        match = pattern.search(key)
        if match is not None:
            return key[: match.start()], part
    return key, None


def _magnitude(file: str, key: str, tensor: Tensor) -> Tensor:
    """Return a magnitude as one value a row; files have (outputs, 1, ...), (1, outputs, 1, ...) or (outputs,).

    Raises:
        LoraFileError: it has one value an input, as LyCORIS can be told to, which PEFT has no form for.
    """
    by_input = tensor.ndim > 1 and tensor.shape[0] == 1 and tensor.numel() > 1
    if by_input and (key.endswith(".dora_scale") or tensor.ndim < 4):
        raise LoraFileError(
            f"{file}: {key} has the shape {tuple(tensor.shape)}, one length for each input; expected one for each "
            "output, (outputs, 1). Train DoRA with wd_on_output=True."
        )
    return tensor.flatten()


def complete(lora: LoraFile, name: str, parts: LoraParts) -> LoraLayer:
    """Return the LoRA of a layer with its alpha from wherever the file says it.

    Args:
        lora: the file.
        name: of the layer, as the file's configuration calls it.
        parts: of that layer.

    Raises:
        LoraFileError: the shapes or the alphas contradict each other.
    """
    down, up = parts.factors
    rank, outputs = down.shape[0], up.shape[0]
    whole = down.ndim >= 2 and up.ndim == down.ndim and rank > 0 and up.shape[1] == rank
    if not whole or any(size != 1 for size in up.shape[2:]):
        raise LoraFileError(
            f"{lora.name}: {parts.keys['down']} has the shape {tuple(down.shape)} and {parts.keys['up']} "
            f"{tuple(up.shape)}, expected (rank, inputs, ...) and (outputs, rank, ...) with a rank of at least 1."
        )
    for part in ("bias", "magnitude"):
        tensor = getattr(parts, part)
        if tensor is not None and tuple(tensor.shape) != (outputs,):
            raise LoraFileError(
                f"{lora.name}: {parts.keys[part]} has the shape {tuple(tensor.shape)}, expected ({outputs},)."
            )
    alpha, bias = alpha_of(lora, name, parts), parts.bias
    if bias is not None and parts.keys["bias"].endswith(".diff_b") and alpha != rank:
        if not alpha:
            raise LoraFileError(
                f"{lora.name}: {parts.keys['bias']} has no place beside an alpha of 0; only a scale above 0 can be "
                "taken out of it."
            )
        bias = (bias.double() * (rank / alpha)).to(bias.dtype)  # a whole difference; ours is scaled
    return LoraLayer(down, up, alpha, bias, parts.magnitude, parts.keys)


# -------------------------------------------------------------------------- alpha


def alpha_of(lora: LoraFile, name: str, parts: LoraParts) -> float:
    """Return the alpha of a layer: its own tensor, else the configuration, else its rank.

    With rank-stabilised LoRA (scale alpha / sqrt(rank)) it is the alpha that gives the same scale without.

    Raises:
        LoraFileError: they contradict each other or the rank, or are no numbers.
    """
    stated = layer_setting(lora, name, "rank_pattern", "r")
    if stated is not None and stated != parts.rank:
        raise LoraFileError(
            f"{lora.name}: its configuration gives {name} the rank {stated:g}, "
            f"but {parts.keys['down']} has {parts.rank}."
        )
    alpha = layer_setting(lora, name, "alpha_pattern", "lora_alpha")
    stabilised = _flag(lora, "use_rslora")
    if parts.alpha is None:
        if alpha is None:
            return float(parts.rank)
        return alpha * math.sqrt(parts.rank) if stabilised else alpha
    if parts.alpha.numel() != 1:
        raise LoraFileError(
            f"{lora.name}: {parts.keys['alpha']} has {parts.alpha.numel()} values, expected one number."
        )
    own = float(parts.alpha)
    if alpha is not None and not math.isclose(own, alpha, rel_tol=1e-3):
        raise LoraFileError(f"{lora.name}: {parts.keys['alpha']} is {own:g}, but its configuration says {alpha:g}.")
    return own * math.sqrt(parts.rank) if stabilised else own


def check_kind(lora: LoraFile) -> None:
    """Refuse configurations of PEFT for other adapters than LoRA.

    Raises:
        LoraFileError: with the kind.
    """
    kind = lora.config.get("peft_type", "LORA")
    if kind != "LORA":
        raise LoraFileError(f"{lora.name}: its configuration says peft_type={kind!r}, expected 'LORA'.")


def layer_setting(lora: LoraFile, name: str, patterns: str, common: str) -> float | None:
    """Return what a configuration of PEFT says for one layer.

    PEFT takes patterns for regular expressions. Here they are names or their ends, as everybody writes them: an
    expression from a file could keep the matcher busy for years.

    Args:
        lora: the file with its configuration.
        name: of the layer.
        patterns: the setting that holds what differs from layer to layer, such as `rank_pattern`.
        common: the setting for all other layers.

    Returns:
        The number; None if the configuration doesn't say.

    Raises:
        LoraFileError: it is no number from 0, or an expression.
    """
    by_pattern = lora.config.get(patterns) or {}
    if not isinstance(by_pattern, Mapping):
        raise LoraFileError(f"{lora.name}: {patterns} is a {type(by_pattern).__name__}, expected name -> number.")
    for pattern, value in by_pattern.items():
        plain = re.sub(r"\\([.-])", r"\1", pattern.removeprefix("^").removesuffix("$"))
        if re.search(r"[^\w.-]", plain):
            raise LoraFileError(
                f"{lora.name}: {patterns} has {pattern[:60]!r}, expected names of layers or their ends, such as to_q."
            )
        if name == plain or (not pattern.startswith("^") and name.endswith("." + plain)):
            return _number(lora, f"{patterns}[{pattern!r}]", value)
    value = lora.config.get(common)
    return None if value is None else _number(lora, common, value)


def _number(lora: LoraFile, what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise LoraFileError(f"{lora.name}: {what} is {value!r:.60}, expected a number from 0.")
    return float(value)


def _flag(lora: LoraFile, name: str) -> bool:
    value = lora.config.get(name, False)
    if not isinstance(value, bool):
        raise LoraFileError(f"{lora.name}: {name} is {value!r:.60}, expected true or false.")
    return value


def alpha_tensor(alpha: float) -> Tensor:
    """Return an alpha as a tensor, (), in float32 where that holds it exactly, else float64."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if float(single) == alpha else torch.tensor(alpha, dtype=torch.float64)
