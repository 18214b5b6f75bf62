"""Operators of many offsets: a product with the matrix, of all layers or of shards as they pass.

A matrix is faster from 17 diagonals on (``benchmarks/large_radius.py``). It costs a copy of the
layers, and a NaN in one layer reaches every other layer of its run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.arrays.halos import Shards, split
from depthsmooth.arrays.layers import Layers, Tensor, upcast
from depthsmooth.operators.stencil import Stencil, matrix_of


@jax.jit
def multiply(stencil: Stencil, tensor: Tensor) -> list[Layers]:
    """Mixes layers by the matrix of the operator, each run of layers by its part of it."""
    matrix = jnp.asarray(matrix_of(stencil))
    shards = {piece.shards for piece in tensor}
    by_layer = [upcast(piece.array) for piece in tensor]
    merged = [piece.of(array).merged() for piece, array in zip(tensor, by_layer, strict=True)]
    if shards == {1} or len(shards) > 1:
        mixed = _multiply_runs(stencil, matrix, tensor, merged)
    else:
        mixed = _multiply_shards(stencil, matrix, tensor, merged)
    return [piece.of(piece.unmerge(array)) for piece, array in zip(tensor, mixed, strict=True)]


def _multiply_runs(
    stencil: Stencil, matrix: jax.Array, tensor: Tensor, merged: Sequence[jax.Array]
) -> list[jax.Array]:
    """All layers in order, by a block-diagonal matrix. Runs without a layer are left out."""
    held = [layer for piece in tensor for layer in piece.layers]
    present = sorted(held)
    in_order = _taken(jnp.concatenate(merged), np.argsort(held))
    ends = np.searchsorted(present, np.cumsum([0, *(stencil.runs or (stencil.layers,))]))
    products = []
    for start, end in itertools.pairwise(ends.tolist()):
        if start < end:
            part = matrix[np.ix_(present[start:end], present[start:end])]
            products.append(_product(part, in_order[start:end], "ij,j...->i..."))
    mixed = _taken(jnp.concatenate(products), np.argsort(np.argsort(held)))
    return jnp.split(mixed, np.cumsum([len(piece.layers) for piece in tensor])[:-1])


def _multiply_shards(
    stencil: Stencil, matrix: jax.Array, tensor: Tensor, merged: Sequence[jax.Array]
) -> list[jax.Array]:
    """Each shard by its part of the matrix, and every other within reach as it passes by."""
    [first, *_] = tensor
    shards = first.shards
    views = [
        split(Layers(array, (0,), piece.layers, shards, piece.axis_name))
        for piece, array in zip(tensor, merged, strict=True)
    ]
    axis = views[0].axes[-1]
    parts = jnp.concatenate([view.array for view in views], axis)
    together = split(Layers(merged[0], (0,), (), shards, first.axis_name)).of(parts)
    assert isinstance(together, Shards)
    order = np.concatenate([np.reshape(piece.layers, (shards, -1)) for piece in tensor], 1)
    total = jnp.zeros_like(parts)
    for distance in range(1 - shards, shards):
        read = order[np.clip(np.arange(shards) + distance, 0, shards - 1)]
        near = _are_near(stencil, order, read, distance)
        if near.any():
            passing = together.from_shard(parts, distance)
            total += _products_of_runs(stencil, matrix, together, passing, order, read, near)
    pieces = jnp.split(total, np.cumsum([view.array.shape[axis] for view in views])[:-1], axis)
    return [piece.reshape(array.shape) for piece, array in zip(pieces, merged, strict=True)]


def _runs(stencil: Stencil) -> np.ndarray:
    """For each layer the number of its run."""
    runs = stencil.runs or (stencil.layers,)
    return np.repeat(np.arange(len(runs)), runs)


def _are_near(stencil: Stencil, order: np.ndarray, read: np.ndarray, distance: int) -> np.ndarray:
    """For each shard, and each two layers, whether one reads the other, at this distance."""
    reach, run_of = max(map(abs, stencil.offsets)), _runs(stencil)
    others = np.arange(len(order)) + distance
    exist = (others >= 0) & (others < len(order))
    rows, columns = order[:, :, None], read[:, None, :]
    near: np.ndarray = exist[:, None, None] & (np.abs(rows - columns) <= reach)
    near &= run_of[rows] == run_of[columns]
    return near


def _products_of_runs(
    stencil: Stencil,
    matrix: jax.Array,
    together: Layers,
    passing: jax.Array,
    order: np.ndarray,
    read: np.ndarray,
    near: np.ndarray,
) -> jax.Array:
    """What the passing layers add to those of each shard, run by run.

    What another run holds may be NaN, which a weight of 0 does not keep out.
    """
    run_of, total = _runs(stencil), jnp.zeros_like(passing)
    rows, columns = order[:, :, None], read[:, None, :]
    for run in np.unique(np.broadcast_to(run_of[rows], near.shape)[near]):
        in_run = near & (run_of[rows] == run)
        blocks = together.of_shards(jnp.where(in_run, matrix[rows, columns], 0))
        here = together.only(run_of[read] == run, passing)
        if together.is_shard:
            product = _product(blocks[0], here, "ij,j...->i...")
        else:
            product = _product(blocks, here, "sij,sj...->si...")
        total += together.only(run_of[order] == run, product)
    return total


def _product(matrix: jax.Array, layers: jax.Array, subscripts: str) -> jax.Array:
    narrow = matrix.astype(layers.dtype)
    return jnp.einsum(subscripts, narrow, layers, precision=jax.lax.Precision.HIGHEST)


def _taken(layers: jax.Array, order: np.ndarray) -> jax.Array:
    """The layers in another order."""
    return layers if (order == np.arange(len(order))).all() else layers[order]
