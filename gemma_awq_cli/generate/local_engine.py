"""This tool's own engine: rows in the slots of a session, and a new prompt in a slot as soon as its row has ended.

It knows a model by its sessions only.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.constraints import GrammarCompiler
from gemma_awq_cli.generate.draft_choice import BeginDraft, exact_lookup
from gemma_awq_cli.generate.drafting import Drafter, matching
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions, Row, TokenLogprobs
from gemma_awq_cli.generate.generation_config import context_of, end_tokens
from gemma_awq_cli.generate.sampler import Largest, Sampler, largest, logsumexp
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.kv_cache import Mark, SavedRow
from gemma_awq_cli.models.forward.loading import OpenModel
from gemma_awq_cli.models.forward.memory import memory_errors
from gemma_awq_cli.models.forward.session import Leading, Logits, Session

KEPT_TOKENS = 512  # the least room, in tokens, of a session that is kept for further turns
SMALLER = "Use fewer tokens (--max-new-tokens, a shorter prompt), fewer prompts at once (--batch-size), or 4 bits."


def complete(
    opened: OpenModel,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    on_text: Callable[[str], None],
) -> Completion:
    """Continue one prompt's token ids. `on_text` is called with each piece of the text once."""
    options = GenerationOptions(max_new_tokens, sampling, stop)
    return LocalEngine(opened).complete([ids], options, lambda _, piece: on_text(piece))[0]


@dataclass(eq=False)
class LiveRow:
    """A session of one row that is kept for the next turn.

    capacity: its room in tokens; read: the ids it has read; starts: how many of them it had read when each turn began;
    mark: of the last of these. A row that parts from what was read goes back to where a turn began, so that the same
    tokens are read in the same steps, which round alike.
    """

    session: Session
    capacity: int
    read: list[int]
    starts: list[int] = field(default_factory=list)
    mark: Mark | None = None

    def continue_with(self, row: Row) -> bool:
        """Keep what the session has read of the row's prompt. Return whether there is any, and room for the row."""
        common = matching(self.read, row.ids[:-1])  # of the last one the logits are needed
        if common < len(self.read):
            common = max((start for start in self.starts if start <= common), default=0)
            common = self._go_back(common) if common else 0
        if not common or needed_room(row) > self.capacity:
            return False
        if isinstance(self.session, CachedSession):
            self.starts = [*(start for start in self.starts if start < common), common]
            self.mark = self.session.mark_row(0)
        return True

    def _go_back(self, length: int) -> int:
        assert isinstance(self.session, CachedSession), "only its turns are marked"
        length = self.session.shorten_row(0, length, self.mark)
        del self.read[length:]
        return length


@dataclass(eq=False)
class Drafts:
    """The drafts of one row, and what the model says to them.

    begin: see `BeginDraft`. draft: tokens that may follow the row's last one, which the session reads behind it.
    """

    begin: BeginDraft
    draft: Sequence[int] = ()
    _drafter: Drafter | None = None
    _begun: bool = False

    def guess(self, row: Row, session: CachedSession) -> None:
        """Draft what may follow the row's last token, if it is worth it."""
        if not self._begun:
            self._drafter = self.begin([*row.ids, *row.completion.tokens], needed_room(row), session)
            self._begun = True
        if self._drafter is not None:
            # one token more comes from the logits behind the draft
            self.draft = self._drafter.draft(row.limit - len(row.completion.tokens) - 1)

    def check(self, row: Row, sampler: Sampler, logits: Logits, leading: Leading | None) -> list[int]:
        """Sample the row's next tokens from logits [1 + drafted, V] float32, as long as they are those of the draft.

        leading: of these logits, as many as the sampler wants, or None; see `leading_logits`. Each token is chosen as
        without a draft, from the same logits with the same random numbers. Returns the tokens; all but the last have
        been read now, and the rest of the draft has to be taken back.
        """
        taken: list[int] = []
        for place, row_logits in enumerate(logits):
            if leading is None:
                require_finite_logits(row_logits)
            elif leading.tokens[place, 0] < 0:
                raise _not_finite()
            found = None if leading is None else (leading.values[place], leading.tokens[place])
            taken.append(take_next(row, sampler, row_logits, found))
            if row.done or (place < len(self.draft) and taken[-1] != self.draft[place]):
                break
        if self._drafter is not None:
            self._drafter.take(taken)
        row.completion.count_draft(len(self.draft), len(taken) - 1)
        self.draft = ()
        return taken


