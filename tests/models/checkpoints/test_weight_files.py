"""The weights of a folder: which set is read, what lying or damaged files are told, and links that lead out."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.checkpoints.headers import find_weights, read_headers
from gemma_awq_cli.models.checkpoints.weight_files import read_tensors
from tests.tiny import edit_weights, make_checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saves of one model: `whole` in one file, `shards` in three and an index."""
    root = tmp_path_factory.mktemp("made")
    make_checkpoint(root / "whole", "gemma3_text")
    tensors = load_file(root / "whole" / SINGLE)
    (root / "shards").mkdir()
    shutil.copyfile(root / "whole" / "config.json", root / "shards" / "config.json")
    weight_map = {}
    for part in range(3):
        name = f"model-0000{part + 1}-of-00003.safetensors"
        held = {key: tensors[key] for key in sorted(tensors)[part::3]}
        save_file(held, root / "shards" / name)
        weight_map |= dict.fromkeys(held, name)
    (root / "shards" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


@pytest.fixture
def whole(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "whole", tmp_path / "model"))


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "shards", tmp_path / "model"))


@pytest.fixture
def both(made: Path, whole: Path) -> Path:
    for path in (made / "shards").glob("model-*"):
        shutil.copyfile(path, whole / path.name)
    shutil.copyfile(made / "shards" / INDEX, whole / INDEX)
    return whole


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def files_read(folder: Path) -> set[str]:
    return {info.file.name for info in read_headers(find_weights(folder)).values()}


# which set


def test_two_complete_sets_are_both_named(both: Path) -> None:
    with pytest.raises(GemmaAwqError, match=rf"two sets of weights: {SINGLE}, and what {INDEX} names") as error:
        Checkpoint(both)
    for way in (SINGLE, INDEX):  # the hint is one that helps, whichever is followed
        assert way in error.value.hint
    single = (both / SINGLE).rename(both / "aside")
    assert len(files_read(both)) == 3
    single.rename(both / SINGLE)
    for path in [*both.glob("model-*"), both / INDEX]:
        path.unlink()
    assert files_read(both) == {SINGLE}


@pytest.mark.parametrize("gone", [1, 3])
def test_an_index_without_its_shards_beside_a_whole_file(both: Path, gone: int) -> None:
    for path in sorted(both.glob("model-*"))[:gone]:
        path.unlink()
    assert files_read(both) == {SINGLE}
    (note,) = Checkpoint(both).notes
    assert INDEX in note
    assert "missing" in note


def test_a_whole_file_that_is_gone_beside_its_shards(both: Path) -> None:
    (both / SINGLE).unlink()
    assert len(files_read(both)) == 3
    assert Checkpoint(both).notes == ()


def test_an_index_that_names_the_whole_file(whole: Path) -> None:
    names = load_file(whole / SINGLE)
    (whole / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert files_read(whole) == {SINGLE}
    assert Checkpoint(whole).notes == ()


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_none_beside_a_whole_file(whole: Path, text: str) -> None:
    (whole / INDEX).write_text(text)
    assert files_read(whole) == {SINGLE}
    (note,) = Checkpoint(whole).notes
    assert INDEX in note


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_none(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    with pytest.raises(GemmaAwqError, match=INDEX):
        Checkpoint(shards)


def test_shards_without_an_index_beside_a_whole_file(both: Path) -> None:
    (both / INDEX).unlink()
    assert files_read(both) == {SINGLE}
    (note,) = Checkpoint(both).notes
    assert "model-00001-of-00003.safetensors" in note


def test_a_damaged_file_of_one_of_two_sets(both: Path) -> None:
    """Nothing is taken in a damaged file's place without a word."""
    (both / SINGLE).write_bytes((both / SINGLE).read_bytes()[:-1])
    with pytest.raises(GemmaAwqError, match="two sets"):
        Checkpoint(both)


def test_shards_without_an_index(shards: Path) -> None:
    (shards / INDEX).unlink()
    with pytest.raises(GemmaAwqError, match=f"has no {INDEX}.*model-00001-of-00003") as error:
        Checkpoint(shards)
    assert INDEX in error.value.hint


def test_a_whole_file_by_another_name(whole: Path) -> None:
    (whole / SINGLE).rename(whole / "gemma.safetensors")
    with pytest.raises(GemmaAwqError, match=r"it holds gemma\.safetensors") as error:
        Checkpoint(whole)
    assert f"rename it to {SINGLE}" in error.value.hint


def test_missing_shards_are_counted(shards: Path) -> None:
    edit_index(shards, lambda names: names.update({f"x{i}": f"x{i}.safetensors" for i in range(1000)}))
    with pytest.raises(GemmaAwqError, match=r"x0\.safetensors, x1\.safetensors, .* and 997 more") as error:
        Checkpoint(shards)
    assert len(error.value.message) < 300 + len(str(shards))


def test_a_tensor_in_two_shards(shards: Path) -> None:
    first, second, _ = sorted(shards.glob("model-*"))
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.zeros(2)}, second)
    with pytest.raises(GemmaAwqError, match=f"{name}: stored both in {first.name} and in {second.name}"):
        Checkpoint(shards)


