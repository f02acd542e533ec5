"""A random text-to-image pipeline of a few thousand weights, for tests.

`python -m tests.pipes.tiny FOLDER` saves it.
"""

import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dit.models.text_dit import TextDiT
from dit.tokenizers import ViTAutoencoder
from pipelines.text_to_image import TextToImagePipeline

SENTENCES = [
    "a red apple on a white background",
    "a cat to the left of a blue bicycle",
    "three small green frogs on a yellow background",
    "a large rocket above a house, on black",
]


def tiny_tokenizer(max_length: int = 24) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any string has tokens; ends each text with an end token as T5's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", bpe.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", model_max_length=max_length
    )


def tiny_components(seed: int = 0) -> dict[str, object]:
    """Return the components of the tiny pipeline: 32 x 32 images, 4 x 4 latents, 4 image tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = TextDiT(
            in_channels=4,
            patch_size=2,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            text_dim=16,
            sample_size=4,
        )
        for parameter in transformer.parameters():  # its output starts at zero; that would hide mistakes
            nn.init.normal_(parameter, std=0.1)
        tokenizer = tiny_tokenizer()
        text_encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
        )
        vae = ViTAutoencoder(
            latent_channels=4,
            patch_size=8,
            encoder_dim=32,
            encoder_layers=1,
            decoder_dim=32,
            decoder_layers=1,
            attention_head_dim=16,
            refiner_channels=8,
            sample_size=32,
        )
        for parameter in vae.parameters():
            nn.init.normal_(parameter, std=0.1)
    return {
        "transformer": transformer.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def tiny_text_to_image_pipeline(seed: int = 0) -> TextToImagePipeline:
    """Return the tiny pipeline on the CPU, without a progress bar."""
    pipe = TextToImagePipeline(**tiny_components(seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    tiny_text_to_image_pipeline().save_pretrained(sys.argv[1])
