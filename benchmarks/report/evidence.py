"""What was measured, by study, arm and seed, out of the files in ``benchmarks/results``."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.quality.arms import Arm, Base
from benchmarks.quality.plan import studies
from benchmarks.quality.runs import Results
from benchmarks.quality.studies import Study

Curves = Mapping[str, Sequence[float | None]]
"""What a run measured over training; None where it diverged."""
Measure = Callable[[Curves], float]
"""A number of the curves of a run."""


def last(name: str) -> Measure:
    """The last of a curve; inf where training diverged."""
    return lambda curves: _number(curves[name][-1])


def mean(name: str) -> Measure:
    """The mean of a curve over training."""
    return lambda curves: float(np.mean([_number(value) for value in curves[name]]))


LOSS = last("loss")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A study and its results.

    Attributes:
      task: whose results they are.
      study: what was compared.
      results: of the task.
    """

    task: str
    study: Study
    results: Results

    @property
    def bases(self) -> list[Base]:
        """The base optimizers that were compared."""
        return list(dict.fromkeys(arm.base for arm in self.study.arms))

    def arms(self, base: Base) -> list[Arm]:
        """All arms that ran."""
        return [arm for arm in self.study.complete(self.results) if arm.base == base]

    def rate(self, arm: Arm) -> float:
        """The best on the tuning seeds."""
        return self.study.rate(arm, self.results)

    def chosen(self, base: Base) -> Arm:
        """The smoothed arm that the tuning seeds chose.

        Raises:
          ValueError: if they were not asked.
        """
        arm = self.study.claim(base, self.results)
        if arm is None:
            raise ValueError(f"in {self.study.name} of {self.task} nothing is chosen")
        return arm

    def values(self, arm: Arm, measure: Measure = LOSS, rate: float | None = None) -> np.ndarray:
        """Of the test seeds, at the best rate if none is given, of shape ``(seeds,)``."""
        runs = self.study.tests(arm, self.rate(arm) if rate is None else rate)
        return np.array([measure(self.results.lines[run]["curves"]) for run in runs])

    def curve(self, arm: Arm, name: str, rate: float | None = None) -> np.ndarray:
        """Over training, of shape ``(seeds, evaluations)``."""
        runs = self.study.tests(arm, self.rate(arm) if rate is None else rate)
        curves = [self.results.lines[run]["curves"][name] for run in runs]
        return np.array([[_number(value) for value in curve] for curve in curves])

    def sweep(self, arm: Arm) -> np.ndarray:
        """The loss at every rate, of shape ``(seeds, rates)``."""
        return np.transpose([self.values(arm, rate=rate) for rate in self.study.rates])

    def environment(self) -> str:
        """Device, versions and dates of the runs."""
        study = self.study
        lines = [
            line
            for run, line in self.results.lines.items()
            if (run.layers, run.steps, run.observed) == (study.layers, study.steps, study.observed)
        ]

        def said(name: str) -> str:
            return " and ".join(sorted({line[name] for line in lines}))

        dates = sorted({line["date"] for line in lines})
        period = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        return (
            f"{said('device')}; Python {said('python')}, JAX {said('jax')}, Optax {said('optax')}, "
            f"depthsmooth {said('depthsmooth')}; {period}"
        )


def gather(directory: pathlib.Path) -> list[Evidence]:
    """All studies whose runs are complete."""
    found = []
    for path in sorted(directory.glob("*.jsonl")):
        results = Results(path)
        for study in studies(path.stem):
            if not study.missing(results):
                found.append(Evidence(path.stem, study, results))
    return found


def _number(value: float | None) -> float:
    return float("inf") if value is None else value
