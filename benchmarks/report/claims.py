"""What is claimed of smoothing, and what each claim is worth in every setting that was tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks import results
from benchmarks.quality.arms import Arm, Base
from benchmarks.report import own
from benchmarks.report.evidence import LOSS, Curves, Evidence, Measure, last, mean
from benchmarks.report.statistics import Comparison, Verdict, corrected, judged, overall

OPPONENTS = ("untuned", "retuned", "own", "deepest", "shuffled", "shrunk", "mean")
"""The first is the base optimizer at the task's own learning rate, with smoothing at the same."""
REQUIRED = ("retuned", "own", "deepest", "shuffled", "shrunk")
AT_ONE_RATE = (
    "Compared at one learning rate, but for “each at its best”; the base has to be beaten both ways"
)
SHARE = 0.05
"""The smallest gain that matters, of what the base optimizer has, for all but losses."""

Pair = tuple[np.ndarray, np.ndarray]
"""What was measured of smoothing, and of an opponent, each of shape ``(seeds,)``."""


def relevant_share() -> float:
    """The smallest gain that matters in losses: half of that of the published replication."""
    [published, *_] = (results.read("published") or {})["rows"]
    return float(-0.5 * published["difference"] / published["adamw"])


@dataclasses.dataclass(frozen=True)
class Trial:
    """A claim tried in one setting.

    Attributes:
      setting: where.
      arm: the smoothing that was tested.
      pairs: with each opponent.
      relevant: the smallest gain that matters.
      task: if it is about a task's loss at the end.
      required: the opponents that have to be beaten, as far as there are such.
    """

    setting: str
    arm: Arm
    pairs: Mapping[str, Pair]
    relevant: float
    task: str = ""
    required: tuple[str, ...] = REQUIRED


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found in one setting.

    Attributes:
      trial: what was compared.
      comparisons: with each opponent, corrected for all of the claim.
      verdict: of those that have to be won.
    """

    trial: Trial
    comparisons: Mapping[str, Comparison]
    verdict: Verdict

    @property
    def ours(self) -> float:
        """What was measured of smoothing at its best rate, mean over the test seeds."""
        return float(self.trial.pairs["retuned"][0].mean())

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
    several = [
        (each, base) for each in grids if len(each.study.bases) > 1 for base in each.study.bases
    ]
    repeated = [each for each in grids if each.task in ("digits", "mlp", "cifar100")]
    owns = {each.task: own.pair_of(each) for each in evidence if each.study.name == "own"}
    observed = [each for each in evidence if each.study.observed]
    return [
        _claim(
            "Better generalisation",
            "loss on held-out data at the end; of images, which are seen several times, also the "
            "share of wrong answers, and how much larger the loss is than in training",
            [_loss(each, each.task, owns=owns) for each in grids]
            + [_other(each, f"{each.task}, wrong answers", _wrong) for each in repeated]
            + [_other(each, f"{each.task}, gap to training", _gap) for each in repeated],
        ),
        _claim(
            "Faster convergence",
            "share of the training until the held-out loss is where that of the retuned base is "
            "halfway",
            [_convergence(each) for each in grids],
        ),
        _claim(
            "Less sensitive to the learning rate",
            "held-out loss at the end, mean over ¼, ½, 1, 2 and 4 times the arm's own best rate, "
            "minus that at the best",
            [_sensitivity(each) for each in grids if each.study.swept],
        ),
        _claim(
            "More help for deeper networks",
            "growth of the final held-out loss from the fewest to the most layers, on a line "
            "through all; and the loss at the most",
            [_deeper(task, each) for task, each in by_depth(evidence).items()],
        ),
        _claim(
            "Works on Adam, SGD and Muon alike",
            "loss on held-out data at the end",
            [_loss(each, f"{each.task}, {base}", base, owns) for each, base in several],
        ),
        _claim(
            "Less noise in gradients",
            "variance of the gradients of micro-batches, as it is and over the square of their "
            f"mean; means over training. {AT_ONE_RATE}",
            [
                _mechanism(each, f"{each.task}, variance", mean("gradient_variance"))
                for each in observed
            ]
            + [
                _mechanism(each, f"{each.task}, ratio", mean("gradient_noise_scale"))
                for each in observed
            ],
        ),
        _claim(
            "Straighter, more aligned representations",
            "line shape score of hidden states; 1 − cosine of what neighbours add to them; means "
            f"over training. {AT_ONE_RATE}",
            [
                _mechanism(each, f"{each.task}, line shape", mean("line_shape_score"))
                for each in observed
            ]
            + [_mechanism(each, f"{each.task}, misalignment", _misaligned) for each in observed],
        ),
    ]


def by_depth(evidence: Sequence[Evidence]) -> dict[str, list[Evidence]]:
    """The studies of depth of each task, from few layers to many."""
    studies = [each for each in evidence if each.study.name == "depth"]
    found: dict[str, list[Evidence]] = {}
    for each in sorted(studies, key=lambda each: each.study.layers):
        found.setdefault(each.task, []).append(each)
    return found


def _claim(title: str, measured: str, trials: Sequence[Trial]) -> Claim:
    """Compares, and corrects for the number of comparisons."""
    compared = [
        {name: Comparison.between(*pair, trial.relevant) for name, pair in trial.pairs.items()}
        for trial in trials
    ]
    verdicts = judged(
        [
            [each[name] for name in trial.required if name in each]
            for trial, each in zip(trials, compared, strict=True)
        ]
    )
    fair = iter(corrected([each for comparisons in compared for each in comparisons.values()]))
    return Claim(
        title,
        measured,
        [
            Finding(trial, {name: next(fair) for name in comparisons}, verdict)
            for trial, comparisons, verdict in zip(trials, compared, verdicts, strict=True)
        ],
    )


def _against(arm: Arm, values: Callable[[Arm], np.ndarray]) -> dict[str, Pair]:
    """An arm with its base optimizer and with its controls."""
    controls = {control.control: (values(arm), values(control)) for control in arm.controls}
    return {"retuned": (values(arm), values(arm.plain)), **controls}


def _measured(
    evidence: Evidence, setting: str, measure: Measure, share: float, base: Base = "adamw"
) -> Trial:
    arm = evidence.claimed(base)
    pairs = _against(arm, lambda each: evidence.values(each, measure))
    if arm in evidence.study.untuned:
        ours, theirs = (evidence.values(each, measure, rate=1.0) for each in (arm, arm.plain))
        pairs["untuned"] = ours, theirs
    _, theirs = pairs["retuned"]
    return Trial(setting, arm, pairs, share * abs(theirs.mean()))


def _loss(
    evidence: Evidence,
    setting: str,
    base: Base = "adamw",
    owns: Mapping[str, Pair] | None = None,
) -> Trial:
    """Also with a rate of the layers' own, where that was tuned."""
    trial = _measured(evidence, setting, LOSS, relevant_share(), base)
    tuned = base == "adamw" and owns and evidence.task in owns
    pairs = {**trial.pairs, "own": owns[evidence.task]} if owns and tuned else trial.pairs
    return dataclasses.replace(trial, task=evidence.task, pairs=pairs)


