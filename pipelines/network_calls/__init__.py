"""How pipelines call their networks, found out by running them: what fine-tuning needs to call a network alone."""

from pipelines.network_calls.arguments import Ragged, from_tensors, to_tensors
from pipelines.network_calls.noise_levels import euler_levels
from pipelines.network_calls.packing import normalize_latents, pack_latents
from pipelines.network_calls.recording import NetworkCall, learn_call
from pipelines.network_calls.unguided import learn_unguided_call, prompt_argument, size_arguments
from pipelines.network_calls.watching import CallNotUnderstood

__all__ = [
    "CallNotUnderstood",
    "NetworkCall",
    "Ragged",
    "euler_levels",
    "from_tensors",
    "learn_call",
    "learn_unguided_call",
    "normalize_latents",
    "pack_latents",
    "prompt_argument",
    "size_arguments",
    "to_tensors",
]
