"""Rows that join and leave between tokens get the tokens that each would get alone."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.generate.draft_choice import BeginDraft, exact_lookup, lookup
from gemma_awq_cli.generate.generation import Completion, Engine, GenerationOptions, Row
from gemma_awq_cli.generate.local_engine import Drafts, LocalEngine
from gemma_awq_cli.generate.sampler import Sampler
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.device_session import DeviceSession, DeviceText
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.session import Session
from gemma_awq_cli.models.forward.torch_layers import TextWeights
from gemma_awq_cli.models.text.thoughts import TurnDetokenizer
from gemma_awq_cli.serve.prefix_cache import PrefixCache
from gemma_awq_cli.serve.scheduler import LEAST_PROMPT_TOKENS, MEASURED_FOR, Scheduler, SharedPrompt, Task

CAPACITY = 96


@pytest.fixture(scope="module", params=["gemma3_text", "gemma4_unified_text", "gemma3n_text"])
def opened(request: pytest.FixtureRequest, checkpoints: Callable[[str], Path]) -> OpenModel:
    """In float32, where a row's numbers do not depend on the rows beside it."""
    return open_model(checkpoints(request.param), torch.device("cpu"), Precision(torch.float32))


def requests(vocabulary: int, count: int, draw: random.Random) -> Iterator[tuple[list[int], int]]:
    """Prompts, some of which begin alike or continue an earlier one, and how many tokens each wants."""
    system = [2, *(draw.randrange(6, vocabulary) for _ in range(40))]
    earlier: list[list[int]] = [system]
    for _ in range(count):
        start = draw.choice([[2], system, draw.choice(earlier)])
        prompt = [*start, *(draw.randrange(6, vocabulary) for _ in range(draw.randrange(1, 12)))][:70]
        earlier.append(prompt)
        yield prompt, draw.randrange(1, 20)


def task_of(engine: Engine, number: int, ids: list[int], limit: int, on_done: Callable[[Task], None]) -> Task:
    text = TurnDetokenizer(engine.prompter.tokenizer, (), lambda _: None, lambda _: None)
    row = Row(number, number, ids, limit, engine.ends, text, Completion(len(ids)))
    return Task(row, Sampler(sampling_of(number), number, ids), on_done)


def sampling_of(number: int) -> Sampling:
    return Sampling(temperature=0.0) if number % 2 else Sampling(temperature=1.0, top_k=20, seed=number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "drafts"),
    [
        pytest.param(0, exact_lookup, id="no cache-exact_lookup", marks=pytest.mark.thorough),
        pytest.param(0, lookup, id="no cache-lookup", marks=pytest.mark.thorough),
        pytest.param(500_000, exact_lookup, id="small cache-exact_lookup"),
        pytest.param(500_000, lookup, id="small cache-lookup", marks=pytest.mark.thorough),
        pytest.param(10**9, exact_lookup, id="cache-exact_lookup", marks=pytest.mark.thorough),
        pytest.param(10**9, lookup, id="cache-lookup"),
    ],
)
def test_rows_are_as_they_are_alone(limit: int, drafts: BeginDraft, opened: OpenModel, thorough: bool) -> None:
    run_scheduler(opened, opened.session(3, CAPACITY), limit, drafts, 40 if thorough else 20)


@pytest.mark.slow
@pytest.mark.parametrize("opened", ["gemma4_unified_text"], indirect=True)
def test_rows_of_a_gpus_session_are_as_they_are_alone(opened: OpenModel, thorough: bool) -> None:
    """Its steps run on the CPU here."""
    assert isinstance(opened.forward.text, TextWeights)
    session = DeviceSession(DeviceText(opened.forward.text), 3, CAPACITY)
    run_scheduler(opened, session, 500_000, exact_lookup, 40 if thorough else 20)


