"""Kernels for GPUs, as far as they can be run without one: Triton's interpreter, and the search for a packed layout."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_awq_cli.kernels.autoawq import autoawq_version
from gemma_awq_cli.kernels.cuda import MANY_ROWS, CudaInt4Linear, _nibbles, tile_order
from gemma_awq_cli.kernels.packed_linear import describe
from tests.kernels.test_kernels import packed_weight

IN_THE_INTERPRETER = """
import contextlib, torch
from gemma_awq_cli.kernels.autoawq import triton_gemm
from gemma_awq_cli.kernels.triton import TritonLinear
from tests.kernels.test_kernels import packed_weight
triton_gemm().__globals__["get_same_device_cm"] = lambda tensor: contextlib.nullcontext()  # it asks for a GPU
packed, dense = packed_weight(64, 256, 64)
x = torch.randn(2, 3, 256).half()
given, expected = TritonLinear(packed)(x), x.float() @ dense.t()
assert given.dtype == torch.float16 and given.shape == expected.shape
assert (given.float() - expected).norm() < 0.002 * expected.norm()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or autoawq_version() is None, reason="AutoAWQ or triton is not installed"
)
def test_autoawqs_triton_product_reads_our_tensors() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER], check=True, cwd=root, env=environment)


def test_a_packed_layout_is_found_out_by_packing_known_numbers() -> None:
    """The search that finds CUDA's layout, on the CPU's, which is a different one on each kind of processor."""
    tile = (64, 16)

    def pack(q: Tensor) -> Tensor:
        return _nibbles(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1))

    order = tile_order(pack, tile)
    q = torch.randint(0, 16, tile, dtype=torch.uint8)
    assert torch.equal(pack(q)[order].view(tile), q)


def test_each_refusal_says_why() -> None:
    packed, _ = packed_weight(64, 256, 64)
    line = describe(packed, torch.device("cuda"), torch.float32)
    assert line.startswith("unpack and multiply; not ")
    for reason in ("on the CPU only", "bfloat16 only", "float16 only"):
        assert reason in line
    assert describe(packed, torch.device("cpu"), torch.bfloat16) == "PyTorch's int4 product for CPUs"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, MANY_ROWS])
def test_pytorchs_int4_product_on_cuda(rows: int) -> None:
    packed, dense = packed_weight(256, 512, 128)
    linear = CudaInt4Linear(type(packed)(*(tensor.cuda() for tensor in packed))).cuda()
    x = torch.randn(rows, 512, dtype=torch.bfloat16)
    expected = x.float() @ dense.t()
    assert (linear(x.cuda()).cpu().float() - expected).norm() < 0.01 * expected.norm()
