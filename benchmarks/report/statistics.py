"""Paired comparisons over seeds, corrected for how many there are, and what they allow to say."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike
from statsmodels.stats.multitest import multipletests

from depthsmooth.demo.report import Difference

LEVEL = 0.05


class Verdict(enum.Enum):
    """What a claim deserves."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    INCONCLUSIVE = "inconclusive"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ours minus theirs, seed by seed; below 0 is better.

    Attributes:
      difference: with its 95 % t-interval.
      p: of the paired t-test, two-sided.
      p_small: of the one-sided test whether ours gains less than what matters.
    """

    difference: Difference
    p: float
    p_small: float

    @classmethod
    def between(cls, ours: ArrayLike, theirs: ArrayLike, relevant: float = 0.0) -> Comparison:
        """Compares two arrays of shape ``(seeds,)``, for gains that matter from ``relevant`` on.

        Example:
          >>> print(Comparison.between([1.0, 2.0, 2.0], [2.0, 3.5, 3.0]))
          -1.1667 [-1.8838, -0.4496]
        """
        ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
        if not np.isfinite([ours, theirs]).all():
            unknown = Difference(float("nan"), None, None, int((ours < theirs).sum()), len(ours))
            return cls(unknown, 1.0, 1.0)
        if np.ptp(ours - theirs) == 0:
            same, small = ours[0] == theirs[0], ours[0] - theirs[0] > -relevant
            return cls(Difference.between(ours, theirs), float(same), float(not small))
        small = scipy.stats.ttest_rel(ours + relevant, theirs, alternative="greater")
        p = float(scipy.stats.ttest_rel(ours, theirs).pvalue)
        return cls(Difference.between(ours, theirs), p, float(small.pvalue))

    def __str__(self) -> str:
        """The difference, with its interval."""
        return str(self.difference) if np.isfinite(self.difference.mean) else "diverged"

    @property
    def better(self) -> bool:
        """Whether ours is surely below theirs."""
        return self.p < LEVEL and self.difference.mean < 0

    @property
    def worse(self) -> bool:
        """Whether ours is surely above theirs."""
        return self.p < LEVEL and self.difference.mean > 0


def holm(values: Sequence[float]) -> list[float]:
    """p-values, adjusted for how many there are.

    References:
      Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.

    Example:
      >>> holm([0.01, 0.04, 0.03])
      [0.03, 0.06, 0.06]
    """
    if not values:
        return []
    _, adjusted, *_ = multipletests(values, method="holm")
    return [float(p) for p in adjusted]


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with Holm's p-values, for all of one table."""
    adjusted = holm([each.p for each in comparisons])
    pairs = zip(comparisons, adjusted, strict=True)
    return [dataclasses.replace(each, p=p) for each, p in pairs]


def judged(settings: Sequence[Sequence[Comparison]]) -> list[Verdict]:
    """What is to be said of a claim in each setting, from the comparisons that have to be won.

    Supported where all of them are won: the largest p-value decides, with Holm's correction for
    the number of settings. Not supported where it is sure, likewise corrected and for the number
    of comparisons as well, that one of them is lost or won by less than what matters.
    """
    won = [max(c.p if c.difference.mean < 0 else 1.0 for c in each) for each in settings]
    lost = [min(1.0, len(each) * min(c.p_small for c in each)) for each in settings]
    verdicts = []
    for p_won, p_lost in zip(holm(won), holm(lost), strict=True):
        verdict = Verdict.SUPPORTED if p_won < LEVEL else Verdict.INCONCLUSIVE
        if p_lost < LEVEL and p_won >= LEVEL:
            verdict = Verdict.NOT_SUPPORTED
        verdicts.append(verdict)
    return verdicts


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Of all settings: supported if in all, not supported if in none and refused in most."""
    supported = verdicts.count(Verdict.SUPPORTED)
    refused = verdicts.count(Verdict.NOT_SUPPORTED)
    if verdicts and supported == len(verdicts):
        return Verdict.SUPPORTED
    if not supported and refused > len(verdicts) / 2:
        return Verdict.NOT_SUPPORTED
    return Verdict.INCONCLUSIVE
