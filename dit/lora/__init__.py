"""LoRA files in and out: every dialect read, five written, the layers of each family by both of their names.

`convert` turns one file into another. The parts, in the order in which a file passes them: `files` (found, read,
checked), `layers` (the tensors of a layer), `names` and `fusing` (diffusers' layers and those of the original code),
`detection` (which family), `dialects` and `peft_config` (written), `conversion` (all of it).
"""

from dit.lora.conversion import convert
from dit.lora.files import LoraFileError, LoraMisfitError

__all__ = ["LoraFileError", "LoraMisfitError", "convert"]