@dataclass(eq=False)
class Slot:
    """A row in its slot of a session. unread: the token ids that the session reads next, before those of a draft."""

    row: Row
    sampler: Sampler
    unread: Sequence[int]
    drafts: Drafts

    def advance(self, logits: Logits, leading: Leading | None) -> list[int]:
        """Sample the row's next tokens; return those that it has read now. logits, leading: see `Drafts.check`."""
        taken = self.drafts.check(self.row, self.sampler, logits, leading)
        read = [*self.unread, *taken[:-1]]
        self.unread = taken[-1:]
        return read

    @property
    def takes_likeliest(self) -> bool:
        """Whether the row reads one token, and of the logits only the largest one's token is asked for."""
        return len(self.unread) == 1 and self.row.logprobs is None and self.sampler.takes_likeliest

    def take(self, token: int) -> list[int]:
        """Take the row's most likely next token, -1 if a logit is not finite; return what the row has read now."""
        if token < 0:
            raise _not_finite()
        self.sampler.take(token)
        self.row.take(token)
        read, self.unread = list(self.unread), [token]
        return read


Begin = Callable[[Row, Sequence[int]], Slot]  # of the tokens that its session has to read


class LocalEngine(Engine):
    """Generates with this tool's own sessions.

    batch_size: the most rows that run at once. keep: keep the session of a single row, so that a prompt that continues
    the last one reads only its new tokens. begin_draft: what drafts the tokens of a row while no other row runs.
    make_sampler: makes what chooses a row's tokens, as `Sampler` is made.
    """

    def __init__(
        self,
        opened: OpenModel,
        batch_size: int = 8,
        keep: bool = False,
        begin_draft: BeginDraft = exact_lookup,
        make_sampler: Callable[..., Sampler] = Sampler,
    ) -> None:
        super().__init__(opened.prompter, context_of(opened.checkpoint), end_tokens(opened.checkpoint, opened.prompter))
        self.opened = opened
        self._batch_size = batch_size
        self._keep = keep
        self._begin_draft = begin_draft
        self._make_sampler = make_sampler
        self._live: LiveRow | None = None
        self._keeps_prompt = False
        self.read_prompt: SavedRow | None = None
        self._grammars = GrammarCompiler(opened.prompter.tokenizer, opened.checkpoint.vocabulary, self.ends)

    def keep_prompt(self) -> None:
        """Leave the state after the next row's prompt in `read_prompt`. Raises GemmaAwqError if there is no such state.

        The row must be the only one of its call.
        """
        self._require_states()
        self._keep = self._keeps_prompt = True

    def go_on_from(self, ids: Sequence[int], saved: SavedRow, read: Sequence[int], new_tokens: int) -> int:
        """Let the next row, which must be the only one, begin with a saved state; return how many tokens it spares.

        ids: the row's prompt; saved: a state of unknown origin; read: the tokens that made it; new_tokens: the row's
        limit. Raises GemmaAwqError if the state is not one of this model's.
        """
        self._require_states()
        common = matching(ids[:-1], read)
        capacity = min(self.context, max(2 * (max(len(ids), saved.length) + new_tokens), KEPT_TOKENS))
        session = self.opened.session(1, capacity)
        assert isinstance(session, CachedSession)
        if not session.fits(saved):
            raise GemmaAwqError("The saved prompt does not fit this model.", "Save it again with this model.")
        session.load_row(0, saved, saved.length)
        if common < saved.length:
            common = session.shorten_row(0, common)
        if common:
            self._keep, self._live = True, LiveRow(session, capacity, list(ids[:common]))
        return common

    def _require_states(self) -> None:
        if self.opened.forward.text is None:
            raise GemmaAwqError(
                "This model runs in transformers' modules, whose states are not saved.", "Leave the cache out."
            )

    def _steps(
        self, rows: Sequence[Row], options: GenerationOptions, on_done: Callable[[Row], None]
    ) -> Generator[None, None, None]:
        """See `Engine`."""
        waiting = list(rows)
        compiled = None if options.grammar is None else self._grammars.compile(options.grammar)

        def begin(row: Row, unread: Sequence[int]) -> Slot:
            row.begin(len(unread))
            constraint = None if compiled is None else compiled.constraint()
            sampler = self._make_sampler(options.sampling, row.number, row.ids, constraint)
            return Slot(row, sampler, unread, Drafts(self._begin_draft))

        try:
            with memory_errors("generating", SMALLER):
                if self._keep and len(waiting) == 1:
                    yield from self._continue_live(waiting.pop(), begin, on_done)
                while waiting:
                    # a session has no more memory than its first rows need: a longer row that waits gets a new one
                    first = waiting[: self._batch_size]
                    yield from self._run_session(waiting, len(first), max(map(needed_room, first)), begin, on_done)
        except BaseException:
            self._live = None  # the cache may be half-way through a token
            raise

    def _run_session(
        self,
        waiting: list[Row],
        count: int,
        capacity: int,
        begin: Begin,
        on_done: Callable[[Row], None],
    ) -> Generator[None, None, None]:
        """Run rows in the `count` slots of a new session; takes those that fit out of `waiting` until none is left."""
        session = self.opened.session(count, capacity)
        slots: list[Slot | None] = [None] * count
        fresh = True
        while True:
            for index in range(count):
                fitting = next((row for row in waiting if needed_room(row) <= capacity), None)
                if fitting is not None and slots[index] is None and (fresh or session.independent_rows):
                    if not fresh:
                        session.reset_row(index)
                    waiting.remove(fitting)
                    slots[index] = begin(fitting, fitting.ids)
            fresh = False
            taken = [(index, slot) for index, slot in enumerate(slots) if slot is not None]
            if not taken:
                return
            _read_next(session, slots)
            for index, slot in taken:
                if slot.row.done:
                    slots[index] = None
                    on_done(slot.row)
            yield

    def _continue_live(self, row: Row, begin: Begin, on_done: Callable[[Row], None]) -> Generator[None, None, None]:
        """Run a single row in the session that was kept, from where their tokens part; or in a new one."""
        live, self._live = self._live, None
        if live is None or not live.continue_with(row):
            capacity = min(self.context, max(2 * needed_room(row), KEPT_TOKENS))  # room for the next turns
            live = LiveRow(self.opened.session(1, capacity), capacity, [])
        slot = begin(row, row.ids[len(live.read) :])
        while not row.done:
            (read,) = _read_next(live.session, [slot])
            live.read += read
            if self._keeps_prompt and isinstance(live.session, CachedSession):
                self._keeps_prompt, self.read_prompt = False, live.session.save_row(0)
            yield
        self._live = live
        on_done(row)


