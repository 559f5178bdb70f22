"""The thread that owns the scheduler and its session, and the tickets by which an event loop waits for rows.

Everything of a step crosses to the event loop in one call: with many streams, a call for each token would cost more
than the tokens.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from gemma_awq_cli.errors import GemmaAwqError
from gemma_awq_cli.generate.generation import Completion, GenerationOptions, Row, TokenLogprobs, with_tool_ends
from gemma_awq_cli.generate.sampler import Constraint, Sampler
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.memory import return_freed_memory
from gemma_awq_cli.models.text.thoughts import TurnDetokenizer
from gemma_awq_cli.models.text.tokenizer import Tokenizer
from gemma_awq_cli.models.text.tool_calls import ToolCall
from gemma_awq_cli.serve.prefix_cache import PrefixCache
from gemma_awq_cli.serve.scheduler import Scheduler, SharedPrompt, Task
from gemma_awq_cli.system.threads import set_threads, thread_count

TIDY_SECONDS = 10.0  # between two times that free memory is given back, which takes milliseconds
_JOIN_SECONDS = 30.0  # a step of the slowest model is over by then


class BusyError(GemmaAwqError):
    """More rows wait than may. retry_after: seconds until one of them has probably ended."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("The server is busy: too many requests wait already.", "Try again later.")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Delta:
    """What one step has added to a row.

    answer, thought: text. calls: of tools, numbered in the row. logprobs: of the answer's tokens, if they were asked
    for. done: whether the row has ended; error: why it failed, if it did.
    """

    answer: str = ""
    thought: str = ""
    calls: tuple[tuple[int, ToolCall], ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    done: bool = False
    error: Exception | None = None


@dataclass(frozen=True)
class RowRequest:
    """A row to be generated.

    ids: the prompt's, BOS included; rows of one prompt that follow each other read it once. streams: whether each piece
    is wanted as soon as it is certain; if not, one delta has it all. ignore_eos: whether no token ends it.
    """

    ids: Sequence[int]
    options: GenerationOptions
    streams: bool
    ignore_eos: bool = False
    constraint: Constraint | None = None


@dataclass(eq=False)
class Ticket:
    """A row that is waited for.

    index: its place in its group. answer, thought: text that is to be handed out. thought_tokens: how many of its
    tokens are thoughts. submitted, first_token, ended: when, by `time.perf_counter`.
    """

    task: Task
    index: int
    streams: bool
    answer: list[str]
    thought: list[str]
    deltas: "asyncio.Queue[tuple[int, Delta]]"
    thought_tokens: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    ended: float | None = None
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _counted: int = 0  # tokens
    _given_calls: int = 0

    @property
    def completion(self) -> Completion:
        """The row's; it is whole once the last delta has come."""
        return self.task.row.completion

    def take(self, now: float) -> Delta | None:
        """In the engine's thread: what was added since the last call; None if there is nothing to hand out yet."""
        task = self.task
        done = task.row.done or task.error is not None
        if self.completion.tokens and self.first_token is None:
            self.first_token = now
        self._count()
        if done:
            self.ended = now
        elif not self.streams or not (self.answer or self.thought or self._logprobs or self._new_calls):
            return None
        calls, self._given_calls = tuple(self._new_calls), self._given_calls + len(self._new_calls)
        delta = Delta("".join(self.answer), "".join(self.thought), calls, tuple(self._logprobs), done, task.error)
        self.answer.clear()
        self.thought.clear()
        self._logprobs.clear()
        return delta

    @property
    def _new_calls(self) -> list[tuple[int, ToolCall]]:
        return list(enumerate(self.task.row.text.calls))[self._given_calls :]

    def _count(self) -> None:
        """Sort the newest token, if there is one, into thoughts and answer."""
        tokens, logprobs = self.completion.tokens, self.completion.logprobs
        if len(tokens) == self._counted:
            return
        self._counted = len(tokens)  # a step adds one at most
        if self.task.row.text.last_was_thought:
            self.thought_tokens += 1
        elif logprobs and tokens[-1] not in self.task.row.ends:
            self._logprobs.append(logprobs[-1])


@dataclass(frozen=True)
class RowGroup:
    """The rows of one request. deltas: with the row's index, those of each row in order, the last one with `done`."""

    tickets: Sequence[Ticket]
    deltas: "asyncio.Queue[tuple[int, Delta]]"


class EngineThread:
    """Runs rows for an event loop; `start` and everything below it is called from that loop.

    rows, capacity: of the session. max_waiting: how many rows may wait beyond those that run. on_failure: told of a
    failure that is not one of a single request, from the engine's thread.
    """

    def __init__(
        self,
        session: CachedSession,
        tokenizer: Tokenizer,
        ends: Iterable[int],
        rows: int,
        capacity: int,
        max_waiting: int,
        cache: PrefixCache,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.rows, self.capacity, self.max_waiting = rows, capacity, max_waiting
        self._scheduler = Scheduler(session, rows, capacity, cache)
        self._cache = cache
        self._tokenizer, self._ends = tokenizer, frozenset(ends)
        self._on_failure = on_failure
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._incoming: list[Task] = []
        self._stopping = False
        self._threads = thread_count()
        self._tickets: dict[Task, Ticket] = {}  # under `_changed`
        self._live: set[Ticket] = set()  # of the event loop
        self._tidied = -TIDY_SECONDS  # when, by `time.monotonic`: at first what loading has left
        self._row_seconds = 1.0  # of the last rows, smoothed

    def start(self) -> None:
        """Start the thread, from a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether rows are taken."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @property
    def live(self) -> int:
        """How many rows run or wait."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """How many rows wait for one that runs to end."""
        return max(0, self.live - self.rows)

    @property
    def cache_bytes(self) -> int:
        """What the prefix cache holds."""
        return self._cache.nbytes

    def submit(self, requests: Sequence[RowRequest]) -> RowGroup:
        """Put rows in the queue, all or none. Raises BusyError if it is full, GemmaAwqError if the thread has ended."""
        if not self.alive:
            raise GemmaAwqError("The engine has ended.", "Start the server again.")
        if self.live + len(requests) > self.rows + self.max_waiting:
            raise BusyError(max(1, min(600, round(self._row_seconds * (1 + self.waiting / self.rows)))))
        deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        tickets = [
            self._ticket(index, request, deltas, shared)
            for index, (request, shared) in enumerate(_with_shared_prompts(requests))
        ]
        self._live.update(tickets)
        with self._changed:
            self._incoming += [ticket.task for ticket in tickets]
            self._tickets |= {ticket.task: ticket for ticket in tickets}
            self._changed.notify()
        return RowGroup(tickets, deltas)

    def cancel(self, group: RowGroup) -> None:
        """End rows that nobody waits for any more. Nothing happens to those that have ended."""
        for ticket in group.tickets:
            if ticket in self._live:
                self._live.discard(ticket)
                ticket.task.cancelled = True
        with self._changed:
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after its current step, and wait for that. Rows that still run get no more deltas."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    def _ticket(
        self, index: int, request: RowRequest, deltas: "asyncio.Queue[tuple[int, Delta]]", shared: SharedPrompt | None
    ) -> Ticket:
        answer: list[str] = []
        thought: list[str] = []
        ids, options = request.ids, request.options
        text = TurnDetokenizer(
            self._tokenizer, options.stop, answer.append, thought.append, options.tools, options.most_calls
        )
        limit = min(options.max_new_tokens, self.capacity - len(ids))
        ends = frozenset[int]() if request.ignore_eos else with_tool_ends(self._ends, self._tokenizer, options.tools)
        row = Row(0, 0, ids, limit, ends, text, Completion(len(ids)), options.logprobs)
        sampler = Sampler(options.sampling, 0, ids, request.constraint)
        task = Task(row, sampler, lambda task: None, shared)
        return Ticket(task, index, request.streams, answer, thought, deltas)

    def _run(self) -> None:
        """The thread: steps while there are rows, else waits."""
        set_threads(self._threads)  # each thread has its own number
        try:
            while self._take_in():
                self._scheduler.step()
                self._hand_out()
        except Exception as error:  # noqa: BLE001 (a bug: whoever waits must hear of it)
            self._fail(error)

    def _take_in(self) -> bool:
        """Move new rows to the scheduler; wait if there is nothing to do. Returns False if the thread is to end."""
        with self._changed:
            while not (self._stopping or self._incoming or self._scheduler.running or self._scheduler.waiting):
                self._tidy()
                self._changed.wait()
            self._scheduler.waiting.extend(self._incoming)
            self._incoming.clear()
            return not self._stopping

    def _tidy(self) -> None:
        """Give memory that lies free between prefixes of many sizes back to the system, now and then."""
        if (now := time.monotonic()) - self._tidied >= TIDY_SECONDS:
            self._tidied = now
            return_freed_memory()

    def _hand_out(self) -> None:
        now = time.perf_counter()
        deltas = []
        with self._changed:
            for task, ticket in list(self._tickets.items()):
                if task.cancelled:
                    del self._tickets[task]
                elif (delta := ticket.take(now)) is not None:
                    deltas.append((ticket, delta))
                    if delta.done:
                        del self._tickets[task]
        if deltas:
            self._call(deltas)

    def _fail(self, error: Exception) -> None:
        """End all rows with an error, and take no more."""
        with self._changed:
            self._stopping = True
            left = list(self._tickets.values())
            self._tickets.clear()
        self._call([(ticket, Delta(done=True, error=error)) for ticket in left])
        self._on_failure(error)

    def _call(self, deltas: Sequence[tuple[Ticket, Delta]]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrive, deltas)

    def _arrive(self, deltas: Sequence[tuple[Ticket, Delta]]) -> None:
        """In the event loop: give each ticket what came for it."""
        for ticket, delta in deltas:
            if delta.done:
                self._live.discard(ticket)
                if ticket.ended is not None:
                    self._row_seconds += 0.1 * (ticket.ended - ticket.submitted - self._row_seconds)
            ticket.deltas.put_nowait((ticket.index, delta))


def _with_shared_prompts(requests: Iterable[RowRequest]) -> Iterator[tuple[RowRequest, SharedPrompt | None]]:
    """Each row with the prompt that it shares with those next to it, or None."""
    for _, group in groupby(requests, key=lambda request: request.ids):
        rows = list(group)
        shared = SharedPrompt(len(rows)) if len(rows) > 1 else None
        for row in rows:
            yield row, shared
