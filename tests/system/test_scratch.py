"""Temporary files where the system has no place for any."""

import tempfile
from pathlib import Path

import pytest

from gemma_awq_cli.bench.process import Worker
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.system.saving import scratch_file, scratch_folder


def test_a_folder_is_gone_afterwards() -> None:
    with scratch_folder() as folder:
        (folder / "file").write_text("x")
    assert not folder.exists()
    with scratch_file() as file:
        file.write(b"x")


@pytest.mark.parametrize("gone", ["since the start", "a file", "none of all"])
def test_without_a_place_there_is_a_hint(gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "gone"
    if gone == "a file":
        place.write_text("")
    monkeypatch.setattr(tempfile, "tempdir", None if gone == "none of all" else str(place))
    if gone == "none of all":
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(place)])

    def in_folder() -> None:
        with scratch_folder():
            raise AssertionError

    for ask in (in_folder, scratch_file, lambda: Worker("x", None)):
        with pytest.raises(GemmaAwqError, match="folder for temporary files cannot be used") as error:
            ask()
        assert "TMPDIR" in error.value.hint
