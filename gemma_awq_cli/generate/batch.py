"""Many prompts through one model, in batches, and the file of their completions, one JSON line each.

A line is appended as soon as its row ends, so whatever ends the run, every finished row is kept. Each line says what it
was made with; a resumed run compares itself with that.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions, require_room
from gemma_awq_cli.generate.prompting import Prompt, prompt_ids
from gemma_awq_cli.models.text.prompter import Prompter, Tool, located
from gemma_awq_cli.system.json_input import parse_json
from gemma_awq_cli.system.locking import Lock
from gemma_awq_cli.system.reading import read_bytes
from gemma_awq_cli.system.saving import require_file_place, write_errors, write_whole

ANOTHER = "Give another --output."
RESUME = "give another --output. --resume continues after the finished prompts"
ROW_BEGINS = b'{"index": '


@dataclass(frozen=True)
class Batch:
    """The prompts to complete and how.

    system, raw, think, tools: as for `prompt_ids`. made_with: all that the completions depend on, by the names of
    the options.
    """

    prompts: Sequence[Prompt]
    system: str | None
    raw: bool
    options: GenerationOptions
    made_with: Mapping[str, Any]
    think: bool | None = None
    tools: Sequence[Tool] = ()


def recorded_seed(path: Path) -> int | None:
    """Return the seed that an earlier run of the command drew, to continue with it; None if the output has none."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return None
    made_with = first.get("made_with") if isinstance(first, dict) else None
    seed = made_with.get("seed") if isinstance(made_with, dict) else None
    return seed if isinstance(seed, int) and not isinstance(seed, bool) and abs(seed) < 2**63 else None


def read_finished(path: Path, batch: Batch) -> dict[int, dict[str, Any]]:
    """Return the rows that an earlier run of the same command finished, by index; cuts off a half-written last line.

    Raises GemmaAwqError, which names the difference, if they have other prompts or were made with other options. A file
    that this command did not write is left as it is.
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
        raise GemmaAwqError(f"{path} was written for other prompts than those of --input (row {index}).", hint)
    now = batch.made_with
    if made_with != dict(now):
        names = [name for name in sorted({*made_with, *now}) if made_with.get(name) != now.get(name)]
        different = "; ".join(f"{name} {made_with.get(name)!r}, now {now.get(name)!r}" for name in names)
        raise GemmaAwqError(f"{path} was written with other options: {different}.", hint)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep other processes from writing the output meanwhile; raise GemmaAwqError if one is writing it.

    The lock ends with this process, however it ends. The lock's own file stays: removing it could remove it from under
    a process that has just opened it.
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
    """Raise GemmaAwqError if the output cannot be written, or if it exists and `resume` is not given.

    Writes nothing, so that it can be called before anything is loaded.
    """
    require_file_place(path, "give another --output")
    if not resume and path.exists() and path.stat().st_size:
        raise GemmaAwqError(
            f"{path} exists and is not empty.", "Add --resume to continue it, or give another --output."
        )


def complete_batch(
    engine: Engine,
    batch: Batch,
    path: Path,
    finished: Mapping[int, dict[str, Any]],
    on_row: Callable[[int, Completion], None],
) -> bool:
    """Complete the prompts that are not in `finished` and append them to `path`. Return False if Ctrl-C ended it early.

    on_row: called with (index of the prompt, completion) as each row ends. Rows end in any order; once all are written,
    the file is brought into the order of the prompts.
    """
    rows = token_rows(engine.prompter, batch)
    for index, ids in enumerate(rows):
        require_room(len(ids), engine.context, f"Prompt {index + 1}")
    left = [index for index in range(len(rows)) if index not in finished]
    order = list(finished)
    options = replace(batch.options, tools=engine.prompter.tool_format) if batch.tools else batch.options
    with writing(path), path.open("a", encoding="utf-8", newline="\n") as file:

        def on_done(place: int, completion: Completion) -> None:
            index = left[place]
            with writing(path):
                file.write(json.dumps(_row(index, batch, completion, engine.prompter), ensure_ascii=False) + "\n")
                file.flush()
            order.append(index)
            on_row(index, completion)

        with contextlib.suppress(KeyboardInterrupt):
            engine.complete([rows[index] for index in left], options, on_done=on_done, numbers=left)
    if order != sorted(order):
        with writing(path):
            _sort(path)
    return len(order) == len(rows)


def token_rows(prompter: Prompter, batch: Batch) -> list[list[int]]:
    """Return the token ids of each prompt. Raises PromptError, which names the prompt, if the model cannot take it."""
    rows = []
    for number, prompt in enumerate(batch.prompts, 1):
        with located(f"Prompt {number}"):
            rows.append(prompt_ids(prompter, prompt, batch.system, batch.raw, batch.think, batch.tools))
    return rows


def writing(path: Path) -> AbstractContextManager[None]:
    """Turn the operating system's errors while the output is written into GemmaAwqError."""
    return write_errors(path, RESUME)


def _row(index: int, batch: Batch, completion: Completion, prompter: Prompter) -> dict[str, Any]:
    return {
        "index": index, "prompt": batch.prompts[index], **completion.texts, **completion.call_documents,
        **completion.logprob_documents(prompter.tokenizer), "finish": completion.finish,
        "prompt_tokens": completion.prompt_tokens, "tokens": len(completion.tokens),
        "made_with": dict(batch.made_with),
    }  # fmt: skip


def _sort(path: Path) -> None:
    """Sort the lines by prompt; the file is replaced as a whole or not at all."""
    lines = sorted(path.read_bytes().split(b"\n")[:-1], key=lambda line: int(json.loads(line)["index"]))
    write_whole(path, b"\n".join(lines) + b"\n")
