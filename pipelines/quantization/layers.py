"""Quantized layers in a network for a time; the plain ones are kept, and come back the same objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dit.quant.diffusers_config import TesseraQuantConfig
from dit.quant.gelu import Fused, fused_gelus
from dit.quant.layer_plan import LayerPlan, Progress, quantized_layers
from dit.quant.marking import mark_quantized, unmark_quantized
from dit.quant.scheme import Scheme
from dit.runtime.state import unwrap
from pipelines.quantization.networks import (
    allow_fusing,
    attributes_kept,
    exchange,
    forget,
    quantized_layers_of,
    refuse_fusing,
    remember,
)


class QuantizedNetwork:
    """The quantized layers of a network, made once, put in and taken out any number of times.

    The plain layers stay in memory meanwhile. Adapters may be loaded and unloaded while the layers are in.

    Args:
        network: wrapped or not; it stays as it is.
        plan: how its layers are quantized.
        progress: see `dit.quant.layer_plan.Progress`.

    Raises:
        ValueError: it has no layer to quantize, is offloaded, or holds NaN.
    """

    def __init__(self, network: nn.Module, plan: LayerPlan, progress: Progress | None = None) -> None:
        self.network = network
        self._config = (plan.recipe.name, plan.bits, list(plan.skip) or None)
        made = list(quantized_layers(network, plan, progress))
        self.reports = [entry for _, _, entry in made]
        self._pairs: dict[nn.Module, nn.Module] = {role.slot.linear: layer for role, layer, _ in made}
        self._gelus: list[tuple[Fused, nn.Module]] = []
        self._restore: Callable[[], None] | None = None

    def put_in(self) -> None:
        """Replace the plain layers.

        Raises:
            ValueError: somebody else replaced one of them; then nothing changes.
        """
        bare: Any = unwrap(self.network)
        remember(bare)
        try:
            exchange(bare, self._pairs)
        except ValueError:
            forget(bare)
            raise
        self._gelus = [(one, one.parent._modules[one.child]) for one in fused_gelus(bare)]  # pyright: ignore
        for one, _ in self._gelus:
            setattr(one.parent, one.child, one.module)
        with attributes_kept(bare) as self._restore:
            mark_quantized(bare, TesseraQuantConfig(*self._config, self._schemes()))
        refuse_fusing(bare)

    def _schemes(self) -> dict[str, Scheme]:
        """Return how each quantized layer is quantized, by its name in the network."""
        found = set(quantized_layers_of(self.network))
        named: Any = unwrap(self.network).named_modules()
        return {name: one.scheme for name, one in named if one in found}

    def take_out(self) -> None:
        """Put the plain layers back, where they are now needed: on the device of those that replaced them.

        Raises:
            ValueError: somebody else replaced a quantized layer; then nothing changes.
        """
        bare: Any = unwrap(self.network)
        for plain, layer in self._pairs.items():
            device = next(layer.parameters()).device
            if next(plain.parameters()).device != device:
                plain.to(device)
        exchange(bare, {layer: plain for plain, layer in self._pairs.items()})
        for one, plain in self._gelus:
            plain._modules["proj"] = one.module.proj  # adapters may be around it by now
            setattr(one.parent, one.child, plain.train(one.module.training))
        self._gelus = []
        if self._restore is not None:
            unmark_quantized(bare)
            self._restore()
        allow_fusing(bare)
        forget(bare)
