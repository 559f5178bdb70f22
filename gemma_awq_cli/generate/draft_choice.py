"""What drafts the tokens of a row, as `--draft` names it: the row itself, another model, or nothing."""

from collections.abc import Callable, Sequence

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.drafting import Drafter, LookupDrafter
from gemma_awq_cli.generate.finding import find_model
from gemma_awq_cli.generate.generation_config import context_of
from gemma_awq_cli.generate.model_drafting import ModelDrafts
from gemma_awq_cli.generate.request import LOOKUP, NO_DRAFT
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.devices import CPU
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.token_bytes import stored_bytes_per_token

# Of a row's tokens so far, the most that it can have and the session that reads it: what drafts the next ones, or None.
BeginDraft = Callable[[Sequence[int], int, CachedSession], Drafter | None]


def lookup(tokens: Sequence[int], most: int, session: CachedSession) -> Drafter:
    """Draft from the row itself: see `BeginDraft`."""
    return LookupDrafter(session.reading_costs, tokens)


def exact_lookup(tokens: Sequence[int], most: int, session: CachedSession) -> Drafter | None:
    """Draft from the row itself where that cannot change it, not even by the rounding of a sum: see `BeginDraft`."""
    return lookup(tokens, most, session) if session.exact_reading else None


def nothing(tokens: Sequence[int], most: int, session: CachedSession) -> None:
    """Draft nothing: see `BeginDraft`."""


def open_drafts(choice: str | None, opened: OpenModel, note: Callable[[str], None]) -> BeginDraft:
    """Return what drafts for an open model. choice: see `EngineOptions.draft`.

    Raises UsageError if the model cannot check drafts or the other one cannot make them, and what opening that raises.
    """
    if choice is None:
        return exact_lookup
    if choice == NO_DRAFT:
        return nothing
    if opened.forward.text is None:
        raise UsageError(
            "--draft cannot be used with this model, device and precision: they take transformers' own forward, which "
            "cannot take tokens back.",
            "Leave it out.",
        )
    if opened.device_name != CPU:
        raise UsageError(
            "--draft is for the CPU: on a GPU, reading a draft would cost more than it spares.", "Leave it out."
        )
    return lookup if choice == LOOKUP else _by_model(choice, opened, note)


def _by_model(name: str, opened: OpenModel, note: Callable[[str], None]) -> BeginDraft:
    found = find_model(name, None, note, one_text=True)  # its tokens are compared, nothing else
    drafting = open_model(found.folder, "cpu", loading=found.prompter)
    if drafting.forward.text is None:
        raise UsageError(f"{name} cannot draft: {drafting.kernel_report()[0]}.", "Give another model to --draft.")
    vocabulary = min(opened.checkpoint.vocabulary, drafting.checkpoint.vocabulary)
    one, other = opened.prompter.tokenizer, drafting.prompter.tokenizer
    if any(one.token_of(index) != other.token_of(index) for index in range(vocabulary)):
        raise GemmaAwqError(
            f"{name} cannot draft for {opened.checkpoint.folder.name}: their tokenizers differ.",
            "Give --draft a smaller model of the same generation of Gemma, or an artifact of the model itself.",
        )
    own, its = (
        stored_bytes_per_token(model.checkpoint, model.dtype_name, model.forward.head) for model in (opened, drafting)
    )
    return ModelDrafts(drafting.session, vocabulary, its / own, context_of(drafting.checkpoint))
