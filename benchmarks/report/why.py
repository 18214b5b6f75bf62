"""Why: what neighbours' gradients share, what comes of equal layers, and what foretells a gain."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from benchmarks.quality.arms import Arm, Base
from benchmarks.quality.plan import ALPHAS, PURPOSE, TASKS
from benchmarks.report.evidence import Evidence
from benchmarks.report.markdown import difference, table
from benchmarks.report.statistics import Comparison, corrected
from benchmarks.signal.kept import Measured
from benchmarks.signal.training import TENTHS, curved_efficiency

KINDS = {
    "kernels": r".*kernel$",
    "biases that write to the stream": r".*/(out|mlp_out)/bias$",
    "other biases": r".*/(qkv|mlp_in|in)/bias$",
    "scales and biases of norms": r".*norm/(scale|bias)$",
}
"""Tensors of a block by what they do."""
STARTS = ("independent", "equal", "permuted")
FORETOLD = 0.7, 0.05
"""The rank correlation and the largest wrong promise at which a formula would be of use."""
FEWEST = 5
"""Settings from which on a correlation is told."""

Signals = Mapping[str, Measured]
"""What was measured over training, by task."""


def read(directory: pathlib.Path) -> dict[str, Measured]:
    """All that is kept."""
    return {path.stem: Measured(path) for path in sorted(directory.glob("*.jsonl"))}


def is_plain(task: str) -> bool:
    """Whether it is what people train, and not made up to ask why."""
    return task in TASKS and task not in PURPOSE


def cosines(
    measured: Measured, base: Base, kind: str, tenths: Sequence[int] = TENTHS
) -> np.ndarray:
    """Of each seed: the cosines of signal and of noise, and the signal's share: ``(seeds, 3)``.

    Tensors of a kind and times are pooled: sums of products over sums of norms.
    """
    told = []
    for line in measured.of(base):
        sums = [
            values
            for time in line["times"]
            if time["tenth"] in tenths
            for name, values in time["tensors"].items()
            if re.fullmatch(KINDS[kind], name)
        ]
        if sums:
            pairs, sizes, noise, noise_sizes, trace, noise_trace = np.sum(sums, 0)
            told.append([pairs / sizes, noise / noise_sizes, trace / (trace + noise_trace)])
    return np.array(told).reshape(-1, 3)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task, a base optimizer and an α: what was foretold, and what was measured.

    Attributes:
      name: such as ``"text, adamw, α = 0.2"``.
      simple: the efficiency with equal curvature: 1 changes nothing.
      curved: the same with measured curvature.
      gained: the share of the base's loss that smoothing saves, each at its best rate.
    """

    name: str
    simple: float
    curved: float
    gained: float


def settings(evidence: Sequence[Evidence], signals: Signals) -> list[Setting]:
    """All of the grids whose signal was measured, with the window on all tensors."""
    found = []
    for each in evidence:
        measured = signals.get(each.task)
        for base in each.study.bases if measured and each.study.name == "grid" else ():
            lines = measured.of(base)
            loss = each.values(Arm(base)).mean()
            for index, alpha in enumerate(ALPHAS):
                arm = Arm(base, alpha=alpha)
                if lines and arm in each.study.arms:
                    name = f"{each.task}, {base}, α = {alpha:g}"
                    gained = 1 - each.values(arm).mean() / loss
                    found.append(Setting(name, *_foretold(lines, index), float(gained)))
    return found


def _foretold(lines: Sequence[Mapping[str, object]], index: int) -> tuple[float, float]:
    """Means over seeds and times; of curvature, medians, for it may be next to nothing."""
    times = [time for line in lines for time in line["times"]]
    simple = np.mean([time["predicted"][index] for time in times])
    curved = np.median([curved_efficiency(time["curved"], ALPHAS[index]) for time in times])
    return float(simple), float(curved)


def section(evidence: Sequence[Evidence], signals: Signals, pictures: Sequence[str]) -> str:
    """The whole of it."""
    parts = [
        _shared(signals),
        _starts(evidence, signals),
        _noise(evidence),
        _formulas(evidence, signals),
    ]
    if "signal" in pictures:
        title = "Cosines of neighbours' signal (solid) and noise (dashed) over training"
        parts.insert(1, f"![{title}](docs/results/signal.png)\n\n*{title}.*")
    parts = [part for part in parts if part]
    if not parts:
        return ""
    return "\n\n".join(["## Why", *parts])


def _shared(signals: Signals) -> str:
    rows = []
    for task, measured in signals.items():
        for kind in KINDS if is_plain(task) else ():
            found = cosines(measured, "adamw", kind)
            if len(found) > 1:
                rows.append([task, kind, *map(_interval, found.T)])
    if not rows:
        return ""
    header = ["task", "tensors", "cosine of signal", "cosine of noise", "share of signal"]
    return (
        "The gradient of a layer on a batch is its mean over all batches, the *signal*, and "
        "*noise*. Smoothing could average noise away where neighbours share their signal and not "
        "their noise. They do not: where they share one, they share the other, for all layers see "
        "the same batch. Means over training with AdamW, [95 % over seeds]:\n\n"
        + table(header, rows)
    )


