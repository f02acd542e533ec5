"""Weights of words, `a (red:1.4) apple`, for every pipeline whose text encoders read the prompt as it is written.

The states of a weighted token move along the line from those of the empty prompt at the same place: with the weight w
and the empty prompt's state e, z becomes e + w * (z - e). ComfyUI (`encode_token_weights`) does the same for all its
encoders, and compel for weights above 1. AUTOMATIC1111's web UI multiplies z by w instead and divides by the change of
the mean; `method="mean"` does that. It is no default, because the mean of the states of a T5 is about 0, which makes
that quotient arbitrary. Pooled states stay as they are, as there.

No family is named here. The pipeline is called with the plain prompt, and while it runs, the outputs of its text
encoders are changed: hooks find the tokens of a weighted span by the offsets of the tokenizer, and compare the numbers
of the tokens with those that the encoder was given. A pipeline that wraps the prompt into a template, or cuts it up in
another way, is refused instead of being weighted at the wrong places.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipelines.inputs.checks import check_choice
from pipelines.inputs.prompt_syntax import Span, has_weights, parse_weights, plain_text

Method = Literal["empty", "mean"]
METHODS: tuple[Method, ...] = ("empty", "mean")
BLANK = ("", " ")
"""Texts that pipelines encode by themselves, for guidance."""


def generate_weighted(
    pipe: Any,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    *,
    bare: bool = False,
    method: Method = "empty",
    **arguments: Any,
) -> Any:
    """Call a pipeline with prompts that have weights.

    Args:
        pipe: of ours or of diffusers.
        prompt: one, or several.
        negative_prompt: one, several, or None.
        bare: whether `(word)` and `[word]` count too, see `parse_weights`.
        method: "empty" or "mean", see the module.
        **arguments: all others of the call.

    Returns:
        What the call returns.

    Raises:
        ValueError: a weight is out of range, or this pipeline can't weight words.

    Example:
        >>> generate_weighted(load_pipeline("stickers"), "a (red:1.4) apple").images[0].save("apple.png")
    """
    sides = {"prompt": prompt, "negative_prompt": negative_prompt}
    given: dict[str, Any] = {}
    spans: list[Sequence[Span]] = []
    for name, side in sides.items():
        if side is None:
            continue
        read = [parse_weights(text, bare) for text in ([side] if isinstance(side, str) else side)]
        spans += read
        texts = [plain_text(one) for one in read]
        given[name] = texts[0] if isinstance(side, str) else texts
    with weighted(pipe, spans, method):
        return pipe(**given, **arguments)


def trouble_with(pipe: Any) -> str:
    """Say why a pipeline can't weight words, as far as that is known before it is called; "" if it may."""
    encoders = _encoders(pipe)
    if not encoders:
        return f"{type(pipe).__name__} has no text encoder with a tokenizer"
    for name, (_, tokenizer) in encoders.items():
        if not getattr(tokenizer, "is_fast", False):
            return f"the tokenizer of its {name} gives no offsets of tokens"
    return ""


