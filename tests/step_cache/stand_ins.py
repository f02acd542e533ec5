"""Stands in for the tiny text encoders and tokenizers that diffusers' tests download, so that their pipelines run here.

Texts become other tokens than with the originals, which nothing measured here depends on.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import transformers
from torch import nn

from tests.families.tiny import (
    bert_tokenizer,
    clip_tokenizer,
    decoder_config,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
)

T5_WIDTH = 32
CHAT = "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][-1]['text'] }}{% endfor %}"


def _llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(decoder_config(transformers.LlamaConfig))


def _bert() -> transformers.PreTrainedModel:
    config = {"vocab_size": len(bert_tokenizer()), "hidden_size": 32, "intermediate_size": 37}
    return transformers.BertModel(transformers.BertConfig(**config, num_attention_heads=4, num_hidden_layers=1))


TOKENIZERS = {"t5": t5_tokenizer, "clip": clip_tokenizer, "bert": bert_tokenizer}
"""Part of a repository's name -> its tokenizer; any other one gets a byte-level one."""

MODELS = {
    "umt5": lambda: t5_encoder(T5_WIDTH, transformers.UMT5EncoderModel),
    "t5": lambda: t5_encoder(T5_WIDTH),
    "bert": _bert,
    "llama": _llama,
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


def _nothing(name: Any = "", *_: Any, **__: Any) -> Any:
    raise OSError(f"no stand-in for the processor {name}")


@contextmanager
def stand_ins() -> Iterator[None]:
    """Answer every `from_pretrained` of transformers with a local random one, or with an OSError that names it."""
    answers = {
        transformers.PreTrainedTokenizerBase: _tokenizer,
        transformers.AutoTokenizer: _tokenizer,
        transformers.AutoConfig: _config,
        transformers.PreTrainedModel: _model,
        transformers.ProcessorMixin: _nothing,
        transformers.AutoProcessor: _nothing,
    }
    with ExitStack() as stack:
        for kind, answer in answers.items():
            stack.enter_context(mock.patch.object(kind, "from_pretrained", staticmethod(answer)))
        yield


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
