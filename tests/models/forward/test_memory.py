"""What counts as running out of memory, and what a device tells of its own."""

import pytest
import torch

from gemma_awq_cli.models.forward.memory import device_memory, free_memory, is_refusal, peak_device_memory
from tests.fake_device import fake_device


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_refusals_of_allocators(error: BaseException) -> None:
    assert is_refusal(error)
    assert not is_refusal(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_each_device_tells_of_its_own_memory() -> None:
    with fake_device(count=2, free=5, total=7, peak=3):
        second = torch.device("cuda", 1)
        assert (free_memory(second), device_memory(second), peak_device_memory(second)) == (5, 7, 3)
        cpu = torch.device("cpu")
        assert (device_memory(cpu), peak_device_memory(cpu)) == (None, None)
    with fake_device("mps"):
        apples = torch.device("mps")
        assert (device_memory(apples), peak_device_memory(apples)) == (None, None)  # unknown, not 0
