"""What is claimed of smoothing, and what each claim is worth in every setting that was tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.quality.arms import Arm, Base
from benchmarks.report.evidence import LOSS, Curves, Evidence, Measure, last, mean
from benchmarks.report.statistics import Comparison, Verdict, corrected, judged, overall

REQUIRED = ("retuned", "shuffled")
"""What smoothing has to beat: the base optimizer at its own best rate, and layers out of order."""
CONTROLS = ("shuffled", "shrunk", "mean")
OPPONENTS = ("untuned", "retuned", *CONTROLS)
"""The first is the base optimizer at the task's own rate, with smoothing at the same rate."""


Pair = tuple[np.ndarray, np.ndarray]
"""What was measured of smoothing, and of an opponent, each of shape ``(seeds,)``."""


class Trial(NamedTuple):
    """A claim tried in one setting, before it is judged.

    Attributes:
      setting: where.
      arm: the smoothing that was tested.
      pairs: with each opponent.
      scale: what a gain is a share of; the opponent's if it is not given.
    """

    setting: str
    arm: Arm
    pairs: Mapping[str, Pair]
    scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim in one setting.

    Attributes:
      setting: where it was tried.
      arm: the smoothing that was tested.
      ours: its mean over the test seeds.
      comparisons: with each opponent.
    """

    setting: str
    arm: Arm
    ours: float
    comparisons: Mapping[str, Comparison]

    @property
    def verdict(self) -> Verdict:
        """Of those comparisons that have to be won."""
        return judged([self.comparisons[name] for name in REQUIRED])

    @property
    def beats_all(self) -> bool:
        """Whether it is better than the retuned base and all controls."""
        opponents = [each for name, each in self.comparisons.items() if name != "untuned"]
        return all(each.better for each in opponents)


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is claimed, and what was found.

    Attributes:
      title: the claim.
      measured: what was measured for it; less is better.
      findings: in each setting.
    """

    title: str
    measured: str
    findings: Sequence[Finding]

    @property
    def verdict(self) -> Verdict:
        """Over all settings."""
        return overall([finding.verdict for finding in self.findings])


def claims(evidence: Sequence[Evidence]) -> list[Claim]:
    """All claims but that of cost."""
    grids = [each for each in evidence if each.study.name == "grid"]
    several = [(each, base) for each in grids if len(each.bases) > 1 for base in each.bases]
    images = [each for each in grids if each.task in ("digits", "cifar100")]
    depths = by_depth(evidence)
    observed = [each for each in evidence if each.study.observed]
    return [
        _claim(
            "Better generalisation",
            "loss on held-out data at the end; in digits the share of wrong answers, too",
            [_chosen(each, each.task, LOSS) for each in grids]
            + [_chosen(each, f"{each.task}, wrong answers", _wrong) for each in images],
        ),
        _claim(
            "Faster convergence",
            "held-out loss, mean over training",
            [_chosen(each, each.task, mean("loss")) for each in grids],
        ),
        _claim(
            "Less sensitive to the learning rate",
            "held-out loss at the end, mean over rates from ¼ to 4, minus that at the best rate",
            [_swept(each) for each in grids if each.study.swept],
        ),
        _claim(
            "More help for deeper networks",
            "growth of the final held-out loss from the fewest to the most layers, on a line "
            "through all",
            [_deeper(task, each) for task, each in depths.items()],
        ),
        _claim(
            "Works on Adam, SGD and Muon alike",
            "loss on held-out data at the end",
            [_chosen(each, f"{each.task}, {base}", LOSS, base) for each, base in several],
        ),
        _claim(
            "Less noise in gradients",
            "variance of the gradients of micro-batches, mean over training",
            [_observed(each, each.task, mean("gradient_variance")) for each in observed],
        ),
        _claim(
            "Straighter, more aligned representations",
            "line shape score of hidden states; 1 − cosine of what neighbours add to them; means "
            "over training",
            [
                _observed(each, f"{each.task}, line shape", mean("line_shape_score"))
                for each in observed
            ]
            + [_observed(each, f"{each.task}, misalignment", _misaligned) for each in observed],
        ),
    ]


def _claim(title: str, measured: str, trials: Sequence[Trial]) -> Claim:
    """Compares, and corrects for the number of comparisons."""
    compared = [
        (trial, name, Comparison.between(*pair, trial.scale))
        for trial in trials
        for name, pair in trial.pairs.items()
    ]
    fair = corrected([comparison for _, _, comparison in compared])
    findings = []
    for trial in trials:
        comparisons = {
            name: comparison
            for (of, name, _), comparison in zip(compared, fair, strict=True)
            if of is trial
        }
        ours, _ = trial.pairs["retuned"]
        findings.append(Finding(trial.setting, trial.arm, float(ours.mean()), comparisons))
    return Claim(title, measured, findings)


def _against(arm: Arm, values: Callable[[Arm], np.ndarray]) -> dict[str, Pair]:
    """An arm with its base optimizer and with its controls."""
    controls = {control.control: (values(arm), values(control)) for control in arm.controls}
    return {"retuned": (values(arm), values(arm.plain)), **controls}


def _chosen(evidence: Evidence, setting: str, measure: Measure, base: Base = "adamw") -> Trial:
    arm = evidence.chosen(base)
    pairs = _against(arm, lambda each: evidence.values(each, measure))
    if arm in evidence.study.untuned:
        ours, theirs = (evidence.values(each, measure, rate=1.0) for each in (arm, arm.plain))
        pairs["untuned"] = ours, theirs
    return Trial(setting, arm, pairs)


def _swept(evidence: Evidence) -> Trial:
    arm = evidence.chosen("adamw")
    pairs = _against(arm, lambda each: evidence.sweep(each).mean(axis=1) - evidence.values(each))
    return Trial(evidence.task, arm, pairs, scale=evidence.values(arm.plain).mean())


def _observed(evidence: Evidence, setting: str, measure: Measure) -> Trial:
    [arm] = [arm for arm in evidence.study.arms if arm.alpha and not arm.control]
    return Trial(setting, arm, _against(arm, lambda each: evidence.values(each, measure)))


def _deeper(task: str, depths: Sequence[Evidence]) -> Trial:
    """At each depth of the arm that was chosen there."""
    arms = [each.chosen("adamw") for each in depths]
    doublings = np.log2([each.study.layers for each in depths])

    def growth(change: Callable[[Arm], Arm]) -> np.ndarray:
        losses = [each.values(change(arm)) for each, arm in zip(depths, arms, strict=True)]
        slopes: np.ndarray = np.polyfit(doublings, losses, 1)[0]
        return np.ptp(doublings) * slopes

    ours = growth(lambda arm: arm)
    pairs = {"retuned": (ours, growth(lambda arm: arm.plain))}
    for control in arms[-1].controls:
        name = control.control
        pairs[name] = ours, growth(lambda arm, name=name: arm.controlled(name))
    return Trial(task, arms[-1], pairs, scale=depths[-1].values(arms[-1].plain).mean())


def by_depth(evidence: Sequence[Evidence]) -> dict[str, list[Evidence]]:
    """The studies of depth of each task, from few layers to many."""
    studies = [each for each in evidence if each.study.name == "depth"]
    found: dict[str, list[Evidence]] = {}
    for each in sorted(studies, key=lambda each: each.study.layers):
        found.setdefault(each.task, []).append(each)
    return found


def _wrong(curves: Curves) -> float:
    return 1 - last("accuracy")(curves)


def _misaligned(curves: Curves) -> float:
    return 1 - mean("residual_alignment")(curves)