@contextmanager
def weighted(pipe: Any, prompts: Sequence[Sequence[Span]], method: Method = "empty") -> Generator[None]:
    """Have the text encoders of a pipeline weight prompts while the context is open.

    Args:
        pipe: of ours or of diffusers; inside it is called with the plain texts of the prompts.
        prompts: spans of every text that the pipeline is given, those without weights too.
        method: "empty" or "mean", see the module.

    Raises:
        ValueError: this pipeline can't weight words, or two prompts differ in their weights alone.
    """
    check_choice("method", method, METHODS)
    if not any(has_weights(spans) for spans in prompts):
        yield
        return
    trouble = trouble_with(pipe)
    if trouble:
        raise ValueError(f"prompt: words can't be weighted, because {trouble}; leave the weights out.")
    texts: dict[str, Sequence[Span]] = dict.fromkeys(BLANK, ())
    for spans in prompts:
        text = plain_text(spans)
        if texts.get(text) and texts[text] != spans:
            raise ValueError(f"prompt: {text!r:.80} is given twice with different weights; give it once.")
        texts[text] = spans
    hooks = [
        module.register_forward_hook(_Weighting(name, tokenizer, texts, method), with_kwargs=True)
        for name, (module, tokenizer) in _encoders(pipe).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _encoders(pipe: Any) -> dict[str, tuple[nn.Module, PreTrainedTokenizerBase]]:
    """Return the text encoders of a pipeline with their tokenizers, by name: `text_encoder_2` has `tokenizer_2`."""
    found = {}
    for name, module in getattr(pipe, "components", {}).items():
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
        if name.startswith("text_encoder") and isinstance(module, nn.Module) and tokenizer is not None:
            found[name] = (module, tokenizer)
    return found


# ------------------------------------------------------------------------------- tokens


@dataclass(frozen=True, slots=True)
class WeightedTokens:
    """A text as a tokenizer cuts it up.

    Attributes:
        ids: of all tokens, with those at the ends.
        weights: of each.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    def place(self, row: Sequence[int], fillers: frozenset[int]) -> Tensor | None:
        """Find the text in a row of tokens, which may be cut off or filled up on either side.

        Args:
            row: L numbers.
            fillers: numbers that rows are filled up with.

        Returns:
            The weights of the row, (L,); None if it is another text.
        """
        length, count = len(row), len(self.ids)
        weights = torch.ones(length)  # (L,)
        if count > length:  # it lost its end, but for the token that ends every text
            kept = length - 1
            if tuple(row[:kept]) != self.ids[:kept]:
                return None
            weights[:kept] = torch.tensor(self.weights[:kept])
            return weights  # (L,)
        for start in dict.fromkeys((0, length - count)):
            rest = {*row[:start], *row[start + count :]}
            if tuple(row[start : start + count]) == self.ids and rest <= fillers:
                weights[start : start + count] = torch.tensor(self.weights)
                return weights  # (L,)
        return None


def tokenize_weighted(tokenizer: PreTrainedTokenizerBase, spans: Sequence[Span]) -> list[WeightedTokens]:
    """Cut a text up as its pipeline may, as it stands and in lower case without blanks at its ends.

    A token has the weight of its last character; those that stand for none, at the ends of a text, have 1.

    Args:
        tokenizer: with offsets.
        spans: of the text.
    """
    text = plain_text(spans)
    by_character = [one.weight for one in spans for _ in one.text]
    begin = len(text) - len(text.lstrip())
    forms = [(text, by_character)]
    if len(text.lower()) == len(text):
        stripped = text.lower().strip()
        forms.append((stripped, by_character[begin : begin + len(stripped)]))
    found = []
    for form, weights in forms:
        encoded = tokenizer(form, return_offsets_mapping=True, verbose=False)
        offsets: Sequence[tuple[int, int]] = encoded["offset_mapping"]
        of_tokens = tuple(weights[end - 1] if end > start else 1.0 for start, end in offsets)
        found.append(WeightedTokens(tuple(encoded["input_ids"]), of_tokens))
    return found


# ------------------------------------------------------------------------------- states


def weight_states(states: Tensor, empty: Tensor, weights: Tensor, method: Method = "empty") -> Tensor:
    """Weight the states of tokens.

    Args:
        states: of the prompts, (P, L, D).
        empty: of the empty prompt, (P, L, D); not used with "mean".
        weights: of the tokens, (P, L).
        method: "empty" or "mean", see the module.

    Returns:
        (P, L, D), in the data type of `states`; rows whose weights are all 1 as they were, to the last bit.
    """
    z, w = states.float(), weights.to(states.device).unsqueeze(-1)  # (P, L, D), (P, L, 1)
    if method == "empty":
        e = empty.float()
        moved = torch.where(w == 1, z, e + w * (z - e))  # (P, L, D)
    else:
        scaled = z * w  # (P, L, D)
        moved = scaled * (z.mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True))
    changed = (w != 1).any(dim=1, keepdim=True)  # (P, 1, 1)
    return torch.where(changed, moved.to(states.dtype), states)  # (P, L, D)


class _Weighting:
    """Hook behind one text encoder."""

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Sequence[Span]], method: Method
    ) -> None:
        self._name, self._tokenizer = name, tokenizer
        self._method: Method = method
        self._tokens = [one for spans in texts.values() for one in tokenize_weighted(tokenizer, spans)]
        self._blank = tuple(tokenizer("", verbose=False)["input_ids"])
        ends: tuple[Any, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._fillers: frozenset[int] = frozenset(one for one in ends if one is not None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output of an encoder with weighted states."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise ValueError(self._refusal("is given no tokens"))
        weights = torch.stack([self._weights(row) for row in ids.tolist()])  # (P, L)
        if bool((weights == 1).all()):
            return output
        empty = self._empty(module, ids, args, kwargs) if self._method == "empty" else output
        if not _change(output, empty, weights, self._method):
            raise ValueError(self._refusal("gives no states of tokens"))
        return output

    def _weights(self, row: list[int]) -> Tensor:
        """Return the weights of the tokens of one text, (L,)."""
        for tokens in self._tokens:
            found = tokens.place(row, self._fillers)
            if found is not None:
                return found
        raise ValueError(self._refusal("reads the prompt in another form than it was written, such as a template"))

    def _refusal(self, reason: str) -> str:
        return f"prompt: words can't be weighted, because the {self._name} of this pipeline {reason}; leave them out."

    def _empty(self, module: nn.Module, ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output for the empty prompt, filled up to the same length."""
        pad = self._tokenizer.pad_token_id or 0
        blank = self._blank[: ids.shape[1]]
        row = torch.tensor([*blank, *[pad] * (ids.shape[1] - len(blank))], device=ids.device, dtype=ids.dtype)  # (L,)
        blanks = row.expand_as(ids).contiguous()  # (P, L)
        given = {**kwargs}
        if isinstance(mask := given.get("attention_mask"), Tensor):
            real = torch.arange(ids.shape[1], device=mask.device) < max(len(blank), 1)  # (L,)
            given["attention_mask"] = real.to(mask.dtype).expand_as(mask)  # (P, L)
        if "input_ids" in given:
            return module.forward(*args, **{**given, "input_ids": blanks})
        return module.forward(blanks, *args[1:], **given)


def _change(output: Any, empty: Any, weights: Tensor, method: Method) -> bool:
    """Weight all states of tokens in an output, those between the layers too; return whether there are any."""
    found = False
    is_mapping = isinstance(output, dict)
    for name in [*output.keys()] if is_mapping else ():
        value = output[name]
        if name == "last_hidden_state" and isinstance(value, Tensor):
            output[name] = weight_states(value, empty[name], weights, method)
            found = True
        elif name == "hidden_states" and value is not None:
            pairs = zip(value, empty[name], strict=True)
            output[name] = tuple(weight_states(one, other, weights, method) for one, other in pairs)
            found = True
    return found
