"""Continuous batching: rows join and leave a session between two tokens.

Each step is one forward: a token for every row that generates, and as many tokens of new prompts as keep it short.
Knows rows, sessions and the prefix cache; knows nothing of HTTP. Not thread-safe: one thread calls it. Whatever goes
wrong in one row ends that row alone.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from gemma_awq_cli.generate.draft_choice import exact_lookup
from gemma_awq_cli.generate.generation import Row
from gemma_awq_cli.generate.local_engine import Drafts, leading_logits, needed_room
from gemma_awq_cli.generate.sampler import Sampler
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.kv_cache import SavedRow
from gemma_awq_cli.models.forward.prefill import CHUNK
from gemma_awq_cli.models.forward.session import Leading, Logits
from gemma_awq_cli.serve.prefix_cache import WORTH_KEEPING, PrefixCache

LEAST_PROMPT_TOKENS = 16  # of new prompts in a step, however slow they are
MEASURED_FOR = 64  # steps, after which one without new prompts is measured again
# How much longer than without new prompts a step may take: 1 is twice as long. Between these, the rows that read and
# those that generate share the time as their numbers are: if most rows wait for their first token, that comes first.
LEAST_STRETCH, MOST_STRETCH = 1.0, 4.0
_SMOOTHING = 0.1  # weight of the newest measurement


@dataclass(eq=False)
class SharedPrompt:
    """A prompt that several tasks begin with: one of them reads it, and the others go on from what it leaves here.

    left: how many tasks have not gone on from it. reader: the task that reads it, or has failed to. read: the state
    after the prompt and the logits [1, V] of the next token, until no task is left that needs them.
    """

    left: int
    reader: "Task | None" = None
    read: tuple[SavedRow, Logits] | None = None

    def used(self) -> None:
        """One more task has gone on from it."""
        self.left -= 1
        if not self.left:
            self.read = None


@dataclass(eq=False)
class Task:
    """A row on its way through the scheduler.

    on_done: called when the row has ended by itself or has failed. shared: its prompt, if other tasks have the same.
    cached_tokens: how many tokens of the prompt it did not have to read. cancelled: set by whoever no longer wants it;
    the next step drops it. error: why it failed. keep_at: after how many tokens its state is worth keeping for others.
    begun: whether its slot of the session holds anything of it. turn: how many tasks had a row before it. drafts: of
    its tokens, while it runs alone.
    """

    row: Row
    sampler: Sampler
    on_done: Callable[["Task"], None]
    shared: SharedPrompt | None = None
    begun: bool = False
    turn: int = 0
    cancelled: bool = False
    cached_tokens: int = 0
    error: Exception | None = None
    keep_at: int | None = None
    unread: Sequence[int] = field(default_factory=list)
    drafts: Drafts = field(default_factory=lambda: Drafts(exact_lookup))

    @property
    def prefilling(self) -> bool:
        """Whether it still reads its prompt."""
        return not self.row.completion.tokens

    @property
    def needed(self) -> int:
        """Tokens that its slot must have room for."""
        return needed_room(self.row)


class Scheduler:
    """Runs tasks in the rows of one session.

    rows: of the session; capacity: tokens of each.
    """

    def __init__(self, session: CachedSession, rows: int, capacity: int, cache: PrefixCache) -> None:
        self._session = session
        self._slots: list[Task | None] = [None] * rows
        self._cache = cache
        self.capacity = capacity
        self.waiting: deque[Task] = deque()
        self._turns = 0
        self._steps = 0
        self._decode_seconds: dict[int, float] = {}  # of a step without new prompts, by how many rows generate
        self._measured_at: dict[int, int] = {}  # the steps in which they were measured
        self._prompt_seconds = 0.0  # of one prompt token beyond that

    @property
    def running(self) -> int:
        """How many tasks have a row."""
        return sum(slot is not None for slot in self._slots)

    def step(self) -> bool:
        """Give every running task what it waits for, once. Returns False if there is nothing to do."""
        self._drop_cancelled()
        self._admit()
        tokens = self._next_tokens()
        if not any(tokens):
            return False
        wanted = [0] * len(tokens)
        for index, task in enumerate(self._slots):
            if task is not None and tokens[index] and len(tokens[index]) >= len(task.unread):
                wanted[index] = 1 + len(task.drafts.draft)
        started = time.perf_counter()
        try:
            logits = self._session.last_logits(tokens, wanted)
        except Exception as error:  # noqa: BLE001 (the step's rows fail, whatever it was, and others can run)
            self._fail_running(error)
            return True
        self._measure(tokens, time.perf_counter() - started)
        self._deliver(tokens, wanted, logits)
        return True

    def _admit(self) -> None:
        """Give free rows to tasks that wait, in their order, and begin those whose prompt nobody else is reading."""
        for index, slot in enumerate(self._slots):
            if slot is None and self.waiting:
                admitted = self._slots[index] = self.waiting.popleft()
                admitted.turn = self._turns
                self._turns += 1
        for index, task in enumerate(self._slots):
            if task is None or task.begun:
                continue
            shared = task.shared
            if shared is not None and shared.read is not None:
                with self._own_failure(index, task):
                    self._go_on(index, task, shared, *shared.read)
            elif shared is None or shared.reader is None or shared.reader not in self._slots:
                self._begin(index, task)

    def _begin(self, index: int, task: Task) -> None:
        """Let a task read its prompt, from where the cache knows it."""
        found = self._cache.find(task.row.ids)
        self._session.reset_row(index)
        if found.saved is not None:
            self._session.load_row(index, found.saved, found.length)
        if task.shared is not None:
            task.shared.reader = task
        task.begun = True
        task.cached_tokens = found.length
        task.unread = task.row.ids[found.length :]
        # what a second prompt begins with, a third one will too
        task.keep_at = found.shared if found.shared >= found.length + WORTH_KEEPING else None
        task.row.begin(len(task.unread))

    def _go_on(self, index: int, task: Task, shared: SharedPrompt, saved: SavedRow, logits: Logits) -> None:
        """Let a task go on from the prompt that another has read. saved, logits: of `SharedPrompt.read`."""
        self._session.load_row(index, saved, saved.length)
        task.begun = True
        task.cached_tokens = saved.length
        task.row.begin(0)
        shared.used()
        self._take(index, task, logits, None)

    def _next_tokens(self) -> list[Sequence[int]]:
        """The tokens that each row reads in this step."""
        running = [(index, task) for index, task in enumerate(self._slots) if task is not None]
        generating = [(index, task) for index, task in running if not task.prefilling]
        reading = [(index, task) for index, task in running if task.prefilling]
        tokens: list[Sequence[int]] = [[] for _ in self._slots]
        if generating and len(running) == 1:
            ((_, alone),) = generating
            alone.drafts.guess(alone.row, self._session)
        for index, task in generating:
            tokens[index] = [*task.unread, *task.drafts.draft]
        left = self._prompt_budget(len(generating), len(reading)) if generating else CHUNK
        for index, task in sorted(reading, key=lambda one: one[1].turn):  # whoever came first is not overtaken
            count = min(left, len(task.unread))
            if task.keep_at is not None:  # stop there once, to keep that state
                count = min(count, task.keep_at - self._session.length(index))
            left -= count
            tokens[index] = task.unread[:count]
        return tokens

    def _prompt_budget(self, generating: int, reading: int) -> int:
        """How many prompt tokens a step may read beside so many rows that generate, while so many have prompts left."""
        if self._steps - self._measured_at.get(generating, -MEASURED_FOR) >= MEASURED_FOR:
            return 0  # this step is measured
        if not self._prompt_seconds:
            return LEAST_PROMPT_TOKENS
        stretch = min(MOST_STRETCH, max(LEAST_STRETCH, reading / generating))
        wanted = stretch * self._decode_seconds[generating] / self._prompt_seconds
        return int(min(CHUNK, max(LEAST_PROMPT_TOKENS, wanted)))

    def _measure(self, tokens: Sequence[Sequence[int]], seconds: float) -> None:
        """Learn from a step what its parts cost."""
        taken = [(new, task) for new, task in zip(tokens, self._slots, strict=True) if task is not None and new]
        prompt = sum(len(new) for new, task in taken if task.prefilling)
        generating = sum(not task.prefilling for _, task in taken)
        self._steps += 1
        if not prompt:
            self._decode_seconds[generating] = _smoothed(self._decode_seconds.get(generating, 0.0), seconds)
            self._measured_at[generating] = self._steps
        else:
            alone = self._decode_seconds.get(generating, 0.0)
            self._prompt_seconds = _smoothed(self._prompt_seconds, max(0.0, seconds - alone) / prompt)

    def _deliver(self, tokens: Sequence[Sequence[int]], wanted: Sequence[int], logits: Logits) -> None:
        """Sample for the rows that have logits, and free those that are done."""
        samplers = [task.sampler for task, count in zip(self._slots, wanted, strict=True) if task is not None and count]
        leading = leading_logits(self._session, logits, samplers)
        place = 0
        for index, task in enumerate(self._slots):
            if task is None:
                continue
            last = place + wanted[index]
            own = None if leading is None else leading.rows(place, last)
            with self._own_failure(index, task):
                self._advance(index, task, len(tokens[index]), logits[place:last], own)
            place = last

    @contextmanager
    def _own_failure(self, index: int, task: Task) -> Iterator[None]:
        """End a task that fails: one row's failure, whatever it was, is not the others'."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self._slots[index] = None
            task.error = error
            task.on_done(task)

    def _advance(self, index: int, task: Task, read: int, logits: Logits, leading: Leading | None) -> None:
        """Bring a task forward that has read some tokens.

        logits: [1 + drafted, V] after the last of them, or none; leading: of these, or None.
        """
        task.unread = task.unread[read:]
        if task.keep_at is not None and self._session.length(index) == task.keep_at:
            self._cache.add(task.row.ids, self._session.save_row(index))
            task.keep_at = None
        if not len(logits):
            return
        if task.shared is not None and task.prefilling:
            if task.shared.left > 1:
                task.shared.read = self._session.save_row(index), logits.copy()
            task.shared.used()
        self._take(index, task, logits, leading)

    def _take(self, index: int, task: Task, logits: Logits, leading: Leading | None) -> None:
        """Sample a task's next tokens. logits, leading: see `Drafts.check`."""
        drafted = len(task.drafts.draft)
        taken = task.drafts.check(task.row, task.sampler, logits, leading)
        task.unread = taken[-1:]
        if (wrong := drafted - len(taken) + 1) > 0:
            self._session.shorten_row(index, self._session.length(index) - wrong)
        if task.row.done:
            self._free(index)
            task.on_done(task)

    def _fail_running(self, error: Exception) -> None:
        """End all running tasks: the session may be half-way through their tokens."""
        for index, task in enumerate(self._slots):
            self._slots[index] = None
            if task is not None:
                task.error = error
                task.on_done(task)

    def _drop_cancelled(self) -> None:
        self.waiting = deque(task for task in self.waiting if not task.cancelled)
        for index, task in enumerate(self._slots):
            if task is not None and task.cancelled:
                task.row.interrupt()
                self._free(index)

    def _free(self, index: int) -> None:
        """Take a task out of its row, and keep what it has read for requests that continue it."""
        task = self._slots[index]
        assert task is not None
        read = [*task.row.ids, *task.row.completion.tokens][: self._session.length(index) if task.begun else 0]
        if len(read) >= WORTH_KEEPING:
            self._cache.add(read, self._session.save_row(index))
        self._slots[index] = None


def _smoothed(old: float, new: float) -> float:
    return new if not old else old + _SMOOTHING * (new - old)
