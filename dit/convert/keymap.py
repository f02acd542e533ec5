"""Declarative maps between the key layouts of state dicts, readable in both directions.

A map is a tuple of rules. Each rule consumes some keys of the source layout and produces some keys of the
target layout, and knows its own inverse, so one list of rules converts a published checkpoint into our layout
and back:

| rule     | source -> target                    | inverse  |
|----------|-------------------------------------|----------|
| Rename   | one key -> one key                  | Rename   |
| Reshape  | one key -> one key, another shape   | Reshape  |
| Split    | one tensor -> equal chunks          | Fuse     |
| Fuse     | chunks -> one tensor                | Split    |
| Drop     | a tensor that can be recomputed -> 0 | Constant |
| Constant | nothing -> a tensor                 | Drop     |
| Merge    | equal copies -> one tensor          | Repeat   |
| Repeat   | one tensor -> equal copies          | Merge    |

No rule does arithmetic on a value, so a round trip is bit-exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

StateDict = dict[str, Tensor]


class KeyMapError(ValueError):
    """A state dict does not have the layout that a key map describes."""


@dataclass(frozen=True)
class Rename:
    """`source` becomes `target`, the tensor untouched."""

    source: str
    target: str

    def consume(self, state: StateDict) -> StateDict:
        """Pop this rule's keys from `state` and return the keys that it produces."""
        return {self.target: state.pop(self.source)}

    def inverse(self) -> Rule:
        """Return the rule that undoes this one."""
        return Rename(self.target, self.source)


@dataclass(frozen=True)
class Reshape:
    """`source` becomes `target`, the same numbers in the same order in another shape."""

    source: str
    target: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]

    def consume(self, state: StateDict) -> StateDict:
        """Pop the key; raise `KeyMapError` when the tensor does not have `source_shape`."""
        tensor = state.pop(self.source)
        if tuple(tensor.shape) != self.source_shape:
            raise KeyMapError(f"{self.source} has shape {tuple(tensor.shape)}, expected {self.source_shape}")
        return {self.target: tensor.reshape(self.target_shape)}

    def inverse(self) -> Rule:
        """Return the rule that undoes this one."""
        return Reshape(self.target, self.source, self.target_shape, self.source_shape)


@dataclass(frozen=True)
class Split:
    """One tensor becomes `len(targets)` equal chunks along `dim` (fused qkv -> q, k, v).

    Args:
        source: key of the fused tensor.
        targets: keys of the chunks.
        dim: axis of the chunks.
        kernel_axes: axes of size 1 at the end that only the fused tensor has (a 1x1 convolution -> linear layers).
    """

    source: str
    targets: tuple[str, ...]
    dim: int = 0
    kernel_axes: int = 0

    def consume(self, state: StateDict) -> StateDict:
        """Pop the key and return its parts; raise `KeyMapError` when the size is not divisible."""
        fused = state.pop(self.source)  # (len(targets) * D, ...)
        if fused.shape[self.dim] % len(self.targets):
            raise KeyMapError(
                f"{self.source} has size {fused.shape[self.dim]} along dim {self.dim}, not divisible by "
                f"{len(self.targets)}; is this a fused projection?"
            )
        if self.kernel_axes:
            if any(size != 1 for size in fused.shape[-self.kernel_axes :]):
                raise KeyMapError(f"{self.source} has shape {tuple(fused.shape)}, expected a 1x1 convolution")
            fused = fused.flatten(-self.kernel_axes - 1)
        chunks = fused.chunk(len(self.targets), dim=self.dim)
        # Clones, because chunks that share memory cannot be saved as safetensors.
        return {
            key: chunk.clone(memory_format=torch.contiguous_format)
            for key, chunk in zip(self.targets, chunks, strict=True)
        }

    def inverse(self) -> Rule:
        """Return the rule that undoes this one."""
        return Fuse(self.targets, self.source, self.dim, self.kernel_axes)


@dataclass(frozen=True)
class Fuse:
    """Several tensors become their concatenation along `dim`; `kernel_axes` as for `Split`."""

    sources: tuple[str, ...]
    target: str
    dim: int = 0
    kernel_axes: int = 0

    def consume(self, state: StateDict) -> StateDict:
        """Pop this rule's keys from `state` and return the keys that it produces."""
        fused = torch.cat([state.pop(key) for key in self.sources], dim=self.dim)
        return {self.target: fused[(..., *[None] * self.kernel_axes)]}

    def inverse(self) -> Rule:
        """Return the rule that undoes this one."""
        return Split(self.target, self.sources, self.dim, self.kernel_axes)


