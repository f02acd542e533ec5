"""Triton kernels of quantized layers: computed by the interpreter, refused without a GPU, compiled for Hopper."""

import importlib.util
import os

import pytest
import torch
from torch import nn

from dit.quant.kernels import scaled_mm, triton_int8
from dit.quant.kernels.contract import Weights
from dit.quant.kernels.table import choose_kernel, linear_kernels
from dit.quant.layer import quantize_linear
from dit.quant.linear import QuantLinear
from dit.quant.scheme import Scheme
from dit.runtime.metrics import relative_error
from tests.attention.test_triton import python

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    """The variable must be set before triton is imported, which other tests may have done here."""
    options = ("-x", "-p", "no:cacheprovider", "-p", "no:xdist")
    told = python("-m", "pytest", "-v", "tests/quant/interpreted_kernels.py", *options, TRITON_INTERPRET="1")
    assert " passed" in told
    assert "skipped" not in told


def weights(scheme: Scheme) -> Weights:
    made = quantize_linear(nn.Linear(64, 32), scheme)
    return Weights(made.scheme, made.tensors, 32, 64, made.bias)


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(linear_kernels()) == ["onednn", "scaled_mm", "triton_int8", "int_mm", "dequantize"]
    with pytest.raises(ValueError, match="it runs on CUDA, the inputs are on cpu"):
        choose_kernel(weights(Scheme()), torch.zeros(2, 64), "triton_int8")
    assert "one scale a token" in triton_int8.KERNEL.refusal(
        weights(Scheme("int8", activations="none")), torch.zeros(2, 64)
    )
    assert "int8 and int4 weights" in triton_int8.KERNEL.refusal(weights(Scheme("int6")), torch.zeros(2, 64))
    monkeypatch.setattr(triton_int8, "find_spec", lambda name: None)
    assert triton_int8.why_no_triton.__wrapped__() == "triton is not installed"


def test_float8_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 64)
    monkeypatch.setattr(scaled_mm, "why_no_triton", lambda: "triton is not installed")
    rounded, scale = scaled_mm.rounded_rows(x, None)
    assert rounded.dtype == torch.float8_e4m3fn
    assert relative_error(rounded.float() * scale, x) < 0.04
    assert scaled_mm.rounded_rows(x, torch.tensor([0.25]))[1].unique().tolist() == [0.25]


def test_int4_with_one_group_a_row_is_multiplied() -> None:
    linear = nn.Linear(64, 32)
    made = quantize_linear(linear, Scheme("int4", 0))
    layer = QuantLinear.from_tensors(made.scheme, made.tensors, 64, 32, made.bias)
    x = torch.randn(20, 64)
    with torch.no_grad():
        assert relative_error(layer(x), x @ layer.effective_weight().t() + linear.bias) < 0.02
    assert layer.calls == {"int_mm": 1}


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dit.quant.kernels.triton_product import finish_kernel, product_kernel, regroup_kernel, unpack_kernel
from dit.quant.kernels.triton_rows import rows_kernel

def build(kernel, constants, kinds, warps=8, stages=4):
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name].startswith("*") or name in ("K", "N", "COLUMNS")}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})

scales = dict.fromkeys(["row_scale", "column_scale", "bias", "input_sums"], "*fp32")
flags = {"HAS_BIAS": True, "HAS_SUMS": True, "AFTER": 1}
for by_tma in (True, False):
    kinds = {**scales, "codes": "*i8", "weight": "*i8", "out": "*bf16", "branch": "*bf16", "up": "*bf16",
             "offset": "fp32", "codes_described": "tensordesc<i8[128, 128]>" if by_tma else "*i8",
             "weight_described": "tensordesc<i8[256, 128]>" if by_tma else "*i8"}
    sizes = {"RANK": 32, "TMA": by_tma, "GROUP": 8, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128}
    built = build(product_kernel, {**flags, **sizes}, kinds, stages=3)
    ptx = built.asm["ptx"]
    print(built.metadata.shared, "s32.s8.s8" in ptx and "wgmma" in ptx, ("cp.async.bulk.tensor" in ptx) == by_tma)
kinds = {**scales, "sums": "*i32", "out": "*bf16", "offset": "fp32"}
build(finish_kernel, {**flags, "BLOCK_M": 4, "BLOCK_N": 512}, kinds)
build(unpack_kernel, {"BLOCK": 32}, dict.fromkeys(["packed", "multiplier", "zero"], "*u8") | {"out": "*i8"}, 4)
kinds = {"packed": "*u8", "scales": "*bf16", "row_scale": "*fp32", "out": "*i8"}
build(regroup_kernel, {"BLOCK": 1024}, kinds, 4)
floats = dict.fromkeys(["limit", "shift", "low", "high", "offset", "smallest"], "fp32")
for float8, kind in ((True, "*fp8e4nv"), (False, "*i8")):
    build(rows_kernel, {"GIVEN": False, "FLOAT8": float8, "BLOCK": 2048, "PARTS": 1},
          {**floats, "x": "*bf16", "codes": kind, "scales": "*fp32", "given_scale": "*fp32"}, 4)
"""


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_hopper(tmp_path) -> None:
    """It needs no GPU: products of warp groups, with tiles by TMA and without, within the shared memory of 227 KiB."""
    told = python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0", PYTHONPATH=os.getcwd())
    for line in told.splitlines():
        shared, *uses = line.split()
        assert int(shared) <= 227 * 1024
        assert uses == ["True", "True"]
