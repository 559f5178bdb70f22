"""Text to token ids as Gemma was trained on them: exactly one BOS at the start, and the model's chat template.

The ids fit the model: none of them is beyond its embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text import tool_calls
from gemma_awq_cli.models.text.template_worker import PromptError, TemplateWorker
from gemma_awq_cli.models.text.tokenizer import COPY, load_tokenizer
from gemma_awq_cli.system.background import begin

__all__ = ["Message", "PromptError", "Prompter", "begin_loading", "located"]

Message = dict[
    str, Any
]  # role and content, both texts; with tools also tool_calls and tool_call_id, as in OpenAI's API
Tool = Mapping[str, Any]  # as in OpenAI's API: {"type": "function", "function": {"name", "description", "parameters"}}
THINKING = "enable_thinking"  # the variable of a chat template that turns thinking on or off


class Prompter:
    """A model folder's tokenizer and chat template.

    can_think: whether the template turns thinking on and off. tool_format: how the model calls tools.

    A text or a conversation that the model cannot be given raises `PromptError`; the next one may be fine.
    """

    def __init__(self, folder: Path, one_text: bool = False) -> None:
        """Open a folder's. one_text: whether it will be asked for the ids of a single text: it is ready sooner then."""
        self.folder = folder
        self.tokenizer = load_tokenizer(folder, one_text)
        bos = self.tokenizer.special_id("bos_token")
        if bos is None:
            raise GemmaAwqError(f"The tokenizer of {folder} has no BOS token, which every Gemma needs.", COPY)
        self.bos = bos
        template = self.tokenizer.chat_template
        self._templates = TemplateWorker(template, self.tokenizer.special) if template else None
        self.can_think = template is not None and THINKING in template.text
        self.tool_format = tool_calls.format_of(template.text if template else "")

    @cached_property
    def vocabulary(self) -> int | None:
        """How many tokens have an embedding; None for a folder without weights. A BOS beyond it is an error."""
        if next(self.folder.glob("*.safetensors"), None) is None:
            return None
        from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint

        vocabulary = Checkpoint(self.folder).vocabulary
        self._require_bos(vocabulary)
        return vocabulary

    def fit_to(self, vocabulary: int) -> None:
        """Set the `vocabulary` of a checkpoint that is open already, so that it need not be read again."""
        self._require_bos(vocabulary)
        self.vocabulary = vocabulary

    def _require_bos(self, vocabulary: int) -> None:
        if self.bos >= vocabulary:
            raise GemmaAwqError(
                f"The tokenizer of {self.folder} belongs to another model: its BOS token "
                f"{self.tokenizer.special['bos_token']!r} has the id {self.bos}, but this model has embeddings of "
                f"{vocabulary} tokens.",
                COPY,
            )

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template, that is, whether it answers rather than completes."""
        return self._templates is not None

    def prepare(self) -> None:
        """Start the process that renders the chat template, and do not wait for it."""
        if self._templates is not None:
            self._templates.start()

    def ids(self, text: str) -> list[int]:
        """Return the token ids of plain text, without BOS."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError("The text contains half of a surrogate pair.", "Write it in UTF-8.") from None
        ids = self.tokenizer.encode(text)
        if self.vocabulary is not None and ids and (largest := max(ids)) >= self.vocabulary:
            raise self._beyond(largest, self.vocabulary)
        return ids

    def _beyond(self, index: int, vocabulary: int) -> GemmaAwqError:
        token = f"the token {self.tokenizer.token_of(index)!r} with the id {index}"
        why = f"this model has embeddings of {vocabulary} tokens"
        if self.tokenizer.is_added(index):
            hint = "Leave it out of the text. If the chat template writes it, copy the original model's template."
            return PromptError(f"The text contains {token}, but {why}.", hint)
        return GemmaAwqError(
            f"The tokenizer of {self.folder} belongs to another model: it gives {token}, but {why}.", COPY
        )

    def prompt_ids(self, text: str) -> list[int]:
        """Return BOS and the token ids of `text`. A BOS that the text spells out already is not doubled."""
        ids = self.ids(text)
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def chat(
        self, messages: Sequence[Message], answer_next: bool, think: bool | None = None, tools: Sequence[Tool] = ()
    ) -> str:
        """Return the text that the chat template renders, up to where the next answer begins if `answer_next`.

        think: whether the model is to think before it answers; None for the template's own default. tools: that it may
        call.
        """
        assert self._templates is not None, "messages need a model with a chat template"
        switches = {} if think is None else {THINKING: think}
        called = tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if called and self.tool_format.prompted:
            messages, tools = tool_calls.prompted(messages, tools), ()
        elif self.tool_format.named_results:
            messages = tool_calls.with_named_results(messages)
        try:
            return self._templates.render(messages, answer_next, switches, tools)
        except PromptError:
            if [message["role"] for message in messages[:2]] != ["system", "user"]:
                raise
            # Gemma 1 and 2 have no system role: its text goes before the first user message
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return self._templates.render([first, *messages[2:]], answer_next, switches, tools)


@contextmanager
def located(place: object) -> Iterator[None]:
    """Put the place in front of a `PromptError` that is raised inside: `prompts.jsonl, line 7: The text ...`."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"{place}: {error.message}", error.hint) from error


def begin_loading(folder: Path, one_text: bool = False) -> Future[Prompter]:
    """Load a folder's `Prompter` on a thread of its own, while the caller imports or reads something else."""

    def load() -> Prompter:
        prompter = Prompter(folder, one_text)
        with suppress(GemmaAwqError):  # raised again when the template is needed
            prompter.prepare()
        return prompter

    return begin(load)