@dataclass(frozen=True)
class Drop:
    """A tensor that the target layout recomputes.

    It must equal `value()`, else dropping it would lose something.

    Args:
        source: key to leave out.
        value: what the tensor must be, called without arguments.
        atol: largest allowed difference (published files were written by other versions of numpy).
    """

    source: str
    value: Callable[[], Tensor]
    atol: float = 1e-6

    def consume(self, state: StateDict) -> StateDict:
        """Pop the key; raise `KeyMapError` when the tensor is another than `value()`."""
        found, expected = state.pop(self.source), self.value()
        if found.shape != expected.shape:
            raise KeyMapError(f"{self.source} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        found_as = found.to(expected)
        gap = (found_as - expected).abs().masked_fill(found_as == expected, 0).max().item()  # masks hold equal -inf
        # Half-precision copies of the same table are welcome: their rounding is not information.
        limit = max(self.atol, torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0)
        if not gap <= limit:
            raise KeyMapError(
                f"{self.source} differs by {gap:.3g} from the fixed table that replaces it "
                f"(allowed {limit:.3g}); the checkpoint was trained with another one"
            )
        return {}

    def inverse(self) -> Rule:
        """Return the rule that undoes this one."""
        return Constant(self.source, self.value, self.atol)


@dataclass(frozen=True)
class Constant:
    """A tensor that only the target layout has, made by `value()`."""

    target: str
    value: Callable[[], Tensor]
    atol: float = 1e-6

    def consume(self, state: StateDict) -> StateDict:
        """Pop this rule's keys from `state` and return the keys that it produces."""
        return {self.target: self.value()}

    def inverse(self) -> Rule:
        """Return the rule that undoes this one."""
        return Drop(self.target, self.value, self.atol)


@dataclass(frozen=True)
class Merge:
    """Equal copies of one tensor become that tensor."""

    sources: tuple[str, ...]
    target: str

    def consume(self, state: StateDict) -> StateDict:
        """Pop the copies and return one; raise `KeyMapError` when they differ."""
        first, *others = [state.pop(key) for key in self.sources]
        for key, other in zip(self.sources[1:], others, strict=True):
            if not torch.equal(first, other):
                raise KeyMapError(f"{key} differs from {self.sources[0]}, but one tensor must stand for both")
        return {self.target: first}

    def inverse(self) -> Rule:
        """Return the rule that undoes this one."""
        return Repeat(self.target, self.sources)


@dataclass(frozen=True)
class Repeat:
    """One tensor becomes several equal copies."""

    source: str
    targets: tuple[str, ...]

    def consume(self, state: StateDict) -> StateDict:
        """Pop this rule's keys from `state` and return the keys that it produces."""
        tensor = state.pop(self.source)
        return {key: tensor.clone() for key in self.targets}

    def inverse(self) -> Rule:
        """Return the rule that undoes this one."""
        return Merge(self.targets, self.source)


Rule = Rename | Reshape | Split | Fuse | Drop | Constant | Merge | Repeat


def affine(make: Callable[..., Rule], *keys: str | tuple[str, ...]) -> tuple[Rule, Rule]:
    """Return the same rule for a layer's `.weight` and its `.bias`.

    Args:
        make: rule class, for example `Rename` or `Split`.
        *keys: its keys without the last part; a tuple where the rule takes several.
    """

    def with_suffix(key: str | tuple[str, ...], suffix: str) -> str | tuple[str, ...]:
        return key + suffix if isinstance(key, str) else tuple(part + suffix for part in key)

    weight, bias = (make(*(with_suffix(key, suffix) for key in keys)) for suffix in (".weight", ".bias"))
    return weight, bias


def inverse(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the map in the other direction."""
    return tuple(rule.inverse() for rule in rules)


def convert(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> StateDict:
    """Apply a map to a whole state dict.

    Args:
        state: tensors by key; left as it is.
        rules: the map; together the rules must consume every key exactly once.

    Returns:
        The tensors in the target layout.

    Raises:
        KeyMapError: a key that a rule needs is missing, or keys are left over.
    """
    rest, converted = dict(state), {}
    for rule in rules:
        try:
            converted.update(rule.consume(rest))
        except KeyError as missing:
            raise KeyMapError(f"the state dict lacks the key {missing} of this layout") from None
    if rest:
        some = ", ".join(sorted(rest)[:5])
        raise KeyMapError(f"{len(rest)} keys are not part of this layout: {some}{', ...' if len(rest) > 5 else ''}")
    return converted