def _read_next(session: Session, slots: Sequence[Slot | None]) -> list[list[int]]:
    """Let the rows in a session's slots, of which there are any, read and sample; return what each has read."""
    taken = [slot for slot in slots if slot is not None]
    if len(taken) == 1 and isinstance(session, CachedSession):
        (alone,) = taken
        if len(alone.unread) == 1:  # a prompt is read as it always is: what it rounds to may depend on its length
            alone.drafts.guess(alone.row, session)
        if alone.drafts.draft:
            return [_read_drafted(session, slots.index(alone), len(slots), alone)]
    unread = [slot.unread if slot is not None else [] for slot in slots]
    if isinstance(session, CachedSession) and all(slot.takes_likeliest for slot in taken):
        found = session.likeliest(unread)
        if found is not None:
            return [slot.take(token) for slot, token in zip(taken, found, strict=True)]
    logits = session.next_logits(unread)
    leading = leading_logits(session, logits, [slot.sampler for slot in taken])
    return [
        slot.advance(logits[place : place + 1], None if leading is None else leading.rows(place, place + 1))
        for place, slot in enumerate(taken)
    ]


def _read_drafted(session: CachedSession, index: int, rows: int, slot: Slot) -> list[int]:
    """Let the row that alone is in one of the session's `rows` slots read its draft; return what it has read of it."""
    tokens, count = [*slot.unread, *slot.drafts.draft], 1 + len(slot.drafts.draft)
    logits = session.last_logits(
        [tokens if place == index else [] for place in range(rows)],
        [count if place == index else 0 for place in range(rows)],
    )
    read = slot.advance(logits, leading_logits(session, logits, [slot.sampler]))
    if len(read) < len(tokens):
        session.shorten_row(index, session.length(index) - len(tokens) + len(read))
    return read


def leading_logits(session: Session, logits: Logits, samplers: Iterable[Sampler]) -> Leading | None:
    """The largest of logits [R, V], as many as one of the samplers wants. None if each looks for its own."""
    count = max((sampler.leading for sampler in samplers), default=0)
    if not count or not isinstance(session, CachedSession):
        return None
    return session.leading(logits, min(count, logits.shape[1]))


def take_next(row: Row, sampler: Sampler, logits: Logits, leading: Largest | None) -> int:
    """Sample the row's next token from logits [V] float32, append and return it. leading: see `Sampler.sample`."""
    token = sampler.sample(logits, leading)
    if row.logprobs is not None:
        row.completion.logprobs.append(token_logprobs(logits, token, row.logprobs))
    row.take(token)
    return token


def token_logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Return the log probability of a token and those of the `count` most likely ones. logits: [V] float32."""
    total = float(logsumexp(logits))
    values, tokens = largest(logits, count)
    top = tuple((index, value - total) for index, value in zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(logits[token]) - total, top)


def needed_room(row: Row) -> int:
    """Return how many tokens its slot must have room for."""
    return len(row.ids) + row.limit


def require_finite_logits(logits: Logits) -> None:
    """Raise GemmaAwqError if any logit is NaN or infinite; the text would be nothing but `<pad>`."""
    # the least and the largest show it, in a twentieth of the time of a look at each
    if not (np.isfinite(logits.min()) and np.isfinite(logits.max())):
        raise _not_finite()


def _not_finite() -> GemmaAwqError:
    return GemmaAwqError(
        "The model's output is NaN or infinite.",
        "If you gave --dtype float16, give bfloat16, which has a wider range. If not, the weights are damaged.",
    )