def run_scheduler(opened: OpenModel, session: Session, limit: int, drafts: BeginDraft, count: int) -> None:
    """Let rows come and go in a session, and compare each with the same row alone.

    limit: bytes of the cache; count: of the prompts.
    """
    engine, draw = LocalEngine(opened), random.Random(limit)
    assert isinstance(session, CachedSession)
    scheduler = Scheduler(session, 3, CAPACITY, PrefixCache(limit))
    done: list[Task] = []
    wanted = list(requests(opened.checkpoint.vocabulary, count, draw))
    left = list(enumerate(wanted))
    tasks = []
    while left or scheduler.running or scheduler.waiting:
        while left and draw.random() < 0.5:
            number, (ids, tokens) = left.pop(0)
            alike = draw.choice([1, 1, 4])
            shared = SharedPrompt(alike) if alike > 1 else None
            for _ in range(alike):
                tasks.append(task_of(engine, number, ids, tokens, done.append))
                tasks[-1].shared = shared
                tasks[-1].drafts = Drafts(drafts)
                scheduler.waiting.append(tasks[-1])
        if tasks and draw.random() < 0.05:
            draw.choice(tasks).cancelled = True
        scheduler.step()
    assert len(done) > 3 * count // 4
    assert all(task.row.done or task.cancelled for task in tasks)
    for task in done:
        ids, tokens = wanted[task.row.number]
        options = GenerationOptions(tokens, sampling_of(task.row.number))
        alone = engine.complete([ids], options, numbers=[task.row.number])[0]
        assert task.row.completion.tokens == alone.tokens
        assert task.row.completion.text == alone.text
    cached = sum(task.cached_tokens for task in tasks if task.shared is None)
    assert (cached > 5 * count // 2) == (limit > 0)


def test_a_row_that_runs_alone_is_drafted(opened: OpenModel) -> None:
    """And no longer as soon as another one comes."""
    engine = LocalEngine(opened)
    ids, options = [2, *[30, 40, 50] * 6], GenerationOptions(50, Sampling(temperature=0.0))
    (alone,) = engine.complete([ids], options)

    class Sure:
        """Drafts three right tokens and a wrong one."""

        def __init__(self, coming: list[int]) -> None:
            self.coming = coming

        def draft(self, most: int) -> list[int]:
            return [*self.coming[:3], 5][:most]

        def take(self, tokens: list[int]) -> None:
            del self.coming[: len(tokens)]

    def begin(tokens: Sequence[int], most: int, session: CachedSession) -> Sure:
        return Sure(alone.tokens[len(tokens) - len(ids) :])

    session = opened.session(2, CAPACITY)
    assert isinstance(session, CachedSession)
    scheduler = Scheduler(session, 2, CAPACITY, PrefixCache(0))
    tasks = [task_of(engine, 1, ids, 50, lambda task: None) for _ in range(2)]
    tasks[0].drafts = Drafts(begin)
    scheduler.waiting.append(tasks[0])
    for _ in range(4):
        scheduler.step()
    assert len(tasks[0].row.completion.tokens) == 1 + 3 * 4
    assert tasks[0].row.completion.accepted_tokens == 9
    scheduler.waiting.append(tasks[1])
    while scheduler.step():
        pass
    assert tasks[0].row.completion.accepted_tokens == 9
    assert [task.row.completion.tokens for task in tasks] == [alone.tokens] * 2


def test_prompts_are_read_in_the_order_in_which_they_came(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a later one has an earlier row, which another task has left."""
    engine = LocalEngine(opened)
    session = opened.session(3, CAPACITY)
    assert isinstance(session, CachedSession)
    scheduler = Scheduler(session, 3, CAPACITY, PrefixCache(0))
    monkeypatch.setattr(scheduler, "_prompt_budget", lambda *_: 4)
    long = [2, *range(10, 60)]
    short, first, generating, second = (
        task_of(engine, 1, ids, limit, lambda task: None)
        for ids, limit in (([2, 5], 3), (long, 4), ([2, 7], 40), ([2, 9, *long[2:]], 4))
    )
    scheduler.waiting.extend([short, generating])
    scheduler.step()
    scheduler.waiting.extend([first, second])  # the latter gets the row of the short one
    while first.prefilling:
        assert second.turn == 0 or len(second.unread) == 51
        assert scheduler.step()
    assert second.turn == 3
    while scheduler.step():
        pass
    wanted = engine.complete([second.row.ids], GenerationOptions(4, sampling_of(1)), numbers=[1])[0]
    assert second.row.completion.tokens == wanted.tokens


def test_rows_that_wait_for_their_first_token_get_their_share_of_the_time(opened: OpenModel) -> None:
    session = opened.session(1, CAPACITY)
    assert isinstance(session, CachedSession)
    scheduler = Scheduler(session, 1, CAPACITY, PrefixCache(0))
    assert scheduler._prompt_budget(4, 4) == 0  # the first step of so many rows is measured without new prompts
    scheduler._decode_seconds, scheduler._measured_at = {4: 0.05}, {4: 1}
    assert scheduler._prompt_budget(4, 4) == LEAST_PROMPT_TOKENS  # no prompt was measured yet
    scheduler._prompt_seconds = 0.001
    assert scheduler._prompt_budget(4, 1) == 50  # a step takes twice as long
    assert scheduler._prompt_budget(4, 8) == 100  # two thirds of its time are for two thirds of the rows
    assert scheduler._prompt_budget(4, 99) == 200
    scheduler._decode_seconds[4] = 0.001
    assert scheduler._prompt_budget(4, 1) == LEAST_PROMPT_TOKENS
    scheduler._steps = 1 + MEASURED_FOR  # the figures are old
    assert scheduler._prompt_budget(4, 1) == 0


def test_a_shared_prompt_outlives_its_reader(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader fails or is cancelled half-way: the next task reads it, and all the others are answered."""
    engine = LocalEngine(opened)
    session = opened.session(3, CAPACITY)
    assert isinstance(session, CachedSession)
    scheduler = Scheduler(session, 3, CAPACITY, PrefixCache(0))
    ids = [2, *range(10, 60)]
    done: list[Task] = []
    shared = SharedPrompt(6)
    tasks = [task_of(engine, 1, ids, 5, done.append) for _ in range(6)]
    for task in tasks:
        task.shared = shared
    scheduler.waiting.extend(tasks)
    monkeypatch.setattr("gemma_awq_cli.serve.scheduler.CHUNK", 20)
    scheduler.step()
    tasks[0].cancelled = True
    scheduler.step()  # the second begins to read; the fourth takes the place of the first
    monkeypatch.setattr(session, "last_logits", lambda *_: 1 / 0)
    scheduler.step()
    monkeypatch.undo()
    assert [bool(task.error) for task in tasks] == [False, True, True, True, False, False]
    while scheduler.step() or scheduler.waiting:
        pass
    wanted = engine.complete([ids], GenerationOptions(5, sampling_of(1)), numbers=[1])[0]
    assert [task.row.completion.tokens for task in tasks[4:]] == [wanted.tokens] * 2
    assert shared.read is not None  # tasks that failed did not use it; the request's end frees it
    assert len(done) == 5
