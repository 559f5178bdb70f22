"""A conversation with one model, as messages and as the very tokens that the model read and wrote.

The tokens of a turn are those of all turns before, followed by what the template puts after an answer. So an engine
that still has the earlier tokens in its cache reads only the new ones. A base model has no turns: each prompt is
completed by itself.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.chat_file import read_chat, write_chat
from gemma_awq_cli.generate.conversation import as_tool_call
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions, require_room
from gemma_awq_cli.generate.prompting import require_switch
from gemma_awq_cli.models.text.prompter import Message, Tool

KEPT_STATES = 32  # earlier turns whose very tokens are kept for `undo`; turns before them are read as text


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


@dataclass(frozen=True)
class _State:
    """A conversation at one time. transcript: None if its text must be turned into tokens again."""

    messages: tuple[Message, ...] = ()
    transcript: _Transcript | None = None


OnText = Callable[[str], None]


class Chat:
    """A conversation that grows with each question and answer.

    engine: best one that keeps its cache between turns. options: of each answer. system: the system message, or None.
    raw: leave out the chat template, so that each message is completed by itself. think: whether the model is to think
    before it answers; None for its template's default. Thoughts are no part of the conversation. tools: that the model
    may call.

    answers: whether the model answers rather than completes. has_template: whether it has a chat template.
    """

    def __init__(
        self,
        engine: Engine,
        options: GenerationOptions,
        system: str | None,
        raw: bool,
        think: bool | None = None,
        tools: Sequence[Tool] = (),
    ) -> None:
        require_switch(engine.prompter, raw, think)
        self.has_template = engine.prompter.is_chat
        self.answers = self.has_template and not raw
        self.system: str | None = None
        self._engine = engine
        self._options = replace(options, tools=engine.prompter.tool_format) if tools else options
        self._think = think
        self._tools = tuple(tools)
        self._state = _State()
        self._earlier: deque[_State] = deque(maxlen=KEPT_STATES)  # before each of the last messages
        self._turns = 0
        if tools and not self.answers:
            raise UsageError("--tools needs a model with a chat template, and no --raw.")
        if system:
            self.start(system)

    @property
    def messages(self) -> list[Message]:
        """The conversation without the system message."""
        return list(self._state.messages)

    @property
    def is_greedy(self) -> bool:
        """Whether an answer that is generated again is the same."""
        return self._options.sampling.greedy

    @property
    def waiting_calls(self) -> list[str]:
        """The names of the tools that the last answer called and whose results come next."""
        last = self._state.messages[-1] if self._state.messages else {}
        return [call["function"]["name"] for call in last.get("tool_calls", ())]

    def start(self, system: str | None) -> None:
        """Begin a new conversation with this system message; the old one is forgotten."""
        if system and not self.answers:
            raise UsageError("A system message needs a model with a chat template, and no --raw.")
        self.system = system
        self._state = _State()
        self._earlier.clear()

    def ask(self, text: str, on_text: OnText, on_thought: OnText = lambda piece: None) -> Answer:
        """Send the message `text` and return the answer, which Ctrl-C ends early.

        on_text, on_thought: called with each piece of the answer and of the thoughts before it. If the answer ended
        before its first word, the conversation stays as it was. Drops the oldest turns if the context is too small.
        Raises MessageTooLongError or PromptError if the model cannot be given the message; the conversation stays as it
        was.
        """
        return self._send(self._state, [{"role": "user", "content": text}], on_text, on_thought)

    def give_results(self, results: Sequence[str], on_text: OnText, on_thought: OnText = lambda piece: None) -> Answer:
        """Send the results of the `waiting_calls`, in their order, and return the answer, as `ask` does."""
        calls = self._state.messages[-1]["tool_calls"]
        given = [
            {"role": "tool", "content": result, "tool_call_id": call["id"], "name": call["function"]["name"]}
            for call, result in zip(calls, results, strict=True)
        ]
        return self._send(self._state, given, on_text, on_thought)

    def regenerate(self, on_text: OnText, on_thought: OnText = lambda piece: None) -> Answer:
        """Answer the last message once more, with other random numbers; the new answer takes the old one's place.

        Raises UsageError if there is no answer. The old one stays if the new one ends before its first word.
        """
        before, asked = self._before()
        kept, earlier = self._state, deque(self._earlier, KEPT_STATES)
        if self._earlier:
            self._earlier.pop()
        try:
            answer = self._send(before, asked, on_text, on_thought)
        except BaseException:
            self._state, self._earlier = kept, earlier
            raise
        if self._state is before:
            self._state, self._earlier = kept, earlier
        return answer

    def undo(self) -> str:
        """Take back the last message and its answer; return the message. Raises UsageError if there is none."""
        before, asked = self._before()
        if self._earlier:
            self._earlier.pop()
        self._state = before
        return str(asked[-1]["content"])

    def _before(self) -> tuple[_State, list[Message]]:
        """The conversation before the last message, or results of tools, was sent; and what was sent."""
        messages = self._state.messages
        if not messages:
            raise UsageError("There is no answer yet.", "Send a message first.")
        sent = len(messages) - 1
        while sent and messages[sent - 1]["role"] != "assistant":
            sent -= 1
        before = self._earlier[-1] if self._earlier else _State(messages[:sent])
        return before, list(messages[sent:-1])

    def load(self, path: Path) -> None:
        """Continue a conversation that `save` wrote, with its system message, in place of this one.

        Raises GemmaAwqError or PromptError if it cannot be read or the model cannot be given it; this conversation then
        stays.
        """
        if not self.answers:
            raise UsageError("A saved chat needs a model with a chat template, and no --raw.")
        system, messages = read_chat(path)
        prompter = self._engine.prompter
        prompter.ids(prompter.chat(self._with_system(system, messages), answer_next=False, tools=self._tools))
        self.start(system)
        self._state = _State(tuple(messages))

    def _send(self, before: _State, sent: Sequence[Message], on_text: OnText, on_thought: OnText) -> Answer:
        """Send messages that come after the state `before`, and make the answer the chat's state."""
        self._state = before
        messages, rendered, ids = self._prompt([*before.messages, *sent], before.transcript)
        # every turn draws its own random numbers
        completion = self._engine.complete(
            [ids],
            self._options,
            lambda _, piece: on_text(piece),
            numbers=[self._turns],
            on_thought=lambda _, piece: on_thought(piece),
        )[0]
        content = completion.text.strip()
        if completion.tokens:
            self._turns += 1
        if not content and not completion.calls and completion.finish != "stop":
            return Answer(completion, dropped=0)  # ended before the answer: as if nothing had been asked
        answer: dict[str, Any] = {"role": "assistant", "content": content}
        if completion.calls:
            answer["tool_calls"] = [as_tool_call(number, call) for number, call in enumerate(completion.calls)]
            transcript = None  # the template writes calls in its own way
        else:
            transcript = self._transcript_of(rendered + content, ids, completion, content)
        self._earlier.append(before)
        self._state = _State((*messages, answer), transcript)
        return Answer(completion, len(before.messages) + len(sent) - len(messages))

    def _with_system(self, system: str | None, messages: Sequence[Message]) -> list[Message]:
        return [*([{"role": "system", "content": system}] if system else []), *messages]

    def _prompt(self, messages: list[Message], transcript: _Transcript | None) -> tuple[list[Message], str, list[int]]:
        """Return the messages that fit the context with an answer, and the next prompt as text and as token ids."""
        prompter, context = self._engine.prompter, self._engine.context
        if not self.answers:
            text = messages[-1]["content"]
            ids = prompter.prompt_ids(text)
            self._require_room(ids)
            return messages, text, ids
        room = min(self._options.max_new_tokens, context // 4)
        while True:
            given = self._with_system(self.system, messages)
            text = prompter.chat(given, answer_next=True, think=self._think, tools=self._tools)
            if transcript is not None and text.startswith(transcript.text):
                ids = [*transcript.ids, *prompter.ids(text.removeprefix(transcript.text))]
            else:
                ids = prompter.prompt_ids(text)
            later = [place for place, message in enumerate(messages) if message["role"] == "user"][1:]
            if len(ids) + room <= context or not later:
                self._require_room(ids)
                return messages, text, ids
            messages, transcript = messages[later[0] :], None  # without the oldest question and what followed it

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
        write_chat(path, self._with_system(self.system, self._state.messages), self.answers)
