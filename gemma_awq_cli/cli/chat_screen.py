"""`gemma-awq run` on a terminal without a prompt: a chat on the screen."""

import contextlib
from pathlib import Path

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.cli.thinking import Thinking
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.chat import Chat, MessageTooLongError
from gemma_awq_cli.models.text.prompter import PromptError

PROMPT, MORE = ">>> ", "... "
FENCE = '"""'
HELP = '''/reset         forget the conversation
/system TEXT   begin a new conversation with this system message; without TEXT, show the present one
/save FILE     write the conversation to FILE as JSON lines
/help          show this list
/exit          end the chat (or Ctrl-D)
For several lines, end each with \\, or put """ before the first and after the last.
Ctrl-C stops the answer; at an empty prompt it ends the chat. Put a space before a message that begins with /.'''


def talk(out: Output, chat: Chat, name: str) -> None:
    """Read messages and answer them until the user leaves. name: the model, as the user gave it."""
    with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    out.note(f"Chat with {Path(name).name}. /help lists the commands, Ctrl-D ends.")
    if not chat.answers:
        why = "--raw turns the chat template off" if chat.has_template else "this is a base model"
        out.note(f"It completes rather than answers ({why}): each prompt is continued by itself.")
    while True:
        try:
            message = read_message(out)
        except EOFError:
            out.note("")
            return
        except KeyboardInterrupt:
            out.note("")
            raise typer.Exit(130) from None
        if message.split(maxsplit=1)[:1] == ["/exit"]:
            return
        try:
            _respond(out, chat, message)
        except KeyboardInterrupt:  # before anything was generated
            out.note("\n(stopped)")


def _respond(out: Output, chat: Chat, message: str) -> None:
    """Carry out a command, or answer a message."""
    try:
        if message.startswith("/"):
            _command(out, chat, message)
        elif message.strip():
            _answer(out, chat, message)
    except (MessageTooLongError, PromptError, UsageError) as error:  # the conversation continues without the message
        out.error(error)


def _answer(out: Output, chat: Chat, message: str) -> None:
    view = Thinking(out)
    answer = chat.ask(message, view.answer, view.thought)
    view.end()
    completion = answer.completion
    out.result("")
    if answer.dropped:
        out.note(f"(The context is full; the oldest {answer.dropped} messages were dropped.)")
    unanswered = (
        "" if completion.text.strip() or not completion.thinking else " while thinking; the message is forgotten"
    )
    if completion.finish == "interrupted":
        out.note(f"(stopped{unanswered})")
    elif completion.finish == "length":
        out.note(f"(cut at {len(completion.tokens)} tokens{unanswered}; --max-new-tokens sets the limit)")


def _command(out: Output, chat: Chat, message: str) -> None:
    word, _, rest = message.partition(" ")
    rest = rest.strip()
    if word == "/help":
        out.note(HELP)
    elif word == "/reset":
        chat.start(chat.system)
        out.note("The conversation is forgotten" + ("; the system message stays." if chat.system else "."))
    elif word == "/system" and rest:
        chat.start(rest)
        out.note("A new conversation with this system message.")
    elif word == "/system":
        out.note(f"System message: {chat.system}" if chat.system else "There is no system message.")
    elif word == "/save" and rest:
        try:
            chat.save(Path(rest))
        except GemmaAwqError as error:
            out.error(error)
        else:
            out.note(f"{len(chat.messages)} messages -> {rest}")
    elif word == "/save":
        out.error(UsageError("/save needs a file name.", "For example: /save chat.jsonl"))
    else:
        out.error(
            UsageError(
                f"Unknown command: {word}.", "/help lists them. Put a space before a message that begins with /."
            )
        )


def read_message(out: Output) -> str:
    """Return one message, of one line or several. Ctrl-C drops the typed text; if there is none, it is passed on."""
    while True:
        lines: list[str] = []
        try:
            line = _line(out, PROMPT)
            if line.lstrip().startswith(FENCE):
                line = line.lstrip().removeprefix(FENCE)
                # a line that opens and closes a fence of its own, as a docstring does, belongs to the message
                while not line.rstrip().endswith(FENCE) or line.count(FENCE) % 2 == 0:
                    lines.append(line)
                    line = _line(out, MORE)
                lines.append(line.rstrip().removesuffix(FENCE))
                return "\n".join(lines).strip("\n")
            while line.endswith("\\"):
                lines.append(line.removesuffix("\\"))
                line = _line(out, MORE)
            return "\n".join([*lines, line])
        except KeyboardInterrupt:
            if not lines and not _typed():
                raise
            out.note("")


def _line(out: Output, prompt: str) -> str:
    while True:
        try:
            line = out.ask(prompt)
            line.encode("utf-8")
        except UnicodeError:
            out.error(UsageError("That line is not UTF-8.", "Check the terminal's encoding."))
        else:
            return line


def _typed() -> bool:
    """Return whether the interrupted line had text in it, as far as the line editor knows."""
    try:
        import readline
    except ImportError:
        return False
    return bool(readline.get_line_buffer())
