"""A conversation with one model: who said what, as messages and as the very tokens that the model read and wrote.

The next turn's tokens are those of all turns before, followed by what the template puts after an answer; so an engine
that still has the earlier tokens in its cache reads only the new ones. A base model has no turns: each prompt is
completed by itself.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions, require_room
from gemma_awq_cli.models.text.prompter import Message
from gemma_awq_cli.system.saving import local_path, write_errors, write_new


class MessageTooLongError(GemmaAwqError):
    """One message alone fills the context; the conversation goes on without it."""


@dataclass(frozen=True)
class Answer:
    """An answer, and how many of the oldest messages were forgotten so that it fits."""

    completion: Completion
    forgotten: int


@dataclass(frozen=True)
class _Shown:
    """What the model has seen: the text as the template renders it, and its tokens."""

    text: str
    ids: list[int]


class Chat:
    """system: the system message, if there is one; answers: whether the model answers rather than completes."""

    def __init__(self, engine: Engine, settings: GenerationOptions, system: str | None, raw: bool) -> None:
        self.answers = engine.prompter.is_chat and not raw
        self.system: str | None = None
        self.messages: list[Message] = []
        self._engine = engine
        self._settings = settings
        self._shown: _Shown | None = None
        self._turns = 0
        if system:
            self.start(system)

    def start(self, system: str | None) -> None:
        """Forget the conversation and begin another, with this system message."""
        if system and not self.answers:
            raise UsageError("A system message needs a model with a chat template, used without --raw.")
        self.system = system
        self.messages = []
        self._shown = None

    def ask(self, text: str, on_text: Callable[[str], None]) -> Answer:
        """Say `text` and hear the answer, which an interruption ends early. Forgets the oldest turns if need be."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            rendered, ids, forgotten = self._next()
            # every turn draws its own random numbers
            completion = self._engine.complete(
                [ids], self._settings, lambda _, piece: on_text(piece), numbers=[self._turns]
            )[0]
        except BaseException:
            self.messages = before
            raise
        if not completion.tokens:  # interrupted before the first token: as if nothing had been said
            self.messages = before
            return Answer(completion, forgotten=0)
        self._turns += 1
        content = completion.text.strip()
        self.messages.append({"role": "assistant", "content": content})
        self._shown = self._seen(rendered + content, ids, completion, content)
        return Answer(completion, forgotten)

    def _next(self) -> tuple[str, list[int], int]:
        """What the model is to continue, as text and tokens, with room for an answer; how much was forgotten."""
        prompter, context = self._engine.prompter, self._engine.context
        if not self.answers:
            text = self.messages[-1]["content"]
            ids = prompter.prompt_ids(text)
            self._require_room(ids)
            return text, ids, 0
        room = min(self._settings.max_new_tokens, context // 4)
        forgotten = 0
        while True:
            system = [{"role": "system", "content": self.system}] if self.system else []
            text = prompter.chat([*system, *self.messages], answer_next=True)
            if self._shown is not None and text.startswith(self._shown.text):
                ids = [*self._shown.ids, *prompter.ids(text.removeprefix(self._shown.text))]
            else:
                ids = prompter.prompt_ids(text)
            if len(ids) + room <= context or len(self.messages) == 1:
                self._require_room(ids)
                return text, ids, forgotten
            self.messages = self.messages[2:]  # the oldest question and its answer
            self._shown = None
            forgotten += 2

    def _require_room(self, ids: list[int]) -> None:
        try:
            require_room(len(ids), self._engine.context, "The message")
        except GemmaAwqError as error:
            raise MessageTooLongError(error.message, error.hint) from None

    def _seen(self, text: str, ids: list[int], completion: Completion, content: str) -> _Shown | None:
        """What the model has seen after an answer; None if its tokens are not that text (a stop text cut it)."""
        decode = self._engine.prompter.tokenizer.decode
        tokens = completion.tokens
        if decode(tokens, skip_special_tokens=True).strip() != content:
            return None
        if decode(tokens[-1:], skip_special_tokens=True) == "":  # the end of the turn, which the template writes too
            tokens = tokens[:-1]
        return _Shown(text, [*ids, *tokens])

    def save(self, path: Path) -> None:
        """Write the conversation as JSON lines in the form that `quantize --calibration` reads. Replaces nothing."""
        if self.answers:
            system = [{"role": "system", "content": self.system}] if self.system else []
            lines: list[object] = [{"messages": [*system, *self.messages]}]
        else:
            pairs = zip(self.messages[::2], self.messages[1::2], strict=True)
            lines = [{"prompt": said["content"], "response": answer["content"]} for said, answer in pairs]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        with write_errors(path, "give another name"):
            try:
                write_new(local_path(path, "give another name"), content)
            except FileExistsError:
                raise GemmaAwqError(f"{path} exists.", "Give another name.") from None
