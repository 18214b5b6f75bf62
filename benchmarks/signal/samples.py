"""How many micro-batches it takes to tell signal from noise, on made-up gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import depthsmooth as ds

SHARES, COUNTS = (0.5, 0.05, 0.01), (4, 8, 16, 32, 64, 128)
LAYERS, FEATURES, DRAWS = 12, 1000, 200
COSINES = 0.5, 0.2
"""Of neighbours: in truth, of their signal and of their noise."""


def rows() -> list[dict[str, float]]:
    """For each share of the signal and number of micro-batches: widths, and how often they hold."""
    return [row(share, count) for share in SHARES for count in COUNTS]


def row(share: float, count: int, draws: int = DRAWS) -> dict[str, float]:
    """The median half width of the interval of the signal's cosine, and the share that hold it."""
    depth = ds.Depth.from_rules({"layers": 0})
    rng = np.random.default_rng([int(1000 * share), count])
    widths, held = [], []
    for _ in range(draws):
        gradients, truth = made(rng, share, count)
        told = ds.depth_signal({"layers": jnp.asarray(gradients, jnp.float32)}, depth)["layers"]
        _, low, high = jax.device_get(told.signal_cosine)
        widths.append((high - low) / 2)
        held.append(low <= truth <= high)
    return {
        "share": share,
        "micro_batches": count,
        "half_width": round(float(np.median(widths)), 3),
        "held": round(float(np.mean(held)), 3),
    }


def made(rng: np.random.Generator, share: float, count: int) -> tuple[np.ndarray, float]:
    """Gradients of shape (micro-batches, layers, features), and the cosine of their signal."""

    def alike(cosine: float, *shape: int) -> np.ndarray:
        common = rng.normal(size=(*shape, 1, FEATURES))
        own = rng.normal(size=(*shape, LAYERS, FEATURES))
        return np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own

    signal, noise = alike(COSINES[0]), alike(COSINES[1], count)
    products = signal @ signal.T
    sizes = np.sqrt(np.diag(products))
    cosine = np.trace(products, 1) / (sizes[1:] * sizes[:-1]).sum()
    return np.sqrt(share) * signal + np.sqrt(1 - share) * noise, float(cosine)


def markdown(told: list[dict[str, float]]) -> str:
    """A row for each share, and a column for each number of micro-batches."""
    head = ["| share of the signal |", *(f" {count} |" for count in COUNTS)]
    lines = ["".join(head), "|---|" + "---:|" * len(COUNTS)]
    for share in SHARES:
        cells = [f" ± {each['half_width']:.2f} |" for each in told if each["share"] == share]
        lines.append(f"| {share:g} |" + "".join(cells))
    return "\n".join(lines)
