"""Which runs it takes: each arm's learning rate is tuned on some seeds, and tested on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.quality.arms import Arm, Base
from benchmarks.quality.runs import Results, Run
from benchmarks.quality.task import TUNING

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
CANDIDATES = tuple(round(2 ** (power / 2), 4) for power in range(-8, 9))
"""From 1/16 to 16 in steps of √2. Those beside the best are tried too, also beyond an edge."""
SCREENING = 3
"""How many of the tuning seeds try all rates; the others, the best of them and those beside it."""
TUNED = tuple(range(TUNING, TUNING + 6))
TESTED = tuple(range(10))


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms to compare on one model.

    Attributes:
      name: what it is called in the report.
      layers: of the model.
      steps: of training.
      arms: all of them are tuned, tested and reported.
      claim: the smoothed arm that claims are tested with; None to let the tuning seeds choose one
        for each base optimizer.
      rates: tried on the tuning seeds first; a single one is taken as it is.
      untuned: arms that are also tested at the rate 1.
      swept: whether AdamW's claim and what it is compared with are also tested at all rates around
        the best of each.
      tuning: the seeds that choose rates and claims.
      test: the seeds that are reported.
      observed: whether updates, gradients and hidden states are measured on the test seeds.
    """

    name: str
    layers: int
    steps: int
    arms: tuple[Arm, ...]
    claim: Arm | None = None
    rates: tuple[float, ...] = RATES
    untuned: tuple[Arm, ...] = ()
    swept: bool = False
    tuning: tuple[int, ...] = TUNED
    test: tuple[int, ...] = TESTED
    observed: bool = False

    @property
    def bases(self) -> list[Base]:
        """The base optimizers, in their order."""
        return list(dict.fromkeys(arm.base for arm in self.arms))

    def tests(self, arm: Arm, rate: float) -> list[Run]:
        """The runs that are reported."""
        return [Run(self.layers, self.steps, arm, rate, seed, self.observed) for seed in self.test]

    def tried(self, arm: Arm, results: Results, seeds: Sequence[int]) -> dict[float, float]:
        """The loss of each rate that has been tried on all of some seeds, mean over them."""
        losses = {}
        for rate in CANDIDATES:
            runs = self._runs(arm, rate, seeds)
            if results.lines.keys() >= set(runs):
                losses[rate] = float(np.mean([results.loss(run) for run in runs]))
        return losses

    def loss(self, arm: Arm, results: Results) -> float:
        """At the arm's best rate, mean over the tuning seeds."""
        return min(self.tried(arm, results, self.tuning).values())

    def rate(self, arm: Arm, results: Results) -> float:
        """The arm's best rate."""
        if len(self.rates) == 1:
            return self.rates[0]
        return _best(self.tried(arm, results, self.tuning))

    def around(self, arm: Arm, results: Results) -> list[float]:
        """The arm's best rate times each of ``RATES``."""
        best = self.rate(arm, results)
        return [float(f"{best * factor:.5g}") for factor in RATES]

    def claimed(self, base: Base, results: Results) -> Arm | None:
        """The smoothed arm that claims are tested with; None while it has still to be chosen."""
        arms = [arm for arm in self.arms if arm.base == base and arm.alpha and not arm.control]
        if self.claim in arms:
            arms = [self.claim]
        elif len(self.rates) == 1:
            return None
        if any(self._untuned(arm, results) for arm in arms):
            return None
        if len(arms) == 1:
            return arms[0]
        return min(arms, key=lambda arm: self.loss(arm, results), default=None)

    def scaled(self, base: Base, results: Results) -> Arm:
        """The base optimizer with the best rate for the layers, as the tuning seeds have it."""
        arms = [arm for arm in self.arms if arm.base == base and not arm.alpha]
        return min(arms, key=lambda arm: self.loss(arm, results))

    def compared(self, base: Base, results: Results) -> tuple[Arm, ...]:
        """The claimed arm, the base optimizer alone, and all controls."""
        arm = self.claimed(base, results)
        return (arm, arm.plain, *arm.controls) if arm else ()

    def complete(self, results: Results) -> tuple[Arm, ...]:
        """All arms, with the controls of those that are claimed, as far as they are known."""
        added = [arm for base in self.bases for arm in self.compared(base, results)]
        return tuple(dict.fromkeys([*self.arms, *added]))

    def missing(self, results: Results) -> list[Run]:
        """What can be run now: tests only of those arms that are tuned."""
        compared = self.compared("adamw", results)
        wanted = []
        for arm in self.complete(results):
            if untuned := self._untuned(arm, results):
                wanted += untuned
                continue
            rates = [self.rate(arm, results)]
            rates += self.around(arm, results) if self.swept and arm in compared else []
            rates += [1.0] if arm in (*self.untuned, *compared) and self.untuned else []
            wanted += [run for rate in rates for run in self.tests(arm, rate)]
        return [run for run in dict.fromkeys(wanted) if run not in results.lines]

    def is_tuned(self, arm: Arm, results: Results) -> bool:
        """Whether its best rate is known."""
        return not self._untuned(arm, results)

    def expected(self) -> int:
        """About how many runs it takes."""
        tuned = (len(self.rates) + 3) * SCREENING + 4 * len(self.tuning[SCREENING:])
        if len(self.rates) == 1:
            return len(self.arms) * len(self.test)
        arms = len(self.arms) + sum(len(Arm(base, alpha=1.0).controls) for base in self.bases)
        others = len(self.untuned) + len(RATES) * 5 * self.swept
        return arms * (tuned + len(self.test)) + others * len(self.test)

    def _runs(self, arm: Arm, rate: float, seeds: Sequence[int]) -> list[Run]:
        return [Run(self.layers, self.steps, arm, rate, seed) for seed in seeds]

    def _untuned(self, arm: Arm, results: Results) -> list[Run]:
        """What has to be run before the best rate is known."""
        if len(self.rates) == 1:
            return []
        screening = self.tuning[:SCREENING]
        screened = self.tried(arm, results, screening)
        confirmed = self.tried(arm, results, self.tuning)
        stages = (
            (screening, set(self.rates), screened),
            (screening, _beyond(screened), screened),
            (screening, _beside(screened), screened),
            (self.tuning, _beside(screened), confirmed),
            (self.tuning, _beside(confirmed), confirmed),
        )
        for seeds, rates, tried in stages:
            if untried := sorted(rates - set(tried)):
                return [run for rate in untried for run in self._runs(arm, rate, seeds)]
        return []


def _best(losses: Mapping[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def _beyond(losses: Mapping[float, float]) -> set[float]:
    """Where the best rate is at the edge, half or double of it."""
    if not losses or _best(losses) not in (min(losses), max(losses)):
        return set()
    return _near(_best(losses), -2 if _best(losses) == min(losses) else 2)


def _beside(losses: Mapping[float, float]) -> set[float]:
    """The best rate and those next to it."""
    return _near(_best(losses), -1, 0, 1) if losses else set()


def _near(rate: float, *steps: int) -> set[float]:
    places = [CANDIDATES.index(rate) + step for step in steps]
    return {CANDIDATES[place] for place in places if 0 <= place < len(CANDIDATES)}
