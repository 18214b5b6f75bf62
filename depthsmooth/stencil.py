"""How: an operator over depth as static shifts and weights, and the kernel that applies it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.layers import Axes, Halo, Layers, Shift, narrowed, pad, some_of, widened
from depthsmooth.mesh import AxisName

_MOST_SHIFTS = 16
"""Stencils of more offsets are dense: see benchmarks/large_radius.py."""

Weights = np.ndarray | jax.Array | Sequence[np.ndarray | jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Stencil:
    r"""An :math:`L \times L` operator over depth, kept by its diagonals.

    .. math::
        \tilde u_i = \sum_k \mathrm{weights}[k, i] \; u_{i + \mathrm{offsets}[k]}

    The boundary is part of the weights: they are 0 where layer
    :math:`i + \mathrm{offsets}[k]` does not exist.

    Attributes:
      offsets: which neighbours are read; static, distinct.
      weights: for each offset a row of shape ``(L,)``. NumPy arrays where the values
        are known while tracing, JAX arrays where they are traced.
      runs: how many layers, one run after another, are mixed among themselves
        alone; all L unless said.
    """

    offsets: tuple[int, ...]
    weights: Weights
    runs: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        """The number of layers L."""
        return len(self.weights[0])

    @property
    def is_dense(self) -> bool:
        """Whether it is faster as a matrix."""
        return len(self.offsets) > _MOST_SHIFTS

    @property
    def is_identity(self) -> bool:
        """Whether the operator is known, while tracing, to change nothing."""
        if isinstance(self.weights, jax.Array):
            return False
        rows = zip(self.offsets, self.weights, strict=True)
        return all(isinstance(row, np.ndarray) and (row == (k == 0)).all() for k, row in rows)

    def of_scaled(self, factors: jax.Array) -> Stencil:
        r"""The operator that scales first: :math:`S\, \mathrm{diag}(\mathrm{factors})`.

        Args:
          factors: for each layer, of shape ``(L,)``.

        Example:
          >>> halves = Stencil((-1, 1), np.array([[0, 0.5, 1], [1, 0.5, 0]]))
          >>> matrix_of(halves.of_scaled(jnp.array([1.0, 0.0, 2.0]))).tolist()
          [[0.0, 0.0, 0.0], [0.5, 0.0, 1.0], [0.0, 0.0, 0.0]]
        """
        weights = []
        for offset, row in zip(self.offsets, self.weights, strict=True):
            scales = pad(factors, offset, 0)
            exist = np.array([layer is not None for layer in self.neighbours(offset)])
            if (exist != exists((offset,), self.layers)[0]).any():
                scales = jnp.where(exist, scales, 0)  # what is read of another run may be NaN
            dtype = np.promote_types(jnp.asarray(row).dtype, factors.dtype)
            weights.append(jnp.asarray(row, dtype) * scales.astype(dtype))
        return Stencil(self.offsets, weights, self.runs)

    def neighbours(self, offset: int) -> list[int | None]:
        """For each layer the one at that offset, None where its run has none."""
        ends = itertools.accumulate(self.runs or (self.layers,))
        return [
            layer + offset if start <= layer + offset < end else None
            for start, end in itertools.pairwise([0, *ends])
            for layer in range(start, end)
        ]


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


def identity(layers: int) -> Stencil:
    """The operator that changes nothing."""
    return Stencil((0,), np.ones((1, layers)))


def matrix_of(stencil: Stencil) -> np.ndarray | jax.Array:
    """The operator as a matrix of shape ``(L, L)``.

    Example:
      >>> matrix_of(Stencil((-1, 1), np.array([[0, 0.5], [1, 0]])))
      array([[0. , 1. ],
             [0.5, 0. ]])
    """
    weights = stencil.weights
    known = all(isinstance(row, np.ndarray) for row in weights)
    neighbours = [stencil.neighbours(offset) for offset in stencil.offsets]
    there = [(k, i) for k, row in enumerate(neighbours) for i, j in enumerate(row) if j is not None]
    k, i = np.array(there, int).reshape(-1, 2).T
    j = i + np.array(stencil.offsets, int)[k]
    square = (stencil.layers, stencil.layers)
    if known:
        matrix = np.zeros(square)
        matrix[i, j] = np.asarray(weights)[k, i]
        return matrix
    rows = weights if isinstance(weights, jax.Array) else jnp.stack(list(weights))
    return jnp.zeros(square, rows.dtype).at[i, j].set(rows[k, i])


def stencil_of(matrix: np.ndarray | jax.Array, radius: int | None = None) -> Stencil:
    """The operator of a matrix: the main diagonal, and others that are not known to be 0.

    Args:
      matrix: of shape ``(L, L)``.
      radius: how far from the middle one there are diagonals, if that is known.

    Example:
      >>> stencil_of(np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1]])).offsets
      (0, 2)
    """
    layers = len(matrix)
    farthest = min(layers - 1, layers if radius is None else radius)
    offsets = tuple(range(-farthest, farthest + 1))
    there = exists(offsets, layers)
    column = np.where(there, np.arange(layers) + np.asarray(offsets)[:, None], 0)
    numeric = np if isinstance(matrix, np.ndarray) else jnp
    weights = numeric.where(there, matrix[np.arange(layers), column], 0)
    if isinstance(weights, jax.Array):
        return Stencil(offsets, weights)
    kept = [k for k, offset in enumerate(offsets) if offset == 0 or weights[k].any()]
    return Stencil(tuple(offsets[k] for k in kept), weights[kept])


def join(stencils: Sequence[Stencil]) -> Stencil:
    """The block-diagonal operator: each stencil on layers of its own, one after another.

    Example:
      >>> halves = Stencil((-1, 1), np.array([[0, 0.5, 1], [1, 0.5, 0]]))
      >>> join([halves, halves]).neighbours(1)
      [1, 2, None, 4, 5, None]
    """
    if len(stencils) == 1:
        return stencils[0]
    offsets = tuple(sorted({offset for stencil in stencils for offset in stencil.offsets}))

    def row(stencil: Stencil, offset: int) -> np.ndarray | jax.Array:
        if offset in stencil.offsets:
            return stencil.weights[stencil.offsets.index(offset)]
        return np.zeros(stencil.layers)

    def joined(rows: Sequence[np.ndarray | jax.Array]) -> np.ndarray | jax.Array:
        known = all(isinstance(row, np.ndarray) for row in rows)
        return np.concatenate(rows) if known else jnp.concatenate(rows)

    rows = [joined([row(stencil, offset) for stencil in stencils]) for offset in offsets]
    runs = tuple(run for stencil in stencils for run in stencil.runs or (stencil.layers,))
    return Stencil(offsets, rows, runs)


def apply(
    stencil: Stencil,
    updates: Sequence[jax.Array],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    zero: jax.typing.ArrayLike = 0,
    *,
    shards: Sequence[int] | None = None,
    axis_name: AxisName | None = None,
    halos: Sequence[Halo] | None = None,
    wide: bool = False,
) -> list[jax.Array]:
    r"""Mixes the layers that several arrays hold between them: :math:`(S \otimes I)\, u`.

    One fused read and write of each array, which are never brought together into
    one. Layers that are dealt to the arrays in turn are shifted as a whole. Types
    narrower than 32 bits are mixed in float32 and cast back; float32, float64 and
    complex types keep their own arithmetic.

    Where devices split the layers into shards, each gets the layers that the stencil reads
    beyond its own from those that hold them, as they are, and nothing else.

    A stencil of more than 16 offsets is applied as a matrix instead, to all the layers
    brought together: faster from there on (``benchmarks/large_radius.py``), at the cost
    of a copy, and of a NaN in one layer reaching every other of its run. Each shard then
    passes every device that reads of it.

    Args:
      stencil: the operator, for all the layers.
      updates: arrays of any inexact dtype, alike but for their depth axes.
      axes: for each array its depth axes, outer to inner.
      layers: for each array the layers it holds, in row-major order of its depth
        axes. Every layer is held once.
      zero: a scalar 0. If it is traced, so that a compiler cannot know that it is 0,
        the result of shifts is the same in every bit, however the layers are laid out.
      shards: for each array into how many parts devices split its layers; 1, unless said.
      axis_name: in ``jax.shard_map``, where a device has one shard of each array: the mesh
        axis along which the others are.
      halos: what :func:`exchange` gives for the same arguments, if it is at hand.
      wide: whether results of narrow types stay in float32.

    Returns:
      Arrays of the shapes, shardings and, unless ``wide``, dtypes and weak types of
      ``updates``.

    Example:
      >>> halves = Stencil((-1, 1), np.array([[0, 0.5, 1], [1, 0.5, 0]]))
      >>> [stacked] = apply(halves, [jnp.array([1.0, 2.0, 5.0])], [(0,)], [(0, 1, 2)])
      >>> stacked.tolist()
      [2.0, 3.0, 2.0]
      >>> dealt = apply(halves, [jnp.array([1.0, 5.0]), jnp.array(2.0)], [(0,), ()], [(0, 2), (1,)])
      >>> [array.tolist() for array in dealt]
      [[2.0, 2.0], 3.0]
    """
    if stencil.is_identity:
        return [widened(update) for update in updates] if wide else list(updates)
    layout = _layout(updates, axes, layers, shards)
    if stencil.is_dense:
        runs = stencil.runs or (stencil.layers,)
        reach = max(map(abs, stencil.offsets))
        mixed: list[jax.Array] = _multiply(
            list(updates), matrix_of(stencil), *layout, axis_name, runs, reach
        )
    else:
        if halos is None:
            halos = exchange(stencil, updates, axes, layers, shards=shards, axis_name=axis_name)
        mixed = _shift_and_add(
            list(updates),
            list(halos),
            list(stencil.weights),
            zero,
            _neighbours(stencil),
            *layout,
            axis_name,
        )
    return mixed if wide else list(map(narrowed, mixed, updates))


def exchange(
    stencil: Stencil,
    updates: Sequence[jax.Array],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    *,
    shards: Sequence[int] | None = None,
    axis_name: AxisName | None = None,
) -> list[Halo]:
    """What a stencil reads of other shards: r layers from either side for the radius r.

    Args:
      stencil: as the others in :func:`apply`.
      updates: the arrays.
      axes: their depth axes.
      layers: the layers they hold.
      shards: into how many parts devices split these.
      axis_name: the mesh axis that the parts are along, in ``jax.shard_map``.

    Returns:
      For each array its halo, of its type.
    """
    layout = _layout(updates, axes, layers, shards)
    if stencil.is_identity or stencil.is_dense or set(layout.shards) <= {1}:
        return [(None, None)] * len(updates)
    halos: list[Halo] = _exchange(list(updates), _neighbours(stencil), *layout, axis_name)
    return halos


class _Layout(NamedTuple):
    axes: tuple[Axes, ...]
    layers: tuple[tuple[int, ...], ...]
    shards: tuple[int, ...]


def _layout(
    updates: Sequence[jax.Array],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    shards: Sequence[int] | None,
) -> _Layout:
    split = (1,) * len(updates) if shards is None else tuple(shards)
    return _Layout(tuple(axes), tuple(map(tuple, layers)), split)


def _neighbours(stencil: Stencil) -> tuple[tuple[int | None, ...], ...]:
    return tuple(map(tuple, map(stencil.neighbours, stencil.offsets)))


# These are compiled by themselves, so that tensors that are alike are traced and lowered once.


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _exchange(
    updates: Sequence[jax.Array],
    neighbours: Sequence[Sequence[int | None]],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    shards: Sequence[int],
    axis_name: AxisName | None,
) -> list[Halo]:
    reads = _reads(neighbours, layers)
    arrays = [Layers(*each, axis_name) for each in zip(updates, axes, shards, strict=True)]
    return [array.halo(_offsets_in(j, reads)) for j, array in enumerate(arrays)]


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8))
def _shift_and_add(
    updates: Sequence[jax.Array],
    halos: Sequence[Halo],
    weights: Sequence[jax.Array],
    zero: jax.Array,
    neighbours: Sequence[Sequence[int | None]],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    shards: Sequence[int],
    axis_name: AxisName | None,
) -> list[jax.Array]:
    reads = _reads(neighbours, layers)
    whole = [Layers(*each, axis_name) for each in zip(updates, axes, shards, strict=True)]
    arrays = [array.split() for array in whole]
    shifts = [array.shifts(halo) for array, halo in zip(arrays, halos, strict=True)]
    results = []
    for original, array, ours, read in zip(whole, arrays, layers, reads, strict=True):
        wide = widened(array.array)
        taps = []
        for row, places in zip(weights, read, strict=True):
            gathered = widened(_gather(arrays, shifts, places, array)).astype(wide.dtype)
            product = array.over_layers(some_of(row, ours), wide.dtype) * gathered
            # Compilers round a product that meets a sum, or do not, as they like. A sum with a 0
            # that they do not see through rounds it always.
            taps.append(product + zero.astype(product.dtype))
        results.append(original.join(functools.reduce(jnp.add, taps)))
    return results


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _multiply(
    updates: Sequence[jax.Array],
    matrix: jax.Array,
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    shards: Sequence[int],
    axis_name: AxisName | None,
    runs: Sequence[int],
    reach: int,
) -> list[jax.Array]:
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


Places = Sequence[tuple[int, int] | None]
"""Where a tap finds its layers: for each an array, and an index in it; None where there is none."""


def _reads(
    neighbours: Sequence[Sequence[int | None]], layers: Sequence[Sequence[int]]
) -> list[list[Places]]:
    """For each array and each tap where it finds its layers."""
    held = {layer: (j, i) for j, ours in enumerate(layers) for i, layer in enumerate(ours)}
    place_of = {None: None} | held
    return [[[place_of[tap[layer]] for layer in ours] for tap in neighbours] for ours in layers]


def _found(places: Places) -> set[tuple[int, int]]:
    """The arrays that the layers are in, and the offsets in these."""
    return {(place[0], place[1] - i) for i, place in enumerate(places) if place is not None}


def _offsets_in(j: int, reads: Sequence[Sequence[Places]]) -> list[int]:
    """The offsets at which any tap finds its layers in one array."""
    founds = [_found(places) for read in reads for places in read]
    return [offset for found in founds if len(found) == 1 for at, offset in found if at == j]


def _gather(
    arrays: Sequence[Layers], shifts: Sequence[Shift], places: Places, like: Layers
) -> jax.Array:
    """An array like ``like`` whose layers come from those places."""
    zeros = jnp.zeros_like(like.array)
    found = _found(places)
    if not found:
        return zeros
    if len(found) == 1:
        [(j, offset)] = found
        if (arrays[j].axes, arrays[j].array.shape) == (like.axes, like.array.shape):
            shifted = shifts[j](offset).astype(zeros.dtype)
            exist = np.array([place is not None for place in places])
            inside = exists((offset,), len(places))[0]
            if (exist == inside).all():
                return shifted
            return like.only(exist, shifted)
    merged = {j: arrays[j].merged().astype(zeros.dtype) for j in {j for j, _ in found}}
    nothing = jnp.zeros(next(iter(merged.values())).shape[1:], zeros.dtype)
    layers = [nothing if place is None else merged[place[0]][place[1]] for place in places]
    return like.unmerge(jnp.stack(layers))
