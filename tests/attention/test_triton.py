"""The Triton kernel: computed by its interpreter in another process, refused without it, compiled for a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from dit.attention import TokenGrid, block_sparse_attention, pattern
from tests.architecture.sources import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_kernel_in_the_interpreter() -> None:
    """The variable must be set before triton is imported, which other tests may have done here."""
    options = ("-x", "-p", "no:cacheprovider", "-p", "no:xdist")
    told = python("-m", "pytest", "-v", "tests/attention/interpreted_triton.py", *options, TRITON_INTERPRET="1")
    assert " passed" in told
    assert "skipped" not in told


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter is on")
def test_without_the_interpreter_a_cpu_is_refused() -> None:
    grid = TokenGrid(1, 4, 4)
    x = torch.zeros(1, 16, 1, 16)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        block_sparse_attention(x, x, x, pattern("dense", grid), kernel="triton")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dit.attention.kernels.triton_forward import forward_kernel as kernel

flags = {"HAS_BITS": True, "HAS_KEY_MASK": True, "HAS_TAIL": True, "HAS_LSE": True, "INT8": INT8, "FP8": INT8}
sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "WIDTH": 128, "E": 128, "TMA": True, "STAGES": 3, "SKIPS": False}
constants = {**flags, **sizes}
keys, values, box = ("i8", "fp8e4nv", "[128, 128]") if INT8 else ("bf16", "bf16", "[128, 128]")
kinds = {"query": "*bf16", "out": "*bf16", "tail_key": "*bf16", "tail_value": "*bf16", "key": "*" + keys}
kinds |= {"key_described": f"tensordesc<{keys}{box}>", "value_described": f"tensordesc<{values}{box}>"}
kinds |= {"value": "*" + values}
kinds |= dict.fromkeys(["lse", "key_scales", "key_mean", "value_scale", "log_count"], "*fp32")
kinds |= dict.fromkeys(["query_pieces", "query_order", "counts", "entries", "key_sizes", "bits", "bits_of"], "*i32")
kinds |= {"key_mask": "*u8", "visits": "*u8", "scale": "fp32", "threshold": "fp32"}
signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
strides = ("QUERY_B", "QUERY_N", "QUERY_K", "KEY_STRIDE", "VALUE_STRIDE")
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
           if signature[name].startswith("*") or name in strides}
constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
source = ASTSource(kernel, signature, constants, aligned)
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
print(built.metadata.shared, "wgmma.mma_async" in built.asm["ptx"], "cp.async.bulk.tensor" in built.asm["ptx"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("in_eight_bits", [False, True])
def test_the_kernel_compiles_for_hopper(in_eight_bits: bool, tmp_path) -> None:
    """It needs no GPU: matrix products of warp groups, tiles by TMA, within the shared memory of 227 KiB."""
    told = python("-c", COMPILE.replace("INT8", str(in_eight_bits)).replace('"' + str(in_eight_bits) + '"', '"INT8"'),
                  TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")  # fmt: skip
    shared, *uses = told.split()
    assert int(shared) <= 227 * 1024
    assert uses == ["True", "True"]
