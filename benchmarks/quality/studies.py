"""Which runs it takes: each arm's learning rate is tuned on some seeds, and tested on others."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.quality.arms import Arm, Base
from benchmarks.quality.runs import Results, Run
from benchmarks.quality.task import TUNING

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
CANDIDATES = tuple(round(2 ** (power / 2), 4) for power in range(-8, 9))
"""From 1/16 to 16 in steps of √2. Those beside the best are tried too, also beyond an edge."""
TUNED = tuple(range(TUNING, TUNING + 3))
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

    def tests(self, arm: Arm, rate: float) -> list[Run]:
        """The runs that are reported."""
        return [Run(self.layers, self.steps, arm, rate, seed, self.observed) for seed in self.test]

    def tried(self, arm: Arm, results: Results) -> dict[float, float]:
        """The loss of each rate that has been tried, mean over the tuning seeds."""
        losses = {}
        for rate in CANDIDATES:
            runs = self._tuning(arm, rate)
            if results.lines.keys() >= set(runs):
                losses[rate] = float(np.mean([results.loss(run) for run in runs]))
        return losses

    def rate(self, arm: Arm, results: Results) -> float:
        """The arm's best rate."""
        losses = self.tried(arm, results)
        return min(losses, key=losses.__getitem__) if len(self.rates) > 1 else self.rates[0]

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
        if any(self._untried(arm, results) for arm in arms):
            return None
        return min(arms, key=lambda arm: min(self.tried(arm, results).values()), default=None)

    def compared(self, base: Base, results: Results) -> tuple[Arm, ...]:
        """The claimed arm, the base optimizer alone, and all controls."""
        arm = self.claimed(base, results)
        return (arm, arm.plain, *arm.controls) if arm else ()

    def complete(self, results: Results) -> tuple[Arm, ...]:
        """All arms, with the controls of those that are claimed, as far as they are known."""
        bases = dict.fromkeys(arm.base for arm in self.arms)
        added = [arm for base in bases for arm in self.compared(base, results)]
        return tuple(dict.fromkeys([*self.arms, *added]))

    def missing(self, results: Results) -> list[Run]:
        """What can be run now: tests only of those arms that are tuned."""
        compared = self.compared("adamw", results)
        wanted = []
        for arm in self.complete(results):
            untried = self._untried(arm, results)
            wanted += [run for rate in untried for run in self._tuning(arm, rate)]
            if untried:
                continue
            rates = [self.rate(arm, results)]
            rates += self.around(arm, results) if self.swept and arm in compared else []
            rates += [1.0] if arm in (*self.untuned, *compared) and self.untuned else []
            wanted += [run for rate in rates for run in self.tests(arm, rate)]
        return [run for run in dict.fromkeys(wanted) if run not in results.lines]

    def expected(self) -> int:
        """About how many runs it takes."""
        tuned = (len(self.rates) + 2) * len(self.tuning) if len(self.rates) > 1 else 0
        others = len(self.untuned) + len(RATES) * 5 * self.swept
        return len(self.arms) * (tuned + len(self.test)) + others * len(self.test)

    def _tuning(self, arm: Arm, rate: float) -> list[Run]:
        return [Run(self.layers, self.steps, arm, rate, seed) for seed in self.tuning]

    def _untried(self, arm: Arm, results: Results) -> list[float]:
        """Rates that have to be tried before the best is known."""
        if len(self.rates) == 1:
            return []
        losses = self.tried(arm, results)
        untried = [rate for rate in self.rates if rate not in losses]
        if untried:
            return untried
        best = min(losses, key=losses.__getitem__)
        place = CANDIDATES.index(best)
        outside = {min(losses): place - 2, max(losses): place + 2}.get(best)
        for places in ([] if outside is None else [outside], [place - 1, place + 1]):
            rates = [CANDIDATES[k] for k in places if 0 <= k < len(CANDIDATES)]
            if untried := [rate for rate in rates if rate not in losses]:
                return untried
        return []
