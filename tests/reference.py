"""Window Smoothing as the paper writes it, in float64 NumPy, layer by layer."""

import numpy as np


def window(updates: np.ndarray, alpha: float, axis: int) -> np.ndarray:
    """The formula with its two ends; one layer stays as it is."""
    wide = np.complex128 if np.iscomplexobj(updates) else np.float64
    layers = list(np.moveaxis(np.asarray(updates, wide), axis, 0))
    if len(layers) == 1:
        return np.asarray(updates, wide)
    last = len(layers) - 1
    mixed = []
    for i, layer in enumerate(layers):
        if i == 0:
            mixed.append((1 - alpha / 2) * layer + alpha / 2 * layers[1])
        elif i == last:
            mixed.append((1 - alpha / 2) * layer + alpha / 2 * layers[last - 1])
        else:
            mixed.append((1 - alpha) * layer + alpha / 2 * (layers[i - 1] + layers[i + 1]))
    return np.moveaxis(np.stack(mixed), 0, axis)
