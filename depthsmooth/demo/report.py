"""What the runs show: paired statistics, a table, two pictures, and a verdict in words."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib.axes
import matplotlib.ticker
import numpy as np
import rich.box
import rich.table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from depthsmooth import operator_matrix, window
from depthsmooth.demo.results import replacing
from depthsmooth.demo.training import Arm, Run
from depthsmooth.plot.pictures import COLOURS, interval

Runs = Mapping[tuple[Arm, int], Run]
ADAMW = Arm()
BLUE, *OTHERS = COLOURS
"""AdamW's colour, and those of its variants."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference over seeds, in nats per byte; below 0 is better.

    Attributes:
      mean: over the seeds.
      low: lower end of the 95 % t-interval; None with one seed.
      high: upper end.
      better: number of seeds in which it is below 0.
      seeds: number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    better: int
    seeds: int

    def __str__(self) -> str:
        interval = f" [{self.low:+.4f}, {self.high:+.4f}]" if self.low is not None else ""
        return f"{self.mean:+.4f}{interval}"

    @classmethod
    def between(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Difference":
        """The difference ours − theirs, seed by seed."""
        pairs = np.subtract(ours, theirs)
        low, high = map(float, interval(pairs)) if len(pairs) > 1 else (None, None)
        return cls(float(pairs.mean()), low, high, int((pairs < 0).sum()), len(pairs))


class Report:
    """Reads the runs of all arms over the same seeds."""

    def __init__(self, runs: Runs, alphas: Sequence[float], seeds: int) -> None:
        self.runs = runs
        self.alphas = alphas
        self.seeds = range(seeds)
        self.arms = [ADAMW]
        for alpha in alphas:
            self.arms += [Arm(alpha), Arm(alpha, control=True)]

    def of(self, arm: Arm) -> list[Run]:
        """The arm's runs, seed by seed."""
        return [self.runs[arm, seed] for seed in self.seeds]

    def name(self, arm: Arm) -> str:
        """What the arm is called in the table and the pictures."""
        if arm.control:
            return f"AdamW, layers × {np.mean([run.shrink for run in self.of(arm)]):.3f}"
        return f"AdamW, smoothed {arm.alpha:g}" if arm.alpha else "AdamW"

    def final(self, arm: Arm) -> list[float]:
        """Final validation loss, seed by seed."""
        return [run.validation_loss[-1] for run in self.of(arm)]

    def difference(self, arm: Arm, other: Arm = ADAMW) -> Difference:
        """Paired difference of the final validation losses."""
        return Difference.between(self.final(arm), self.final(other))

    def steps_to_adamw(self, arm: Arm) -> list[int | None]:
        """The first evaluated step at or below AdamW's final loss, seed by seed."""
        reached = []
        for run, adamw in zip(self.of(arm), self.of(ADAMW), strict=True):
            steps = (
                step
                for step, loss in zip(run.evaluated_at, run.validation_loss, strict=True)
                if loss <= adamw.validation_loss[-1]
            )
            reached.append(next(steps, None))
        return reached

    def table(self) -> rich.table.Table:
        """One row for each arm."""
        table = rich.table.Table(
            title=f"Seeds: {len(self.seeds)}, the same start and batches for every arm",
            caption="nats per byte; (n/N): seeds in which AdamW's final loss was reached",
            box=rich.box.SIMPLE_HEAD,
        )
        table.add_column("")
        table.add_column("final loss", justify="right")
        table.add_column("minus AdamW [95 %]", justify="right")
        table.add_column("better", justify="right")
        table.add_column("steps to its loss", justify="right")
        table.add_column("ms/step", justify="right")
        for arm in self.arms:
            difference = self.difference(arm)
            reached = [step for step in self.steps_to_adamw(arm) if step is not None]
            steps = f"{np.mean(reached):.0f}" if reached else "–"
            table.add_row(
                self.name(arm),
                f"{np.mean(self.final(arm)):.4f}",
                str(difference) if arm != ADAMW else "",
                f"{difference.better}/{difference.seeds}" if arm != ADAMW else "",
                f"{steps} ({len(reached)}/{len(self.seeds)})",
                f"{1e3 * np.median([run.seconds_per_step for run in self.of(arm)]):.1f}",
            )
        return table

    def verdict(self) -> str:
        """What the intervals say, in words, for each alpha."""
        return "\n".join(self._verdict(alpha) for alpha in self.alphas)

    def _verdict(self, alpha: float) -> str:
        arms = ADAMW, Arm(alpha), Arm(alpha, control=True)
        if not all(np.isfinite(self.final(arm)).all() for arm in arms):
            return f"α = {alpha:g}: a run diverged, so nothing can be said. Lower --learning-rate."
        if len(self.seeds) < 2:
            return f"α = {alpha:g}: one seed gives no interval, so nothing can be said."
        plain = self.difference(Arm(alpha))
        fair = self.difference(Arm(alpha), Arm(alpha, control=True))
        shrink = np.mean([run.shrink for run in self.of(Arm(alpha))])
        return (
            f"α = {alpha:g}: against AdamW, smoothing {_effect(plain)}. It shrank the layers' "
            f"updates to {shrink:.3f} of their norm; against AdamW with its layers' updates "
            f"scaled by as much, it {_effect(fair)}. {_conclusion(plain, fair)}"
        )

    def findings(self) -> dict[str, object]:
        """The table's numbers and the verdict, for the JSON file."""
        arms = [
            {
                "name": self.name(arm),
                **dataclasses.asdict(arm),
                "validation_loss": float(np.mean(self.final(arm))),
                "minus_adamw": dataclasses.asdict(self.difference(arm)),
                "steps_to_adamw": self.steps_to_adamw(arm),
                "seconds_per_step": float(
                    np.median([run.seconds_per_step for run in self.of(arm)])
                ),
            }
            for arm in self.arms
        ]
        return {"seeds": len(self.seeds), "arms": arms, "verdict": self.verdict()}

    def save_pictures(self, out: pathlib.Path) -> None:
        """Writes ``loss.png`` and ``update-similarity.png``."""
        figure = Figure(figsize=(10, 4), layout="constrained")
        loss, difference = figure.subplots(1, 2)
        self.draw_loss(loss)
        self.draw_difference(difference)
        _save(figure, out / "loss.png")
        figure = Figure(figsize=(9, 4), layout="constrained")
        self.draw_similarity(figure.subplots())
        _save(figure, out / "update-similarity.png")

    def draw_loss(self, axes: matplotlib.axes.Axes) -> None:
        """Validation loss of each arm."""
        for arm, colour in zip(self.arms, _colours(self.arms), strict=True):
            steps, losses = self._curve(arm)
            axes.plot(steps, losses.mean(axis=0), _line(arm), color=colour, label=self.name(arm))
        axes.set(
            title="Validation loss, mean over seeds",
            xlabel="step, second half",
            ylabel="nats per byte",
        )
        axes.legend(frameon=False)

    def draw_difference(self, axes: matplotlib.axes.Axes) -> None:
        """Paired difference of each arm to AdamW, with its interval; a control's is dotted."""
        _, adamw = self._curve(ADAMW)
        for arm, colour in list(zip(self.arms, _colours(self.arms), strict=True))[1:]:
            steps, losses = self._curve(arm)
            pairs = losses - adamw
            axes.plot(steps, pairs.mean(axis=0), _line(arm), color=colour, label=self.name(arm))
            if len(pairs) < 2:
                continue
            low, high = interval(pairs)
            if arm.control:
                axes.plot(steps, np.transpose([low, high]), ":", color=colour, linewidth=1)
            else:
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        band = ", 95 % interval over seeds" if len(self.seeds) > 1 else ""
        axes.set(
            title=f"Difference to AdamW{band}",
            xlabel="step, second half",
            ylabel="nats per byte (below 0 is better)",
        )

    def draw_similarity(self, axes: matplotlib.axes.Axes) -> None:
        """Cosine of neighbouring layers' updates, before and after smoothing."""
        for alpha, colour in zip(self.alphas, _colours([Arm(a) for a in self.alphas]), strict=True):
            runs = self.of(Arm(alpha))
            before, after = (
                np.mean([getattr(run, name) for run in runs], axis=0)
                for name in ("cosine_before", "cosine_after")
            )
            pairs = np.arange(1, len(before) + 1)
            name = f"α = {alpha:g}"
            axes.plot(pairs, after, "o-", color=colour, label=f"{name}: after smoothing")
            axes.plot(pairs, before, "o--", color=colour, mfc="white", label=f"{name}: before")
            unrelated = _cosine_of_unrelated(alpha, len(before) + 1)
            axes.plot(pairs, unrelated, ":", color=colour, label=f"{name}: after, if unrelated")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(
            title="How alike are the updates of neighbouring layers?",
            xlabel="ℓ, of layers ℓ and ℓ + 1",
            ylabel="cosine, mean over training and seeds",
        )
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    def _curve(self, arm: Arm) -> tuple[list[int], np.ndarray]:
        """The second half: evaluated steps, validation losses (seeds, evaluations).

        Before, losses and differences are so large that they would hide the end.
        """
        runs = self.of(arm)
        half = len(runs[0].evaluated_at) // 2
        losses = np.array([run.validation_loss[half:] for run in runs])
        return runs[0].evaluated_at[half:], losses


def _cosine_of_unrelated(alpha: float, layers: int) -> np.ndarray:
    """What smoothing alone makes of the neighbours of uncorrelated updates of one norm."""
    smoothed = np.asarray(operator_matrix(window(alpha), layers))
    gram = smoothed @ smoothed.T
    norms = np.sqrt(gram.diagonal())
    cosines: np.ndarray = gram.diagonal(1) / (norms[:-1] * norms[1:])
    return cosines


def _sign(difference: Difference) -> int:
    """-1 or 1 where the interval lies below or above 0; 0 where it holds it."""
    low, high = difference.low, difference.high
    if low is None or high is None:
        return 0
    return -1 if high < 0 else int(low > 0)


def _effect(difference: Difference) -> str:
    sign = _sign(difference)
    if not sign:
        return f"made no difference that {difference.seeds} seeds can tell ({difference})"
    verb = "lowered" if sign < 0 else "raised"
    return f"{verb} the final validation loss ({difference} nats per byte)"


def _conclusion(plain: Difference, fair: Difference) -> str:
    if _sign(fair) < 0:
        return "So mixing neighbours did better than the smaller step alone."
    if _sign(fair) > 0:
        return "So the smaller step alone did better than mixing neighbours."
    if _sign(plain):
        return "So all of the effect may be the smaller step, and none of it depth."
    return "So nothing is shown here, neither for mixing neighbours nor against it."


def _colours(arms: Sequence[Arm]) -> list[str]:
    """A control has the colour of the smoothing it is the control of."""
    alphas = list(dict.fromkeys(arm.alpha for arm in arms if arm.alpha))
    return [OTHERS[alphas.index(arm.alpha) % len(OTHERS)] if arm.alpha else BLUE for arm in arms]


def _line(arm: Arm) -> str:
    return "--" if arm.control else "-"


def _save(figure: Figure, path: pathlib.Path) -> None:
    FigureCanvasAgg(figure)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
