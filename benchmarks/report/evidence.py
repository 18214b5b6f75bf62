"""What was measured, by study, arm and seed, out of the files in ``benchmarks/results``."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.quality.arms import Arm, Base
from benchmarks.quality.plan import CHANCE, studies
from benchmarks.quality.runs import Results, Run
from benchmarks.quality.studies import Study

Curves = Mapping[str, Sequence[float]]
"""What a run measured over training."""
Measure = Callable[[Curves], float]


def last(name: str) -> Measure:
    """The last of a curve."""
    return lambda curves: curves[name][-1]


def mean(name: str) -> Measure:
    """The mean of a curve over training."""
    return lambda curves: float(np.mean(curves[name]))


LOSS = last("loss")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A study whose runs are complete, and their results.

    Attributes:
      task: whose results they are.
      study: what was compared.
      results: of the task.
    """

    task: str
    study: Study
    results: Results

    def arms(self, base: Base) -> list[Arm]:
        """All arms that ran."""
        return [arm for arm in self.study.complete(self.results) if arm.base == base]

    def rate(self, arm: Arm) -> float:
        """The best on the tuning seeds."""
        return self.study.rate(arm, self.results)

    def claimed(self, base: Base) -> Arm:
        """The smoothed arm that claims are tested with.

        Raises:
          ValueError: if there is none.
        """
        arm = self.study.claimed(base, self.results)
        if arm is None:
            raise ValueError(f"in {self.study.name} of {self.task} nothing is claimed")
        return arm

    def values(self, arm: Arm, measure: Measure = LOSS, rate: float | None = None) -> np.ndarray:
        """Of the test seeds, at the best rate if none is given, of shape ``(seeds,)``."""
        runs = self.study.tests(arm, self.rate(arm) if rate is None else rate)
        return np.array([measure(self.curves(run)) for run in runs])

    def curve(self, arm: Arm, name: str, rate: float | None = None) -> np.ndarray:
        """Over training at the best rate if none is given, of shape ``(seeds, evaluations)``."""
        runs = self.study.tests(arm, self.rate(arm) if rate is None else rate)
        return np.array([self.curves(run)[name] for run in runs])

    def swept(self, arm: Arm) -> np.ndarray:
        """The loss at every rate around the best, of shape ``(seeds, rates)``."""
        rates = self.study.around(arm, self.results)
        return np.transpose([self.values(arm, rate=rate) for rate in rates])

    def curves(self, run: Run) -> dict[str, list[float]]:
        """Of a run: held-out losses above chance, as where training diverged, count as chance."""
        measured: Mapping[str, Sequence[float | None]] = self.results.lines[run]["curves"]
        found = {
            name: [float("inf") if value is None else value for value in curve]
            for name, curve in measured.items()
        }
        return {**found, "loss": [min(value, CHANCE[self.task]) for value in found["loss"]]}

    def environment(self) -> str:
        """Device, versions and dates of the runs."""
        study = self.study
        size, arms = (study.layers, study.steps, study.observed), study.complete(self.results)
        lines = [
            line
            for run, line in self.results.lines.items()
            if (run.layers, run.steps, run.observed) == size and run.arm in arms
        ]

        def said(name: str) -> str:
            return " and ".join(sorted({line[name] for line in lines}))

        dates = sorted({line["date"] for line in lines})
        period = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        return (
            f"{said('device')}; Python {said('python')}, JAX {said('jax')}, Optax {said('optax')}, "
            f"depthsmooth {said('depthsmooth')}; {period}"
        )


def gather(directory: pathlib.Path) -> tuple[list[Evidence], list[str]]:
    """All studies whose runs are complete, and the names of those that have only begun."""
    found, begun = [], []
    for path in sorted(directory.glob("*.jsonl")):
        results = Results(path)
        for study in studies(path.stem):
            if study.missing(results):
                begun.append(f"{path.stem}, {study.name}, {study.layers} layers")
            else:
                found.append(Evidence(path.stem, study, results))
    return found, begun
