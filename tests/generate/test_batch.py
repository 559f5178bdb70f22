"""Many prompts: order, batches that change nothing, an interruption at any row, a resumed run, refusals."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_awq_cli.cli.app import main
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.batch import Batch, complete_batch, read_finished, recorded_seed
from gemma_awq_cli.generate.generation import Completion, GenerationOptions
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.prompt_file import read_prompts
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.session import Logits, Session

CPU = torch.device("cpu")
PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog", "a", "0123456789 times", "naïve 東京"]
OPTIONS = GenerationOptions(12, Sampling(temperature=1.0, top_k=40, seed=3))


@pytest.fixture(scope="module")
def opened(checkpoints: Callable[[str], Path]) -> OpenModel:
    """float32: a batch's matmuls round otherwise than a single row's, which bf16 would show at ties."""
    return open_model(checkpoints("gemma2"), CPU, Precision(torch.float32))


@pytest.fixture(scope="module")
def engine(opened: OpenModel) -> LocalEngine:
    return LocalEngine(opened)


def batch(prompts: Sequence[Any] = PROMPTS, options: GenerationOptions = OPTIONS, **made_with: object) -> Batch:
    return Batch(prompts, None, False, options, {"model": "tiny", "seed": 3, **made_with})


def run(engine: LocalEngine, path: Path, work: Batch | None = None) -> list[dict[str, Any]]:
    work = work or batch()
    assert complete_batch(engine, work, path, read_finished(path, work), lambda *_: None)
    return rows_of(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("sampling", [Sampling(), OPTIONS.sampling])
def test_the_batch_a_row_is_in_does_not_change_it(
    sampling: Sampling, opened: OpenModel, engine: LocalEngine, tmp_path: Path
) -> None:
    work = batch(options=GenerationOptions(12, sampling))
    results = [run(LocalEngine(opened, size), tmp_path / f"{size}.jsonl", work) for size in (1, 2, 5)]
    assert results[0] == results[1] == results[2]
    assert [row["prompt"] for row in results[0]] == PROMPTS
    assert [row["index"] for row in results[0]] == list(range(5))
    assert len({row["text"] for row in results[0]}) >= 4
    # and a prompt alone draws as the first row of a batch does
    ids = engine.prompter.prompt_ids(PROMPTS[0])
    (alone,) = engine.complete([ids], GenerationOptions(12, sampling), lambda *_: None)
    assert alone.text == results[0][0]["text"]


def test_rows_that_end_early_are_written_at_once_and_the_end_is_in_order(engine: LocalEngine, tmp_path: Path) -> None:
    """A stop text ends rows at different times; whoever reads the finished file sees the prompts' order."""
    whole = run(engine, tmp_path / "whole.jsonl")
    texts = [row["text"] for row in whole]
    early = next(n for n, text in enumerate(texts) if not any(text[:2] in other for other in texts if other != text))
    stop = texts[early][:2]
    seen: list[int] = []
    work = batch(options=GenerationOptions(12, OPTIONS.sampling, (stop,)))
    path = tmp_path / "out.jsonl"
    assert complete_batch(engine, work, path, {}, lambda index, _: seen.append(index))
    assert seen[0] == early
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert [row["index"] for row in rows_of(path)] == [0, 1, 2, 3, 4]
    assert rows_of(path)[early]["finish"] == "stop"


class CountingSession:
    """A session that counts the tokens of each row that it is given."""

    def __init__(self, inner: Session, read: list[list[int]]) -> None:
        self._inner, self._read = inner, read
        self.independent_rows = inner.independent_rows

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> Logits:
        self._read.append([len(row) for row in tokens])
        return self._inner.next_logits(tokens)

    def reset_row(self, row: int) -> None:
        self._inner.reset_row(row)


@dataclass(frozen=True)
class CountingModel(OpenModel):
    """An opened model that records its sessions, as (rows, capacity), and how many tokens they read."""

    sessions: list[tuple[int, int]] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)

    def session(self, rows: int, capacity: int) -> Session:
        self.sessions.append((rows, capacity))
        return CountingSession(super().session(rows, capacity), self.read)  # type: ignore[return-value]


