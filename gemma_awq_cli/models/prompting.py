"""Text to token ids the way Gemma was trained on them: always exactly one BOS at the start, the right chat template."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.tokenizer import load_tokenizer

Message = dict[str, str]


class Prompter:
    """A model folder's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        bos = self.tokenizer.special_id("bos_token")
        if bos is None:
            raise GemmaAwqError(
                f"The tokenizer of {folder} has no BOS token, which every Gemma needs.",
                "Copy the tokenizer files of the original model.",
            )
        self.bos = bos

    @property
    def is_chat(self) -> bool:
        """Whether the model comes with a chat template, that is, whether it answers rather than completes."""
        return bool(self.tokenizer.chat_template)

    def ids(self, text: str) -> list[int]:
        """Token ids of plain text, without BOS."""
        return self.tokenizer.encode(text)

    def prompt_ids(self, text: str) -> list[int]:
        """BOS and the ids of `text`. A BOS that the text spells out already is not doubled."""
        ids = self.ids(text)
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def chat(self, messages: Sequence[Message], answer_next: bool) -> str:
        """Messages through the model's template, up to where the model's answer begins if `answer_next`."""
        import jinja2

        from gemma_awq_cli.models.chat_template import render

        template, special = self.tokenizer.chat_template or "", self.tokenizer.special
        try:
            try:
                return render(template, messages, answer_next, special)
            except jinja2.exceptions.TemplateError:
                if messages[0]["role"] != "system" or len(messages) < 2:
                    raise
                # Gemma 1 and 2 know no system role: what it says goes before the first user message.
                first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
                return render(template, [first, *messages[2:]], answer_next, special)
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise GemmaAwqError(
                f"The chat template cannot be used: {error}.", "Copy the chat template of the original model."
            ) from None
        except jinja2.exceptions.TemplateError as error:
            raise GemmaAwqError(
                f"The model's chat template refuses the messages: {error}",
                "Gemma's messages are user and assistant by turns, after at most one system message.",
            ) from None


def begin_loading(folder: Path) -> Future[Prompter]:
    """Load a folder's prompter on a thread of its own, while something else is imported or packed."""
    loader = ThreadPoolExecutor(1)
    prompter = loader.submit(Prompter, folder)
    loader.shutdown(wait=False)
    return prompter
