"""The int4 product for CUDA on a fake device: how it prepares what PyTorch's operation gets, and what it returns."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gemma_awq_cli.awq.grid import dequantize
from gemma_awq_cli.awq.packing import PackedWeight, unpack_weight
from gemma_awq_cli.kernels import step_ops
from gemma_awq_cli.kernels.cuda import MANY_ROWS, CudaInt4Linear
from gemma_awq_cli.kernels.file_int4 import FEW_ROWS, FileInt4Linear
from gemma_awq_cli.kernels.head import RefinedHead, make_head
from gemma_awq_cli.kernels.mps import MpsInt4Linear
from gemma_awq_cli.kernels.packed_linear import describe, make_linear
from gemma_awq_cli.kernels.triton import MANY_ROWS as TRITON_MANY_ROWS
from gemma_awq_cli.kernels.triton import TritonLinear
from tests.fake_device import FakeDevice, fake_device
from tests.kernels.test_kernels import packed_weight

PLACE = torch.device("cuda", 0)
OTHER = "; not PyTorch's int4 product for CPUs: it computes in bfloat16 on the CPU only"


def on(device: FakeDevice, packed: PackedWeight) -> PackedWeight:
    return PackedWeight(*(device.on(tensor) for tensor in packed))


def test_few_rows_and_many_are_multiplied_by_the_same_weight() -> None:
    packed, dense = packed_weight(32, 256, 64)
    x = torch.randn(MANY_ROWS, 256, dtype=torch.bfloat16)
    with fake_device(capability=(8, 0)) as device:
        linear = make_linear(on(device, packed), PLACE, torch.bfloat16)
        assert isinstance(linear, CudaInt4Linear)
        many, few = linear(device.on(x)).cpu(), linear(device.on(x[:3])).cpu()
    expected = x.float() @ dense.t()
    assert (many.float() - expected).norm() < 0.01 * expected.norm()
    torch.testing.assert_close(few, many[:3], rtol=0.02, atol=0.1)


def test_the_dense_weight_is_rounded_once_as_in_the_op() -> None:
    packed, _ = packed_weight(32, 256, 64)
    with fake_device(capability=(8, 0)) as device:
        linear = CudaInt4Linear(on(device, packed))
        scale, zero = (part.double() for part in linear.scale_zero.cpu().transpose(0, 1).unbind(-1))
        found = linear.dense().cpu()
    q, _ = unpack_weight(packed)
    exact = (q.double().view(32, 4, 64) - 8) * scale[:, :, None] + zero[:, :, None]
    assert torch.equal(found, exact.view(32, 256).float().to(torch.bfloat16))


def test_rows_that_lie_apart_are_put_together() -> None:
    packed, _ = packed_weight(32, 256, 64)
    apart = torch.randn(256, 5, dtype=torch.bfloat16)
    with fake_device(capability=(8, 0)) as device:
        linear = CudaInt4Linear(on(device, packed))
        given = device.on(apart).t()  # [5, 256], not contiguous: the op refuses it
        assert torch.equal(linear(given).cpu(), linear(device.on(apart.t().contiguous())).cpu())


def test_the_int4_head_is_made_on_the_device() -> None:
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    with fake_device(capability=(8, 0)) as device:
        held = device.on(weight)
        make_head(held, "int4")  # the first time, the op is tried on known numbers
        device.reset()
        head = make_head(held, "int4")
        assert isinstance(head, RefinedHead)
        assert not device.syncs
        found = head(device.on(weight[:2])).cpu()
    expected = make_head(weight, "int4")(weight[:2])
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=1.0)


def test_a_prompt_does_not_take_the_split_product() -> None:
    """Its partial sums would take 8 times the output: the weight is unpacked once instead."""
    packed, _ = packed_weight(32, 256, 64)
    q, grid = unpack_weight(packed)
    x = torch.randn(TRITON_MANY_ROWS, 256).half()
    found = TritonLinear(packed)(x)
    assert TRITON_MANY_ROWS <= 64
    torch.testing.assert_close(found, x @ dequantize(q, grid).half().t())


@pytest.mark.parametrize("wrong", ["a nibble", "an error", "NaN"])
def test_a_gpu_whose_product_is_wrong_gets_another_kernel(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FakeDevice._int4

    def broken(device: FakeDevice, name: str, args: Sequence[Any]) -> torch.Tensor | None:
        result = right(device, name, args)
        if name == "_weight_int4pack_mm" and result is not None:
            if wrong == "an error":
                raise RuntimeError("no kernel image is available for execution on the device")
            result = result.clone()
            result[:, 3] = torch.nan if wrong == "NaN" else result[:, 3] * 1.5
        return result

    packed, dense = packed_weight(32, 256, 64)
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    with fake_device(capability=(8, 0)) as device:
        assert describe(on(device, packed), PLACE, torch.bfloat16) == "PyTorch's int4 product for CUDA" + OTHER
    monkeypatch.setattr(FakeDevice, "_int4", broken)
    with fake_device(capability=(8, 0)) as device:
        line = describe(on(device, packed), PLACE, torch.bfloat16)
        assert line.startswith(("a Triton product of this project", "unpack and multiply"))
        assert ("no kernel image" if wrong == "an error" else "multiplies known numbers wrongly") in line
        found = make_linear(on(device, packed), PLACE, torch.bfloat16)(device.on(x)).cpu()
    expected = x.float() @ dense.t()
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_product_takes_what_pytorchs_op_does_not() -> None:
    """Here in plain torch, as the kernels' own arithmetic is Triton's: 72 outputs are no multiple of anything but 8."""
    packed, dense = packed_weight(72, 192, 64)
    x = torch.randn(FEW_ROWS + 1, 192, dtype=torch.bfloat16)
    with fake_device(capability=(8, 0)) as device:
        linear = make_linear(on(device, packed), PLACE, torch.bfloat16)
        assert isinstance(linear, FileInt4Linear)
        device.reset()
        few = linear(device.on(x[:FEW_ROWS])).cpu()
        assert device.launches == {"few_rows_product": 1, "_to_copy": 1}
        many = linear(device.on(x)).cpu()
    with fake_device(capability=(7, 5)) as device:
        assert "needs compute capability" in describe(on(device, packed), PLACE, torch.bfloat16)
    expected = x.float() @ dense.t()
    for found in (few, many[:FEW_ROWS]):
        assert (found.float() - expected[:FEW_ROWS]).norm() < 0.01 * expected[:FEW_ROWS].norm()


def test_unpacking_for_many_rows_is_one_kernel() -> None:
    packed, _ = packed_weight(32, 256, 64)
    with fake_device(capability=(8, 0)) as device:
        linear = make_linear(on(device, packed), PLACE, torch.bfloat16)
        assert isinstance(linear, CudaInt4Linear)
        device.reset()
        linear.dense()
        assert device.launches == {"unpacked_tiles": 1}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_gpu_whose_kernels_are_wrong_gets_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is between the products: tried on known numbers, like the products."""
    sizes = frozenset({32, 256})
    with fake_device(capability=(8, 0)):
        assert step_ops.steps_problem(PLACE, torch.bfloat16, sizes) is None
        assert "96 channels" in str(step_ops.steps_problem(PLACE, torch.bfloat16, frozenset({96})))
        assert "16 and 32 bits" in str(step_ops.steps_problem(PLACE, torch.float64, sizes))
    monkeypatch.setattr(step_ops, "gated", lambda gate_up: gate_up[:, ::2])
    with fake_device(capability=(8, 0)):
        assert "wrongly" in str(step_ops.steps_problem(PLACE, torch.bfloat16, sizes))


def test_apples_gpus_get_pytorchs_product() -> None:
    packed, dense = packed_weight(32, 256, 64)
    odd, _ = packed_weight(32, 192, 64)
    place = torch.device("mps", 0)
    x = torch.randn(70, 256, dtype=torch.bfloat16)
    with fake_device("mps") as device:
        linear = make_linear(on(device, packed), place, torch.bfloat16)
        assert isinstance(linear, MpsInt4Linear)
        few, many = linear(device.on(x[:2])).cpu(), linear(device.on(x)).cpu()
        assert describe(on(device, odd), place, torch.bfloat16).startswith("unpack and multiply")
        assert describe(on(device, packed), place, torch.float16).startswith("unpack and multiply")
    expected = x.float() @ dense.t()
    for found in (few, many[:2]):
        assert (found.float() - expected[:2]).norm() < 0.01 * expected[:2].norm()
