"""The prompt of `gemma-awq run`: its argument, or standard input."""

import sys

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.system.failures import system_errors
from gemma_awq_cli.system.text_input import decode, plain_lines, require_text

STDIN_BYTES = 8 << 20  # the largest Gemma's context has 131072 tokens; few tokens have more than 64 bytes


def read_prompt(argument: str | None) -> str:
    """Return the prompt: the argument, or standard input for `-` and pipes."""
    text = argument if argument is not None and argument != "-" else _read_stdin()
    if not text:
        raise UsageError("The prompt is empty.", 'Give one: gemma-awq run "PROMPT", or pipe it in.')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of an argument that are not UTF-8 arrive as lone surrogates
        raise GemmaAwqError("The prompt is not UTF-8.", "Convert it to UTF-8.") from None
    return text


def _read_stdin() -> str:
    """Return standard input as text, with \\n for line ends and without the last; at most what a context can hold."""
    where = "The prompt on standard input"
    if sys.stdin is None:
        raise UsageError("Standard input is closed, and there is no prompt.", 'Give one: gemma-awq run "PROMPT".')
    with system_errors("Standard input", "Pipe the prompt in, or give it as an argument."):
        data = sys.stdin.buffer.read(STDIN_BYTES + 1)
    if len(data) > STDIN_BYTES:
        raise GemmaAwqError(
            f"{where} has more than {STDIN_BYTES} bytes, which no Gemma's context holds.",
            "Shorten it, or give many prompts with --input.",
        )
    return plain_lines(require_text(decode(data, where), where)).removesuffix("\n")
