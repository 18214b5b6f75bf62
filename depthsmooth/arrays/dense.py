"""Operators of many offsets: a product with the matrix, of all layers or of shards as they pass."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.arrays.layers import Layers, widened
from depthsmooth.depth.leaves import Axes
from depthsmooth.mesh import AxisName


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def multiply(
    updates: Sequence[jax.Array],
    matrix: jax.Array,
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    shards: Sequence[int],
    axis_name: AxisName | None,
    runs: Sequence[int],
    reach: int,
) -> list[jax.Array]:
    """Multiplies the layers that arrays hold by a matrix, each run by its part of it."""
    arrays = [
        Layers(*each, axis_name) for each in zip(map(widened, updates), axes, shards, strict=True)
    ]
    merged = [array.merged() for array in arrays]
    if shards[0] > 1 and len(set(shards)) == 1:
        mixed = _multiply_shards(arrays, merged, matrix, layers, runs, reach)
    else:
        mixed = _multiply_runs(merged, matrix, layers, runs)
    return [array.unmerge(piece) for array, piece in zip(arrays, mixed, strict=True)]


def _multiply_runs(
    merged: Sequence[jax.Array],
    matrix: jax.Array,
    layers: Sequence[Sequence[int]],
    runs: Sequence[int],
) -> list[jax.Array]:
    """Each run of layers, of arrays of shape (layers, ...), by its part of the matrix."""
    order = [layer for ours in layers for layer in ours]
    in_order = _taken(jnp.concatenate(merged), np.argsort(order))
    products = [
        _product(matrix[start:end, start:end], in_order[start:end], "ij,j...->i...")
        for start, end in itertools.pairwise([0, *itertools.accumulate(runs)])
    ]
    mixed = _taken(jnp.concatenate(products), np.array(order))
    return jnp.split(mixed, np.cumsum([len(ours) for ours in layers])[:-1])


def _multiply_shards(
    arrays: Sequence[Layers],
    merged: Sequence[jax.Array],
    matrix: jax.Array,
    layers: Sequence[Sequence[int]],
    runs: Sequence[int],
    reach: int,
) -> list[jax.Array]:
    """Each shard by its part of the matrix, and every other that is within reach, as it passes."""
    shards, axis_name = arrays[0].shards, arrays[0].axis_name
    split = [Layers(array, (0,), shards, axis_name).split() for array in merged]
    axis = split[0].axes[-1]
    parts = jnp.concatenate([array.array for array in split], axis)
    together = Layers(parts, split[0].axes, shards, axis_name)
    order = np.concatenate([np.reshape(ours, (shards, -1)) for ours in layers], 1)
    run_of = np.repeat(np.arange(len(runs)), runs)
    total = jnp.zeros_like(parts)
    for distance in range(1 - shards, shards):
        others = np.arange(shards) + distance
        exist = (others >= 0) & (others < shards)
        written, read = order, order[np.where(exist, others, 0)]
        rows, columns = written[:, :, None], read[:, None, :]
        near = exist[:, None, None] & (np.abs(rows - columns) <= reach)
        near &= run_of[rows] == run_of[columns]
        if not near.any():
            continue
        passing = together.from_shard(parts, distance)
        for run in np.unique(np.broadcast_to(run_of[rows], near.shape)[near]):
            in_run = near & (run_of[rows] == run)
            blocks = together.of_shards(jnp.where(in_run, matrix[rows, columns], 0))
            # What another run has may be NaN, which a weight of 0 does not keep out.
            here = _product_of_shards(together, blocks, together.only(run_of[read] == run, passing))
            total += together.only(run_of[written] == run, here)
    sizes = [array.array.shape[axis] for array in split]
    pieces = jnp.split(total, np.cumsum(sizes)[:-1], axis)
    return [piece.reshape(array.shape) for piece, array in zip(pieces, merged, strict=True)]


def _product_of_shards(like: Layers, blocks: jax.Array, layers: jax.Array) -> jax.Array:
    """The product of the part that this device has, or of all parts."""
    if like.is_shard:
        return _product(blocks[0], layers, "ij,j...->i...")
    return _product(blocks, layers, "sij,sj...->si...")


def _product(matrix: jax.Array, layers: jax.Array, subscripts: str) -> jax.Array:
    narrow = matrix.astype(layers.dtype)
    return jnp.einsum(subscripts, narrow, layers, precision=jax.lax.Precision.HIGHEST)


def _taken(layers: jax.Array, order: np.ndarray) -> jax.Array:
    """The layers in another order."""
    return layers if (order == np.arange(len(order))).all() else layers[order]
