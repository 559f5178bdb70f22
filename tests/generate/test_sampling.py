"""Sampling: what transformers' own warpers keep, with their probabilities; what the model's makers say unless asked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma_awq_cli.errors import GemmaAwqError, UsageError
from gemma_awq_cli.generate.sampler import Sampler, biased, distribution, largest, penalized, softmax
from gemma_awq_cli.generate.sampling import Sampling, resolve
from gemma_awq_cli.models.forward.session import Logits
from gemma_awq_cli.system.arrays import as_array, as_tensor

GEMMA3_IT = {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=64, top_p=0.95),
        Sampling(top_k=5),
        Sampling(top_p=0.9),
        Sampling(temperature=3.0, top_p=0.999),  # a nucleus beyond the first candidates
        Sampling(temperature=2.0, min_p=0.01),
        Sampling(temperature=4.0, min_p=1e-5),
        Sampling(temperature=1.3, top_k=200, top_p=0.8, min_p=0.02),
        Sampling(top_p=0.0),
    ],
)
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_the_distribution_is_that_of_transformers_warpers(sampling: Sampling, spread: float) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * spread
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature or 1.0))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    expected = warpers(torch.tensor([[1]]), logits[None])[0].softmax(0)
    weights, tokens = distribution(as_array(logits), sampling)
    ours = torch.zeros(5000)
    ours[slice(None) if tokens is None else torch.from_numpy(tokens)] = torch.from_numpy(weights)
    ours /= ours.sum()
    # a token on the edge of the nucleus may fall on either side of a rounded sum
    assert (ours.bool() != expected.bool()).sum() <= 1
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-5)


def test_the_repetition_penalty_is_transformers() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    seen = [3, 7, 7, 12]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits[None].clone())[0]
    torch.testing.assert_close(as_tensor(penalized(as_array(logits), set(seen), 1.3)), expected)


def test_the_logit_bias_is_transformers() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    bias = {3: 2.5, 12: -100.0, 0: 0.25}
    theirs = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = theirs(torch.tensor([[1]]), logits[None].clone())[0]
    torch.testing.assert_close(as_tensor(biased(as_array(logits), list(bias.items()))), expected)


def test_presence_and_frequency_penalties_are_openais() -> None:
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence; c counts what was generated, not the prompt."""
    mu = np.array([5.0, 4.9, 4.0, 3.0, 0.0], np.float32)
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.3), 0, prompt=[2, 2, 2])
    counts = np.zeros(5)
    for _ in range(12):
        wanted = mu - counts * 0.3 - (counts > 0) * 0.5
        token = sampler.sample(mu)
        assert token == int(wanted.argmax())
        counts[token] += 1
    assert counts.tolist() != [12, 0, 0, 0, 0]
    assert counts[4] == 0


class FewTokens:
    """Lets only some tokens come, and keeps those that came."""

    def __init__(self, *allowed: int) -> None:
        self.allowed, self.taken = list(allowed), list[int]()

    def mask(self, logits: Logits) -> Logits:
        masked = np.full_like(logits, -np.inf)
        masked[self.allowed] = logits[self.allowed]
        return masked

    def take(self, token: int) -> None:
        self.taken.append(token)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(temperature=2.0, seed=1), Sampling(top_k=3, top_p=0.9, seed=1)]
)
def test_a_constraint_bounds_every_draw_and_is_told_it(sampling: Sampling) -> None:
    """Even where a bias asks for another token."""
    constraint = FewTokens(4, 9)
    biased_to_7 = replace(sampling, logit_bias=((7, 100.0),), presence_penalty=1.0)
    sampler = Sampler(biased_to_7, 0, (), constraint)
    drawn = [sampler.sample(np.linspace(0, 3, 20, dtype=np.float32)) for _ in range(30)]
    assert set(drawn) == {4, 9}
    assert constraint.taken == drawn


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0, repetition_penalty=1.5),
        Sampling(temperature=0, logit_bias=((40, 9.0),)),
        Sampling(temperature=0.7, top_k=20, seed=3),
        Sampling(temperature=2.0, top_k=64, top_p=0.95, min_p=0.01, seed=3),
        Sampling(temperature=2.0, top_k=500, frequency_penalty=0.5, seed=3),
        Sampling(temperature=2.0, top_k=4000, seed=3),
        Sampling(temperature=2.0, seed=3),
    ],
)
@pytest.mark.parametrize("constraint", [None, FewTokens(4, 9)])
def test_draws_are_the_same_if_the_largest_logits_are_known(sampling: Sampling, constraint: FewTokens | None) -> None:
    rng = np.random.default_rng(5)
    alone, told = (Sampler(sampling, 0, [40, 41], constraint) for _ in range(2))
    known = max(100, told.leading)  # another row may want more
    for logits in rng.standard_normal((20, 5000)).astype(np.float32) * 3:
        assert alone.sample(logits) == told.sample(logits, largest(logits, known))


def test_what_may_change_any_logit_is_not_chosen_from_the_largest() -> None:
    plain = Sampling(temperature=1.0, top_k=64, top_p=0.95)
    assert Sampler(plain, 0, ()).leading == 64
    assert Sampler(Sampling(temperature=0), 0, ()).leading == 1
    assert Sampler(plain, 0, (), FewTokens(1)).leading == 0
    for changed in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1},
                    {"logit_bias": ((1, 1.0),)}, {"top_k": None}, {"top_k": 5000}):  # fmt: skip
        assert Sampler(replace(plain, **changed), 0, ()).leading == 0  # type: ignore[arg-type]


