"""A file of prompts for `run`. Answers must match prompts: so a bad one is an error, and none is left out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gemma_awq_cli.calibration_text.document_files import TEXT, Kind, kind_of, line_of_json, rows_of, unpacked
from gemma_awq_cli.calibration_text.document_forms import named_keys, read_messages, require_sound
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.models.text.prompter import Message
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.text_input import byte_lines, decode, require_utf8_mark

Prompt = str | list[Message]
INPUT_BYTES = 1 << 28  # of a file of prompts, unpacked
_HINT = "Check --input."
_FORM = 'Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} on each line.'


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, by its name, in whatever case; anything gzipped too.

    .jsonl, .ndjson, .json, .csv, .tsv, .parquet: rows with `prompt` or `messages`. Any other name: a prompt per line,
    empty lines left out; if the lines are such rows they are read as that. An error names the file and line.
    """
    kind = kind_of(path)
    if kind is not None and kind.suffix not in TEXT:
        prompts = _row_prompts(path, kind)
    else:
        prompts = _plain_prompts(path, list(_lines(path, kind)))
    if not prompts:
        raise UsageError(f"{path} holds no prompt.", "Write one prompt per line, or JSON lines with `prompt`.")
    return prompts


def _row_prompts(path: Path, kind: Kind) -> list[Prompt]:
    prompts, size = [], 0
    for where, row in rows_of(path, kind):
        prompt = _prompt(row, where)
        size += len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
        _require_bounded(path, size)
        prompts.append(prompt)
    return prompts


def _require_bounded(path: Path, size: int) -> None:
    if size > INPUT_BYTES:
        raise GemmaAwqError(f"{path} has more than {INPUT_BYTES} bytes.", "Split it into several files.")


def _lines(path: Path, kind: Kind | None) -> Iterator[tuple[int, str]]:
    """The lines that are not blank. A pipe is read too, as long as it ends."""
    size = 0
    with _opened(path, kind) as stream:
        for number, line in byte_lines(stream, path, _HINT):
            if number == 1:
                require_utf8_mark(line, path)
            size += len(line) + 1
            _require_bounded(path, size)
            if line.strip():
                where = f"{path}, line {number}"
                yield number, require_sound(decode(line, where), where)


@contextmanager
def _opened(path: Path, kind: Kind | None) -> Iterator[BinaryIO]:
    if kind is not None and kind.packed:
        with unpacked(path, kind) as stream:
            yield stream
    else:
        with system_errors(path, _HINT), path.open("rb") as stream:
            yield stream


def _plain_prompts(path: Path, lines: list[tuple[int, str]]) -> list[Prompt]:
    """A prompt per line, unless the lines are rows of JSON: nobody means those to go to the model as they are."""
    rows = [number for number, line in lines if _is_row(line)]
    if not rows:
        return [line for _, line in lines]
    if len(rows) < len(lines):
        other = next(number for number, line in lines if not _is_row(line))
        raise GemmaAwqError(
            f"{path}, line {other} is no JSON object with a prompt, and line {rows[0]} is one.",
            "Name the file .jsonl and make every line such an object.",
        )
    return [_prompt(line_of_json(line.encode(), ""), f"{path}, line {number}") for number, line in lines]


def _is_row(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    row = line_of_json(line.encode(), "")
    return isinstance(row, dict) and ("prompt" in row or "messages" in row)


def _prompt(row: Any, where: object) -> Prompt:
    if isinstance(row, GemmaAwqError):
        raise GemmaAwqError(row.message, _FORM)
    if isinstance(row, str) and row:
        return require_sound(row, where)
    given = row if isinstance(row, dict) else {}
    prompt, messages = given.get("prompt"), given.get("messages")
    if messages is not None and prompt is None:
        return read_messages(messages, where)
    if isinstance(prompt, str) and prompt and messages is None:
        return require_sound(prompt, where)
    found = f"; it has {named_keys(row)}" if isinstance(row, dict) else ""
    raise GemmaAwqError(f"{where} has neither a `prompt` text nor `messages`{found}.", _FORM)
