"""LoRA files of every pipeline of ours go there and back through diffusers' interface."""

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tests.families.tiny import tiny_call, tiny_pipeline


@pytest.mark.parametrize("name", ["text_dit", "class_dit"])
def test_there_and_back(name, tmp_path):
    pipe = tiny_pipeline(name)
    plain = pipe(**tiny_call(name)).images
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    lora_applied = pipe(**tiny_call(name)).images
    assert not torch.equal(lora_applied, plain)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    pipe.transformer.delete_adapters("default")

    pipe.load_lora_weights(tmp_path, adapter_name="mine")
    torch.testing.assert_close(pipe(**tiny_call(name)).images, lora_applied, atol=1e-5, rtol=0)
    off = pipe(**tiny_call(name), attention_kwargs={"scale": 0.0}).images
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=0)
    pipe.unload_lora_weights()
    assert torch.equal(pipe(**tiny_call(name)).images, plain)
    with pytest.raises(ValueError, match="from safetensors only"):
        pipe.load_lora_weights(tmp_path, use_safetensors=False)
