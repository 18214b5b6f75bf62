"""Sums over each layer of a block: inner products, norms, and layers multiplied by factors."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.arrays.halos import split
from depthsmooth.arrays.layers import Block, Layers, Tensor, some_of, upcast
from depthsmooth.mesh import names_of, rank_along, replicated


def inner(one: Block, other: Block) -> jax.Array:
    r"""The inner product of each layer with its like: :math:`\mathrm{Re} \sum \bar u v`.

    A real array of shape ``(L,)``, of float32 or the widest type among the tensors; 0 for layers
    that no tensor holds.

    Example:
      >>> stack = Layers(jnp.array([[3.0, 4.0], [6.0, 8.0]]), axes=(0,), layers=(0, 1))
      >>> inner([[stack]], [[stack]]).tolist()
      [25.0, 100.0]
    """
    pieces = [piece for tensor in one for piece in tensor]
    dtype = max((upcast(p.array).real.dtype for p in pieces), key=lambda dtype: dtype.itemsize)
    layers = 1 + max(max(piece.layers) for piece in pieces)
    totals: dict[tuple[str, ...], jax.Array] = {}
    for ours, theirs in zip(one, other, strict=True):
        for axes, total in _totals(ours, theirs, layers, dtype).items():
            totals[axes] = totals[axes] + total if axes in totals else total
    # One exchange for all that is to be summed over the same devices.
    sums = [jax.lax.psum(total, axes) if axes else total for axes, total in totals.items()]
    return functools.reduce(jnp.add, sums)


def _totals(
    ours: Tensor, theirs: Tensor, layers: int, dtype: jax.typing.DTypeLike
) -> dict[tuple[str, ...], jax.Array]:
    """The inner products of one tensor, by the mesh axes over which they are still to be summed."""
    parts: dict[tuple[str, ...], list[tuple[jax.Array, np.ndarray | jax.Array]]] = {}
    for piece, like in zip(ours, theirs, strict=True):
        axes, held = piece.features, np.array(piece.layers)
        if piece.is_shard:
            axes = (*axes, *names_of(piece.axis_name))
        parts.setdefault(axes, []).append((_inner(piece, like).astype(dtype), _own(piece, held)))
    return {axes: _in_order(some, layers, dtype) for axes, some in parts.items()}


def _own(piece: Layers, held: np.ndarray) -> np.ndarray | jax.Array:
    """Of something for each layer that a whole array holds, what this device has."""
    if not piece.is_shard or piece.axis_name is None:
        return held
    return jnp.asarray(held.reshape(piece.shards, -1))[rank_along(piece.axis_name)]


def _in_order(
    parts: Iterable[tuple[jax.Array, np.ndarray | jax.Array]],
    layers: int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Values and the layers that they belong to, as one array of shape ``(layers,)``."""
    values, helds = zip(*parts, strict=True)
    total = values[0] if len(values) == 1 else jnp.concatenate(values)
    known = all(isinstance(held, np.ndarray) for held in helds)
    together = np.concatenate(helds) if known else jnp.concatenate(helds)
    if known and together.tolist() == list(range(layers)):
        return total
    return jnp.zeros(layers, dtype).at[together].set(replicated(total))


def scaled(block: Block, factors: jax.Array) -> list[Tensor]:
    """Each of L layers multiplied by its factor, in float32 or a wider type.

    Example:
      >>> stack = Layers(jnp.array([[3.0, 4.0], [6.0, 8.0]]), axes=(0,), layers=(0, 1))
      >>> [[half]] = scaled([[stack]], jnp.array([1.0, 0.5]))
      >>> half.array.tolist()
      [[3.0, 4.0], [3.0, 4.0]]
    """
    return [[_times(piece, _of_layers(factors, piece)) for piece in tensor] for tensor in block]


def _of_layers(factors: jax.Array, piece: Layers) -> jax.Array:
    """The factors of the layers that an array holds."""
    if list(piece.layers) == list(range(len(factors))):
        return factors
    return jnp.asarray(some_of(replicated(factors), piece.layers))


def norms(block: Block) -> jax.Array:
    r"""The norm of each layer: :math:`\sqrt{\sum |u|^2}`, of shape ``(L,)``.

    Where it is 0 its gradient is taken to be 0, too.
    """
    squares = inner(block, block)
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def ratio(one: jax.typing.ArrayLike, other: jax.Array) -> jax.Array:
    """``one / other``, and 0 where the other is 0. What is NaN stays NaN."""
    return jnp.where(other == 0, 0, one / jnp.where(other == 0, 1, other))


# Both are compiled by themselves, so that arrays that are alike are traced and lowered once.


@jax.jit
def _inner(one: Layers, other: Layers) -> jax.Array:
    """The inner products of the layers of two arrays, of shape ``(layers,)``."""
    # By shards, as they are mixed: a compiler that sees another shape reads them once more.
    ours, theirs, axes = split(one).array, split(other).array, split(one).axes
    products = upcast(ours).real * upcast(theirs).real
    if jnp.iscomplexobj(ours):
        products = products + ours.imag * theirs.imag
    sums = products.sum([axis for axis in range(ours.ndim) if axis not in axes])
    return sums.transpose([sorted(axes).index(axis) for axis in axes]).reshape(-1)


@jax.jit
def _times(piece: Layers, factors: jax.Array) -> Layers:
    wide = piece.of(upcast(piece.array))
    return wide.of(wide.array * wide.over_layers(factors))
