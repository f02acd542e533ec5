"""Stands in for the tiny text encoders and tokenizers that diffusers' tests download, so that their pipelines run here.

Texts become other tokens than with the originals, which nothing measured here depends on.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import transformers
from torch import nn

from tests.families.tiny import (
    WIDTH,
    bert_tokenizer,
    clip_tokenizer,
    decoder_config,
    qwen_tokenizer,
    qwen_vl_encoder,
    t5_encoder,
    t5_tokenizer,
)

T5_WIDTH = 32
SIDE = 32
VISION = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CHAT = "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][-1]['text'] }}{% endfor %}"


def _llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(decoder_config(transformers.LlamaConfig))


def _bert() -> transformers.PreTrainedModel:
    config = {"vocab_size": len(bert_tokenizer()), "hidden_size": 32, "intermediate_size": 37}
    return transformers.BertModel(transformers.BertConfig(**config, num_attention_heads=4, num_hidden_layers=1))


def _gemma3() -> transformers.PreTrainedModel:
    text = decoder_config(transformers.Gemma3TextConfig, hidden_size=T5_WIDTH).to_dict()
    vision = {**VISION, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def _qwen3_vl() -> transformers.PreTrainedModel:
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    text = decoder_config(transformers.Qwen3VLConfig.sub_configs["text_config"], rope_parameters=rope).to_dict()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": []})
    return transformers.Qwen3VLForConditionalGeneration(config)


def _siglip() -> transformers.PreTrainedModel:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, image_size=224, patch_size=56))


class Reader:
    """A processor that reads texts only: nothing of an image reaches the encoder."""

    PICTURES = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "mm_token_type_ids")

    image_token_id = -1

    def __init__(self) -> None:
        self.tokenizer = qwen_tokenizer(CHAT)
        self.image_processor = SimpleNamespace()

    def __call__(self, *texts: Any, text: Any = None, images: Any = None, videos: Any = None, **how: Any) -> Any:
        """Tokenize; what an image would become is None."""
        read = self.tokenizer(text if text is not None else texts[0], **how)
        return transformers.BatchFeature({**dict.fromkeys(self.PICTURES), **read})

    def apply_chat_template(self, messages: Any, **how: Any) -> Any:
        """See the tokenizer's."""
        made = self.tokenizer.apply_chat_template(messages, **how)
        is_read = how.get("tokenize", True) and how.get("return_dict")
        return transformers.BatchFeature({**dict.fromkeys(self.PICTURES), **made}) if is_read else made

    def __getattr__(self, name: str) -> Any:
        """Look for everything else in the tokenizer."""
        if name in ("tokenizer", "image_processor"):
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


TOKENIZERS = {"t5": t5_tokenizer, "clip": clip_tokenizer, "bert": bert_tokenizer}
"""Part of a repository's name -> its tokenizer; any other one gets a byte-level one."""

MODELS = {
    "umt5": lambda: t5_encoder(T5_WIDTH, transformers.UMT5EncoderModel),
    "t5": lambda: t5_encoder(T5_WIDTH),
    "bert": _bert,
    "llama": _llama,
    "gemma3": _gemma3,
    "qwen3vl": _qwen3_vl,
    "qwen2vl": qwen_vl_encoder,
    "siglip": _siglip,
}


def _chosen(table: dict[str, Any], name: Any) -> Any:
    return next((make for part, make in table.items() if part in str(name).lower()), None)


def _tokenizer(name: Any = "", *_: Any, **__: Any) -> Any:
    make = _chosen(TOKENIZERS, name)
    return qwen_tokenizer(CHAT) if make is None else make()


def _model(name: Any = "", *_: Any, **__: Any) -> Any:
    make = _chosen(MODELS, name)
    if make is None:
        raise OSError(f"no stand-in for the model {name}")
    return make().eval()


def _config(name: Any = "", *_: Any, **__: Any) -> Any:
    return _model(name).config


def _processor(name: Any = "", *_: Any, **__: Any) -> Any:
    if not any(part in str(name).lower() for part in ("qwen", "mistral")):
        raise OSError(f"no stand-in for the processor {name}")
    return Reader()


def _pictures(name: Any = "", *_: Any, **__: Any) -> Any:
    if "siglip" not in str(name).lower():
        raise OSError(f"no stand-in for the image processor {name}")
    return transformers.SiglipImageProcessor()


@contextmanager
def stand_ins() -> Iterator[None]:
    """Answer every `from_pretrained` of transformers with a local random one, or with an OSError that names it."""
    answers = {
        transformers.PreTrainedTokenizerBase: _tokenizer,
        transformers.AutoTokenizer: _tokenizer,
        transformers.AutoConfig: _config,
        transformers.PreTrainedModel: _model,
        transformers.ProcessorMixin: _processor,
        transformers.AutoProcessor: _processor,
        transformers.ImageProcessingMixin: _pictures,
    }
    with ExitStack() as stack:
        for kind, answer in answers.items():
            stack.enter_context(mock.patch.object(kind, "from_pretrained", staticmethod(answer)))
        yield


@contextmanager
def small_pictures() -> Iterator[None]:
    """Keep pipelines that edit from enlarging the image that they are given to a megapixel."""
    with ExitStack() as stack:
        for name in ("edit", "edit_inpaint", "edit_plus", "layered"):
            module = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}")
            smaller = partial(_smaller, module.calculate_dimensions)
            stack.enter_context(mock.patch.object(module, "calculate_dimensions", smaller))
        bucket = "diffusers.pipelines.joyimage.image_processor.find_best_bucket"
        stack.enter_context(mock.patch(bucket, return_value=(SIDE, SIDE)))
        yield


def _smaller(dimensions: Callable[..., Any], area: float, ratio: float) -> Any:
    return dimensions(min(area, SIDE**2), ratio)


def fit_vocabularies(components: dict[str, Any]) -> None:
    """Give text encoders with fewer words than their tokenizer as many as it has."""
    for name, part in components.items():
        if not name.startswith("text_encoder") or not isinstance(part, transformers.PreTrainedModel):
            continue
        tokenizer = components.get(name.replace("text_encoder", "tokenizer"))
        table = part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else None
        words = len(tokenizer) if isinstance(tokenizer, transformers.PreTrainedTokenizerBase) else 0
        if isinstance(table, nn.Embedding) and table.num_embeddings < words:
            wider = nn.Embedding(words, table.embedding_dim)
            nn.init.normal_(wider.weight, std=0.02)
            part.set_input_embeddings(wider)
