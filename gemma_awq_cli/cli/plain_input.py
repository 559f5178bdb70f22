"""Messages of a chat typed without the line editor: on a simple terminal, or while stdout goes elsewhere."""

import contextlib

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.typed_message import FENCE, MORE, is_open, without_fence
from gemma_awq_cli.errors import UsageError


class PlainInput:
    """Reads messages line by line with Python's `input`."""

    def __init__(self, out: Output) -> None:
        with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        self._out = out

    def read(self, prompt: str) -> str:
        """Return one message, of one line or several.

        Ctrl-C drops what was typed; if that is nothing, KeyboardInterrupt is raised. Raises EOFError at the end.
        """
        while True:
            text = ""
            try:
                text = self._line(prompt)
                while is_open(text):
                    if not text.lstrip().startswith(FENCE):
                        text = text.removesuffix("\\")
                    text = f"{text}\n{self._line(MORE)}"
                return without_fence(text)
            except KeyboardInterrupt:
                if not text and not _typed():
                    raise
                self._out.note("")

    def _line(self, prompt: str) -> str:
        while True:
            try:
                line = self._out.ask(prompt)
                line.encode("utf-8")
            except UnicodeError:
                self._out.error(UsageError("That line is not UTF-8.", "Check the terminal's encoding."))
            else:
                return line


def _typed() -> bool:
    """Return whether the interrupted line had text in it, as far as readline knows."""
    try:
        import readline
    except ImportError:
        return False
    return bool(readline.get_line_buffer())
