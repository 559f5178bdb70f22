"""Log probabilities of continuations are those of one plain forward a request, however they were batched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_awq_cli.bench import scoring
from gemma_awq_cli.bench.scoring import Continuation, score
from gemma_awq_cli.models.forward.loading import OpenModel, open_model
from gemma_awq_cli.models.forward.precision import Precision
from gemma_awq_cli.system.arrays import as_tensor

CPU = torch.device("cpu")


def drawn() -> list[Continuation]:
    """Shared prefixes, equal contexts, answers of one token, an answer of many, and a context that is BOS alone."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda n: torch.randint(6, 260, (n,), generator=generator).tolist()  # noqa: E731
    shots = [2, *draw(40)]
    questions = [[*shots, *draw(n)] for n in (9, 14)]
    made = [Continuation(question, draw(n)) for question in questions for n in (1, 1, 1, 5, 7)]
    twice = draw(4)
    made += [Continuation([*questions[0], *twice[:2]], twice[2:]), Continuation(questions[0], twice)]  # the same row
    return [*made, Continuation([2], draw(60)), Continuation([2, *draw(3)], draw(2))]


@torch.inference_mode()
def expected(opened: OpenModel, one: Continuation) -> tuple[float, bool]:
    """From transformers' logits of the whole text at once."""
    ids = torch.tensor([[*one.context, *one.tokens]])
    logits = opened.model(ids, use_cache=False).logits[0, len(one.context) - 1 : -1].float().log_softmax(-1)
    target = torch.tensor(one.tokens)
    greedy = bool((logits.argmax(-1) == target).all())
    return float(logits.gather(1, target[:, None]).sum()), greedy


@pytest.mark.parametrize("bounds", [{}, {"MAX_ROWS": 3}, {"MAX_TOKENS": 150}, {"MAX_LOGITS": 7}, {"MIN_SHARED": 999}])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_batches_change_nothing(
    kind: str, bounds: dict[str, int], checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bounds.items():
        monkeypatch.setattr(scoring, name, value)
    opened = open_model(checkpoints(kind), CPU, Precision(dtype=torch.float32))
    made, counted = drawn(), []
    given = score(opened, made, counted.append)
    assert sum(counted) == len(made)
    with torch.inference_mode():
        opened.model.float()
    for one, (log_probability, greedy) in zip(made, given, strict=True):
        wanted, is_greedy = expected(opened, one)
        assert log_probability == pytest.approx(wanted, rel=1e-3)
        assert greedy == is_greedy


def test_greedy_is_recognized(checkpoints: Callable[[str], Path]) -> None:
    opened = open_model(checkpoints("gemma"), CPU, Precision(dtype=torch.float32))
    session, tokens = opened.session(1, 16), []
    logits = as_tensor(session.next_logits([[2, 50, 51]]))
    for _ in range(4):
        tokens.append(int(logits.argmax()))
        logits = as_tensor(session.next_logits([[tokens[-1]]]))
    other = [*tokens[:-1], (tokens[-1] + 1) % 260]
    (_, yes), (_, no) = score(
        opened, [Continuation([2, 50, 51], tokens), Continuation([2, 50, 51], other)], lambda _: None
    )
    assert yes
    assert not no


def test_neighbours_read_what_they_share_once(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(checkpoints("gemma"), CPU, Precision(dtype=torch.float32))
    session_type = type(opened.session(1, 1))
    fed: list[int] = []
    last_logits = session_type.last_logits

    def counting(self: object, tokens: list[list[int]], counts: list[int]) -> torch.Tensor:
        fed.append(sum(map(len, tokens)))
        return last_logits(self, tokens, counts)  # type: ignore[arg-type]

    monkeypatch.setattr(session_type, "last_logits", counting)
    context = [2, *range(10, 60)]
    score(opened, [Continuation(context, [100 + n, 7, 8]) for n in range(4)], lambda _: None)
    # the context but its last token once, then that and two tokens for each of the four
    assert sum(fed) == 50 + 4 * 3
    fed.clear()
    score(opened, [Continuation(context, [100 + n]) for n in range(4)], lambda _: None)
    assert sum(fed) == 51  # one row: four answers of one token
