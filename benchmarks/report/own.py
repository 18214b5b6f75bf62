"""The control that was missing: a learning rate of the layers' own, and no mixing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks.quality.arms import Arm
from benchmarks.report.evidence import Evidence
from benchmarks.report.markdown import difference, table
from benchmarks.report.statistics import Comparison, corrected


@dataclasses.dataclass(frozen=True)
class Own:
    """What it changes in one task, with AdamW.

    Attributes:
      task: its name.
      base: the loss of the base optimizer at its best rate, mean over the test seeds.
      scaled: the base optimizer with the best rate for the layers.
      smoothed: the smoothed arm, of those with one rate for all.
      both: the smoothed arm, of those with a rate for the layers.
      gained: ``scaled`` minus base.
      alone: ``smoothed`` minus base.
      mixing: ``both`` minus ``scaled``: what mixing adds.
    """

    task: str
    base: float
    scaled: Arm
    smoothed: Arm
    both: Arm
    gained: Comparison
    alone: Comparison
    mixing: Comparison


def own_rates(evidence: Sequence[Evidence]) -> list[Own]:
    """In every task where it was tuned; with Holm's correction over these."""
    studies = [each for each in evidence if each.study.name == "own"]
    found = [_of_task(each) for each in studies]
    for name in ("gained", "alone", "mixing"):
        fair = corrected([getattr(each, name) for each in found])
        found = [
            dataclasses.replace(each, **{name: one}) for each, one in zip(found, fair, strict=True)
        ]
    return found


def pair_of(evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Losses of smoothing and of the base optimizer, each with a rate of the layers' own."""
    both = evidence.claimed("adamw")
    return evidence.values(both), evidence.values(scaled_of(evidence))


def scaled_of(evidence: Evidence) -> Arm:
    """The base optimizer with the best rate for the layers."""
    return evidence.study.scaled("adamw", evidence.results)


def _of_task(evidence: Evidence) -> Own:
    study, results = evidence.study, evidence.results
    plain, scaled, both = Arm("adamw"), scaled_of(evidence), evidence.claimed("adamw")
    alone = [arm for arm in study.arms if arm.alpha and not arm.control and arm.own == 1]
    smoothed = min(alone, key=lambda arm: study.loss(arm, results))
    base = evidence.values(plain)
    return Own(
        evidence.task,
        float(base.mean()),
        scaled,
        smoothed,
        both,
        Comparison.between(evidence.values(scaled), base),
        Comparison.between(evidence.values(smoothed), base),
        Comparison.between(*pair_of(evidence)),
    )


def section(found: Sequence[Own]) -> str:
    """The table."""
    if not found:
        return ""
    rows = [
        [
            each.task,
            f"{each.base:.4f}",
            f"{each.scaled.own:g}×",
            difference(each.gained),
            f"`{each.smoothed}`",
            difference(each.alone),
            f"`{each.both}`",
            difference(each.mixing),
        ]
        for each in found
    ]
    header = [
        "task", "AdamW", "the layers' own rate", "minus AdamW", "smoothed, one rate for all",
        "minus AdamW", "smoothed, with the layers' own rate", "minus AdamW with it",
    ]  # fmt: skip
    return (
        "## The layers' own rate\n\nA control that mixes nothing: the layers' updates are "
        "multiplied by a factor, tuned on the tuning seeds beside the rate of everything else. "
        "The last column is what mixing adds to it.\n\n" + table(header, rows)
    )
