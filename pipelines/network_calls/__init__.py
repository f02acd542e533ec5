"""How pipelines call their networks, found out by running them: what fine-tuning needs to call a network alone."""

from pipelines.network_calls.arguments import Ragged, from_tensors, to_tensors
from pipelines.network_calls.packing import normalize_latents, pack_latents
from pipelines.network_calls.recording import CallNotUnderstood, NetworkCall, learn_call
from pipelines.network_calls.unguided import learn_unguided_call, prompt_argument, size_arguments

__all__ = [
    "CallNotUnderstood",
    "NetworkCall",
    "Ragged",
    "from_tensors",
    "learn_call",
    "learn_unguided_call",
    "normalize_latents",
    "pack_latents",
    "prompt_argument",
    "size_arguments",
    "to_tensors",
]
