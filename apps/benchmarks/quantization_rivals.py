"""Quantized layers of other libraries, run as their authors have it, for `tessera bench quantization`.

Each is used where it is installed: torchao, SDNQ, OpenVINO (with NNCF for weight formats and static activations).
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]


def rivals_of(module: nn.Module, inputs: tuple[Tensor, ...], compiled: bool) -> dict[str, Call]:
    """Return calls of a module quantized by other libraries, by name.

    Args:
        module: in float32.
        inputs: of its call, float32.
        compiled: also through torch's compiler, which takes minutes.

    Returns:
        Calls that return the module's output, as a tensor or array.
    """
    found: dict[str, Call] = {}
    found |= _torchao(module, inputs, compiled)
    found |= _sdnq(module, inputs)
    found |= _openvino(module, inputs)
    return found


def _cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def _torchao(module: nn.Module, inputs: tuple[Tensor, ...], compiled: bool) -> dict[str, Call]:
    """Int8 weights and activations, a scale a token, in both dtypes, eager and by Inductor."""
    if find_spec("torchao") is None:
        return {}
    library: Any = import_module("torchao.quantization")
    calls: dict[str, Call] = {}
    for dtype in (torch.float32, torch.bfloat16):
        made = nn.Sequential(copy.deepcopy(module)).to(dtype)  # it replaces children, not a layer itself
        library.quantize_(made, library.Int8DynamicActivationInt8WeightConfig())
        given, name = _cast(inputs, dtype), str(dtype).removeprefix("torch.")
        calls[f"torchao W8A8 {name}"] = lambda made=made, given=given: made[0](*given)
        if compiled and shutil.which("g++") and dtype == torch.bfloat16:
            fast = torch.compile(made[0])
            calls[f"torchao W8A8 {name} inductor"] = lambda fast=fast, given=given: fast(*given)
    return calls


def _sdnq(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Call]:
    """Int8 and uint4 weights with int8 products."""
    if find_spec("sdnq") is None:
        return {}
    library: Any = import_module("sdnq")
    calls: dict[str, Call] = {}
    for weights in ("int8", "uint4"):
        made = nn.Sequential(copy.deepcopy(module)).to(torch.bfloat16)
        made = library.sdnq_post_load_quant(
            made, weights_dtype=weights, use_quantized_matmul=True, add_skip_keys=False, torch_dtype=torch.bfloat16
        )
        given = _cast(inputs, torch.bfloat16)
        calls[f"SDNQ {weights}"] = lambda made=made, given=given: made[0](*given)
    return calls


GROUPS = (None, 64, 2**32)
"""Sizes of OpenVINO's groups of activations that are tried: its own choice, 64, and whole tokens."""


def _openvino(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Call]:
    """Weights of 8 and 4 bits with activations quantized on the fly, and static ones calibrated on the input itself."""
    if find_spec("openvino") is None or find_spec("nncf") is None:
        return {}
    openvino: Any = import_module("openvino")
    nncf: Any = import_module("nncf")
    shapes = [list(x.shape) for x in inputs]

    def convert() -> Any:
        return openvino.convert_model(module, example_input=inputs, input=shapes)

    eight = nncf.compress_weights(convert(), mode=nncf.CompressWeightsMode.INT8_SYM)
    four = nncf.compress_weights(
        convert(), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0, all_layers=True
    )
    data = nncf.Dataset([[x.numpy() for x in inputs]])
    static = nncf.quantize(
        convert(),
        data,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=1,
        preset=nncf.QuantizationPreset.PERFORMANCE,
    )
    calls: dict[str, Call] = {}
    for name, model in (("W8", eight), ("W4 g64", four)):
        for group in GROUPS:
            settings = {} if group is None else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}
            label = "" if group is None else f" group {group}"
            calls[f"OpenVINO {name}{label}"] = _request(openvino, model, inputs, settings)
    calls["NNCF static W8A8"] = _request(openvino, static, inputs, {})
    return calls


def _request(openvino: Any, model: Any, inputs: tuple[Tensor, ...], settings: dict[str, str]) -> Call:
    """Return a call of a compiled model, on memory that is shared with it."""
    given = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        **settings,
    }
    request = openvino.Core().compile_model(model, "CPU", given).create_infer_request()
    for index, x in enumerate(inputs):
        request.set_input_tensor(index, openvino.Tensor(x.numpy(), shared_memory=True))

    def call() -> Any:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call
