"""Drafted tokens change no text: whatever is drafted, rows have the tokens that they have without."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.draft_choice import BeginDraft, exact_lookup, lookup, nothing, open_drafts
from gemma_awq_cli.generate.drafting import Speed
from gemma_awq_cli.generate.generation import Completion, GenerationOptions
from gemma_awq_cli.generate.grammar import lark_grammar
from gemma_awq_cli.generate.local_engine import LocalEngine
from gemma_awq_cli.generate.model import load_model
from gemma_awq_cli.generate.model_drafting import ModelDrafter, ModelDrafts, Reader
from gemma_awq_cli.generate.request import EngineOptions
from gemma_awq_cli.generate.sampling import Sampling
from gemma_awq_cli.models.forward.cached_session import CachedSession
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.native_session import NativeSession
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.models.forward.session import Logits
from tests.conftest import FORWARDS
from tests.tiny import make_checkpoint

TOKENS = 60  # the rings wrap around: the windows are of 16
PROMPT = [2, *(40 + number % 7 for number in range(20))]


class Oracle:
    """Drafts what will come, with mistakes: every draft length and every place of a mistake occurs."""

    def __init__(self, coming: Sequence[int], longest: int) -> None:
        self._coming = list(coming)
        self._longest = longest
        self._rng = random.Random(1)

    def draft(self, most: int) -> Sequence[int]:
        draft = self._coming[: self._rng.randrange(min(most, self._longest) + 1)]
        if draft and self._rng.random() < 0.6:
            draft[self._rng.randrange(len(draft))] = self._rng.randrange(6, 260)
        return draft

    def take(self, tokens: Sequence[int]) -> None:
        assert self._coming[: len(tokens)] == list(tokens)
        del self._coming[: len(tokens)]


def oracle(expected: Completion) -> BeginDraft:
    def begin(tokens: Sequence[int], most: int, session: CachedSession) -> Oracle:
        done = len(tokens) - expected.prompt_tokens
        return Oracle(expected.tokens[done:], len(session.reading_costs) - 1)

    return begin


def complete(opened: OpenModel, begin: BeginDraft, options: GenerationOptions) -> Completion:
    return LocalEngine(opened, 1, begin_draft=begin).complete([PROMPT], options)[0]


def greedy(tokens: int = TOKENS) -> GenerationOptions:
    return GenerationOptions(tokens, Sampling(temperature=0.0))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    """A 16-bit model in the compiled decoder, if there is one here, or else in the torch decoder."""
    return open_model(make_checkpoint(tmp_path_factory.mktemp("drafted") / "gemma3_text", "gemma3_text"), "cpu")


@pytest.mark.parametrize("kind", FORWARDS)
def test_greedy_text_of_the_compiled_decoder(kind: str, artifacts: Callable[[str], Path]) -> None:
    opened = open_model(artifacts(kind), "cpu")
    if not isinstance(opened.session(1, 1), NativeSession):
        pytest.skip(opened.kernel_report()[0])
    plain = complete(opened, nothing, greedy())
    assert plain.drafted_tokens == 0
    for begin in (exact_lookup, oracle(plain)):
        drafted = complete(opened, begin, greedy())
        assert drafted.tokens == plain.tokens
        assert drafted.text == plain.text
    assert drafted.accepted_tokens > 5
    assert drafted.drafted_tokens > drafted.accepted_tokens + 5


@pytest.mark.parametrize("kind", FORWARDS)
def test_greedy_text_in_float32(kind: str, checkpoints: Callable[[str], Path]) -> None:
    opened = open_model(checkpoints(kind), "cpu", Precision("float32"))
    plain = complete(opened, nothing, greedy())
    for begin in (lookup, oracle(plain)):
        drafted = complete(opened, begin, greedy())
        assert drafted.tokens == plain.tokens
        assert drafted.finish == plain.finish
    assert drafted.accepted_tokens > 5
    assert complete(opened, exact_lookup, greedy()).drafted_tokens == 0  # torch's sums differ in the last bits


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.7, top_k=5, seed=4),
        Sampling(temperature=1.2, top_p=0.9, min_p=0.05, seed=5, repetition_penalty=1.3),
        Sampling(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.5),
        Sampling(temperature=0.0, repetition_penalty=1.5, logit_bias=((50, 3.0), (51, -100.0))),
    ],
    ids=["hot", "top-k", "top-p", "penalties", "bias"],
)
def test_sampled_text_and_its_probabilities(sampling: Sampling, gemma3: OpenModel) -> None:
    options = GenerationOptions(TOKENS, sampling, logprobs=3)
    plain = complete(gemma3, nothing, options)
    drafted = complete(gemma3, oracle(plain), options)
    assert drafted.tokens == plain.tokens
    assert drafted.accepted_tokens > 5
    assert [one.token for one in drafted.logprobs] == drafted.tokens
    for one, other in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_text_of_a_grammar(gemma3: OpenModel) -> None:
    pytest.importorskip("llguidance")
    options = GenerationOptions(
        TOKENS, Sampling(temperature=1.0, seed=6), grammar=lark_grammar("start: /[ab ]{40,}/", False)
    )
    plain = complete(gemma3, nothing, options)
    drafted = complete(gemma3, oracle(plain), options)
    assert drafted.tokens == plain.tokens
    assert drafted.accepted_tokens > 5


def test_a_stop_string_in_a_draft_ends_the_row(gemma3: OpenModel) -> None:
    letters = tuple((token, 100.0) for token in range(70, 96))  # bytes of ASCII, so that there is text
    sampling = Sampling(temperature=12.0, seed=7, logit_bias=letters)
    whole = complete(gemma3, nothing, GenerationOptions(TOKENS, sampling))
    assert whole.text.isascii()
    options = GenerationOptions(TOKENS, sampling, (whole.text[30:33],))
    plain = complete(gemma3, nothing, options)
    drafted = complete(gemma3, oracle(whole), options)
    assert plain.finish == drafted.finish == "stop"
    assert drafted.tokens == plain.tokens
    assert drafted.text == plain.text
    assert drafted.accepted_tokens > 3


@pytest.mark.parametrize("limit", [1, 2, 3, 17])
def test_the_limit_holds_within_a_draft(limit: int, gemma3: OpenModel) -> None:
    whole = complete(gemma3, nothing, greedy())
    assert complete(gemma3, oracle(whole), greedy(limit)).tokens == whole.tokens[:limit]


def test_streamed_pieces_are_the_text(gemma3: OpenModel) -> None:
    plain = complete(gemma3, nothing, greedy())
    engine = LocalEngine(gemma3, 1, begin_draft=oracle(plain))
    assert "".join(engine.stream(PROMPT, greedy())) == plain.text


def test_a_kept_session_goes_on_behind_a_draft(gemma3: OpenModel) -> None:
    """The second turn continues the first: its session has read what it would have without drafts."""
    turns: list[list[Completion]] = []
    for drafts in (False, True):
        begin: BeginDraft = nothing
        engine = LocalEngine(gemma3, 1, keep=True, begin_draft=nothing)
        done = []
        ids = PROMPT
        for turn in range(3):
            if drafts:
                begin = oracle(turns[0][turn])
            engine._begin_draft = begin
            (completion,) = engine.complete([ids], greedy(30))
            done.append(completion)
            ids = [*ids, *completion.tokens, 50 + turn, 60, 70]
        turns.append(done)
    for plain, drafted in zip(*turns, strict=True):
        assert drafted.tokens == plain.tokens
        assert drafted.read_tokens == plain.read_tokens
    assert turns[1][1].read_tokens == 4  # three, and the last of the answer before
    assert sum(one.accepted_tokens for one in turns[1]) > 15


def test_the_last_row_of_a_batch_is_drafted(gemma3: OpenModel) -> None:
    rows = [PROMPT, PROMPT[:9], PROMPT[:15]]
    plain = LocalEngine(gemma3, 2, begin_draft=nothing).complete(rows, greedy())
    begun: list[int] = []

    def begin(tokens: Sequence[int], most: int, session: CachedSession) -> Oracle:
        begun.append(len(tokens))
        coming = next(
            each.tokens
            for each, ids in zip(plain, rows, strict=True)
            if list(tokens[: len(ids)]) == ids and len(ids) + len(each.tokens) == most
        )
        return Oracle(coming[len(tokens) - (most - len(coming)) :], 14)

    drafted = LocalEngine(gemma3, 2, begin_draft=begin).complete(rows, greedy())
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]
    assert len(begun) == 1
    assert sum(each.accepted_tokens for each in drafted) > 5


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0), Sampling(temperature=0.8, seed=2)], ids=["greedy", "sampled"]
)
def test_a_model_drafts_for_another(
    sampling: Sampling, gemma3: OpenModel, tmp_path: Path, checkpoints: Callable[[str], Path]
) -> None:
    options = GenerationOptions(TOKENS, sampling)
    plain = complete(gemma3, nothing, options)
    other = open_model(checkpoints("gemma2"), "cpu")
    for drafting in (gemma3, other):
        drafts = ModelDrafts(drafting.session, 264, 0.1, 256)
        for _ in range(2):  # its session is kept, and goes back to where the rows part
            assert complete(gemma3, drafts, options).tokens == plain.tokens


def test_a_model_that_drafts_for_itself_is_nearly_always_right(gemma3: OpenModel) -> None:
    drafted = complete(gemma3, ModelDrafts(gemma3.session, 264, 0.1, 256), greedy())
    assert drafted.accepted_tokens > 0.9 * drafted.drafted_tokens > 20


class Wrong(Reader):
    """A drafting model that is sure of what never comes."""

    def __init__(self) -> None:
        self.asked = 0

    def logits(self, ids: Sequence[int]) -> Logits:
        self.asked += 1
        return np.eye(10, dtype=np.float32)[7] * 20


def test_a_model_whose_drafts_are_wrong_is_asked_less_and_less() -> None:
    reader = Wrong()
    drafter = ModelDrafter(reader, [1.0, 1.4, 1.8, 2.2], [1], Speed())
    for _ in range(1000):
        drafter.draft(5)
        drafter.take([3])
    assert reader.asked < 40


def test_a_row_longer_than_the_drafting_models_context_is_not_drafted(gemma3: OpenModel) -> None:
    assert complete(gemma3, ModelDrafts(gemma3.session, 264, 0.1, 40), greedy()).drafted_tokens == 0
    assert complete(gemma3, ModelDrafts(gemma3.session, 40, 0.1, 256), greedy()).drafted_tokens == 0  # unknown ids


def test_a_session_of_unknown_costs_is_not_drafted(gemma3: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(gemma3.session(1, 1)), "reading_costs", CachedSession.reading_costs)
    for begin in (lookup, ModelDrafts(gemma3.session, 264, 0.1, 256)):
        assert complete(gemma3, begin, greedy(20)).drafted_tokens == 0


def test_another_tokenizer_is_refused(gemma3: OpenModel, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "other", "gemma3_text")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<start_of_turn>", "<another_turn>"), encoding="utf-8")
    with pytest.raises(GemmaAwqError, match="their tokenizers differ"):
        open_drafts(str(folder), gemma3, lambda _: None)


def test_what_cannot_take_tokens_back_is_refused(checkpoints: Callable[[str], Path]) -> None:
    opened = open_model(checkpoints("gemma"), "cpu", Precision(attention="eager"))
    with pytest.raises(UsageError, match="cannot take tokens back"):
        open_drafts("lookup", opened, lambda _: None)
    assert open_drafts("none", opened, lambda _: None) is nothing
    assert complete(opened, open_drafts(None, opened, lambda _: None), greedy(5)).drafted_tokens == 0


def test_vllm_takes_no_drafts() -> None:
    with pytest.raises(UsageError, match="--draft cannot be used with --engine vllm"):
        EngineOptions(engine="vllm", draft="lookup").require_consistent()


def test_the_python_api(checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints("gemma3_text")
    plain, itself = (load_model(folder, device="cpu", draft=draft) for draft in ("none", str(folder)))
    one, other = (
        model.generate("Hello there", max_new_tokens=40, temperature=0.0, raw=True) for model in (plain, itself)
    )
    assert other.tokens == one.tokens
    assert one.drafted_tokens == 0
    assert other.accepted_tokens > 10
