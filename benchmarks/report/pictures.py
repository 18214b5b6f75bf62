"""Pictures of the results, with means and 95 % t-intervals over the test seeds."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

import matplotlib.axes
import matplotlib.ticker
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from benchmarks.quality.arms import Arm
from benchmarks.quality.plan import ALPHAS
from benchmarks.quality.studies import RATES
from benchmarks.report import why
from benchmarks.report.claims import by_depth
from benchmarks.report.evidence import Evidence
from benchmarks.signal.training import TENTHS
from depthsmooth.demo.results import replacing
from depthsmooth.plot.pictures import COLOURS, interval

NAMES = {
    "base": "AdamW",
    "": "smoothed",
    "shuffled": "control: shuffled layers",
    "shrunk": "control: smaller step",
    "mean": "control: mean over layers",
}
LOOKS = dict(zip(NAMES, zip(COLOURS, ("o-", "o-", "s--", "d-.", "^:"), strict=False), strict=True))
MECHANISM = {
    "roughness_before": "roughness of updates, before",
    "roughness_after": "roughness of updates, as applied",
    "adjacent_cosine_after": "cosine of neighbours' updates, as applied",
    "gradient_variance": "variance of micro-batches' gradients",
    "line_shape_score": "line shape score of hidden states",
    "residual_alignment": "alignment of what neighbours add",
}


def draw(evidence: Sequence[Evidence], signals: why.Signals, directory: pathlib.Path) -> list[str]:
    """Writes the pictures that there are results for, and gives their names."""
    figures = {
        "alpha": _alpha([each for each in evidence if _published(0.5) in each.study.arms]),
        "rates": _rates([each for each in evidence if each.study.swept]),
        "depth": _depth(evidence),
        "mechanism": _mechanism([each for each in evidence if each.study.observed]),
        "signal": _signal(signals),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        if figure.axes:
            axes = max(figure.axes, key=lambda ax: len(ax.get_legend_handles_labels()[0]))
            entries = axes.get_legend_handles_labels()
            figure.legend(*entries, loc="outside upper center", ncols=len(NAMES), frameon=False)
            FigureCanvasAgg(figure)
            with replacing(directory / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=110)
    return [name for name, figure in figures.items() if figure.axes]


def _published(alpha: float) -> Arm:
    return Arm("adamw", scope="proj", alpha=alpha)


def _alpha(evidence: Sequence[Evidence]) -> Figure:
    """The same comparison twice: at one learning rate, and with each arm at its best."""
    evidence = [each for each in evidence if each.study.name == "grid"]
    figure = Figure(figsize=(10, 4.2 * len(evidence)), layout="constrained")
    for row, each in enumerate(evidence):
        for column, rate in enumerate((1.0, None)):
            ax = figure.add_subplot(len(evidence), 2, 2 * row + column + 1)
            plain = each.values(Arm("adamw"), rate=rate)
            for control in list(NAMES)[1:]:
                arms = [_published(alpha).controlled(control) for alpha in ALPHAS]
                differences = [each.values(arm, rate=rate) - plain for arm in arms]
                _draw(ax, control, ALPHAS, np.transpose(differences))
            ax.axhline(0, color="black", linewidth=0.8)
            how = "each at its best rate" if rate is None else "at one rate"
            ax.set(
                title=f"{each.task}, {each.study.layers} layers, {how}",
                xlabel="α",
                ylabel="final loss minus AdamW's",
            )
    return figure


def _rates(evidence: Sequence[Evidence]) -> Figure:
    rows = math.ceil(len(evidence) / 3)
    figure = Figure(figsize=(14, 4 * rows), layout="constrained")
    for number, each in enumerate(evidence, 1):
        ax = figure.add_subplot(rows, 3, number)
        for arm in each.study.compared("adamw", each.results):
            _draw(ax, arm.control if arm.alpha else "base", RATES, each.swept(arm))
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}×")
        ax.set(
            title=each.task,
            xlabel="learning rate, over the arm's best",
            ylabel="final held-out loss",
        )
    return figure


def _depth(evidence: Sequence[Evidence]) -> Figure:
    tasks = by_depth(evidence)
    figure = Figure(figsize=(5.5 * len(tasks), 4), layout="constrained")
    for column, (task, depths) in enumerate(tasks.items()):
        ax = figure.add_subplot(1, len(tasks), column + 1)
        layers = [each.study.layers for each in depths]
        for opponent in ("base", "shuffled", "shrunk"):
            differences = []
            for each in depths:
                arm = each.claimed("adamw")
                other = arm.plain if opponent == "base" else arm.controlled(opponent)
                differences.append(each.values(arm) - each.values(other))
            label = f"smoothed minus {NAMES[opponent].removeprefix('control: ')}"
            _draw(ax, opponent, layers, np.transpose(differences), label)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(title=task, xlabel="layers", ylabel="difference of final losses, each at its best")
    return figure


def _mechanism(evidence: Sequence[Evidence]) -> Figure:
    figure = Figure(figsize=(14, 3.2 * 2 * len(evidence)), layout="constrained")
    for row, each in enumerate(evidence):
        for column, (name, title) in enumerate(MECHANISM.items()):
            ax = figure.add_subplot(2 * len(evidence), 3, 6 * row + column + 1)
            for arm in each.study.compared("adamw", each.results):
                values = each.curve(arm, name, rate=1.0)
                steps = np.linspace(0, each.study.steps, values.shape[1] + 1)[1:]
                _draw(ax, arm.control if arm.alpha else "base", steps, values)
            ax.set_title(f"{each.task}: {title}", fontsize=10)
            ax.set_xlabel("step")
            ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    return figure


def _signal(signals: why.Signals) -> Figure:
    """Of each kind of tensor, over training: signal solid, noise dashed."""
    tasks = {task: each for task, each in signals.items() if why.is_plain(task)}
    figure = Figure(figsize=(14, 4 * math.ceil(len(tasks) / 3)), layout="constrained")
    for number, (task, measured) in enumerate(tasks.items(), 1):
        ax = figure.add_subplot(math.ceil(len(tasks) / 3), 3, number)
        for kind, colour in zip(why.KINDS, COLOURS, strict=False):
            told = [why.cosines(measured, "adamw", kind, [tenth]) for tenth in TENTHS]
            if len(told[0]) < 2:
                continue
            for column, style in ((0, "o-"), (1, "o--")):
                values = np.transpose([each[:, column] for each in told])
                x = np.array(TENTHS) / TENTHS[-1]
                label = kind if column == 0 else None
                ax.plot(x, values.mean(0), style, color=colour, markersize=4, label=label)
                if column == 0:
                    ax.fill_between(x, *interval(values), color=colour, alpha=0.15, linewidth=0)
        ax.set(title=task, xlabel="share of the training", ylabel="cosine of neighbours")
    return figure


def _draw(
    ax: matplotlib.axes.Axes, look: str, x: ArrayLike, values: np.ndarray, label: str = ""
) -> None:
    """Mean and interval of (seeds, points); no point where a seed has diverged."""
    colour, style = LOOKS[look]
    finite = np.where(np.isfinite(values).all(axis=0), values, np.nan)
    low, high = interval(finite)
    ax.plot(x, finite.mean(axis=0), style, color=colour, markersize=4, label=label or NAMES[look])
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
