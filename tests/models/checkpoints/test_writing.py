"""Nothing half-written looks whole, and nothing a user had is lost."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.headers import find_weights, read_headers
from gemma_awq_cli.models.checkpoints.staging import REPORT, StagedFolder, require_space
from gemma_awq_cli.models.checkpoints.writing import PlannedTensor, TensorWriter

TENSORS = {
    "b": torch.randn(5, 7),
    "a": torch.arange(12, dtype=torch.int32).view(3, 4),
    "half": torch.randn(3).to(torch.bfloat16),
    "c": torch.randn(2, 3, dtype=torch.float16),
    "one": torch.tensor(2.5),
}
PLAN = [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("shard_bytes", [10**9, 60])
def test_every_tensor_begins_at_a_multiple_of_its_elements_size(tmp_path: Path, shard_bytes: int) -> None:
    TensorWriter(tmp_path, PLAN, shard_bytes)
    for path in tmp_path.glob("*.safetensors"):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        for name, tensor in TENSORS.items():
            if name in header:
                assert (8 + size + header[name]["data_offsets"][0]) % tensor.element_size() == 0, name


@pytest.mark.parametrize("shard_bytes", [10**9, 60])
def test_safetensors_reads_what_was_written_in_any_order(tmp_path: Path, shard_bytes: int) -> None:
    writer = TensorWriter(tmp_path, PLAN, shard_bytes)
    for name in reversed(TENSORS):
        writer.write(name, TENSORS[name])
    writer.finish()
    read = {}
    for path in tmp_path.glob("*.safetensors"):
        read.update(load_file(path))
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype
    assert read_headers(find_weights(tmp_path)).keys() == TENSORS.keys()  # and through the index
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 60)


def test_a_forgotten_tensor_is_noticed(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, PLAN)
    writer.write("a", TENSORS["a"])
    with pytest.raises(ValueError, match="never written"):
        writer.finish()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with StagedFolder(tmp_path / "artifact") as staged:
            (staged.folder / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays_until_its_successor_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with StagedFolder(target) as staged:
        (staged.folder / REPORT).write_text("old")
    with pytest.raises(GemmaAwqError, match="exists and is not empty"):
        StagedFolder(target)
    with pytest.raises(RuntimeError), StagedFolder(target, force=True) as staged:
        raise RuntimeError
    assert (target / REPORT).read_text() == "old"
    with StagedFolder(target, force=True) as staged:
        (staged.folder / REPORT).write_text("new")
    assert (target / REPORT).read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_force_never_replaces_a_folder_that_is_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(GemmaAwqError, match="not an artifact"):
        StagedFolder(tmp_path, force=True)
    assert (tmp_path / "thesis.txt").exists()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    with StagedFolder(target) as staged:
        (staged.folder / REPORT).write_text("x")
    assert (target / REPORT).exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GemmaAwqError, match="not a folder"):
        StagedFolder(tmp_path / "file", force=True)
    with pytest.raises(GemmaAwqError), StagedFolder(tmp_path / "file" / "below"):
        pass


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "disk .* is full"), (errno.EACCES, "cannot be written"), (errno.EROFS, "cannot be written")],
)
def test_the_systems_refusals_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, "refused")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(GemmaAwqError, match=message), StagedFolder(tmp_path / "artifact"):
        pass


def test_too_little_space_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(GemmaAwqError, match="GB free"):
        require_space(tmp_path / "not" / "yet" / "there", 10**18)
