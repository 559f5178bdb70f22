"""The only file that prints. stdout carries a command's result and nothing else; everything else goes to stderr.

Progress is drawn only on a terminal; `NO_COLOR` and pipes give plain text.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError


class Output:
    """Where a command reports. quiet: notes and progress are left out, errors are not."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._console: Any = None

    @property
    def console(self) -> Any:
        """rich's console on stderr, made when it is first needed."""
        if self._console is None:
            from rich.console import Console

            # outside a terminal rich would assume 80 columns and break long paths
            width = None if sys.stderr.isatty() else 200
            self._console = Console(
                stderr=True, highlight=False, force_terminal=None if sys.stderr.isatty() else False, width=width
            )
        return self._console

    def result(self, text: str) -> None:
        """A result on stdout, with a newline."""
        print(text, flush=True)

    def piece(self, text: str) -> None:
        """A piece of streamed text on stdout, as it is."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def ask(self, prompt: str) -> str:
        """A line that the user types. The prompt is no result: it goes to stderr where stdout is not the screen."""
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)
        sys.stderr.flush()
        return input()

    def document(self, value: Any) -> None:
        """Exactly one JSON document on stdout."""
        print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        self.console.print(f"warning: {text}", markup=False, style="yellow", soft_wrap=True)

    def confirm(self, question: str) -> bool:
        """Ask on stderr; only where a person can answer."""
        self.console.print(f"{question} [y/N] ", markup=False, end="", soft_wrap=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def error(self, error: GemmaAwqError) -> None:
        from rich.text import Text

        self.console.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
        if error.hint:
            self.console.print(Text.assemble(("hint: ", "bold cyan"), error.hint), soft_wrap=True)

    def table(self, title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str] = ()) -> None:
        """A small table on stderr: the first column names, the others hold figures."""
        if not self.quiet:
            self.console.print(self._table(title, rows, header))

    def result_table(self, title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str]) -> None:
        """A table that is the result, on stdout."""
        from rich.console import Console

        width = None if sys.stdout.isatty() else 200
        terminal = None if sys.stdout.isatty() else False
        Console(highlight=False, force_terminal=terminal, width=width).print(self._table(title, rows, header))
        sys.stdout.flush()

    def violation(self, text: str) -> None:
        """A line for a bound that was not kept."""
        self.console.print(f"not met: {text}", markup=False, style="bold red", soft_wrap=True)

    @staticmethod
    def _table(title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str]) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=bool(header))
        columns = header or ("",) * len(rows[0])
        for index, name in enumerate(columns):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator["Progress"]:
        """A progress bar below the lines that are printed meanwhile; nothing is drawn outside a terminal."""
        if self.quiet or not self.console.is_terminal:
            yield Progress(None, None)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Bar(*columns, console=self.console, transient=True, speed_estimate_period=600) as bar:
            yield Progress(bar, bar.add_task(description, total=total))


class Progress:
    """What a command holds while it works; `step` moves the bar, if there is one."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def step(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def go_to(self, done: int) -> None:
        """So much is done in all."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def begin_at(self, done: int, total: int) -> None:
        """So much was done before: it does not count for the time that is left."""
        if self._bar is not None:
            self._bar.reset(self._task, total=total, completed=done)
            self._bar.advance(self._task, 0)  # steps that come many at a time are timed from here, not from each other


def quiet_libraries() -> None:
    """Keep the libraries' own bars and chatter off the screen; warnings of theirs are not for our users."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def human_bytes(count: float) -> str:
    """1234567 -> `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def bytes_of(text: str) -> int | None:
    """`6GB`, `900MB`, `1.5 GiB` or plain bytes -> bytes; None if it is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None:
        return None
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))


def human_seconds(seconds: float) -> str:
    """83.4 -> `1 min 23 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
