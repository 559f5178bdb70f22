"""Memory that is used again, but never while somebody can still see it."""

import gc

import numpy as np
import torch

from gemma_awq_cli.system.arrays import ReusedMemory, address, as_tensor


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    memory = ReusedMemory(100)
    places = {address(memory.array(size, 2)) for size in (50, 3, 50, 1)}
    assert len(places) == 1


def test_what_somebody_holds_stays_as_it_is() -> None:
    memory = ReusedMemory(100)
    held = []
    for number, view in enumerate([lambda a: a, lambda a: a[1:2], lambda a: a[:, 1][3:4].T, as_tensor, iter]):
        array = memory.array(10, 5)
        array[:] = number
        held.append(view(array))
        del array
    gc.collect()
    memory.array(10, 5)[:] = -1
    for number, shown in enumerate(held):
        assert (torch.as_tensor(np.stack(list(shown))) == number).all()


def test_a_large_array_is_its_own() -> None:
    memory = ReusedMemory(100)
    kept = memory.array(4, 5)
    kept[:] = 1
    assert memory.array(11, 10).shape == (11, 10)
    assert memory.array(0, 7).shape == (0, 7)
    assert (kept == 1).all()