def _other(evidence: Evidence, setting: str, measure: Measure) -> Trial:
    return _measured(evidence, setting, measure, SHARE)


def _mechanism(evidence: Evidence, setting: str, measure: Measure) -> Trial:
    """At one rate for all, and against the base at its best too: the rate itself changes much."""

    def values(arm: Arm) -> np.ndarray:
        return evidence.values(arm, measure, rate=1.0)

    arm = evidence.claimed("adamw")
    tuned = evidence.values(arm, measure), evidence.values(arm.plain, measure)
    pairs = {**_against(arm, values), "untuned": (values(arm), values(arm.plain)), "retuned": tuned}
    relevant = SHARE * abs(values(arm.plain).mean())
    return Trial(setting, arm, pairs, relevant, required=("untuned", *REQUIRED))


def _convergence(evidence: Evidence) -> Trial:
    arm = evidence.claimed("adamw")
    curve = evidence.curve(arm.plain, "loss")
    target = curve[:, curve.shape[1] // 2 - 1]
    pairs = _against(arm, lambda each: _share_until(evidence.curve(each, "loss"), target))
    return Trial(evidence.task, arm, pairs, SHARE * pairs["retuned"][1].mean())


def _share_until(curves: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The share of the training after which curves are first at a target, between evaluations."""
    count = curves.shape[1]
    shares = []
    for curve, wanted in zip(curves, target, strict=True):
        [reached] = np.nonzero(curve <= wanted)
        first = int(reached[0]) if reached.size else count - 1
        before = (curve[first] - wanted) / (curve[first] - curve[first - 1]) if first else 0.0
        shares.append((first + 1 - (before if reached.size else 0.0)) / count)
    return np.array(shares)


def _sensitivity(evidence: Evidence) -> Trial:
    arm = evidence.claimed("adamw")
    pairs = _against(arm, lambda each: evidence.swept(each).mean(axis=1) - evidence.values(each))
    return Trial(evidence.task, arm, pairs, SHARE * pairs["retuned"][1].mean())


def _deeper(task: str, depths: Sequence[Evidence]) -> Trial:
    deepest = depths[-1]
    arm = deepest.claimed("adamw")
    doublings = np.log2([each.study.layers for each in depths])

    def growth(arm: Arm) -> np.ndarray:
        slopes: np.ndarray = np.polyfit(doublings, [each.values(arm) for each in depths], 1)[0]
        return np.ptp(doublings) * slopes

    base = deepest.values(arm.plain)
    pairs = {**_against(arm, growth), "deepest": (deepest.values(arm), base)}
    return Trial(task, arm, pairs, relevant_share() * base.mean())


def _wrong(curves: Curves) -> float:
    return 1 - last("accuracy")(curves)


def _gap(curves: Curves) -> float:
    return last("loss")(curves) - last("train_loss")(curves)


def _misaligned(curves: Curves) -> float:
    return 1 - mean("residual_alignment")(curves)
