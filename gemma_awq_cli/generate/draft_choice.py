"""What drafts the tokens of a row, as `--draft` names it: the row itself, another model, or nothing."""

from collections.abc import Callable, Sequence

from gemma_awq_cli.generate.drafting import Drafter, LookupDrafter
from gemma_awq_cli.models.forward.cached_session import CachedSession

# Of a row's tokens so far, the most that it can have, and the session that reads it: what drafts the next ones, or None.
BeginDraft = Callable[[Sequence[int], int, CachedSession], Drafter | None]


def lookup(tokens: Sequence[int], most: int, session: CachedSession) -> Drafter:
    """Draft from the row itself: see `BeginDraft`."""
    return LookupDrafter(session.reading_costs, tokens)


def exact_lookup(tokens: Sequence[int], most: int, session: CachedSession) -> Drafter | None:
    """Draft from the row itself where that cannot change it, not even by the rounding of a sum: see `BeginDraft`."""
    return lookup(tokens, most, session) if session.exact_reading else None


def nothing(tokens: Sequence[int], most: int, session: CachedSession) -> None:
    """Draft nothing: see `BeginDraft`."""