ROWS = [[2, *range(40, 40 + n)] for n in (3, 9, 1, 20, 5, 2, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text", "gemma3"])
@pytest.mark.parametrize("way", ["compiled", "torch", "transformers"])
def test_a_row_that_has_ended_costs_nothing_and_gives_its_place_away(
    way: str, kind: str, artifacts: Callable[[str], Path], checkpoints: Callable[[str], Path]
) -> None:
    precision = Precision(torch.float32, attention="eager" if way == "transformers" else None)
    opened = open_model(artifacts(kind), CPU) if way == "compiled" else open_model(checkpoints(kind), CPU, precision)
    assert opened.session(1, 2).independent_rows == (way != "transformers")
    alone = [LocalEngine(opened).complete([ids], GenerationOptions(12), lambda *_: None)[0] for ids in ROWS]
    # a row each of which ends early by a text of its own
    stops = tuple({completion.text[4:6] for completion in alone[::3] if len(completion.text) > 6})
    options = GenerationOptions(12, stop=stops)
    alone = [LocalEngine(opened).complete([ids], options)[0] for ids in ROWS]
    assert len({len(completion.tokens) for completion in alone}) > 1
    counting = CountingModel(**{field.name: getattr(opened, field.name) for field in fields(opened)})
    together = LocalEngine(counting, 3).complete(ROWS, options)
    assert [(c.tokens, c.text, c.finish) for c in together] == [(c.tokens, c.text, c.finish) for c in alone]
    # each prompt is read once, and each token but a row's last
    assert sum(map(sum, counting.read)) == sum(len(ids) + len(c.tokens) - 1 for ids, c in zip(ROWS, alone, strict=True))
    # the prompt of 21 tokens does not fit where those of 4, 10 and 2 are
    expected = [(3, 22), (1, 33)] if opened.session(1, 2).independent_rows else [(3, 22), (3, 33), (1, 20)]
    assert counting.sessions == expected


class Interrupting:
    """An engine that Ctrl-C meets as the given row ends."""

    def __init__(self, engine: LocalEngine, at: int) -> None:
        self.prompter, self.context = engine.prompter, engine.context
        self._engine, self._left = engine, at

    def complete(self, rows: Any, options: Any, *, on_done: Any, numbers: Any) -> list[Completion]:
        def count(row: int, completion: Completion) -> None:
            on_done(row, completion)
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt

        return self._engine.complete(rows, options, on_done=count, numbers=numbers)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupted_run_goes_on_to_the_same_file(at: int, opened: OpenModel, tmp_path: Path) -> None:
    engine = LocalEngine(opened, 2)
    whole = run(engine, tmp_path / "whole.jsonl")
    path = tmp_path / "out.jsonl"
    assert not complete_batch(Interrupting(engine, at), batch(), path, {}, lambda *_: None)
    assert len(rows_of(path)) == at
    with path.open("a", encoding="utf-8") as file:
        file.write('{"index": 4, "prom')  # as a killed process leaves it
    assert set(read_finished(path, batch())) == set(range(at))
    assert run(LocalEngine(opened, 3), path) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert run(LocalEngine(opened, 3), path) == whole  # complete: nothing is added


def test_what_was_made_otherwise_is_refused_and_named(engine: LocalEngine, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run(engine, path)
    assert recorded_seed(path) == 3
    before = path.read_bytes()
    with pytest.raises(GemmaAwqError, match=r"other options: seed 3, now 4"):
        read_finished(path, batch(seed=4))
    with pytest.raises(GemmaAwqError, match=r"other prompts than those of --input \(row 1\)"):
        read_finished(path, batch([PROMPTS[0], "another", *PROMPTS[2:]]))
    with pytest.raises(GemmaAwqError, match=r"other prompts than those of --input \(row 3\)"):
        read_finished(path, batch(PROMPTS[:3]))
    assert path.read_bytes() == before
    path.write_text('{"text": "of something else"}\n')
    with pytest.raises(GemmaAwqError, match="line 1 was not written by this command"):
        read_finished(path, batch())


def test_a_prompt_beyond_the_context_is_found_before_anything_is_written(engine: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(GemmaAwqError, match="Prompt 2 has 301 tokens; this model's context holds 256"):
        complete_batch(engine, batch(["short", "x" * 300]), tmp_path / "out.jsonl", {}, lambda *_: None)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "SIGKILL"])
def test_one_process_alone_writes_an_output(
    end: str, artifacts: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("Hello\n")
    arguments = ["run", "-m", str(artifacts("gemma")), "--input", str(source), "--output", str(target)]
    code = (
        "from pathlib import Path\nfrom gemma_awq_cli.generate.batch import sole_writer\n"
        f"with sole_writer(Path({str(target)!r})):\n    print('mine', flush=True)\n    input()\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        for resume in ([], ["--resume"]):
            assert main([*arguments, *resume, "--device", "cpu"]) == 1
            assert f"{target} is being written by another process" in capsys.readouterr().err
        assert not target.exists()
        if end == "SIGKILL":
            other.kill()
        else:
            other.stdin.write(b"\n")
            other.stdin.flush()
        other.wait(60)
    assert main([*arguments, "--device", "cpu", "--max-new-tokens", "2"]) == 0
    assert len(rows_of(target)) == 1


def test_files_of_prompts(tmp_path: Path) -> None:
    def read(name: str, content: bytes) -> list[Any]:
        (tmp_path / name).write_bytes(content)
        return read_prompts(tmp_path / name)

    assert read("a.txt", "one\r\n\n  two words\nthree\u2028still three\n".encode()) == [
        "one",
        "  two words",
        "three\u2028still three",
    ]
    messages = [{"role": "user", "content": "Hi"}]
    assert read("b.jsonl", b'{"prompt": "a\\nb"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n') == [
        "a\nb",
        messages,
    ]
    with pytest.raises(UsageError, match="has no prompts"):
        read("c.txt", b"\n \n")
    with pytest.raises(GemmaAwqError, match="not UTF-8"):
        read("d.txt", b"Gr\xf6\xdfe")
    with pytest.raises(GemmaAwqError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")
    for line in (b'{"prompt": 3}', b'{"text": "x"}', b'{"prompt": ""}', b'{"messages": ["x"]}', b"[]", b"{"):
        with pytest.raises(GemmaAwqError, match="line 2"):
            read("e.jsonl", b'{"prompt": "x"}\n' + line)
    with pytest.raises(GemmaAwqError, match="surrogate"):
        read("f.jsonl", b'{"prompt": "\\ud800"}')
