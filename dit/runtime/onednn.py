"""Have somebody else's network multiply in float32 where this processor is fast, see `dit.layers.linear`."""

from __future__ import annotations

from torch import nn

from dit.layers.linear import Linear, mkl_is_slow
from dit.runtime.module_conversion import LinearConversion, convert_linears, linear_places


def use_onednn(module: nn.Module) -> LinearConversion | None:
    """Replace the plain linear layers inside a network by `dit.layers.linear.Linear` layers with the same weights.

    They compute as before in other dtypes, on other devices and with gradients.

    Args:
        module: any network.

    Returns:
        What puts the old layers back, with the weights of that moment; None where there is nothing to replace: no
        plain linear layer, or MKL is as fast as oneDNN.

    Raises:
        ValueError: a layer is offloaded by a hook.
    """
    if not mkl_is_slow() or not any(_is_plain(place.linear) for place in linear_places(module)):
        return None
    return convert_linears(module, _OneDNN(), lambda _, layer: _is_plain(layer))


class _OneDNN:
    """Converts a layer to one that shares its parameters, buffers and hooks, whatever becomes of them."""

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        """See `LinearConverter.convert`."""
        made = Linear.__new__(Linear)  # without `__init__`, which would draw weights
        vars(made).update(vars(linear))  # the dictionaries of parameters and hooks are shared, not copied
        return made


def _is_plain(layer: nn.Linear) -> bool:
    """Whether a layer is torch's own; subclasses may compute otherwise."""
    return type(layer) is nn.Linear
