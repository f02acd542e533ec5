"""LoRA files of the transformer, for every pipeline of ours."""

from __future__ import annotations

from diffusers.loaders import SanaLoraLoaderMixin
from torch import Tensor


class TransformerLoraMixin(SanaLoraLoaderMixin):
    """Adds `load_lora_weights`, `save_lora_weights`, `set_adapters`, ... to a pipeline with a `transformer`.

    It is diffusers' loader for pipelines whose only adapted component is `transformer` (nothing in it is specific to
    Sana), narrowed to safetensors files.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, Tensor], **kwargs: object
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict]:
        """Read a LoRA file as diffusers does, but from safetensors only.

        Args:
            pretrained_model_name_or_path_or_dict: file, folder, Hub id, or the tensors themselves.
            **kwargs: as in diffusers; in a folder, `weight_name` names the file.

        Returns:
            The tensors; with their metadata if `return_lora_metadata` is True.

        Raises:
            ValueError: `use_safetensors` is not True.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("use_safetensors=False: LoRA files are read from safetensors only; convert it.")
        return super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
