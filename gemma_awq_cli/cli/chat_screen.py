"""`gemma-awq run` on a terminal without a prompt: the screen of a chat."""

import contextlib
from pathlib import Path

import typer

from gemma_awq_cli.cli.console import Output
from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.chat import Chat, MessageTooLongError
from gemma_awq_cli.generate.generation import Engine, GenerationOptions
from gemma_awq_cli.models.text.prompter import PromptError

PROMPT, MORE = ">>> ", "... "
FENCE = '"""'
HELP = '''/reset         forget the conversation
/system TEXT   begin a new conversation with this system message; without TEXT: show it
/save FILE     write the conversation as JSON lines
/help          this list
/exit          end the chat (or Ctrl-D)
Several lines: end a line with \\, or put """ before the first and after the last.
Ctrl-C stops the answer; at an empty prompt it ends the chat. A message that begins with /: put a space before it.'''


def talk(out: Output, engine: Engine, settings: GenerationOptions, name: str, system: str | None, raw: bool) -> None:
    """Read messages and answer them until the user leaves."""
    with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    chat = Chat(engine, settings, system, raw)
    out.note(f"Chat with {Path(name).name}. /help lists the commands, Ctrl-D ends.")
    if not chat.answers:
        why = "--raw switches the chat template off" if engine.prompter.is_chat else "this is a base model"
        out.note(f"It completes rather than answers ({why}): each prompt is continued by itself.")
    while True:
        try:
            said = read_message(out)
        except EOFError:
            out.note("")
            return
        except KeyboardInterrupt:
            out.note("")
            raise typer.Exit(130) from None
        if said.split(maxsplit=1)[:1] == ["/exit"]:
            return
        try:
            _do(out, chat, said)
        except KeyboardInterrupt:  # while nothing was generated yet
            out.note("\n(stopped)")


def _do(out: Output, chat: Chat, said: str) -> None:
    """Carry out a command, or answer."""
    try:
        if said.startswith("/"):
            _command(out, chat, said)
        elif said.strip():
            _answer(out, chat, said)
    except (MessageTooLongError, PromptError, UsageError) as error:  # the conversation goes on without it
        out.error(error)


def _answer(out: Output, chat: Chat, said: str) -> None:
    answer = chat.ask(said, out.piece)
    completion = answer.completion
    out.result("")
    if answer.forgotten:
        out.note(f"(the context is full: the oldest {answer.forgotten} messages were forgotten)")
    if completion.finish == "interrupted":
        out.note("(stopped)")
    elif completion.finish == "length":
        out.note(f"(cut at {len(completion.tokens)} tokens; --max-new-tokens sets the limit)")


def _command(out: Output, chat: Chat, said: str) -> None:
    word, _, rest = said.partition(" ")
    rest = rest.strip()
    if word == "/help":
        out.note(HELP)
    elif word == "/reset":
        chat.start(chat.system)
        out.note("The conversation is forgotten" + (", the system message is kept." if chat.system else "."))
    elif word == "/system" and rest:
        chat.start(rest)
        out.note("A new conversation, with this system message.")
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
        out.error(UsageError(f"There is no command {word}.", "/help lists them; a message may begin with a space."))


def read_message(out: Output) -> str:
    """One message, of one line or several. Ctrl-C drops what was typed, and is passed on if nothing was."""
    while True:
        lines: list[str] = []
        try:
            line = _line(out, PROMPT)
            if line.lstrip().startswith(FENCE):
                line = line.lstrip().removeprefix(FENCE)
                # a line that opens and closes a fence of its own, as a docstring does, is a part of the message
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
    """Whether the line that was interrupted had text in it, where the line editor tells."""
    try:
        import readline
    except ImportError:
        return False
    return bool(readline.get_line_buffer())
