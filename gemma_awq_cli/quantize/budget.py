"""Choosing a group size, and the linears that stay in 16 bits, so that an artifact meets a bound of KL or of size.

What is tried is decided here, from sizes that are known beforehand, from the KL divergences that were measured so far,
and from how sensitive each group of linears is. Nothing here reads or quantizes anything.

The divergences that single groups cause add up to the whole model's nearly exactly, so the gain from leaving some of
them in 16 bits is estimated by their share of the sum; what counts in the end is what is measured.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gemma_awq_cli.errors import ThresholdError
from gemma_awq_cli.models.gemma.left_groups import LeftGroup
from gemma_awq_cli.system.sizes import format_bytes

MOST_IN_16_BITS = 0.25  # of the weights of linears: beyond that an artifact is no 4-bit one any more
MOST_MIXTURES = 6  # that are measured, with some linears in 16 bits
WORTH_TRYING = 0.0005  # the share of its size that another artifact must save
OVERSHOOT = 1.02  # how much more gain than the bound asks for is aimed at


@dataclass(frozen=True)
class Budget:
    """max_kl: nats per token on the held-out rows; max_bytes: of the safetensors files. At least one is given."""

    max_kl: float | None
    max_bytes: int | None

    def describe(self) -> str:
        """Return the bounds in a few words."""
        kl = [] if self.max_kl is None else [f"a KL divergence of at most {self.max_kl:g}"]
        size = [] if self.max_bytes is None else [f"at most {format_bytes(self.max_bytes)}"]
        return " and ".join(kl + size)

    def meets_size(self, nbytes: int) -> bool:
        """Whether files of this size are small enough."""
        return self.max_bytes is None or nbytes <= self.max_bytes

    def meets_kl(self, kl: float) -> bool:
        """Whether a measured divergence is small enough. NaN is not."""
        return self.max_kl is None or kl <= self.max_kl


@dataclass(frozen=True)
class Choice:
    """left: the groups of linears that stay in 16 bits."""

    group_size: int
    left: tuple[LeftGroup, ...] = ()

    def describe(self) -> str:
        """Return the choice in a few words: `groups of 64, 3 linears in 16 bits`."""
        count = sum(len(group.linears) for group in self.left)
        linears = f", {count} linear{'s' if count > 1 else ''} in 16 bits" if count else ""
        return f"groups of {self.group_size}{linears}"


@dataclass(frozen=True)
class Trial:
    """A choice that was measured. nbytes: of the safetensors files."""

    choice: Choice
    nbytes: int
    kl: float

    def describe(self) -> str:
        """Return the choice and its figures."""
        return f"{self.choice.describe()}: KL {self.kl:.4f}, {format_bytes(self.nbytes)}"


@dataclass(frozen=True)
class Costs:
    """What is known without quantizing.

    plain: group size -> bytes of the files with all linears packed; extra: group size -> by how many bytes each group
    of linears is larger in 16 bits; weights: how many weights each group has; all_weights: how many all linears have.
    """

    plain: Mapping[int, int]
    extra: Mapping[int, Mapping[LeftGroup, int]]
    weights: Mapping[LeftGroup, int]
    all_weights: int

    def nbytes(self, choice: Choice) -> int:
        """Return the bytes of the files: exact without groups in 16 bits, and a few too many with them."""
        return self.plain[choice.group_size] + sum(self.extra[choice.group_size][group] for group in choice.left)


@dataclass
class BudgetSearch:
    """Finds the smallest artifact with a KL divergence within the budget, or the best of those that are small enough.

    measure: quantizes (or changes what was quantized), and measures. sensitivities: the KL divergence that each group
    of linears causes alone, at a group size; it is asked for once, and only if linears may have to stay in 16 bits.
    """

    budget: Budget
    costs: Costs
    measure: Callable[[Choice], Trial]
    sensitivities: Callable[[int], Mapping[LeftGroup, float]]
    tried: list[Trial] = field(default_factory=list)
    _order: list[tuple[LeftGroup, float]] = field(default_factory=list)

    def run(self) -> Trial:
        """Return the trial that was chosen. Raises ThresholdError if none meets the budget."""
        sizes = fitting_sizes(self.budget, self.costs)
        if self.budget.max_kl is None:
            self._try(Choice(sizes[-1]))
            if left := self._filling(sizes[-1]):
                self._try(Choice(sizes[-1], left))
            return min(self.tried, key=lambda trial: trial.kl)
        for size in sizes:
            if self.budget.meets_kl(self._try(Choice(size)).kl):
                break
        for _ in range(MOST_MIXTURES):
            if (choice := self._next_mixture()) is None:
                break
            self._try(choice)
        if (best := self._smallest_met()) is None:
            raise self._missed()
        return best

    def _try(self, choice: Choice) -> Trial:
        trial = self.measure(choice)
        self.tried.append(trial)
        return trial

    def _smallest_met(self) -> Trial | None:
        met = [trial for trial in self.tried if self.budget.meets_kl(trial.kl)]
        return min(met, key=lambda trial: trial.nbytes, default=None)

    def _plain(self) -> list[Trial]:
        return [trial for trial in self.tried if not trial.choice.left]

    def _shares(self, group_size: int) -> list[tuple[LeftGroup, float]]:
        """Each group's share of the whole divergence, those that gain most per byte first."""
        if not self._order:
            found = {group: max(0.0, kl) for group, kl in self.sensitivities(group_size).items()}
            total = sum(found.values()) or 1.0
            extra = self.costs.extra[group_size]
            order = sorted(found, key=lambda group: -found[group] / extra[group])
            self._order = [(group, found[group] / total) for group in order]
        return self._order

    def _longest(self, group_size: int) -> list[tuple[LeftGroup, float]]:
        """The groups that may stay in 16 bits together, within the size and within `MOST_IN_16_BITS`."""
        room = None if self.budget.max_bytes is None else self.budget.max_bytes - self.costs.plain[group_size]
        weights = int(MOST_IN_16_BITS * self.costs.all_weights)
        extra, chosen = self.costs.extra[group_size], []
        if all(weights < self.costs.weights[g] or (room is not None and room < extra[g]) for g in extra):
            return []  # without measuring anything
        for group, share in self._shares(group_size):
            if self.costs.weights[group] <= weights and (room is None or extra[group] <= room):
                weights -= self.costs.weights[group]
                room = None if room is None else room - extra[group]
                chosen.append((group, share))
        return chosen

    def _filling(self, group_size: int) -> tuple[LeftGroup, ...]:
        return _groups(self._longest(group_size))

    def _next_mixture(self) -> Choice | None:
        """The smallest choice with groups in 16 bits that should meet the KL and is smaller than what meets it."""
        best = self._smallest_met()
        limit = self.costs.nbytes(best.choice) * (1 - WORTH_TRYING) if best is not None else None
        tried = {trial.choice for trial in self.tried}
        found = []
        for plain in self._plain():
            size = plain.choice.group_size
            if self.budget.meets_kl(plain.kl) or (limit is not None and self.costs.plain[size] >= limit):
                continue
            longest = self._longest(size)
            count = self._count_needed(plain, longest)
            while count <= len(longest) and Choice(size, _groups(longest[:count])) in tried:
                count += 1
            if 0 < count <= len(longest):
                choice = Choice(size, _groups(longest[:count]))
                if limit is None or self.costs.nbytes(choice) < limit:
                    found.append(choice)
        if not found and best is None:  # the prediction may be wrong: only a measurement says that it cannot be met
            last = self._plain()[-1].choice.group_size
            choice = Choice(last, self._filling(last))
            found = [choice] if choice.left and choice not in tried else []
        return min(found, key=self.costs.nbytes, default=None)

    def _count_needed(self, plain: Trial, longest: Sequence[tuple[LeftGroup, float]]) -> int:
        """How many of the first groups should be enough; more than there are if all are not.

        It is read from a line through the measurements on both sides of the bound, or through the outermost ones.
        """
        bound = self.budget.max_kl
        assert bound is not None
        shares = dict(longest)
        mixtures = [one for one in self.tried if one.choice.left and one.choice.group_size == plain.choice.group_size]
        points = sorted([(0.0, plain.kl), *((sum(shares.get(g, 0.0) for g in t.choice.left), t.kl) for t in mixtures)])
        met = [point for point in points if self.budget.meets_kl(point[1])]
        over = [point for point in points if point not in met and (not met or point[0] < met[0][0])]
        low = over[-1]
        if met:
            slope = (low[1] - met[0][1]) / (met[0][0] - low[0])
        else:
            slope = (plain.kl - low[1]) / low[0] if low[0] else plain.kl  # by the estimate
        needed = low[0] + OVERSHOOT * (low[1] - bound) / slope if slope > 0 else math.inf
        gained = 0.0
        for count, (_, share) in enumerate(longest, 1):
            gained += share
            if gained >= needed:
                return count
        return len(longest) + 1

    def _missed(self) -> ThresholdError:
        best = min(self.tried, key=lambda trial: trial.kl)
        hint = f"Use --max-kl {_rounded_up(best.kl)} with --resume, which finds it without quantizing again"
        more = "" if self.budget.max_bytes is None else ", or allow more with --max-size"
        return ThresholdError(
            f"No choice has {self.budget.describe()}. The best of {len(self.tried)} that were measured is "
            f"{best.describe()}.",
            f"{hint}{more}.",
        )


def fitting_sizes(budget: Budget, costs: Costs) -> list[int]:
    """Return the group sizes with which all linears packed are small enough, the smallest files first.

    Raises ThresholdError if there is none.
    """
    sizes = sorted(costs.plain, key=lambda size: costs.plain[size])
    fitting = [size for size in sizes if budget.meets_size(costs.plain[size])]
    if not fitting:
        least = costs.plain[sizes[0]]
        raise ThresholdError(
            f"No choice is small enough: groups of {sizes[0]} already take {format_bytes(least)} "
            f"({least} bytes of safetensors files).",
            f"Use --max-size {least} or more.",
        )
    return fitting


def _groups(chosen: Sequence[tuple[LeftGroup, float]]) -> tuple[LeftGroup, ...]:
    """The groups in the order of the model, so that equal choices are equal."""
    return tuple(sorted((group for group, _ in chosen), key=lambda group: (group.layer, group.linears)))


def _rounded_up(kl: float) -> str:
    """A divergence with four digits behind the point that is not less."""
    return f"{-(-kl // 0.0001) * 0.0001:.4f}"
