"""Paired comparisons over seeds, corrected for how many there are, and what they allow to say."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike
from statsmodels.stats.multitest import multipletests

from benchmarks import results
from depthsmooth.demo.report import Difference

LEVEL = 0.05
PUBLISHED = (results.read("published") or {})["rows"][0]
RELEVANT = -0.5 * PUBLISHED["difference"] / PUBLISHED["adamw"]
"""The smallest gain that is looked for, as a share: half of that of the published replication."""


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
      scale: what a gain is a share of; the mean of theirs if it is not given.
      p: of the paired t-test, two-sided; after :func:`corrected` that of Holm.
    """

    difference: Difference
    scale: float
    p: float

    @classmethod
    def between(cls, ours: ArrayLike, theirs: ArrayLike, scale: float | None = None) -> Comparison:
        """Compares two arrays of shape ``(seeds,)``; runs that diverged are inf in them.

        Example:
          >>> print(Comparison.between([1.0, 2.0, 2.0], [2.0, 3.5, 3.0]))
          -1.1667 [-1.8838, -0.4495]
        """
        ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
        if not np.isfinite([ours, theirs]).all():
            unknown = Difference(float("nan"), None, None, int((ours < theirs).sum()), len(ours))
            return cls(unknown, float("nan"), 1.0)
        scale = float(abs(theirs.mean())) if scale is None else scale
        same = bool(np.ptp(ours - theirs) == 0)
        p = float(ours[0] == theirs[0]) if same else scipy.stats.ttest_rel(ours, theirs).pvalue
        return cls(Difference.between(ours, theirs), scale, float(p))

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

    @property
    def irrelevant(self) -> bool:
        """Whether the interval excludes a gain of the smallest size that is looked for."""
        low = self.difference.low
        return low is not None and low > -RELEVANT * self.scale


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with Holm's p-values, for all of one table.

    References:
      Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
    """
    if not comparisons:
        return []
    _, adjusted, *_ = multipletests([each.p for each in comparisons], method="holm")
    return [
        dataclasses.replace(each, p=float(p)) for each, p in zip(comparisons, adjusted, strict=True)
    ]


def judged(comparisons: Sequence[Comparison]) -> Verdict:
    """What those comparisons together allow to say that have all to be won.

    Supported if all are surely won; not supported if one is surely lost, or excludes a gain that
    matters; inconclusive otherwise.
    """
    if all(each.better for each in comparisons):
        return Verdict.SUPPORTED
    if any(each.worse or (each.irrelevant and not each.better) for each in comparisons):
        return Verdict.NOT_SUPPORTED
    return Verdict.INCONCLUSIVE


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim in several settings: supported, or not, if it is so in all or in most."""
    supported = verdicts.count(Verdict.SUPPORTED)
    refused = verdicts.count(Verdict.NOT_SUPPORTED)
    if verdicts and supported == len(verdicts):
        return Verdict.SUPPORTED
    if refused and not supported:
        return Verdict.NOT_SUPPORTED
    return Verdict.INCONCLUSIVE