# what an index may name


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "{root}/secret.safetensors", "sub/secret.safetensors", "./model.safetensors",
        "..\\secret.safetensors", "C:secret.safetensors", "..", ".", "", "config.json", "secret.safetensors\n",
        "a\x00.safetensors", "\x1b]0;x\x07.safetensors",
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_whole", [False, True])
def test_an_index_names_plain_files_only(made: Path, tmp_path: Path, shards: Path, name: str, with_whole: bool) -> None:
    (shards / "sub").mkdir()
    for place in (tmp_path, shards / "sub"):
        save_file({"private": torch.ones(2)}, place / "secret.safetensors")
    if with_whole:
        shutil.copyfile(made / "whole" / SINGLE, shards / SINGLE)
    edit_index(shards, lambda names: names.update(private=name.format(root=tmp_path)))
    with pytest.raises(GemmaAwqError, match="not the plain name of a safetensors file") as error:
        Checkpoint(shards)
    assert error.value.message.isprintable()


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "model-00002-of-00003.safetensors"])
def test_a_link_that_leads_out_of_the_folder(made: Path, tmp_path: Path, name: str) -> None:
    kind = "whole" if name == SINGLE else "shards"
    folder = Path(shutil.copytree(made / kind, tmp_path / "model"))
    (folder / name).unlink()
    (folder / name).symlink_to(made / kind / name)
    with pytest.raises(GemmaAwqError, match=f"{name} leads out of its folder"):
        Checkpoint(folder)
    (folder / name).unlink()  # as the hint says
    shutil.copyfile(made / kind / name, folder / name)
    Checkpoint(folder)


