"""Which runs it takes: each arm's learning rate is tuned on some seeds, and tested on others."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.quality.arms import Arm, Base
from benchmarks.quality.runs import Results, Run

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
CANDIDATES = (0.0625, 0.125, *RATES, 8.0, 16.0)
"""Where the best rate is at the edge of those tried, the next of these is tried too."""
TUNING = tuple(range(100, 103))
TEST = tuple(range(10))


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms to compare on one model.

    Attributes:
      name: what it is called in the report.
      layers: of the model.
      steps: of training.
      arms: all of them are tuned, tested and reported.
      rates: tried on the tuning seeds; a single one is taken as it is.
      untuned: arms that are also tested at the rate 1.
      swept: whether the claim of AdamW, with what it is compared with, is tested at all rates.
      tuning: the seeds that choose rates and claims.
      test: the seeds that are reported.
      observed: whether updates, gradients and hidden states are measured on the test seeds.
    """

    name: str
    layers: int
    steps: int
    arms: tuple[Arm, ...]
    rates: tuple[float, ...] = RATES
    untuned: tuple[Arm, ...] = ()
    swept: bool = False
    tuning: tuple[int, ...] = TUNING
    test: tuple[int, ...] = TEST
    observed: bool = False

    def tests(self, arm: Arm, rate: float) -> list[Run]:
        """The runs that are reported."""
        return [Run(self.layers, self.steps, arm, rate, seed, self.observed) for seed in self.test]

    def sweep(self, arm: Arm, results: Results) -> dict[float, float]:
        """The loss of each rate that has been tried, mean over the tuning seeds."""
        losses = {}
        for rate in CANDIDATES:
            runs = self._tuning(arm, rate)
            if results.lines.keys() >= set(runs):
                losses[rate] = float(np.mean([results.loss(run) for run in runs]))
        return losses

    def rate(self, arm: Arm, results: Results) -> float:
        """The arm's best rate."""
        losses = self.sweep(arm, results)
        return min(losses, key=losses.__getitem__) if len(self.rates) > 1 else self.rates[0]

    def claim(self, base: Base, results: Results) -> Arm | None:
        """The smoothed arm that the tuning seeds choose; None while they have still to."""
        arms = [arm for arm in self.arms if arm.base == base and arm.alpha and not arm.control]
        if len(self.rates) == 1 or any(self._untried(arm, results) for arm in arms):
            return None
        return min(arms, key=lambda arm: min(self.sweep(arm, results).values()), default=None)

    def compared(self, base: Base, results: Results) -> tuple[Arm, ...]:
        """The claim, the base optimizer alone, and all controls of the claim."""
        claim = self.claim(base, results)
        return (claim, claim.plain, *claim.controls) if claim else ()

    def complete(self, results: Results) -> tuple[Arm, ...]:
        """All arms, with the controls of the claims, as far as they are known."""
        bases = dict.fromkeys(arm.base for arm in self.arms)
        added = [arm for base in bases for arm in self.compared(base, results)]
        return tuple(dict.fromkeys([*self.arms, *added]))

    def missing(self, results: Results) -> list[Run]:
        """What can be run now: tests only of those arms that are tuned."""
        wanted = [run for arm in self.untuned for run in self.tests(arm, 1.0)]
        for arm in self.compared("adamw", results) if self.swept else ():
            wanted += [run for rate in self.rates for run in self.tests(arm, rate)]
        for arm in self.complete(results):
            untried = self._untried(arm, results)
            wanted += [run for rate in untried for run in self._tuning(arm, rate)]
            wanted += self.tests(arm, self.rate(arm, results)) if not untried else []
        return [run for run in dict.fromkeys(wanted) if run not in results.lines]

    def expected(self) -> int:
        """About how many runs it takes."""
        tuned = len(self.rates) * len(self.tuning) if len(self.rates) > 1 else 0
        others = len(self.untuned) + len(self.rates) * 5 * self.swept
        return len(self.arms) * (tuned + len(self.test)) + others * len(self.test)

    def _tuning(self, arm: Arm, rate: float) -> list[Run]:
        return [Run(self.layers, self.steps, arm, rate, seed) for seed in self.tuning]

    def _untried(self, arm: Arm, results: Results) -> list[float]:
        """Rates that have to be tried before the best is known."""
        if len(self.rates) == 1:
            return []
        losses = self.sweep(arm, results)
        untried = [rate for rate in self.rates if rate not in losses]
        if untried:
            return untried
        best = min(losses, key=losses.__getitem__)
        beyond = {min(losses): best / 2, max(losses): best * 2}.get(best, best)
        return [] if beyond in losses or beyond not in CANDIDATES else [beyond]
