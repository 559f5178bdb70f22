"""`gemma-awq run` on a terminal without a prompt: a chat on the screen."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import typer

from gemma_awq_cli.cli.chat_history import ChatHistory, history_path
from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.plain_input import PlainInput
from gemma_awq_cli.cli.thinking import Thinking
from gemma_awq_cli.cli.typed_message import SEVERAL_LINES
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.chat import Answer, Chat, OnText

PROMPT = ">>> "
SHOWN = 60  # characters of a message that is taken back
HELP = f"""{SEVERAL_LINES}
Alt-Enter begins a line too, and lines can be pasted. Arrow keys bring earlier messages back; Tab completes commands.
Ctrl-C stops the answer; at an empty prompt it ends the chat. Put a space before a message that begins with /."""


class Input(Protocol):
    """Where messages come from."""

    def read(self, prompt: str) -> str:
        """Return one message. Raises EOFError at the end, and KeyboardInterrupt for Ctrl-C with nothing typed."""
        ...


@dataclass(frozen=True)
class Command:
    """What a message that begins with / does. argument: its name for the help; act: gets it, "" without one."""

    argument: str
    help: str
    act: Callable[[str], None]


def talk(out: Output, chat: Chat, name: str, keep_history: bool) -> None:
    """Read messages and answer them until the user leaves. name: the model, as the user gave it."""
    out.note(f"Chat with {Path(name).name}. /help lists the commands, Ctrl-D ends.")
    if not chat.answers:
        why = "--raw turns the chat template off" if chat.has_template else "this is a base model"
        out.note(f"It completes rather than answers ({why}): each prompt is continued by itself.")
    screen = ChatScreen(out, chat)
    screen.run(_input(out, screen, keep_history))


def _input(out: Output, screen: "ChatScreen", keep_history: bool) -> Input:
    drawn_on = out.drawn_on()
    if drawn_on is None:
        return PlainInput(out)
    from gemma_awq_cli.cli.line_editor import LineEditor

    arguments = {name: command.argument for name, command in screen.commands.items()}
    history = ChatHistory(history_path(), out.warning) if keep_history else None
    return LineEditor(arguments, history, drawn_on)


class ChatScreen:
    """A chat that shows its answers and obeys commands."""

    def __init__(self, out: Output, chat: Chat) -> None:
        self._out = out
        self._chat = chat
        self._results: list[str] = []  # of the calls that the model waits for, as far as they were typed
        self._ended = False
        self.commands = {
            "/regenerate": Command("", "answer the last message once more", self._regenerate),
            "/undo": Command("", "take back the last message and its answer", self._undo),
            "/reset": Command("", "forget the conversation", self._reset),
            "/system": Command(
                "TEXT",
                "begin a new conversation with this system message; without TEXT, show the present one",
                self._system,
            ),
            "/save": Command("FILE", "write the conversation to FILE as JSON lines", self._save),
            "/load": Command("FILE", "continue the conversation that /save wrote to FILE", self._load),
            "/help": Command("", "show this list", self._help),
            "/exit": Command("", "end the chat (or Ctrl-D)", self._exit),
        }

    def run(self, keys: Input) -> None:
        """Read messages and answer them until the user leaves."""
        while not self._ended:
            try:
                message = keys.read(self._prompt())
            except EOFError:
                self._out.note("")
                return
            except KeyboardInterrupt:
                self._out.note("")
                raise typer.Exit(130) from None
            try:
                self.respond(message)
            except KeyboardInterrupt:  # before anything was generated
                self._out.note("\n(stopped)")

    def _prompt(self) -> str:
        waiting = self._chat.waiting_calls
        return f"result of {waiting[len(self._results)]}> " if waiting else PROMPT

    def respond(self, message: str) -> None:
        """Carry out a command, or answer a message. Shows an error, after which the conversation goes on without it."""
        name, _, argument = message.partition(" ")
        try:
            if message.startswith("/"):
                command = self.commands.get(name.strip())
                if command is None:
                    raise UsageError(
                        f"Unknown command: {name}.",
                        "/help lists them. Put a space before a message that begins with /.",
                    )
                command.act(argument.strip())
            elif message.strip():
                self._send(message)
        except GemmaAwqError as error:
            self._out.error(error)

    def _send(self, message: str) -> None:
        waiting = self._chat.waiting_calls
        if not waiting:
            self._show(lambda *on: self._chat.ask(message, *on))
            return
        self._results.append(message)
        if len(self._results) == len(waiting):
            results, self._results = self._results, []
            self._show(lambda *on: self._chat.give_results(results, *on))

    def _show(self, answering: Callable[[OnText, OnText], Answer]) -> None:
        """Show an answer while it is generated."""
        view = Thinking(self._out)
        answer = answering(view.answer, view.thought)
        view.end()
        completion = answer.completion
        if completion.text or not completion.calls:
            self._out.result("")
        for call in completion.call_documents.get("tool_calls", ()):
            self._out.result(json.dumps(call, ensure_ascii=False))
        if answer.dropped:
            self._out.note(f"(The context is full; the oldest {answer.dropped} messages were dropped.)")
        unanswered = (
            "" if completion.text.strip() or not completion.thinking else " while thinking; the message is forgotten"
        )
        if completion.finish == "interrupted":
            self._out.note(f"(stopped{unanswered})")
        elif completion.finish == "length":
            self._out.note(f"(cut at {len(completion.tokens)} tokens{unanswered}; --max-new-tokens sets the limit)")
        if self._chat.waiting_calls:
            self._out.note("(The model calls a tool. Type or paste its result, or /undo the message.)")

    def _regenerate(self, _: str) -> None:
        self._results = []
        if self._chat.is_greedy:
            self._out.note("(At temperature 0 the answer is the same each time.)")
        self._show(self._chat.regenerate)

    def _undo(self, _: str) -> None:
        message = " ".join(self._chat.undo().split())
        self._results = []
        shown = message if len(message) <= SHOWN else f"{message[: SHOWN - 3]}..."
        self._out.note(f"Taken back: {shown}")

    def _reset(self, _: str) -> None:
        self._chat.start(self._chat.system)
        self._results = []
        self._out.note("The conversation is forgotten" + ("; the system message stays." if self._chat.system else "."))

    def _system(self, text: str) -> None:
        if text:
            self._chat.start(text)
            self._results = []
            self._out.note("A new conversation with this system message.")
        else:
            system = self._chat.system
            self._out.note(f"System message: {system}" if system else "There is no system message.")

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs a file name.", "For example: /save chat.jsonl")
        self._chat.save(Path(name))
        self._out.note(f"{len(self._chat.messages)} messages -> {name}")

    def _load(self, name: str) -> None:
        if not name:
            raise UsageError("/load needs a file name.", "For example: /load chat.jsonl")
        self._chat.load(Path(name))
        self._results = []
        system = ", and a system message" if self._chat.system else ""
        self._out.note(f"{len(self._chat.messages)} messages{system} from {name}; the conversation goes on after them.")

    def _help(self, _: str) -> None:
        width = max(len(f"{name} {command.argument}") for name, command in self.commands.items())
        for name, command in self.commands.items():
            self._out.note(f"{f'{name} {command.argument}':{width}}  {command.help}")
        self._out.note(HELP)

    def _exit(self, _: str) -> None:
        self._ended = True
