"""Text to token ids the way Gemma was trained on them: always exactly one BOS at the start, the right chat template.

What comes out of here fits the model: no id is beyond its embedding.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.text.template_worker import PromptError, TemplateWorker
from gemma_awq_cli.models.text.tokenizer import COPY, load_tokenizer

__all__ = ["Message", "PromptError", "Prompter", "begin_loading", "located"]

Message = dict[str, str]


class Prompter:
    """A model folder's tokenizer and chat template.

    `PromptError` is what texts and conversations raise that the model cannot be given: others may be given after it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        bos = self.tokenizer.special_id("bos_token")
        if bos is None:
            raise GemmaAwqError(f"The tokenizer of {folder} has no BOS token, which every Gemma needs.", COPY)
        self.bos = bos
        template = self.tokenizer.chat_template
        self._templates = TemplateWorker(template, self.tokenizer.special) if template else None

    @cached_property
    def vocabulary(self) -> int | None:
        """How many tokens the model has embeddings of; None for a folder without weights."""
        if next(self.folder.glob("*.safetensors"), None) is None:
            return None
        from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint

        vocabulary = Checkpoint(self.folder).vocabulary
        if self.bos >= vocabulary:
            raise GemmaAwqError(
                f"The tokenizer of {self.folder} is another model's: its BOS token "
                f"{self.tokenizer.special['bos_token']!r} has the id {self.bos}, and this model has embeddings of "
                f"{vocabulary} tokens.",
                COPY,
            )
        return vocabulary

    @property
    def is_chat(self) -> bool:
        """Whether the model comes with a chat template, that is, whether it answers rather than completes."""
        return self._templates is not None

    def prepare(self) -> None:
        """Begin what the first conversation will wait for."""
        if self._templates is not None:
            self._templates.start()

    def ids(self, text: str) -> list[int]:
        """Token ids of plain text, without BOS."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError("The text holds half of a surrogate pair.", "Write it in UTF-8.") from None
        ids = self.tokenizer.encode(text)
        if self.vocabulary is not None and ids and (largest := max(ids)) >= self.vocabulary:
            raise self._beyond(largest, self.vocabulary)
        return ids

    def _beyond(self, index: int, vocabulary: int) -> GemmaAwqError:
        token = f"the token {self.tokenizer.token_of(index)!r} with the id {index}"
        why = f"this model has embeddings of {vocabulary} tokens"
        if self.tokenizer.is_added(index):
            hint = "Leave it out of the text. If the chat template writes it, take the original model's template."
            return PromptError(f"The text holds {token}, and {why}.", hint)
        return GemmaAwqError(f"The tokenizer of {self.folder} is another model's: it gives {token}, and {why}.", COPY)

    def prompt_ids(self, text: str) -> list[int]:
        """BOS and the ids of `text`. A BOS that the text spells out already is not doubled."""
        ids = self.ids(text)
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def chat(self, messages: Sequence[Message], answer_next: bool) -> str:
        """Messages through the model's template, up to where the model's answer begins if `answer_next`."""
        assert self._templates is not None, "only a model with a chat template is given messages"
        try:
            return self._templates.render(messages, answer_next)
        except PromptError:
            if [message["role"] for message in messages[:2]] != ["system", "user"]:
                raise
            # Gemma 1 and 2 know no system role: what it says goes before the first user message.
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return self._templates.render([first, *messages[2:]], answer_next)


@contextmanager
def located(place: object) -> Iterator[None]:
    """Put the place in front of a `PromptError` that is raised inside: `prompts.jsonl, line 7: The text holds ...`."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"{place}: {error.message}", error.hint) from error


def begin_loading(folder: Path) -> Future[Prompter]:
    """Load a folder's prompter on a thread of its own, while something else is imported or packed."""

    def load() -> Prompter:
        prompter = Prompter(folder)
        with suppress(GemmaAwqError):  # whoever needs it is told
            prompter.prepare()
        return prompter

    loader = ThreadPoolExecutor(1)
    prompter = loader.submit(load)
    loader.shutdown(wait=False)
    return prompter
