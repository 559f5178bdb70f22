"""The choice within a budget, on models whose KL divergences are given: what is tried, and what is chosen."""

import math

import pytest

from gemma_awq_cli.errors import ThresholdError
from gemma_awq_cli.models.gemma.left_groups import LeftGroup
from gemma_awq_cli.quantize.budget import MOST_IN_16_BITS, Budget, BudgetSearch, Choice, Costs, Trial

LAYERS, WEIGHTS = 8, 100_000
GROUPS = [
    LeftGroup(layer, name, linears)
    for layer in range(LAYERS)
    for name, linears in (("gate_up", ("mlp.gate_proj", "mlp.up_proj")), ("down", ("mlp.down_proj",)))
]
PLAIN_KL = {128: 0.100, 64: 0.085, 32: 0.070}
BITS = {size: 4 + 20 / size for size in PLAIN_KL}
# One group causes a quarter of the divergence, another a tenth; the others share the rest.
SHARES = {group: 0.65 / (len(GROUPS) - 2) for group in GROUPS} | {GROUPS[1]: 0.25, GROUPS[6]: 0.10}


def costs() -> Costs:
    weights = dict.fromkeys(GROUPS, WEIGHTS)
    extra = {size: {group: round(WEIGHTS * (16 - bits) / 8) for group in GROUPS} for size, bits in BITS.items()}
    plain = {size: 10**6 + round(WEIGHTS * len(GROUPS) * bits / 8) for size, bits in BITS.items()}
    return Costs(plain, extra, weights, WEIGHTS * len(GROUPS))


class Model:
    """Measures a choice: its divergence is the sum of what its packed groups cause. held: the share of the gain that
    there really is.
    """

    def __init__(self, max_kl: float | None, max_bytes: int | None = None, held: float = 1.0) -> None:
        self.measured: list[Choice] = []
        self.asked = 0
        self.held = held
        self.costs = costs()
        self.search = BudgetSearch(Budget(max_kl, max_bytes), self.costs, self.measure, self.sensitivities)

    def measure(self, choice: Choice) -> Trial:
        self.measured.append(choice)
        gained = sum(SHARES[group] for group in choice.left) * self.held
        return Trial(choice, self.costs.nbytes(choice), PLAIN_KL[choice.group_size] * (1 - gained))

    def sensitivities(self, group_size: int) -> dict[LeftGroup, float]:
        self.asked += 1
        return {group: share * PLAIN_KL[group_size] for group, share in SHARES.items()}


@pytest.mark.parametrize(("max_kl", "size"), [(0.11, 128), (0.10, 128)])
def test_the_first_that_meets_a_kl_is_the_only_one_tried(max_kl: float, size: int) -> None:
    model = Model(max_kl)
    assert model.search.run().choice == Choice(size)
    assert model.measured == [Choice(size)]
    assert model.asked == 0


def test_a_smaller_group_size_wins_where_16_bits_would_cost_more() -> None:
    model = Model(0.072)
    chosen = model.search.run()
    assert chosen.choice == Choice(32)
    assert [choice.group_size for choice in model.measured if not choice.left] == [128, 64, 32]


def test_a_linear_in_16_bits_is_taken_where_it_costs_less_than_a_smaller_group_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One small group in 16 bits beside groups of 128 is smaller than groups of 32 for all, and enough."""
    monkeypatch.setitem(PLAIN_KL, 64, 0.099)
    model = Model(0.076)
    monkeypatch.setitem(model.costs.extra[128], GROUPS[1], WEIGHTS // 4)  # type: ignore[arg-type]
    chosen = model.search.run()
    assert chosen.choice == Choice(128, (GROUPS[1],))
    assert chosen.kl <= 0.076
    assert chosen.nbytes < model.costs.plain[32]


def test_beyond_the_smallest_groups_the_most_sensitive_linears_stay_in_16_bits() -> None:
    model = Model(0.050)
    chosen = model.search.run()
    assert chosen.kl <= 0.050
    assert set(chosen.choice.left) == {GROUPS[1], GROUPS[6]}  # a quarter and a tenth: 0.0455 at 32
    assert model.asked == 1


@pytest.mark.parametrize("held", [0.5, 0.8, 1.3])
def test_what_is_measured_counts_and_not_what_was_estimated(held: float) -> None:
    model = Model(0.058, held=held)
    chosen = model.search.run()
    assert chosen.kl <= 0.058
    met = [trial for trial in model.search.tried if trial.kl <= 0.058]
    assert chosen.nbytes == min(trial.nbytes for trial in met)


def test_a_kl_that_nothing_has_is_an_error_with_exit_code_3_that_says_the_best() -> None:
    model = Model(0.01)
    with pytest.raises(ThresholdError) as raised:
        model.search.run()
    best = min(model.search.tried, key=lambda trial: trial.kl)
    weights = sum(WEIGHTS for _ in best.choice.left)
    assert weights <= MOST_IN_16_BITS * WEIGHTS * len(GROUPS)
    assert raised.value.exit_code == 3
    assert f"{best.kl:.4f}" in raised.value.message
    assert "in 16 bits" in raised.value.message
    # the hint can be followed: with its bound, what was the best is enough
    bound = float(raised.value.hint.split("--max-kl ")[1].split()[0])
    assert bound >= best.kl
    assert Model(bound).search.run().kl <= bound


def test_a_size_alone_takes_the_smallest_groups_that_fit_and_fills_the_rest() -> None:
    room = costs()
    one = room.extra[64][GROUPS[0]]
    exact = Model(None, room.plain[64])
    assert exact.search.run().choice == Choice(64)
    assert exact.asked == 0
    two = Model(None, room.plain[32] + 2 * one)
    assert two.search.run().choice == Choice(32, (GROUPS[1], GROUPS[6]))
    assert two.measured[0] == Choice(32)


def test_a_size_that_nothing_has_is_an_error_before_anything_is_measured() -> None:
    least = costs().plain[128]
    model = Model(None, least - 1)
    with pytest.raises(ThresholdError) as raised:
        model.search.run()
    assert model.measured == []
    assert f"--max-size {least}" in raised.value.hint
    assert Model(None, least).search.run().choice == Choice(128)


def test_both_bounds_hold_or_it_is_an_error() -> None:
    room = costs()
    fits = room.plain[32] + 3 * room.extra[32][GROUPS[0]]
    chosen = Model(0.050, fits).search.run()
    assert chosen.kl <= 0.050
    assert chosen.nbytes <= fits
    model = Model(0.050, room.plain[64])
    with pytest.raises(ThresholdError) as raised:
        model.search.run()
    assert all(trial.nbytes <= room.plain[64] for trial in model.search.tried)
    assert "--max-size" in raised.value.hint


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_divergence_that_is_no_number_meets_nothing(kl: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLAIN_KL, 128, kl)
    model = Model(0.2)
    assert model.search.run().choice.group_size == 64


def test_sensitivities_that_are_all_zero_do_not_stop_the_search() -> None:
    model = Model(0.06)
    search = BudgetSearch(Budget(0.02, None), model.costs, model.measure, lambda _: dict.fromkeys(GROUPS, 0.0))
    with pytest.raises(ThresholdError):
        search.run()
    assert any(choice.left for choice in model.measured)
