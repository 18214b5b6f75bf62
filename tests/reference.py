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


def ratio(one, other):
    """The quotient, 0 where the divisor is."""
    return np.divide(one, other, out=np.zeros(np.broadcast(one, other).shape), where=other != 0)


def augmented(blocks: dict, matrix: np.ndarray, variant: str, norm_over: str) -> dict:
    """What becomes of tensors of shape (L, ...), with the norms of section 3.4 of the paper."""

    def norms(tensors):
        squares = {
            name: (np.abs(tensor.reshape(len(tensor), -1)) ** 2).sum(1)
            for name, tensor in tensors.items()
        }
        total = sum(squares.values())
        return {name: np.sqrt(total if norm_over == "block" else squares[name]) for name in tensors}

    def times(tensors, factors):
        return {
            name: tensor * factors[name].reshape(-1, *[1] * (tensor.ndim - 1))
            for name, tensor in tensors.items()
        }

    def mix(tensors):
        return {name: np.tensordot(matrix, tensor, 1) for name, tensor in tensors.items()}

    before = norms(blocks)
    if variant == "standard":
        return mix(blocks)
    if variant == "shrunk":
        after = norms(mix(blocks))
        return times(blocks, {name: ratio(after[name], before[name]) for name in blocks})
    if variant == "directional":
        blocks = times(blocks, {name: ratio(1.0, before[name]) for name in blocks})
    mixed = mix(blocks)
    after = norms(mixed)
    return times(mixed, {name: ratio(before[name], after[name]) for name in blocks})
