"""A conversation with one model, as messages and as the very tokens that the model read and wrote.

The tokens of a turn are those of all turns before, followed by what the template puts after an answer. So an engine
that still has the earlier tokens in its cache reads only the new ones. A base model has no turns: each prompt is
completed by itself.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions, require_room
from gemma_awq_cli.generate.prompting import require_switch
from gemma_awq_cli.models.text.prompter import Message
from gemma_awq_cli.system.saving import local_path, write_errors, write_new


class MessageTooLongError(GemmaAwqError):
    """One message alone fills the context. The conversation can continue without it."""


@dataclass(frozen=True)
class Answer:
    """An answer. dropped: how many of the oldest messages were dropped to make room for it."""

    completion: Completion
    dropped: int


@dataclass(frozen=True)
class _Transcript:
    """The conversation so far as the model has it: the text that the template renders, and its token ids."""

    text: str
    ids: list[int]


class Chat:
    """A conversation that grows with each question and answer.

    engine: best one that keeps its cache between turns. options: of each answer. system: the system message, or None.
    raw: leave out the chat template, so that each message is completed by itself. think: whether the model is to think
    before it answers; None for its template's default. Thoughts are no part of the conversation.

    answers: whether the model answers rather than completes. has_template: whether it has a chat template. messages:
    the conversation without the system message.
    """

    def __init__(
        self, engine: Engine, options: GenerationOptions, system: str | None, raw: bool, think: bool | None = None
    ) -> None:
        require_switch(engine.prompter, raw, think)
        self.has_template = engine.prompter.is_chat
        self.answers = self.has_template and not raw
        self.system: str | None = None
        self.messages: list[Message] = []
        self._engine = engine
        self._options = options
        self._think = think
        self._transcript: _Transcript | None = None
        self._turns = 0
        if system:
            self.start(system)

    def start(self, system: str | None) -> None:
        """Begin a new conversation with this system message; the old one is forgotten."""
        if system and not self.answers:
            raise UsageError("A system message needs a model with a chat template, and no --raw.")
        self.system = system
        self.messages = []
        self._transcript = None

    def ask(
        self, text: str, on_text: Callable[[str], None], on_thought: Callable[[str], None] = lambda piece: None
    ) -> Answer:
        """Send the message `text` and return the answer, which Ctrl-C ends early.

        on_text, on_thought: called with each piece of the answer and of the thoughts before it. If the answer ended
        before its first word, the conversation stays as it was. Drops the oldest turns if the context is too small.
        Raises MessageTooLongError or PromptError if the model cannot be given the message; the conversation stays as it
        was.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            rendered, ids, dropped = self._next()
            # every turn draws its own random numbers
            completion = self._engine.complete(
                [ids],
                self._options,
                lambda _, piece: on_text(piece),
                numbers=[self._turns],
                on_thought=lambda _, piece: on_thought(piece),
            )[0]
        except BaseException:
            self.messages = before
            raise
        content = completion.text.strip()
        if completion.tokens:
            self._turns += 1
        if not content and completion.finish != "stop":  # ended before the answer: as if nothing had been asked
            self.messages = before
            return Answer(completion, dropped=0)
        self.messages.append({"role": "assistant", "content": content})
        self._transcript = self._transcript_of(rendered + content, ids, completion, content)
        return Answer(completion, dropped)

    def _next(self) -> tuple[str, list[int], int]:
        """Return the next prompt as text and as token ids, and how many messages were dropped to fit an answer."""
        prompter, context = self._engine.prompter, self._engine.context
        if not self.answers:
            text = self.messages[-1]["content"]
            ids = prompter.prompt_ids(text)
            self._require_room(ids)
            return text, ids, 0
        room = min(self._options.max_new_tokens, context // 4)
        dropped = 0
        while True:
            system = [{"role": "system", "content": self.system}] if self.system else []
            text = prompter.chat([*system, *self.messages], answer_next=True, think=self._think)
            if self._transcript is not None and text.startswith(self._transcript.text):
                ids = [*self._transcript.ids, *prompter.ids(text.removeprefix(self._transcript.text))]
            else:
                ids = prompter.prompt_ids(text)
            if len(ids) + room <= context or len(self.messages) == 1:
                self._require_room(ids)
                return text, ids, dropped
            self.messages = self.messages[2:]  # the oldest question and its answer
            self._transcript = None
            dropped += 2

    def _require_room(self, ids: list[int]) -> None:
        try:
            require_room(len(ids), self._engine.context, "The message")
        except GemmaAwqError as error:
            raise MessageTooLongError(error.message, error.hint) from None

    def _transcript_of(self, text: str, ids: list[int], completion: Completion, content: str) -> _Transcript | None:
        """Return the transcript after an answer; None if its tokens are not its text, because a stop string cut it."""
        decode = self._engine.prompter.tokenizer.decode
        tokens = completion.tokens
        if decode(tokens, skip_special_tokens=True).strip() != content:
            return None
        if decode(tokens[-1:], skip_special_tokens=True) == "":  # the end of the turn, which the template writes too
            tokens = tokens[:-1]
        return _Transcript(text, [*ids, *tokens])

    def save(self, path: Path) -> None:
        """Write the conversation as JSON lines that `quantize --calibration` reads. An existing `path` is an error."""
        if self.answers:
            system = [{"role": "system", "content": self.system}] if self.system else []
            lines: list[object] = [{"messages": [*system, *self.messages]}]
        else:
            pairs = zip(self.messages[::2], self.messages[1::2], strict=True)
            lines = [{"prompt": asked["content"], "response": answer["content"]} for asked, answer in pairs]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        with write_errors(path, "give another name"):
            try:
                write_new(local_path(path, "give another name"), content)
            except FileExistsError:
                raise GemmaAwqError(f"{path} exists.", "Give another name.") from None
