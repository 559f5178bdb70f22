"""The line editor of a chat: editing, history, completion and pasting. Nothing else touches prompt_toolkit."""

from collections.abc import Iterable, Mapping
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import History
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output import Output as Screen
from prompt_toolkit.output import create_output

from gemma_awq_cli.cli import terminal
from gemma_awq_cli.cli.chat_history import ChatHistory
from gemma_awq_cli.cli.typed_message import FENCE, MORE, is_open, without_fence
from gemma_awq_cli.system import interruption


class LineEditor:
    """Reads messages from a terminal.

    commands: their names, and the name of the argument of each, which is completed as a path if it is FILE. history: of
    earlier chats too, or None to remember this chat only. screen: the terminal. keys: in place of its keyboard.
    """

    def __init__(
        self,
        commands: Mapping[str, str],
        history: ChatHistory | None,
        screen: TextIO | Screen,
        keys: Input | None = None,
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation=MORE,
            key_bindings=_key_bindings(),
            completer=CommandCompleter(commands),
            complete_while_typing=Condition(self._is_command),
            reserve_space_for_menu=len(commands) // 2,
            history=_History(history),
            input_processors=[TabsProcessor()],
            enable_suspend=True,
            input=keys,
            output=screen if isinstance(screen, Screen) else create_output(screen),
        )

    def read(self, prompt: str) -> str:
        """Return one message, of one line or several.

        Ctrl-C drops what was typed; if that is nothing, KeyboardInterrupt is raised. Raises EOFError for Ctrl-D.
        """
        while True:
            try:
                with interruption.handed_to(self._end):
                    text = self._session.prompt(terminal.line(prompt))
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    raise
            else:
                return without_fence(text)

    def _end(self, error: BaseException) -> bool:
        """End `prompt` with a signal's exception, the terminal restored; return whether it is running."""
        app = self._session.app
        if app.loop is None or app.future is None or app.future.done():
            return False
        # the signal came between two instructions of the loop's own thread, but must also wake it
        app.loop.call_soon_threadsafe(lambda: app.exit(exception=error) if app.is_running else None)
        return True

    def _is_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")


def _key_bindings() -> KeyBindings:
    """Enter sends what is complete, Alt-Enter begins a line. What is pasted does neither."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not is_open(buffer.text):
            buffer.validate_and_handle()
            return
        buffer.cursor_position = len(buffer.text)
        if not buffer.text.lstrip().startswith(FENCE):
            buffer.delete_before_cursor()  # the backslash
        buffer.insert_text("\n")

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class CommandCompleter(Completer):
    """Completes the commands, and the file names after those that take one."""

    def __init__(self, commands: Mapping[str, str]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """See `Completer`."""
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if space:
            if self._commands.get(name) == "FILE":
                yield from self._paths.get_completions(Document(rest), complete_event)
            return
        for command, argument in self._commands.items():
            if command.startswith(name):
                yield Completion(f"{command} " if argument else command, -len(name), f"{command} {argument}")


class _History(History):
    """What the editor goes through with the arrow keys."""

    def __init__(self, kept: ChatHistory | None) -> None:
        super().__init__()
        self._kept = kept

    def load_history_strings(self) -> Iterable[str]:
        """Yield the messages of earlier chats, the newest first."""
        return reversed(self._kept.load()) if self._kept is not None else ()

    def store_string(self, string: str) -> None:
        """Keep a message for later chats."""
        if self._kept is not None:
            self._kept.add(string)
