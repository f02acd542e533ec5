"""English for reports and refusals: a key and its values give a sentence.

Another language brings a table of the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sampling.step_cache.reasons import TEXTS as STEP_CACHE

ENGLISH: Mapping[str, str] = {
    # What the parts did.
    "quantization": "quantized {name}: {layers} layers, {before_mib:.1f} to {after_mib:.1f} MiB, products {calls}",
    "quantization.steps": "quantized {name}: {layers} layers, {before_mib:.1f} to {after_mib:.1f} MiB, products {calls}"
    ", activations in 16 bits at {full_steps} of {steps} steps",
    "step_cache": "step cache {preset}: {skipped} of {called} calls forecast",
    "guidance_cache": "guidance cache: the unconditional branch left out at {left_out} of {steps} steps",
    "kv_cache": "KV cache {policy}: {share:.0%} of the history kept, peak {peak_mib:.1f} of {full_mib:.1f} MiB",
    "kv_cache.before": "KV cache {policy}, budget {budget:g}",
    "next_scale": "next-scale shortcuts: {scales} of {all_scales} scales, {token_share:.0%} of the tokens",
    "next_scale.before": "next-scale shortcuts",
    "few_step": "few-step preset {preset}: {scheduler}, {steps} steps, guidance {guidance:g}, for a LoRA of weight "
    "{lora_scale:g}",
    "parallel": "{kind} parallel over {processes} processes",
    "attention": "attention backend {backend} in {layers} layers",
    "attention.plan": "sparse attention {pattern}: {sparse} of {calls} calls in {layers} layers, {density:.0%} of the "
    "pairs in these",
    "compile": "compiled: {modules} modules, {calls} calls",
    "decoder_tiling": "decoder tiling: {tiled} of {decodes} decodes in tiles, {sliced} image by image",
    "offload": "{mode} offload to {device}",
    "report.inactive": "{done} (did nothing: {why})",
    "report.partly": "{done} ({why})",
    # Why a part did nothing, or less than was asked for.
    "why.not_called": "the pipeline was not called since",
    "why.no_step_context": "the step of {count} calls is not known",
    "why.step_not_found": "the step of {count} calls was not found ({reason})",
    "why.one_branch": "the call had one branch only, so there was no guidance to save",
    "why.branch_order": "the order of the branches in the batch is not known",
    "why.uncond_first": "the unconditional call comes before the conditional one",
    "why.every_step_computed": "all steps lie in the interval, and each was computed",
    "why.other": "{reason}: {count} of the calls",
    "why.reason": "{reason}: {count} calls",
    "why.branch_never_skipped": "no step of the branch {branch} was forecast",
    "why.networks_not_called": "the network was not called",
    "why.call_argument": "the call named {argument} itself, which goes first",
    "why.all_kept": "all tokens fit the budget {budget:g}",
    "why.shortcut_idle": "{part} leaves nothing out: {reason}",
    "why.same_backend": "the layers used this backend already",
    "why.all_full_precision": "activations kept 16 bits at all {steps} steps",
    "why.dequantized": "{count} products had no kernel for these formats here: weights were made plain first, which "
    "saves memory and no time",
    "why.dense_calls": "{count} calls stayed dense: {reason}",
    "why.fits_one_tile": "every image fits one tile",
    "why.one_image": "images came one at a time",
    "why.other_steps": "the last call made {found} steps instead of {steps}: pass handle.call_arguments to the call",
    # Refusals of a value.
    "refused.unknown_field": "{field} is not known; accepted: {accepted}",
    "refused.value": "{field}: {reason}",
    "refused.version": "version {version} of an acceleration is not known; accepted: {accepted}",
    "refused.together": "{first} and {second} can't go together: {reason}",
    # Refusals of a pipeline.
    "refused.not_quantized": "{part} without bits is for a quantized model, and {pipeline} is none; give bits, such as "
    "'w8a8'",
    "refused.already_quantized": "{pipeline} is quantized already ({found}), not as {asked!r}; leave bits out, or load "
    "the model that it was made of",
    "refused.other_quantization": "{pipeline} is quantized by {found}, which has no layers of ours to set or report; "
    "leave {part} out",
    "refused.offloaded_before": "{part} needs the weights of {pipeline} in memory, and they are offloaded; load it by "
    "load_pipeline(..., quantization=...), which quantizes first",
    "refused.not_first": "{part} must be applied before {others}; give both in one acceleration",
    "refused.already_applied": "{part} is already applied to this pipeline; leave that acceleration first",
    "refused.not_last": "another acceleration was applied to this pipeline afterwards; leave that one first",
    "refused.no_scales": "{part} needs a next-scale pipeline, and {pipeline} is none",
    "refused.no_steps": "{part} needs denoising steps, and {pipeline} generates scale by scale",
    "refused.no_network": "{part} finds nothing to attach to in {pipeline}: {reason}",
    "refused.no_profile": "the step cache budget needs a profile, and the folder of this model has none: name a file "
    "as profile, calibrate one with sampling.step_cache.calibrate_budget, or choose another preset",
    "refused.not_attached": "{part} can't be attached to {pipeline}: {reason}",
    "refused.no_choice": "the attention layers of {pipeline} don't ask which backend to use",
    "refused.backend": "attention backend {backend!r} can't be used here: {reason}; there are {accepted}",
    "refused.no_blocks": "{network} doesn't name its repeated blocks; compile with scope='network'",
    "refused.no_whole_network": "{pipeline} calls its network scale by scale, which is compiled by blocks only; use "
    "scope='blocks'",
    "refused.no_tiles": "the decoder of {pipeline} can't decode in tiles",
    "refused.no_slices": "the decoder of {pipeline} can't decode image by image",
    "refused.offload": "offload {mode!r} can't be had: {reason}",
    "refused.already_offloaded": "{pipeline} is offloaded already; load it with offload='none'",
    "refused.other_model": "few-step preset {preset!r} doesn't fit {pipeline}: {reason}",
    "refused.no_argument": "calls of {pipeline} take no {argument}, which {part} sets",
    "refused.no_processes": "{kind} parallelism needs {wanted} processes, there are {found}: start with torchrun",
    **{f"step_cache.{key}": text for key, text in STEP_CACHE.items()},
}


def render(key: str, values: Mapping[str, Any], texts: Mapping[str, str] = ENGLISH) -> str:
    """Make a sentence of a key and its values.

    Args:
        key: of the table.
        values: what its text is filled with.
        texts: sentences by key, with placeholders like Python's `str.format`.

    Raises:
        KeyError: the table lacks the key.
    """
    shown = {name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
             for name, value in values.items()}  # fmt: skip
    return texts[key].format(**shown)


class AccelerationError(ValueError):
    """An acceleration is refused; the message says why and what is accepted.

    Args:
        key: of `ENGLISH`.
        **values: what its sentence is filled with.

    Attributes:
        key: see above.
        values: see above.
    """

    def __init__(self, key: str, **values: Any) -> None:
        self.key, self.values = key, values
        super().__init__(render(key, values))
