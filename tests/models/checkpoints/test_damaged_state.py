"""What the tool itself wrote and finds again, damaged in every way: an error that says how to go on."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.batch import Batch, read_finished, recorded_seed
from gemma_awq_cli.generate.generation import GenerationOptions
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.checkpoints.cache import last_artifact, remember_artifact
from gemma_awq_cli.models.checkpoints.journal import Journal
from tests.conftest import make_cache
from tests.quantize.test_resume import identity, kept_run, record

Capture = pytest.CaptureFixture[str]
ANY_JSON: list[Any] = [None, True, 0, -1, 1.5, "text", "", [], [1], {}, {"a": 1}, [[]], "1" * 1000]
NOT_JSON = [
    b"", b"{", b"nonsense", b"\xff\xfe\x00", b'{"a": NaN}', b"[" * 100_000, b"1" * 6000, b'"\\ud800"', b"\0" * 50,
    b'{"a": 1}{"b": 2}',
]  # fmt: skip


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def damaged_records() -> Iterator[Any]:
    yield from ANY_JSON
    for name in ("groups", "seconds"):
        for value in ANY_JSON:
            if not (name == "seconds" and type(value) in (int, float)) and not (name == "groups" and value == []):
                yield record(**{name: value})
    good = record()["groups"][0]  # type: ignore[index]
    for name, kept in good.items():
        for value in ANY_JSON:
            same = type(value) is type(kept) or (isinstance(kept, float | int) and type(value) in (int, float))
            if not (same or (name == "linears" and value == [])) or value in ([1], [[]]):
                if name == "exponents" and value == [1]:
                    continue
                yield record(groups=[{**good, name: value}])


def test_a_journal_with_any_json_where_a_record_is_expected(tmp_path: Path) -> None:
    for damaged in damaged_records():
        (tmp_path / "journal.jsonl").write_bytes(lines({"seed": 0}, record(), damaged))
        with pytest.raises(GemmaAwqError, match="line 3 is damaged") as caught:
            Journal(tmp_path)
        assert caught.value.hint == "Start over with --force.", damaged


def test_a_journal_with_any_json_where_the_conditions_are_expected(tmp_path: Path) -> None:
    for damaged in ANY_JSON:
        if not isinstance(damaged, dict):
            (tmp_path / "journal.jsonl").write_bytes(lines(damaged, record()))
            with pytest.raises(GemmaAwqError, match="line 1 is damaged"):
                Journal(tmp_path)


@pytest.mark.parametrize("damage", NOT_JSON)
def test_a_journal_that_is_no_json(damage: bytes, tmp_path: Path) -> None:
    for content in (damage + b"\n", lines({"seed": 0}) + damage + b"\n", lines({"seed": 0}, record()) + damage + b"\n"):
        (tmp_path / "journal.jsonl").write_bytes(content)
        with pytest.raises(GemmaAwqError, match=r"line \d") as caught:
            Journal(tmp_path)
        assert "--force" in caught.value.hint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    import os

    path.unlink()
    os.mkfifo(path)


def repeated(path: Path) -> None:
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + rest[0] * 9)


DAMAGE: list[tuple[str, Callable[[Path], Any]]] = [
    ("state/journal.jsonl", lambda path: path.write_bytes(lines(None, None))),
    ("state/journal.jsonl", lambda path: path.write_bytes(path.read_bytes()[:40] + b"\0\n" + path.read_bytes()[40:])),
    ("state/journal.jsonl", repeated),
    ("state/journal.jsonl", as_folder),
    ("state/journal.jsonl", as_pipe),
    ("state/hidden-0.f32", cut),
    ("state/hidden-0.f32", Path.unlink),
    ("state/hidden-1.f32", Path.unlink),
    ("state/hidden-0.f32", as_folder),
    ("state/hidden-1.f32", as_pipe),
    ("model/model.safetensors", cut),
    ("model/model.safetensors", Path.unlink),
    ("model/model.safetensors", as_folder),
    ("model/model.safetensors", lambda path: path.write_bytes(b"\xff" * path.stat().st_size)),
]


@pytest.fixture(scope="module")
def kept(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path], text_file: Path, native_folder: Path
) -> tuple[Path, list[str]]:
    """A run that was interrupted after two of three layers, and its arguments."""
    out = tmp_path_factory.mktemp("kept") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_AWQ_CACHE", str(make_cache(out.parent / "cache", native_folder)))
        arguments = kept_run(out, checkpoints("gemma"), text_file)
    return out, arguments


@pytest.mark.timeout(600)
def test_damaged_work_is_not_gone_on_with(
    kept: tuple[Path, list[str]], artifacts: Callable[[str], Path], capsys: Capture
) -> None:
    out, arguments = kept
    partial = out.parent / ".out.partial"
    safe = shutil.copytree(partial, out.parent / "safe")
    for name, damage in DAMAGE:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(safe, partial)
        damage(partial / name)
        assert main([*arguments, "--resume"]) == 1, name
        said = capsys.readouterr().err
        assert "error: " in said
        assert "--force" in said, name
        assert partial.exists(), name
    assert main([*arguments, "--force"]) == 0  # the hint can be followed
    assert identity(out) == identity(artifacts("gemma"))
    assert not partial.exists()
    shutil.rmtree(out)
    shutil.copytree(safe, partial)
    (partial / "state" / "journal.jsonl").write_bytes(b"nonsense\n")
    assert main([*arguments, "--resume", "--force"]) == 0
    assert identity(out) == identity(artifacts("gemma"))


def test_a_damaged_report_of_a_finished_run(
    tmp_path: Path,
    artifacts: Callable[[str], Path],
    checkpoints: Callable[[str], Path],
    text_file: Path,
    capsys: Capture,
) -> None:
    from tests.conftest import quantize_arguments

    out = Path(shutil.copytree(artifacts("gemma"), tmp_path / "out"))
    arguments = quantize_arguments(checkpoints("gemma"), out, text_file, "--resume")
    path = out / "quantization_report.json"
    good = json.loads(path.read_text())
    assert main(arguments) == 0
    damaged = [*NOT_JSON, *(json.dumps(value).encode() for value in ANY_JSON)]
    damaged += [json.dumps({**good, name: 1}).encode() for name in ("fingerprint", "fidelity", "run", "artifact")]
    damaged += [json.dumps({**good, "fidelity": {**good["fidelity"], "kl": "x"}}).encode()]
    for content in damaged[::3]:  # each of them takes a second
        path.write_bytes(content)
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert "quantization_report.json" in said
        assert "Start over with --force." in said or "is UTF-16" in said
        assert path.read_bytes() == content


@pytest.mark.parametrize("content", [*NOT_JSON, *(json.dumps(value).encode() for value in ANY_JSON)])
def test_a_damaged_note_of_the_last_artifact(content: bytes, tmp_path: Path, capsys: Capture) -> None:
    assert remember_artifact(tmp_path) is None
    assert last_artifact() == tmp_path
    from gemma_awq_cli.models.checkpoints.cache import cache_folder

    (cache_folder() / "last-artifact.json").write_bytes(content)
    assert last_artifact() is None
    assert main(["run", "Hello"]) == 1
    assert "none was quantized yet" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*ANY_JSON, "relative/path", "/x\0y", "/" + "x" * 300, "/" + "x/" * 9000, "\udcff"])
def test_a_last_artifact_of_any_type(name: Any, tmp_path: Path, capsys: Capture) -> None:
    from gemma_awq_cli.models.checkpoints.cache import cache_folder

    (cache_folder() / "last-artifact.json").write_text(json.dumps({"artifact": name}))
    assert last_artifact() is None
    assert main(["run", "Hello"]) == 1
    assert "none was quantized yet" in capsys.readouterr().err


def test_a_name_that_is_no_utf_8_is_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "x\udcff"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert remember_artifact(folder) is None
    assert last_artifact() == folder


MADE_WITH = {"model": "m", "seed": 5}


def row(**changes: Any) -> dict[str, Any]:
    return {"index": 0, "prompt": "a", "text": "b", "made_with": MADE_WITH, **changes}


def batch() -> Batch:
    return Batch(["a", "b"], None, False, GenerationOptions(4, Sampling(), ()), MADE_WITH)


@pytest.mark.parametrize(
    "content",
    [
        *(damage + b"\n" for damage in NOT_JSON),
        *(lines(value) for value in ANY_JSON),
        *(lines(row(**{name: value})) for name in ("index", "made_with") for value in ANY_JSON if value != 0),
        *(lines(row(text=value)) for value in ANY_JSON if not isinstance(value, str)),
        lines(row(), row(index=7)),
        lines(row(), row(index=True)),
        b"my notes, without a line end",
        b'{"prompt": "my own prompts", ',
        lines(row()) + b"and something of mine",
        b"\n\n",
    ],
)
def test_an_output_of_somebody_else_is_not_touched(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    recorded_seed(path)
    with pytest.raises(GemmaAwqError) as caught:
        read_finished(path, batch())
    assert "--output" in caught.value.hint
    assert path.read_bytes() == content


def test_only_a_cut_off_row_of_ours_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = lines(row())
    for end in range(len(whole)):
        path.write_bytes(whole + whole[:end])
        assert list(read_finished(path, batch())) == [0]
        assert path.read_bytes() == whole
    assert recorded_seed(path) == 5
