"""The text that fidelity is measured on, cut into windows by the GPTQ convention.

The documents are joined, and the text is cut into whole windows that do not overlap; here each begins with BOS.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_awq_cli.calibration_text.document_forms import Document
from gemma_awq_cli.calibration_text.document_reading import WHOLE
from gemma_awq_cli.calibration_text.recipes import Recipe, evaluation_documents, find_recipe
from gemma_awq_cli.calibration_text.rows import hash_rows, rendered
from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.models.checkpoints.checkpoint import Checkpoint
from gemma_awq_cli.models.text.prompter import Prompter, located

WINDOW = 2048  # tokens, BOS included
CHARACTERS_PER_TOKEN = 8  # read for each token of a window; prose has about four


@dataclass(frozen=True)
class EvaluationText:
    """A text as a model reads it.

    rows: windows [R, S] of token ids, each beginning with BOS. plain: the text that they were cut from. description:
    where the text comes from, for people.
    """

    rows: Tensor
    plain: str
    description: str

    @property
    def sha256(self) -> str:
        """The hash of the token ids: figures are comparable if it is equal."""
        return hash_rows(self.rows)


def read_evaluation_text(
    name: str, original: Checkpoint, window: int | None = None, windows: int | None = None
) -> EvaluationText:
    """Return the text that `name` stands for (see `find_recipe`), cut to fit the original's tokenizer and context."""
    context = int(original.text_config.max_position_embeddings)
    return cut_windows(find_recipe(name), Prompter(original.folder), context, window, windows)


def cut_windows(
    recipe: Recipe, prompter: Prompter, context: int, window: int | None, windows: int | None
) -> EvaluationText:
    """Return the text of a recipe in windows; the rest that does not fill a window is dropped.

    context: the most tokens that the model reads. window: tokens per window, BOS included; None for `WINDOW`, or less
    where the text or the context is shorter. windows: the most windows to return, None for all. Raises an error if the
    window exceeds the context or the text does not fill one window.
    """
    if window is not None and window > context:
        raise GemmaAwqError(
            f"A window of {window} tokens does not fit this model's context of {context}.", "Give a smaller --window."
        )
    # of a long text only as much is read as the windows need
    characters = None if windows is None else windows * (window or WINDOW) * CHARACTERS_PER_TOKEN
    while True:
        text = evaluation_documents(recipe, characters)
        plain = "\n\n".join(_plain(document, prompter) for document in text.documents)
        ids = prompter.ids(plain)
        length = window or min(WINDOW, context, len(ids) + 1)
        count = len(ids) // max(length - 1, 1)
        if text.complete or characters is None or windows is None or count >= windows:
            break
        characters = 4 * max(characters, WHOLE)  # a text of unusually long tokens
    if not ids:
        raise GemmaAwqError(f"The text {text.description} is empty.", "Give another --text.")
    if count == 0:
        raise GemmaAwqError(
            f"The text {text.description} has {len(ids)} tokens, fewer than the {length - 1} that fill a window after "
            "BOS.",
            "Give a longer --text, or a smaller --window.",
        )
    count = min(count, windows or count)
    body = torch.tensor(ids[: count * (length - 1)]).view(count, length - 1)
    rows = torch.cat([torch.full((count, 1), prompter.bos), body], dim=1)
    return EvaluationText(rows, plain, text.description)


def _plain(document: Document, prompter: Prompter) -> str:
    """The text of a document, without the BOS that a chat template puts before it."""
    with located(document.where):
        text = rendered(document, prompter)
    is_rendered = prompter.is_chat and not isinstance(document.content, str)
    return text.removeprefix(prompter.tokenizer.special["bos_token"]) if is_rendered else text
