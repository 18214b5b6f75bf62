"""Draws placement.png: what each place in a chain makes of one gradient and one weight.

``python docs/placement.py`` runs the chains with the library itself, for twelve layers of which one
has a gradient and another has a weight to decay.
"""

import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes

import depthsmooth as ds

LAYERS, GRADIENT_AT, WEIGHT_AT = 12, 3, 8
ALPHA, DECAY = 0.5, 0.5
SMOOTH, STEP, DECAYED = "#333333", "#0072B2", "#E69F00"

SMOOTHING = ds.smooth_over_depth(ALPHA, depth=ds.Depth.from_rules({"layers": 0}))
BOXES = {
    "clip": optax.clip_by_global_norm(1.0),
    "Adam": optax.scale_by_adam(),
    "smooth": SMOOTHING,
    "decay": optax.add_decayed_weights(DECAY),
    "learning\nrate": optax.scale_by_learning_rate(1.0),
}
CHAINS: dict[str, tuple[str, ...]] = {
    "AdamW": ("clip", "Adam", "decay", "learning\nrate"),
    "After the optimizer, outside weight decay: the paper": (
        "clip",
        "Adam",
        "smooth",
        "decay",
        "learning\nrate",
    ),
    "After the whole of optax.adamw: the decay is smoothed too": (
        "clip",
        "Adam",
        "decay",
        "learning\nrate",
        "smooth",
    ),
    "Before the optimizer: Adam makes full steps of the shares": (
        "clip",
        "smooth",
        "Adam",
        "decay",
        "learning\nrate",
    ),
}


def updates(chain: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What the first update adds to each layer: its step, and its decay."""
    gradient = {"layers": jnp.zeros(LAYERS).at[GRADIENT_AT].set(0.1)}
    weight = {"layers": jnp.zeros(LAYERS).at[WEIGHT_AT].set(1.0)}
    nothing = {"layers": jnp.zeros(LAYERS)}
    tx = optax.chain(*(BOXES[name] for name in chain))

    def update(gradients: Mapping[str, jnp.ndarray], params: Mapping[str, jnp.ndarray]):
        return np.asarray(tx.update(gradients, tx.init(params), params)[0]["layers"])

    return {"step": update(gradient, nothing), "decay": update(nothing, weight)}


def draw_chain(ax: Axes, title: str, chain: tuple[str, ...]) -> None:
    """The chain as boxes, from the gradient on."""
    colours = {"smooth": SMOOTH, "Adam": STEP, "decay": DECAYED}
    ax.set(xlim=(-0.1, 6.3), ylim=(-0.75, 0.95))
    ax.axis("off")
    ax.text(0, 0.9, title, fontsize=11, fontweight="bold", va="top")
    ax.text(0.35, 0, "gradient", ha="center", va="center", fontsize=9)
    for k, name in enumerate(chain, 1):
        ax.annotate(
            "", xy=(k + 0.02, 0), xytext=(k - 0.2, 0), arrowprops={"arrowstyle": "-|>", "lw": 1.2}
        )
        ax.text(
            k + 0.4,
            0,
            name,
            ha="center",
            va="center",
            fontsize=9,
            color="white" if name in ("smooth", "Adam") else "black",
            bbox={
                "boxstyle": "round,pad=0.45",
                "facecolor": colours.get(name, "#DDDDDD"),
                "edgecolor": "none",
            },
        )


def draw_updates(ax: Axes, parts: Mapping[str, np.ndarray]) -> None:
    """Two bars of each layer, where there is an update."""
    layers = np.arange(LAYERS)
    ax.axhline(0, color="black", lw=0.8)
    ax.bar(layers, parts["step"], color=STEP, label="step, from the gradient of layer 3")
    ax.bar(layers, parts["decay"], color=DECAYED, label="decay, of the weight of layer 8")
    for part in parts.values():
        for layer, value in enumerate(part):
            if abs(value) > 1e-6:
                place = (layer, value - 0.06)
                ax.text(
                    *place, f"{value:.3g}".replace("-", "−"), ha="center", va="top", fontsize=7.5
                )
    ax.set(ylim=(-1.35, 0.12), xticks=layers, yticks=(-1, 0), ylabel="added")
    ax.tick_params(labelsize=8)
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)


def main() -> None:
    """Draws and writes."""
    figure, rows = plt.subplots(
        len(CHAINS),
        2,
        figsize=(11, 6.6),
        width_ratios=(1.25, 1),
        layout="constrained",
    )
    for (title, chain), (left, right) in zip(CHAINS.items(), rows, strict=True):
        draw_chain(left, title, chain)
        draw_updates(right, updates(chain))
    rows[-1, 1].set_xlabel("layer")
    rows[0, 1].set_title(f"first update, α = {ALPHA}, decay {DECAY}, learning rate 1", fontsize=10)
    handles, labels = rows[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    figure.savefig(pathlib.Path(__file__).with_name("placement.png"), dpi=150)


if __name__ == "__main__":
    main()
