"""Prompts to text states: shared by all pipelines with a text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.base import TesseraPipeline
from pipelines.inputs.checks import check_prompts
from pipelines.inputs.words import KnownWordsMixin
from pipelines.loading.errors import clear_loading_errors

logger = logging.get_logger(__name__)

LONGEST = 512
"""Tokens kept of a prompt when neither the tokenizer nor the encoder states a limit."""


class TextConditionedPipeline(KnownWordsMixin, TesseraPipeline):
    """A pipeline with the components `tokenizer`, `text_encoder` and `transformer`, which can read prompts.

    Words of a prompt that the model was not trained on are named in one warning a call, see `pipelines.inputs.words`.
    """

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Encode prompts, one row per image.

        Args:
            prompt: P prompts, or None when `prompt_embeds` are given.
            negative_prompt: one for all, or one per prompt; None is the empty prompt.
            do_classifier_free_guidance: whether the negative side is needed.
            num_images_per_prompt: how often each prompt's row is repeated, in a row; B = P times this.
            device: of the results; None is the execution device.
            prompt_embeds: ready text states instead of `prompt`, (P, L, Dt).
            prompt_attention_mask: theirs, (P, L), True on real tokens; None is all real.
            negative_prompt_embeds: ready negative states, (P, L', Dt).
            negative_prompt_attention_mask: theirs, (P, L').
            max_sequence_length: tokens kept of a prompt; None is the model's limit.

        Returns:
            States (B, L, Dt) and mask (B, L), bool, then those of the negative side (None without guidance).

        Raises:
            TypeError: a prompt is no string.
            ValueError: text is missing or given twice, counts or shapes disagree; the message says which.
        """
        device = device or self._execution_device
        self.warn_of_unknown_words(prompt, negative_prompt if do_classifier_free_guidance else None)
        prompt_embeds, prompt_attention_mask = self._one_side(
            "prompt", prompt, prompt_embeds, prompt_attention_mask, max_sequence_length, device
        )
        count, times = len(prompt_embeds), num_images_per_prompt
        if do_classifier_free_guidance:
            if negative_prompt is None and negative_prompt_embeds is None:
                negative_prompt = ""
            negative_prompt_embeds, negative_prompt_attention_mask = self._one_side(
                "negative_prompt",
                negative_prompt,
                negative_prompt_embeds,
                negative_prompt_attention_mask,
                max_sequence_length,
                device,
            )
            given = len(negative_prompt_embeds)
            if given not in (1, count):
                raise ValueError(f"Got {given} negative prompts for {count} prompts: pass 1 or {count}.")
            length = max(prompt_embeds.shape[1], negative_prompt_embeds.shape[1])  # the sides share one batch
            prompt_embeds, prompt_attention_mask = pad_text(prompt_embeds, prompt_attention_mask, length)
            negative_prompt_embeds, negative_prompt_attention_mask = repeat_text(
                *pad_text(negative_prompt_embeds, negative_prompt_attention_mask, length), times * count // given
            )
        else:
            negative_prompt_embeds = negative_prompt_attention_mask = None
        prompt_embeds, prompt_attention_mask = repeat_text(prompt_embeds, prompt_attention_mask, times)
        # diffusers' tools read these names out of the source, so they are those of __call__
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def check_parts(self, *names: str) -> None:
        """Check that components are there, which may be left out to encode prompts first and generate later.

        Args:
            *names: of the components that a call needs.

        Raises:
            ValueError: one is None.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"This pipeline was loaded without {' and '.join(missing)}: it can encode prompts (encode_prompt), not "
                "generate images. Pass the encoded prompts to a pipeline that has all of them."
            )

    def _one_side(
        self,
        name: str,
        prompt: object,
        embeds: Tensor | None,
        mask: Tensor | None,
        max_length: int | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Return text states (P, L, Dt) and mask (P, L) of the positive or the negative side."""
        if (prompt is None) == (embeds is None):
            given = "neither" if prompt is None else "both"
            raise ValueError(f"Pass either {name} or {name}_embeds, got {given}.")
        if embeds is None:
            prompts = check_prompts(name, prompt)
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError(f"This pipeline has no text encoder to read {name} with: pass {name}_embeds.")
            states, mask = encode_text(self.tokenizer, self.text_encoder, prompts, max_length, device)
        elif isinstance(embeds, Tensor) and embeds.ndim == 3:
            states = embeds
        else:
            shown = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ValueError(f"{name}_embeds must be a tensor (prompts, tokens, width), got {shown}.")
        wanted = None if self.transformer is None else self.transformer.config.get("text_dim")
        if wanted is not None and states.shape[-1] != wanted:
            raise ValueError(
                f"{name}_embeds has width {states.shape[-1]}, the transformer reads width {wanted}: "
                "were they made by another text encoder?"
            )
        if mask is None:
            mask = torch.ones(states.shape[:2])
        if mask.shape != states.shape[:2]:
            raise ValueError(
                f"{name}_attention_mask has the shape {tuple(mask.shape)}: expected (prompts, tokens) of "
                f"{name}_embeds, {tuple(states.shape[:2])}."
            )
        dtype = states.dtype if self.transformer is None else self.transformer.dtype
        return states.to(device, dtype), mask.to(device).bool()  # (P, L, Dt), (P, L)


def text_limit(tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel) -> int:
    """Return how many tokens are read: the least of what the tokenizer and the encoder's config state."""
    config = text_encoder.config
    stated = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([tokenizer.model_max_length, LONGEST, *(limit for limit in stated if limit)])


@torch.no_grad()
def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    prompts: Sequence[str],
    max_length: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode prompts with a T5-like or CLIP-like encoder, padded to the longest prompt of the call.

    A prompt longer than the limit loses its end, with one warning.

    Args:
        tokenizer: the encoder's tokenizer.
        text_encoder: a transformers encoder whose output has `last_hidden_state`.
        prompts: P prompts; "" is allowed.
        max_length: tokens kept of a prompt; None is the model's limit.
        device: where the encoder runs; None is where it is.

    Returns:
        Text states (P, L, Dt) in the encoder's dtype, and the mask (P, L), bool, True on real tokens.

    Raises:
        ValueError: `max_length` is out of range.
    """
    limit = text_limit(tokenizer, text_encoder)
    if max_length is not None and not 1 <= max_length <= limit:
        raise ValueError(f"max_sequence_length={max_length} is out of range: this model reads 1 to {limit}.")
    kept = max_length or limit
    lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]
    longest = max(lengths)
    if longest > kept:
        logger.warning(
            f"The prompt {prompts[lengths.index(longest)]!r:.80} has {longest} tokens, the model reads {kept}: "
            "its end is ignored. Shorten it, or put what matters first."
        )
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=min(max(longest, 1), kept),  # "" may have no token at all; the encoder needs one
        truncation=True,
        return_tensors="pt",
    ).to(device or text_encoder.device)
    with clear_loading_errors("The text encoder"):  # its configuration may be damaged where no shape shows it
        output = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
    return output.last_hidden_state, tokens.attention_mask.bool()  # (P, L, Dt), (P, L)


def pad_text(states: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pad text on the right with masked zeros: (P, L, Dt) -> (P, length, Dt), the mask alike."""
    missing = length - states.shape[1]
    return F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))


def repeat_text(states: Tensor, mask: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Repeat each row `times` times in a row: (P, L, Dt) -> (P * times, L, Dt), the mask alike."""
    return states.repeat_interleave(times, dim=0), mask.repeat_interleave(times, dim=0)
