"""The only file that prints. stdout carries a command's result and nothing else; everything else goes to stderr.

Progress is drawn only on a terminal; `NO_COLOR` and pipes give plain text. Text that quotes names, errors or a model's
words passes a filter (`terminal.py`), so that a terminal shows control characters and obeys none. A result that goes to
a pipe or a file is written unchanged.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from traceback import format_exception
from typing import Any, TextIO, cast

from gemma_awq_cli.cli import terminal
from gemma_awq_cli.cli.streams import AsIs, put
from gemma_awq_cli.errors import GemmaAwqError

WIDE = 200  # outside a terminal rich would assume 80 columns and break long paths
NARROW = 60  # below this many columns, progress is a count without a bar


class Output:
    """The place where a command reports. quiet: without notes and progress, but with warnings and errors."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._console: Any = None

    @property
    def console(self) -> Any:
        """rich's console on stderr, created at its first use."""
        if self._console is None:
            self._console = _console(sys.stderr)
        return self._console

    def result(self, text: str) -> None:
        """Write a result and a newline to stdout."""
        put(sys.stdout, f"{terminal.message(text) if sys.stdout.isatty() else text}\n")
        sys.stdout.flush()

    def piece(self, text: str) -> None:
        """Write a piece of a model's text to stdout at once."""
        put(sys.stdout, terminal.content(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def thought(self, text: str) -> None:
        """Write a piece of what a model thinks to stderr at once, unless the command is quiet."""
        if not self.quiet:
            self._say(terminal.content(text), "dim", end="")

    def ask(self, prompt: str) -> str:
        """Return a line that the user types. The prompt goes to stderr if stdout is not a terminal."""
        prompt = terminal.line(prompt)
        if sys.stdout.isatty():
            return input(prompt)
        put(sys.stderr, prompt)
        sys.stderr.flush()
        return input()

    def drawn_on(self) -> TextIO | None:
        """Return stdout for a line editor, whose sequences must not be filtered; None unless it is such a terminal."""
        capable = os.environ.get("TERM", "") not in ("dumb", "unknown")
        return cast(TextIO, AsIs(sys.stdout)) if sys.stdin.isatty() and sys.stdout.isatty() and capable else None

    def document(self, value: Any) -> None:
        """Write exactly one JSON document to stdout."""
        text = terminal.json_escaped(json.dumps(value, indent=2, ensure_ascii=False))
        try:
            text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(value, indent=2)
        put(sys.stdout, f"{text}\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Write a line about what happens to stderr, unless the command is quiet."""
        if not self.quiet:
            self._say(terminal.message(text))

    def warning(self, text: str) -> None:
        """Write a warning to stderr."""
        self._say(f"warning: {_quoted(text)}", "yellow")

    def confirm(self, question: str) -> bool:
        """Ask a yes-or-no question on stderr. Only for a stdin that is a terminal."""
        self._say(f"{terminal.line(question)} [y/N] ", end="")
        try:
            return sys.stdin.readline().strip().lower() in ("y", "yes")
        except UnicodeDecodeError:
            return False

    def error(self, error: GemmaAwqError) -> None:
        """Write an error and its hint to stderr."""
        self._labelled("error: ", "bold red", error.message)
        if error.hint:
            self._labelled("hint: ", "bold cyan", error.hint)

    def traceback(self, error: BaseException) -> None:
        """Write the traceback of an error to stderr, and before it those of the errors that caused it."""
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        for one in reversed(chain):
            self._say(terminal.message("".join(format_exception(one, chain=False))))

    def usage(self, text: str) -> None:
        """Write the usage line or the help to stderr, where the command line was wrong."""
        self._say(terminal.shortened(terminal.message(text)).rstrip("\n"))

    def table(self, title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str] = ()) -> None:
        """Write a small table to stderr: names in the first column, figures in the others."""
        if not self.quiet:
            _print_table(self.console, title, rows, header)

    def result_table(
        self, title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str], words: Sequence[int] = (0,)
    ) -> None:
        """Write a table that is the result to stdout. words: the columns that hold text; the others hold figures."""
        _print_table(_console(sys.stdout), title, rows, header, words)
        sys.stdout.flush()

    def result_facts(self, sections: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> None:
        """Write sections of labels and values that are the result to stdout: wrapped for a terminal, else on one line.

        A value is as long as a message may be, whatever it quotes.
        """
        console = _console(sys.stdout)
        seen = sys.stdout.isatty()
        for index, (title, rows) in enumerate(sections):
            if index:
                console.print()
            if title:
                console.print(_text(title, "bold"), soft_wrap=True)
            _print_facts(console, rows, wrap=seen)
        sys.stdout.flush()

    def violation(self, text: str) -> None:
        """Write a line about a limit that was not met to stderr."""
        self._say(f"not met: {_quoted(text)}", "bold red")

    def _say(self, text: str, style: str = "", end: str = "\n") -> None:
        from rich.text import Text

        self.console.print(Text(text, style), end=end, soft_wrap=True)

    def _labelled(self, label: str, style: str, text: str) -> None:
        from rich.text import Text

        self.console.print(Text.assemble((label, style), _quoted(text)), soft_wrap=True)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator["Progress"]:
        """Show a progress bar below the lines that are printed meanwhile; outside a terminal, show nothing."""
        if self.quiet or not self.console.is_interactive:
            yield Progress(None, None)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns: tuple[Any, ...] = (TextColumn("{task.description}", markup=False), MofNCompleteColumn())
        if self.console.width >= NARROW:
            left = TextColumn("left", markup=False)
            columns = (columns[0], BarColumn(), columns[1], TimeElapsedColumn(), left, TimeRemainingColumn())
        # rich would pass on what libraries print meanwhile, escape sequences included
        with Bar(
            *columns, console=self.console, transient=True, speed_estimate_period=600, redirect_stdout=False,
            redirect_stderr=False,
        ) as bar:  # fmt: skip
            yield Progress(bar, bar.add_task(terminal.line(description), total=total))


def _console(stream: Any) -> Any:
    """Return rich's console on a standard stream. Give it `Text` only, so that no name is read as markup."""
    from rich.console import Console

    seen = stream.isatty()
    console = Console(
        file=cast(TextIO, AsIs(stream)), highlight=False, markup=False, emoji=False,
        force_terminal=None if seen else False, width=None if seen else WIDE,
    )  # fmt: skip
    if seen and console.is_dumb_terminal:  # for which rich assumes 80 columns
        with suppress(OSError, ValueError):
            size = os.get_terminal_size(stream.fileno())
            if size.columns:  # 0 in some pseudo-terminals
                console.size = size
    return console


def _quoted(text: str) -> str:
    """Return text to follow a label: of bounded length, with further lines indented so that none looks like a label."""
    return terminal.shortened(terminal.message(text)).rstrip("\n").replace("\n", "\n  ")


def _text(text: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(terminal.shortened(terminal.line(text)), style)


def _print_facts(console: Any, rows: Sequence[tuple[str, str]], wrap: bool) -> None:
    """Print labels and values in two columns; further lines of a value begin below it."""
    from rich.table import Table

    width = max(len(label) for label, _ in rows)
    if not wrap:
        for label, value in rows:
            console.print(_text(f"{label:<{width}}  {value}"), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=min(width, console.width // 2), overflow="fold", style="cyan")
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(_text(label), _text(value))
    console.print(table)


def _print_table(
    console: Any, title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str], words: Sequence[int] = (0,)
) -> None:
    """Print a table, or one line per figure if the table is wider than the terminal."""
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    def shown(cell: str) -> Text:
        return Text(terminal.line(cell))

    table = Table(
        title=shown(title), title_justify="left", title_style="bold", box=box.SIMPLE, show_header=bool(header)
    )
    columns = header or ("",) * len(rows[0])
    for index, name in enumerate(columns):
        table.add_column(shown(name), justify="left" if index in words else "right")
    for row in rows:
        table.add_row(*map(shown, row))
    if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
        console.print(table)
        return
    if title:
        console.print(Text(terminal.line(title), "bold"), soft_wrap=True)
    for name, *cells in rows:
        named = [(label, cell) for label, cell in zip(columns[1:], cells, strict=True) if cell]
        one = len(named) == 1 and not named[0][0]
        console.print(shown(f"{name}: {named[0][1]}" if one else name), soft_wrap=True)
        for label, cell in [] if one else named:
            console.print(shown(f"  {label}: {cell}" if label else f"  {cell}"), soft_wrap=True)


class Progress:
    """The progress of a command, with or without a bar on the screen."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def step(self) -> None:
        """Count one more step as done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def go_to(self, done: int) -> None:
        """Set the number of steps that are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def set(self, done: int, total: int) -> None:
        """Set both the number of steps that are done and how many there are."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def begin_at(self, done: int, total: int) -> None:
        """Start at `done` of `total` steps. Steps done before do not count in the estimate of the time that is left."""
        if self._bar is not None:
            self._bar.reset(self._task, total=total, completed=done)
            self._bar.advance(self._task, 0)  # times steps that arrive many at once from here, not from each other


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars, notes and warnings off the screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def human_seconds(seconds: float) -> str:
    """Return a duration: 83.4 -> `1 min 23 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
