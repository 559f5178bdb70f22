"""Rows in a file of which a device holds a copy: the same numbers, whoever reads them."""

import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from gemma_awq_cli.models.forward import held_rows
from gemma_awq_cli.models.forward.held_rows import Behind, HeldRows, RowFile
from tests.fake_device import FakeTensor, fake_device

ROWS = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path: Path) -> RowFile:
    made = RowFile(tmp_path / "rows.f32", (3, 4))
    made.path.touch()
    return made


@pytest.fixture
def behind() -> Iterator[Behind]:
    made = Behind()
    yield made
    made.close()


def test_what_was_written_is_read_from_the_device_and_lies_in_the_file(file: RowFile, behind: Behind) -> None:
    with fake_device("cuda") as device:
        held = HeldRows(file, len(ROWS), torch.device("cuda"), behind)
        held.write(2, device.on(ROWS[2:4]))
        held.write(4, device.on(ROWS[4:]))
        device.reset()
        read = held.read(slice(2, 6))
        assert isinstance(read, FakeTensor)
        assert not device.uploads
        held.sync()
        assert torch.equal(read.cpu(), ROWS[2:])
    assert torch.equal(file.read(slice(2, 6)), ROWS[2:])


def test_rows_of_an_earlier_run_are_read_from_the_file_beside_new_ones(file: RowFile, behind: Behind) -> None:
    file.write(0, ROWS)
    with fake_device("cuda") as device:
        held = HeldRows(file, len(ROWS), torch.device("cuda"), behind)
        held.write(1, device.on(ROWS[1:2] + 1))
        expected = torch.cat([ROWS[:1], ROWS[1:2] + 1, ROWS[2:]])
        assert torch.equal(held.read(slice(0, 6)).cpu(), expected)  # the written row had to be in the file by then
        held.require(6)


def test_a_device_without_memory_holds_none(file: RowFile, behind: Behind) -> None:
    held = HeldRows(file, len(ROWS), torch.device("cpu"), behind)
    with mock.patch.object(held_rows.torch, "empty", side_effect=torch.OutOfMemoryError("CUDA out of memory")):
        held.write(0, ROWS)
    held.write(0, ROWS)  # nor does it try again
    assert held._copy is None
    assert torch.equal(held.read(slice(0, 6)), ROWS)


def test_what_cannot_be_written_is_an_error_of_the_next_call(file: RowFile, behind: Behind) -> None:
    held = HeldRows(file, len(ROWS), torch.device("cpu"), behind)
    with mock.patch.object(RowFile, "write", side_effect=OSError(28, "No space left on device")):
        held.write(0, ROWS[:1])
        with pytest.raises(OSError, match="No space left"):
            held.sync()


def test_what_was_not_begun_when_it_is_closed_is_not_done() -> None:
    behind, begun, goes_on = Behind(), threading.Event(), threading.Event()
    done: list[str] = []

    def first() -> None:
        begun.set()
        goes_on.wait()
        done.append("first")

    behind.do(first)
    behind.do(done.append, "second")
    begun.wait()
    closing = threading.Thread(target=behind.close)
    closing.start()
    closing.join(0.2)  # waits for the first
    assert closing.is_alive()
    goes_on.set()
    closing.join()
    assert done == ["first"]
