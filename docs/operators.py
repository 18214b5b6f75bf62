"""Draws operators.png: the matrices of operators over eight layers, and their gains.

``python docs/operators.py`` draws what the library itself gives.
"""

import pathlib

import matplotlib.pyplot as plt

import depthsmooth as ds
from depthsmooth import plot

LAYERS = 8
OPERATORS = {
    "window(0.5)": ds.window(0.5),
    "sharpen(0.5)": ds.sharpen(0.5),
    "exponential(0.5, radius=3)": ds.exponential(0.5, radius=3),
    "ema(0.5)": ds.ema(0.5),
    "diffusion(1.0)": ds.diffusion(1.0),
    "shuffled(window(0.5), seed=0)": ds.shuffled(ds.window(0.5), seed=0),
}
WITH_GAIN = "window(0.5)", "sharpen(0.5)", "exponential(0.5, radius=3)", "diffusion(1.0)"


def main() -> None:
    """Draws and writes."""
    names = list(OPERATORS)
    rows = [[*names[:3], "gain"], [*names[3:], "gain"]]
    figure = plt.figure(figsize=(16, 7), layout="constrained")
    axes = figure.subplot_mosaic(rows, width_ratios=(1, 1, 1, 1.2))
    for name, operator in OPERATORS.items():
        plot.operator(operator, LAYERS, ax=axes[name])
    plot.gain({name: OPERATORS[name] for name in WITH_GAIN}, LAYERS, ax=axes["gain"])
    axes["gain"].set_ylim(0, 1.4)
    axes["gain"].legend(loc="upper center")
    for name, ax in axes.items():
        ax.set_title(name, fontsize=11)
    figure.savefig(pathlib.Path(__file__).with_name("operators.png"), dpi=100)


if __name__ == "__main__":
    main()
