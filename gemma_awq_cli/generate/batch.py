"""Many prompts through one model: completed in batches, written one JSON line each.

A line is appended as soon as its row ends, so whatever ends the run keeps every row that was finished. Each line says
what it was made with; that is what a resumed run compares itself with.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions, prompt_ids, require_room
from gemma_awq_cli.generate.prompt_file import Prompt
from gemma_awq_cli.models.text.prompter import Prompter, located
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.locking import Lock
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.saving import require_file_place, write_errors, write_whole

ANOTHER = "Give another --output."
ROW_BEGINS = b'{"index": '


@dataclass(frozen=True)
class Batch:
    """What is to be completed. made_with: all that the answers depend on, by the names of the options."""

    prompts: Sequence[Prompt]
    system: str | None
    raw: bool
    settings: GenerationOptions
    made_with: Mapping[str, Any]


def recorded_seed(path: Path) -> int | None:
    """The seed that an earlier run of the command drew, if its output tells: a resumed run goes on with it."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return None
    made_with = first.get("made_with") if isinstance(first, dict) else None
    seed = made_with.get("seed") if isinstance(made_with, dict) else None
    return seed if isinstance(seed, int) and not isinstance(seed, bool) and abs(seed) < 2**63 else None


def read_finished(path: Path, batch: Batch) -> dict[int, dict[str, Any]]:
    """The rows that an earlier run of the same command finished, by number; cuts off a half-written last line.

    Refuses, and names the difference, if they were made of other prompts or with anything else, and touches nothing
    that this command did not write.
    """
    if not path.exists():
        return {}
    content = read_bytes(path, ANOTHER)
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        row = _read_row(f"{path}, line {number}", line)
        _require_same(path, batch, row["index"], row["prompt"], row["made_with"])
        rows[row["index"]] = row
    if rest := content[len(whole) :]:
        if not rest.startswith(ROW_BEGINS[: len(rest)]):
            raise GemmaAwqError(f"{path}, line {len(lines) + 1} was not written by this command.", ANOTHER)
        with writing(path):
            os.truncate(path, len(whole))
    return rows


def _read_row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line.decode("utf-8"), where, ANOTHER)
    except (UnicodeDecodeError, GemmaAwqError):
        row = None
    kinds: dict[str, Any] = {"index": int, "prompt": (str, list), "text": str, "made_with": dict}
    if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
        raise GemmaAwqError(f"{where} was not written by this command.", ANOTHER)
    return row


def _require_same(path: Path, batch: Batch, index: int, prompt: Any, made_with: dict[str, Any]) -> None:
    hint = "Repeat the command that wrote it with --resume, or give another --output."
    if isinstance(index, bool) or not 0 <= index < len(batch.prompts) or batch.prompts[index] != prompt:
        raise GemmaAwqError(f"{path} holds other prompts than --input (row {index}).", hint)
    now = batch.made_with
    if made_with != dict(now):
        names = [name for name in sorted({*made_with, *now}) if made_with.get(name) != now.get(name)]
        different = "; ".join(f"{name} {made_with.get(name)!r}, now {now.get(name)!r}" for name in names)
        raise GemmaAwqError(f"{path} was written with other settings: {different}.", hint)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Nobody else writes the output meanwhile; an error if somebody does. However this process ends, that ends too.

    The lock's own file stays: whoever took it away might take it from under one who has just opened it.
    """
    lock = Lock(path.with_name(f"{path.name}.lock"))
    with writing(path):
        taken = lock.acquire()
    if not taken:
        raise GemmaAwqError(f"{path} is being written by another process.", "Wait for it, or give another --output.")
    try:
        yield
    finally:
        lock.release()


def require_free(path: Path, resume: bool) -> None:
    """An error if nothing can be written to the output, or it is there already and `resume` does not allow it.

    Only looks, so that it can be asked before anything is loaded.
    """
    require_file_place(path, "give another --output")
    if not resume and path.exists() and path.stat().st_size:
        raise GemmaAwqError(f"{path} exists and is not empty.", "Add --resume to go on with it, or give another name.")


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
    rows = token_rows(engine.prompter, batch)
    for index, ids in enumerate(rows):
        require_room(len(ids), engine.context, f"Prompt {index + 1}")
    left = [index for index in range(len(rows)) if index not in finished]
    order = list(finished)
    with writing(path), path.open("a", encoding="utf-8", newline="\n") as file:

        def on_done(place: int, completion: Completion) -> None:
            index = left[place]
            with writing(path):
                file.write(json.dumps(_row(index, batch, completion), ensure_ascii=False) + "\n")
                file.flush()
            order.append(index)
            on_row(index, completion)

        with contextlib.suppress(KeyboardInterrupt):
            engine.complete([rows[index] for index in left], batch.settings, lambda _, piece: None, on_done, left)
    if order != sorted(order):
        with writing(path):
            _sort(path)
    return len(order) == len(rows)


def token_rows(prompter: Prompter, batch: Batch) -> list[list[int]]:
    """Each prompt's token ids; an error that names the prompt if the model cannot be given it."""
    rows = []
    for number, prompt in enumerate(batch.prompts, 1):
        with located(f"Prompt {number}"):
            rows.append(prompt_ids(prompter, prompt, batch.system, batch.raw))
    return rows


def writing(path: Path) -> AbstractContextManager[None]:
    """Refusals of the operating system while the output is written, as errors."""
    return write_errors(path, "give another --output; --resume goes on")


def _row(index: int, batch: Batch, completion: Completion) -> dict[str, Any]:
    return {
        "index": index, "prompt": batch.prompts[index], "text": completion.text, "finish": completion.finish,
        "prompt_tokens": completion.prompt_tokens, "tokens": len(completion.tokens),
        "made_with": dict(batch.made_with),
    }  # fmt: skip


def _sort(path: Path) -> None:
    """Bring the lines into the order of the prompts; the file is replaced whole or not at all."""
    lines = sorted(path.read_bytes().split(b"\n")[:-1], key=lambda line: int(json.loads(line)["index"]))
    write_whole(path, b"\n".join(lines) + b"\n")
