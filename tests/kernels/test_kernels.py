"""Every kernel against the reference, for one row and for many, in every group size."""

import pytest
import torch

from gemma_awq_cli.awq.grid import dequantize, minmax_grid, quantize
from gemma_awq_cli.awq.packing import PackedWeight, pack_weight
from gemma_awq_cli.kernels.cpu import MANY_ROWS, CpuInt4Linear
from gemma_awq_cli.kernels.packed_linear import make_linear
from gemma_awq_cli.kernels.reference import ReferenceLinear

CPU = torch.device("cpu")


def packed_weight(outputs: int, inputs: int, group_size: int) -> tuple[PackedWeight, torch.Tensor]:
    torch.manual_seed(outputs)
    weight = torch.randn(outputs, inputs)
    grid = minmax_grid(weight, group_size)
    q = quantize(weight, grid)
    return pack_weight(q, grid), dequantize(q, grid)


@pytest.mark.parametrize("rows", [1, 3, MANY_ROWS + 1])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("outputs", [64, 256, 80])
def test_kernels_agree_with_the_dense_weight(rows: int, group_size: int, outputs: int) -> None:
    packed, dense = packed_weight(outputs, 256, group_size)
    x = torch.randn(2, rows, 256).to(torch.bfloat16)
    expected = x.float() @ dense.t()
    for linear in (make_linear(packed, CPU, torch.bfloat16), ReferenceLinear(packed)):
        result = linear(x)
        assert result.dtype == torch.bfloat16
        assert (result.float() - expected).norm() < 0.01 * expected.norm()


def test_the_reference_is_exact_in_float32() -> None:
    packed, dense = packed_weight(64, 128, 32)
    x = torch.randn(5, 128)
    torch.testing.assert_close(ReferenceLinear(packed)(x), x @ dense.t())


def test_the_cpu_kernel_takes_what_it_can_and_refuses_the_rest() -> None:
    packed, _ = packed_weight(64, 128, 64)
    assert CpuInt4Linear.refusal(packed, CPU, torch.bfloat16) is None
    assert isinstance(make_linear(packed, CPU, torch.bfloat16), CpuInt4Linear)
    assert CpuInt4Linear.refusal(packed, CPU, torch.float32) is not None
    odd, _ = packed_weight(24, 128, 64)
    assert isinstance(make_linear(odd, CPU, torch.bfloat16), ReferenceLinear)


def test_the_cpu_kernels_dense_weight_is_the_files() -> None:
    packed, dense = packed_weight(128, 256, 64)
    kernel = CpuInt4Linear(packed)
    if kernel.block is None:
        pytest.skip("this processor packs in a layout that is read by the op alone")
    assert torch.equal(kernel.dense(), dense.to(torch.bfloat16))
