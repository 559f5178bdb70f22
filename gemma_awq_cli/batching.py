"""Many prompts through one model: completed in batches, written one JSON line each.

A line is appended as soon as its row ends, so whatever ends the run keeps every row that was finished. Each line says
what it was made with; that is what a resumed run compares itself with.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generation import Completion, Engine, Settings, prompt_ids, require_room
from gemma_awq_cli.prompt_file import Prompt


@dataclass(frozen=True)
class Batch:
    """What is to be completed. made_with: all that the answers depend on, by the names of the options."""

    prompts: Sequence[Prompt]
    system: str | None
    raw: bool
    settings: Settings
    made_with: Mapping[str, Any]


def recorded_seed(path: Path) -> int | None:
    """The seed that an earlier run of the command drew, if its output tells: a resumed run goes on with it."""
    try:
        with path.open(encoding="utf-8") as file:
            seed = json.loads(file.readline())["made_with"]["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seed if isinstance(seed, int) else None


def read_finished(path: Path, batch: Batch) -> dict[int, dict[str, Any]]:
    """The rows that an earlier run of the same command finished, by number; cuts off a half-written last line.

    Refuses, and names the difference, if they were made of other prompts or with anything else.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            index, prompt, made_with = row["index"], row["prompt"], row["made_with"]
        except (ValueError, KeyError, TypeError):
            raise GemmaAwqError(
                f"{path}, line {number} was not written by this command.", "Give another --output."
            ) from None
        _require_same(path, batch, index, prompt, made_with)
        rows[index] = row
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return rows


def _require_same(path: Path, batch: Batch, index: Any, prompt: Any, made_with: Any) -> None:
    hint = "Repeat the command that wrote it with --resume, or give another --output."
    if not isinstance(index, int) or not 0 <= index < len(batch.prompts) or batch.prompts[index] != prompt:
        raise GemmaAwqError(f"{path} holds other prompts than --input (row {index}).", hint)
    if not isinstance(made_with, dict) or made_with != dict(batch.made_with):
        there = made_with if isinstance(made_with, dict) else {}
        names = [n for n in sorted({*there, *batch.made_with}) if there.get(n) != batch.made_with.get(n)]
        different = "; ".join(f"{name} {there.get(name)!r}, now {batch.made_with.get(name)!r}" for name in names)
        raise GemmaAwqError(f"{path} was written with other settings: {different}.", hint)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Nobody else writes the output meanwhile; an error if somebody does. However this process ends, that ends too.

    The lock's own file stays: whoever took it away might take it from under one who has just opened it.
    """
    lock = FileLock(f"{path}.lock", timeout=0)
    with _writing(path):
        try:
            lock.acquire()
        except Timeout:
            raise GemmaAwqError(
                f"{path} is being written by another process.", "Wait for it, or give another --output."
            ) from None
    try:
        yield
    finally:
        lock.release()


def require_free(path: Path, resume: bool) -> None:
    """An error if the output is there already and `resume` does not allow it."""
    if not resume and path.exists() and path.stat().st_size:
        raise GemmaAwqError(f"{path} exists and is not empty.", "Add --resume to go on with it, or give another name.")


def require_folder(path: Path) -> None:
    """An error if there is no folder for the output to be in."""
    if not path.absolute().parent.is_dir():
        raise GemmaAwqError(f"{path.parent} is no folder.", "Make it first, or give another --output.")


def complete_batch(
    engine: Engine,
    batch: Batch,
    path: Path,
    finished: Mapping[int, dict[str, Any]],
    on_row: Callable[[int, Completion], None],
) -> bool:
    """Complete what is not in `finished`, and append it to `path`. False if Ctrl-C ended it early.

    Rows end in any order; when all are there the file is in the order of the prompts.
    """
    rows = [prompt_ids(engine.prompter, prompt, batch.system, batch.raw) for prompt in batch.prompts]
    for index, ids in enumerate(rows):
        require_room(len(ids), engine.context, f"Prompt {index + 1}")
    left = [index for index in range(len(rows)) if index not in finished]
    order = list(finished)
    with _writing(path), path.open("a", encoding="utf-8", newline="\n") as file:

        def on_done(place: int, completion: Completion) -> None:
            index = left[place]
            with _writing(path):
                file.write(json.dumps(_row(index, batch, completion), ensure_ascii=False) + "\n")
                file.flush()
            order.append(index)
            on_row(index, completion)

        with contextlib.suppress(KeyboardInterrupt):
            engine.complete([rows[index] for index in left], batch.settings, lambda _, piece: None, on_done, left)
    if order != sorted(order):
        with _writing(path):
            _sort(path)
    return len(order) == len(rows)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GemmaAwqError(
            f"{path} cannot be written: {error.strerror}.", "Make room or choose another place; --resume goes on."
        ) from None


def _row(index: int, batch: Batch, completion: Completion) -> dict[str, Any]:
    return {
        "index": index, "prompt": batch.prompts[index], "text": completion.text, "finish": completion.finish,
        "prompt_tokens": completion.prompt_tokens, "tokens": len(completion.tokens),
        "made_with": dict(batch.made_with),
    }  # fmt: skip


def _sort(path: Path) -> None:
    """Bring the lines into the order of the prompts; the file is replaced whole or not at all."""
    lines = sorted(path.read_bytes().splitlines(), key=lambda line: int(json.loads(line)["index"]))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(b"\n".join(lines) + b"\n")
    partial.replace(path)