def test_draws_follow_the_distribution() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    sampler = Sampler(Sampling(temperature=1.0, top_k=3, seed=4), 0, ())
    counts = np.bincount([sampler.sample(logits) for _ in range(4000)], minlength=4)
    assert counts[3] == 0
    np.testing.assert_allclose(counts[:3] / 4000, softmax(logits[:3]), rtol=0, atol=0.03)


def test_each_row_has_its_own_random_numbers() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int, row: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), row, ())
        return [sampler.sample(logits) for _ in range(8)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, row)) for seed in range(4) for row in range(4)}) == 16


def test_the_models_generation_config_decides_unless_asked() -> None:
    as_made = resolve(Sampling(seed=5), GEMMA3_IT)
    assert as_made == Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=5)
    assert as_made.summary() == "temperature 1, top-k 64, top-p 0.95, seed 5"
    assert resolve(Sampling(temperature=0.5, seed=5), GEMMA3_IT) == Sampling(0.5, 64, 0.95, 5)
    assert resolve(Sampling(temperature=0.0), GEMMA3_IT).summary() == "greedy"
    assert resolve(Sampling(), {}).greedy
    assert resolve(Sampling(), {"top_k": 64, "top_p": 0.95}).greedy  # do_sample is what switches it on
    assert resolve(Sampling(temperature=0.8, seed=1), {}) == Sampling(temperature=0.8, seed=1)
    assert resolve(Sampling(), {"do_sample": True, "temperature": 0.0}).greedy
    assert resolve(Sampling(), {"repetition_penalty": 1.1}).summary() == "greedy, repetition penalty 1.1"
    declared = {"do_sample": True, "top_k": 64, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    off = resolve(Sampling(top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=1), declared)
    assert off.summary() == "temperature 1, top-p 1, seed 1"
    asked = Sampling(min_p=0.2, presence_penalty=0.5, frequency_penalty=-1, logit_bias=((3, 1.0),), seed=1)
    both = resolve(asked, {})
    assert both.summary() == "temperature 1, min-p 0.2, presence penalty 0.5, frequency penalty -1, seed 1"
    assert both.logit_bias == ((3, 1.0),)
    assert resolve(replace(asked, temperature=0), declared).summary() == (
        "greedy, repetition penalty 1.1, presence penalty 0.5, frequency penalty -1"
    )
    drawn = resolve(Sampling(), GEMMA3_IT)
    assert drawn.seed is not None  # said, so that the run can be repeated
    assert drawn.seed != resolve(Sampling(), GEMMA3_IT).seed


ODD = ["high", "", [], [1], {}, True, False, -1, -0.5, float("nan"), float("inf"), 10**30, 1e300]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") for value in ODD),
        ("top_k", 3.7), ("top_p", 1.5), ("min_p", 2), ("repetition_penalty", 0), ("do_sample", "yes"), ("do_sample", 1),
        ("do_sample", []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("asked", [Sampling(), Sampling(temperature=0.0), Sampling(temperature=0.5)])
def test_an_odd_generation_config_is_an_error_that_names_it(name: str, value: object, asked: Sampling) -> None:
    with pytest.raises(GemmaAwqError, match=f"^Invalid {name} in the model's generation_config.json: ") as caught:
        resolve(asked, {"do_sample": True} | {name: value})
    assert len(caught.value.message) < 250
    assert caught.value.hint


def test_what_a_generation_config_leaves_open_is_no_error() -> None:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample")
    assert resolve(Sampling(), dict.fromkeys(names)).greedy
    assert resolve(Sampling(seed=1), {"do_sample": True, "top_k": 0, "min_p": 0, "top_p": 1}) == Sampling(
        1.0, None, 1, seed=1
    )
    assert resolve(Sampling(seed=1), {"do_sample": True, "top_k": 50.0}).top_k == 50


@pytest.mark.parametrize("asked", [Sampling(temperature=float("nan")), Sampling(temperature=float("inf"))])
def test_a_temperature_that_is_no_number_is_a_usage_error(asked: Sampling) -> None:
    with pytest.raises(UsageError, match="Invalid temperature"):
        resolve(asked, {})
    with pytest.raises(UsageError, match="Invalid top-p"):
        resolve(Sampling(top_p=float("nan")), {})


@pytest.mark.parametrize("temperature", [1e-29, 1e-38, 1e-45, 1e-320])
def test_the_coldest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    logits = np.array([-30.0, 29.9, 30.0, -1.0], np.float32)
    for extra in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert Sampler(Sampling(temperature=temperature, seed=1, **extra), 0, ()).sample(logits) == 2


@pytest.mark.parametrize("kind", ["spread", "ties", "forbidden", "odd size"])
@pytest.mark.parametrize("count", [1, 64, 1024])
def test_the_largest_are_those_of_topk(count: int, kind: str) -> None:
    torch.manual_seed(count)
    scores = torch.randn(262144 if kind != "odd size" else 262207) * 5
    if kind == "ties":
        scores = scores.round()
    if kind == "forbidden":
        scores[200:] = float("-inf")
    found, tokens = largest(as_array(scores), count)
    assert np.array_equal(found, as_array(scores.topk(count).values))
    assert np.array_equal(as_array(scores)[tokens], found)
    assert len(set(tokens.tolist())) == count
