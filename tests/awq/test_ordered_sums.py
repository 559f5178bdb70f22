"""Sums in a fixed order: on the CPU the bits of torch's own operations, on a GPU none whose order is not fixed."""

import pytest
import torch

from gemma_awq_cli.awq.fold import repeat_heads
from gemma_awq_cli.awq.ordered_sums import add_by_place, running_sums, sum_by_class
from gemma_awq_cli.awq.packing import pack_columns, unpack_columns
from tests.fake_device import fake_device


def test_sums_by_class_are_those_of_index_add() -> None:
    classes = repeat_heads(torch.arange(2 * 8), heads=6, head_dim=8)  # as a value's channels are tied
    values = torch.randn(48)
    expected = torch.zeros(16).index_add_(0, classes, values)
    assert torch.equal(sum_by_class(values, classes, 16), expected)
    with fake_device() as device:
        found = sum_by_class(device.on(values), device.on(classes), 16)
        assert torch.equal(found.cpu(), expected)
        assert not device.unordered


def test_sums_by_place_have_a_fixed_order_on_a_gpu() -> None:
    places, values, total = torch.randint(0, 4, (30, 3)), torch.randn(30, 3), torch.randn(3, 4)
    expected = total.clone().scatter_add_(1, places.t(), values.t())
    on_cpu = total.clone()
    add_by_place(on_cpu, places, values)
    assert torch.equal(on_cpu, expected)
    with fake_device() as device:
        device.on(total).scatter_add_(1, device.on(places).t(), device.on(values).t())
        assert device.unordered.pop("scatter_add_") == 1  # what must not be used is noticed
        found = device.on(total)
        add_by_place(found, device.on(places), device.on(values))
        assert not device.unordered
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_running_sums(columns: int) -> None:
    values = torch.rand(3, columns)
    assert torch.equal(running_sums(values), values.cumsum(1))
    with fake_device() as device:
        found = running_sums(device.on(values))
        assert not device.unordered
        torch.testing.assert_close(found.cpu(), values.cumsum(1))


def test_columns_are_unpacked_on_a_gpu_as_on_the_cpu() -> None:
    q = torch.randint(0, 16, (5, 24))
    with fake_device() as device:
        packed = device.on(pack_columns(q))
        device.reset()
        found = unpack_columns(packed)
        assert sum(device.launches.values()) <= 4
        assert torch.equal(found.cpu(), q.to(torch.uint8))
