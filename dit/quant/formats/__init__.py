"""How weights are stored: formats, their scales, packing and unpacking."""

from dit.quant.formats.base import Format, Scales, grouped
from dit.quant.formats.table import format_names, weight_format

__all__ = ["Format", "Scales", "format_names", "grouped", "weight_format"]