def _starts(evidence: Sequence[Evidence], signals: Signals) -> str:
    """Equal layers, coupled and not."""
    found = {each.task: each for each in evidence if each.study.name == "start"}
    names = [f"{start}_{how}" for start in STARTS for how in ("free", "coupled")]
    if not set(names) <= set(found):
        return ""
    values = {name: found[name].values(Arm("adamw")) for name in names}
    pairs = [Comparison.between(values[name], values[names[0]]) for name in names[1:]]
    fair = [None, *corrected(pairs)]
    rows = []
    for name, comparison in zip(names, fair, strict=True):
        start, how = name.split("_")
        alike = ["", ""]
        measured = signals.get(name)
        if measured and len(told := cosines(measured, "adamw", "kernels", [1])) > 1:
            alike = [_interval(each) for each in told.T[:2]]
        rows.append([start, how, *alike, f"{values[name].mean():.4f}", difference(comparison)])
    header = ["start", "gradients", "kernels: signal", "noise", "final loss", "minus the first"]
    return (
        "Layers can be made to share: by an equal start. Text, each of L layers adding 1/L of what "
        "it makes; *coupled*: for the first fifth of the steps all layers get the mean of their "
        "gradients, before AdamW; *permuted*: equal layers whose hidden units and heads are in "
        "another order in each, which changes neither what a layer does nor how it trains alone. "
        "Cosines of neighbours after a tenth of the steps; each at its best rate:\n\n"
        + table(header, rows)
    )


def _noise(evidence: Sequence[Evidence]) -> str:
    rows = []
    told = {
        "dropped": "each layer is left out of half of the steps",
        "private": "each number of a layer's gradient gets normal noise",
    }
    for each in evidence:
        if each.study.name != "noise":
            continue
        study, results = each.study, each.results
        scaled = study.scaled("adamw", results)
        base = each.values(scaled)
        arms = []
        for alpha, control in ((0.2, ""), (0.5, ""), (0.9, "mean")):
            ours = [arm for arm in study.arms if (arm.alpha, arm.control) == (alpha, control)]
            arms.append(min(ours, key=lambda arm: study.loss(arm, results)))
        fair = corrected([Comparison.between(each.values(arm), base) for arm in arms])
        rows.append([told[each.task], f"`{scaled}`", f"{base.mean():.4f}"])
        rows += [["", f"`{arm}`", difference(one)] for arm, one in zip(arms, fair, strict=True)]
    if not rows:
        return ""
    header = ["noise", "arm", "final loss, or minus that of AdamW with it"]
    return (
        "Signals are alike and noise is not where layers are equal *and* each draws noise of its "
        "own. The deep MLP from equal layers, all arms with the layers' rate tuned:\n\n"
        + table(header, rows)
    )


def _formulas(evidence: Sequence[Evidence], signals: Signals) -> str:
    found = settings(evidence, signals)
    if len(found) < FEWEST:
        return ""
    gained = [each.gained for each in found]
    return (
        "**What would foretell it?** With S and E the inner products of signals and of noise, "
        "equal curvature in all directions and the best rate, an operator A would have the "
        "efficiency (tr AS)² / tr A(S+E)Aᵀ · tr(S+E) / (tr S)²; with the curvature H that two "
        "Hessian-vector products measure along an update u, ⟨μ, Au⟩² / ⟨Au, HAu⟩ over the same of "
        f"u. Here they are beside what the window gained in {len(found)} settings (a task, a base "
        f"optimizer and an α), each at its best rate: {100 * min(gained):+.1f} % to "
        f"{100 * max(gained):+.1f} % of the base's loss. Of use would be a rank correlation of "
        f"{FORETOLD[0]:g}, and never a gain of {100 * FORETOLD[1]:g} % where there is harm:\n\n"
        + formulas(found)
    )


def formulas(found: Sequence[Setting]) -> str:
    """What two formulas foretell beside what training gained, in Markdown."""
    gained = [each.gained for each in found]
    rows = []
    for name, title in (("simple", "equal curvature"), ("curved", "measured curvature")):
        foretold = [getattr(each, name) for each in found]
        correlation = scipy.stats.pearsonr(foretold, gained).statistic
        rank = scipy.stats.spearmanr(foretold, gained).statistic
        losses = [value for value, gain in zip(foretold, gained, strict=True) if gain < 0]
        rows.append(
            [
                title,
                f"{min(foretold):.2f} to {max(foretold):.2f}",
                f"{correlation:.2f}",
                f"{rank:.2f}",
                f"{max(losses, default=float('nan')):.2f}",
                "yes" if is_of_use(foretold, gained) else "no",
            ]
        )
    header = ["efficiency with", "foretold", "correlation", "of ranks", "most where it did harm"]
    return table([*header, "of use"], rows)


def is_of_use(foretold: Sequence[float], gained: Sequence[float]) -> bool:
    """Whether ranks agree, and nothing is promised where there is harm.

    Example:
      >>> is_of_use([1.0, 1.1, 1.2], [-0.1, 0.0, 0.1]), is_of_use([1.1, 1.2, 1.3], [-0.1, 0.0, 0.1])
      (True, False)
    """
    rank = scipy.stats.spearmanr(foretold, gained).statistic
    promised = [one for one, gain in zip(foretold, gained, strict=True) if gain < 0]
    return bool(rank >= FORETOLD[0] and max(promised, default=0.0) < 1 + FORETOLD[1])


def _interval(values: np.ndarray) -> str:
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{values.mean():.2f} [{values.mean() - half:.2f}, {values.mean() + half:.2f}]"
