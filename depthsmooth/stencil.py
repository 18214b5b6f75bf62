"""How: an operator over depth as static shifts and weights, and the kernel that applies it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Stencil:
    r"""An :math:`L \times L` operator over depth, kept by its diagonals.

    .. math::
        \tilde u_i = \sum_k \mathrm{weights}[k, i] \; u_{i + \mathrm{offsets}[k]}

    The boundary is part of the weights: they are 0 where layer
    :math:`i + \mathrm{offsets}[k]` does not exist.

    Attributes:
      offsets: which neighbours are read; static, distinct.
      weights: shape ``(len(offsets), L)``. A NumPy array where the values are
        known while tracing, a JAX array where they are traced.
    """

    offsets: tuple[int, ...]
    weights: np.ndarray | jax.Array

    @property
    def is_identity(self) -> bool:
        """Whether the operator is known, while tracing, to change nothing."""
        if not isinstance(self.weights, np.ndarray):
            return False
        itself = np.array([offset == 0 for offset in self.offsets])
        return bool((self.weights == itself[:, None]).all())


def exists(offsets: tuple[int, ...], layers: int) -> np.ndarray:
    """Tells for each offset and layer whether that neighbour exists.

    Args:
      offsets: neighbours relative to a layer.
      layers: number of layers L.

    Returns:
      Boolean array of shape ``(len(offsets), L)``.

    Example:
      >>> exists((-1, 0, 1), 3).astype(int)
      array([[0, 1, 1],
             [1, 1, 1],
             [1, 1, 0]])
    """
    neighbour = np.arange(layers) + np.asarray(offsets)[:, None]
    mask: np.ndarray = (neighbour >= 0) & (neighbour < layers)
    return mask


def apply(stencil: Stencil, updates: jax.Array, axis: int) -> jax.Array:
    r"""Mixes the layers of one stacked array: :math:`(S \otimes I)\, u`.

    One fused read and write. Types narrower than 32 bits are mixed in float32
    and cast back; float32, float64 and complex types keep their own arithmetic.

    Args:
      stencil: the operator, for ``updates.shape[axis]`` layers.
      updates: array of any inexact dtype with layers along ``axis``.
      axis: the depth axis, ``0 <= axis < updates.ndim``.

    Returns:
      Array of the shape, dtype, weak type and sharding of ``updates``.

    Example:
      >>> halves = Stencil((-1, 1), np.array([[0, 0.5, 1], [1, 0.5, 0]]))
      >>> apply(halves, jnp.array([1.0, 2.0, 5.0]), axis=0).tolist()
      [2.0, 3.0, 2.0]
    """
    if stencil.is_identity:
        return updates
    updates = jnp.asarray(updates)
    narrow = updates.dtype.itemsize < 4
    layers = updates.astype(jnp.float32) if narrow else updates
    per_layer = [1] * layers.ndim
    per_layer[axis] = layers.shape[axis]
    weights = jnp.asarray(stencil.weights, layers.dtype)
    taps = [
        weight.reshape(per_layer) * _shift(layers, offset, axis)
        for offset, weight in zip(stencil.offsets, weights, strict=True)
    ]
    mixed = functools.reduce(jnp.add, taps).astype(updates.dtype)
    # Setting into the original is the public way to keep a weak type.
    return updates.at[...].set(mixed) if jax.typeof(updates).weak_type else mixed


def _shift(layers: jax.Array, offset: int, axis: int) -> jax.Array:
    """Puts layer ``i + offset`` in place i, and zeros where there is none."""
    padding = [(0, 0, 0)] * layers.ndim
    padding[axis] = (-offset, offset, 0)
    return jax.lax.pad(layers, jnp.zeros((), layers.dtype), padding)