def test_links_as_the_hubs_cache_has_them(made: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--tiny"
    snapshot = cache / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate((made / "shards").iterdir()):
        shutil.copyfile(path, cache / "blobs" / f"{number:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    checkpoint = Checkpoint(snapshot)
    assert len(read_tensors(checkpoint.tensors, checkpoint.tensors)) == len(checkpoint.tensors)
    (tmp_path / "mine").symlink_to(snapshot)
    Checkpoint(tmp_path / "mine")
    (cache / "blobs" / f"{0:040}").unlink()  # a download that broke off
    with pytest.raises(GemmaAwqError):
        Checkpoint(snapshot)


# what a file may say of itself


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", name: str = "a") -> bytes:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'.encode()


EIGHT = b"\0" * 8
LIES = {
    "empty": b"",
    "shorter than a length": b"\1\2",
    "no header": EIGHT,
    "a length beyond the file": header(b"{}", length=1000),
    "a length of 2^62": header(b"{}", length=2**62),
    "a length of 2^64 - 1": header(b"{}", length=2**64 - 1),
    "not JSON": header(b"hello!"),
    "a list": header(b"[]"),
    "not UTF-8": header(b'{"\xff":1}'),
    "half a surrogate pair": header(b"{" + entry(name="\\ud800") + b"}", EIGHT),
    "nested deeply": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a name twice": header(b"{" + entry() + b"," + entry(shape="[1]", offsets="[0,4]") + b"}", EIGHT),
    "one place for two": header(b"{" + entry() + b"," + entry(name="b") + b"}", EIGHT),
    "a hole": header(b"{" + entry() + b"," + entry(name="b", offsets="[12,20]") + b"}", EIGHT * 3),
    "a product that overflows": header(b"{" + entry(shape=f"[{2**63},{2**63}]") + b"}", EIGHT),
    "a negative size": header(b"{" + entry(shape="[-2]") + b"}", EIGHT),
    "a size of 5000 digits": header(b"{" + entry(shape=f"[{'9' * 5000}]") + b"}", EIGHT),
    "offsets backwards": header(b"{" + entry(offsets="[8,0]") + b"}", EIGHT),
    "beyond the end": header(b"{" + entry(shape="[4]", offsets="[0,16]") + b"}", EIGHT),
    "more than it says": header(b"{" + entry() + b"}", EIGHT * 9),
    "an unknown dtype": header(b"{" + entry(dtype="F99") + b"}", EIGHT),
    "a dtype of 8 bits": header(b"{" + entry(dtype="F8_E4M3", shape="[8]") + b"}", EIGHT),
    "no tensors": header(b"{}"),
    "tensors of nothing we know": header(b"{" + entry() + b"}", EIGHT),
    "sizes of 0": header(b"{" + entry(shape="[0]", offsets="[0,0]") + b"}"),
    "an empty name": header(b"{" + entry(name="") + b"}", EIGHT),
    "control characters": header(b"{" + entry(name="\\u001b[2J\\n") + b"}", EIGHT),
}


@pytest.mark.parametrize("case", LIES)
@pytest.mark.parametrize(("kind", "name"), [("whole", SINGLE), ("shards", "model-00002-of-00003.safetensors")])
def test_a_file_that_is_no_safetensors_or_lies(made: Path, tmp_path: Path, case: str, kind: str, name: str) -> None:
    folder = Path(shutil.copytree(made / kind, tmp_path / "model"))
    (folder / name).write_bytes(LIES[case])
    with pytest.raises(GemmaAwqError) as error:
        Checkpoint(folder)
    assert error.value.hint


def _directory(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("blob")


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_directory, os.mkfifo, _loop, _dangling, _device], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX])
def test_what_is_no_regular_file(whole: Path, make: Callable[[Path], None], name: str) -> None:
    """Above all, nothing waits for a pipe that nobody writes to."""
    (whole / name).unlink(missing_ok=True)
    make(whole / name)
    if name == INDEX and make in (_loop, _dangling, _directory, os.mkfifo):
        Checkpoint(whole)  # as if there were none
        return
    with pytest.raises(GemmaAwqError, match=f"{name} ") as error:
        Checkpoint(whole)
    assert error.value.hint


def test_a_tensor_without_elements_among_the_others(whole: Path) -> None:
    edit_weights(whole, lambda t: t.update({"model.extra": torch.zeros(0, 4), "model.flag": torch.tensor(True)}))
    checkpoint = Checkpoint(whole)
    assert len(checkpoint.identity()) == 64


def test_tensors_of_a_file_without_alignment_are_copied(tmp_path: Path) -> None:
    """Other writers put a scalar of two bytes in front of integers of four."""
    numbers = torch.arange(6, dtype=torch.int32)
    header = json.dumps(
        {
            "scalar": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
            "numbers": {"dtype": "I32", "shape": [6], "data_offsets": [2, 26]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    content = len(header).to_bytes(8, "little") + header + bytes(2) + numbers.numpy().tobytes()
    (tmp_path / SINGLE).write_bytes(content)
    read = read_tensors(read_headers(find_weights(tmp_path)), ["numbers"])["numbers"]
    assert torch.equal(read, numbers)
    assert read.data_ptr() % 4 == 0
