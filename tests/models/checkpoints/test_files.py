"""Links in a checkpoint folder: followed inside it and into a hub cache's blobs, nowhere else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.files import require_inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    return path


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("contents")
    return path


def _link(path: Path, target: Path | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def _plain(folder: Path) -> Path:
    return _file(folder / "LICENSE")


def _missing(folder: Path) -> Path:
    return folder / "LICENSE"


def _link_to_a_neighbour(folder: Path) -> Path:
    _file(folder / "texts" / "LICENSE")
    return _link(folder / "LICENSE", "texts/LICENSE")


def _link_by_way_of_outside(folder: Path) -> Path:
    _file(folder / "texts" / "LICENSE")
    _link(folder.parent / "elsewhere", folder / "texts")
    return _link(folder / "LICENSE", "../elsewhere/LICENSE")


@pytest.mark.parametrize(
    "make", [_plain, _missing, _link_to_a_neighbour, _link_by_way_of_outside], ids=lambda make: make.__name__
)
def test_what_stays_in_the_folder_is_followed(folder: Path, make: Callable[[Path], Path]) -> None:
    require_inside(folder, make(folder))


def test_a_folder_that_is_a_link_itself(folder: Path) -> None:
    _file(folder / "LICENSE")
    _link(folder.parent / "mine", folder)
    require_inside(folder.parent / "mine", folder.parent / "mine" / "LICENSE")


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    """As `snapshot_download` lays it out; also a folder that older clients filled with links into the cache."""
    cache = tmp_path / "hub" / "models--org--name"
    blob = _file(cache / "blobs" / ("a" * 40))
    snapshot = cache / "snapshots" / ("b" * 40)
    require_inside(snapshot, _link(snapshot / "LICENSE", f"../../blobs/{'a' * 40}"))
    require_inside(tmp_path / "local", _link(tmp_path / "local" / "LICENSE", blob))


@pytest.mark.parametrize(
    "target",
    [
        "../secret",
        "{root}/secret",
        "../model-2/secret",  # a neighbour whose name begins alike
        "../hop",  # a link to a link
        "../nothing-there",
        "/dev/zero",
        "../blobs/secret",  # not of a hub cache
        "../hub/models--org--name/snapshots/secret",
    ],
)
def test_a_link_that_leads_out_is_refused(folder: Path, target: str) -> None:
    root = folder.parent
    for name in ("secret", "model-2/secret", "blobs/secret", "hub/models--org--name/snapshots/secret"):
        _file(root / name)
    _link(root / "hop", "secret")
    path = _link(folder / "LICENSE", target.format(root=root))
    with pytest.raises(GemmaAwqError, match=r"LICENSE leads out of its folder, to /") as error:
        require_inside(folder, path)
    assert "copy" in error.value.hint


def test_a_folder_link_inside_that_leads_out(folder: Path) -> None:
    _file(folder.parent / "secrets" / "LICENSE")
    _link(folder / "texts", "../secrets")
    with pytest.raises(GemmaAwqError, match="leads out"):
        require_inside(folder, folder / "texts" / "LICENSE")


def test_a_blobs_folder_that_is_a_link(tmp_path: Path) -> None:
    """The blob's real place counts: a cache's `blobs` that leads elsewhere opens nothing."""
    _file(tmp_path / "secrets" / "key")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    _link(tmp_path / "models--a--b" / "blobs", tmp_path / "secrets")
    with pytest.raises(GemmaAwqError, match="leads out"):
        require_inside(snapshot, _link(snapshot / "LICENSE", "../../blobs/key"))
