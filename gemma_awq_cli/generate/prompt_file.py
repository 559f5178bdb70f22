"""A file of prompts for `run`. Completions must match prompts, so a bad prompt is an error and none is skipped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gemma_awq_cli.calibration_text.document_files import TEXT, Kind, kind_of, line_of_json, rows_of, unpacked
from gemma_awq_cli.calibration_text.document_forms import named_keys, read_messages, require_sound
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.prompting import Prompt
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.text_input import byte_lines, decode, require_utf8_mark

INPUT_BYTES = 1 << 28  # the largest file of prompts, unpacked
_HINT = "Check --input."
_FORM = 'Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} on each line.'


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file, whose name (in any case, and with .gz) tells its form.

    .jsonl, .ndjson, .json, .csv, .tsv, .parquet: rows with `prompt` or `messages`. Any other name: a prompt per line,
    without empty lines; if the lines are JSON rows of that kind, they are read as such. Errors name the file and line.
    """
    kind = kind_of(path)
    if kind is not None and kind.suffix not in TEXT:
        prompts = _row_prompts(path, kind)
    else:
        prompts = _plain_prompts(path, list(_lines(path, kind)))
    if not prompts:
        raise UsageError(f"{path} has no prompts.", "Write one prompt per line, or JSON lines with `prompt`.")
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
    """Yield the lines that are not blank, with their numbers. A pipe is read too, up to the largest size."""
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
    """Return a prompt per line. Lines that are JSON rows of prompts are read as such, not taken as text."""
    rows = [number for number, line in lines if _is_row(line)]
    if not rows:
        return [line for _, line in lines]
    if len(rows) < len(lines):
        other = next(number for number, line in lines if not _is_row(line))
        raise GemmaAwqError(
            f"{path}, line {other} is not a JSON object with a prompt, but line {rows[0]} is.",
            "Name the file .jsonl and make every line a JSON object.",
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
    raise GemmaAwqError(f"{where} needs either a `prompt` text or `messages`{found}.", _FORM)
