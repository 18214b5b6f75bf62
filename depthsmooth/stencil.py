"""How: an operator over depth as static shifts and weights, and the kernel that applies it."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Axes = tuple[int, ...]
"""The axes of a leaf that run over its layers, outer to inner; none for a leaf of one layer."""

_MOST_SHIFTS = 16
"""Stencils of more offsets are faster as a matrix: see benchmarks/large_radius.py."""

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
    def is_identity(self) -> bool:
        """Whether the operator is known, while tracing, to change nothing."""
        if isinstance(self.weights, jax.Array):
            return False
        rows = zip(self.offsets, self.weights, strict=True)
        return all(isinstance(row, np.ndarray) and (row == (k == 0)).all() for k, row in rows)

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
) -> list[jax.Array]:
    r"""Mixes the layers that several arrays hold between them: :math:`(S \otimes I)\, u`.

    One fused read and write of each array, which are never brought together into
    one. Layers that are dealt to the arrays in turn are shifted as a whole. Types
    narrower than 32 bits are mixed in float32 and cast back; float32, float64 and
    complex types keep their own arithmetic.

    A stencil of more than 16 offsets is applied as a matrix instead, to all the layers
    brought together: faster from there on (``benchmarks/large_radius.py``), at the cost
    of a copy, and of a NaN in one layer reaching every other of its run.

    Args:
      stencil: the operator, for all the layers.
      updates: arrays of any inexact dtype, alike but for their depth axes.
      axes: for each array its depth axes, outer to inner.
      layers: for each array the layers it holds, in row-major order of its depth
        axes. Every layer is held once.
      zero: a scalar 0. If it is traced, so that a compiler cannot know that it is 0,
        the result of shifts is the same in every bit, however the layers are laid out.

    Returns:
      Arrays of the shapes, dtypes, weak types and shardings of ``updates``.

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
        return list(updates)
    held = tuple(map(tuple, layers))
    if len(stencil.offsets) > _MOST_SHIFTS:
        runs = stencil.runs or (stencil.layers,)
        product: list[jax.Array] = _multiply(
            list(updates), matrix_of(stencil), tuple(axes), held, runs
        )
        return product
    neighbours = tuple(map(tuple, map(stencil.neighbours, stencil.offsets)))
    mixed: list[jax.Array] = _shift_and_add(
        list(updates), list(stencil.weights), zero, neighbours, tuple(axes), held
    )
    return mixed


# Both are compiled by themselves, so that tensors that are alike are traced and lowered once.


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _shift_and_add(
    updates: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    zero: jax.Array,
    neighbours: Sequence[Sequence[int | None]],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
) -> list[jax.Array]:
    wide = [Layers(widened(array), a) for array, a in zip(updates, axes, strict=True)]
    held = {layer: (j, i) for j, ours in enumerate(layers) for i, layer in enumerate(ours)}
    results = []
    for update, array, ours in zip(updates, wide, layers, strict=True):
        taps = []
        for row, neighbour in zip(weights, neighbours, strict=True):
            wanted = [neighbour[layer] for layer in ours]
            places = [None if layer is None else held[layer] for layer in wanted]
            product = array.over_layers(some_of(row, ours)) * _gather(wide, places, array)
            # Compilers round a product that meets a sum, or do not, as they like. A sum with a 0
            # that they do not see through rounds it always.
            taps.append(product + zero.astype(product.dtype))
        results.append(narrowed(functools.reduce(jnp.add, taps), update))
    return results


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _multiply(
    updates: Sequence[jax.Array],
    matrix: jax.Array,
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    runs: Sequence[int],
) -> list[jax.Array]:
    wide = [Layers(widened(array), a) for array, a in zip(updates, axes, strict=True)]
    order = [layer for ours in layers for layer in ours]
    together = jnp.concatenate([array.merged() for array in wide])
    in_order = _taken(together, np.argsort(order))
    products = [
        jnp.tensordot(
            matrix[start:end, start:end].astype(together.dtype),
            in_order[start:end],
            1,
            precision=jax.lax.Precision.HIGHEST,
        )
        for start, end in itertools.pairwise([0, *itertools.accumulate(runs)])
    ]
    mixed = _taken(jnp.concatenate(products), np.array(order))
    pieces = jnp.split(mixed, np.cumsum([len(ours) for ours in layers])[:-1])
    return [
        narrowed(array.unmerge(piece), update)
        for array, piece, update in zip(wide, pieces, updates, strict=True)
    ]


def _taken(layers: jax.Array, order: np.ndarray) -> jax.Array:
    """The layers in another order."""
    return layers if (order == np.arange(len(order))).all() else layers[order]


@dataclasses.dataclass(frozen=True)
class Layers:
    """An array with the axes that run over its layers."""

    array: jax.Array
    axes: Axes

    @property
    def sizes(self) -> Axes:
        """How long each of the axes is."""
        return tuple(self.array.shape[axis] for axis in self.axes)

    def merged(self) -> jax.Array:
        """The array of shape (layers, ...)."""
        front = jnp.moveaxis(self.array, self.axes, range(len(self.axes)))
        return front.reshape(math.prod(self.sizes), *front.shape[len(self.axes) :])

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """An array of shape (layers, ...) in this one's shape."""
        front = merged.reshape(*self.sizes, *merged.shape[1:])
        return jnp.moveaxis(front, range(len(self.axes)), self.axes)

    def over_layers(self, values: jax.typing.ArrayLike) -> jax.Array:
        """One value for each layer, in a shape that multiplies the array."""
        ones = (1,) * (self.array.ndim - len(self.axes))
        return self.unmerge(jnp.asarray(values, self.array.dtype).reshape(-1, *ones))

    def shift(self, offset: int) -> jax.Array:
        """Puts layer ``i + offset`` in place i, and zeros where there is none."""
        if offset == 0:
            return self.array
        if len(self.axes) == 1:
            return _pad(self.array, offset, self.axes[0])
        return self.unmerge(_pad(self.merged(), offset, 0))


def _gather(
    arrays: Sequence[Layers], places: Sequence[tuple[int, int] | None], like: Layers
) -> jax.Array:
    """An array like ``like`` whose layers come from those places: an array, an index in it."""
    zeros = jnp.zeros_like(like.array)
    found = {(place[0], place[1] - i) for i, place in enumerate(places) if place is not None}
    if not found:
        return zeros
    if len(found) == 1:
        [(j, offset)] = found
        if arrays[j].axes == like.axes and arrays[j].array.shape == like.array.shape:
            shifted = arrays[j].shift(offset).astype(zeros.dtype)
            exist = np.array([place is not None for place in places])
            inside = exists((offset,), len(places))[0]
            if (exist == inside).all():
                return shifted
            mask = like.over_layers(exist.astype(np.int8)) != 0
            return jnp.where(mask, shifted, zeros)
    merged = {j: arrays[j].merged().astype(zeros.dtype) for j in {j for j, _ in found}}
    nothing = jnp.zeros(next(iter(merged.values())).shape[1:], zeros.dtype)
    layers = [nothing if place is None else merged[place[0]][place[1]] for place in places]
    return like.unmerge(jnp.stack(layers))


def _pad(array: jax.Array, offset: int, axis: int) -> jax.Array:
    padding = [(0, 0, 0)] * array.ndim
    padding[axis] = (-offset, offset, 0)
    return jax.lax.pad(array, jnp.zeros((), array.dtype), padding)


def widened(array: jax.Array) -> jax.Array:
    """The array in float32, if its type is narrower."""
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array


def narrowed(mixed: jax.Array, update: jax.Array) -> jax.Array:
    """The result in the type, also if that is a weak one, of the update that it is for."""
    result = mixed.astype(update.dtype)
    # Setting into the original is the public way to keep a weak type.
    return update.at[...].set(result) if jax.typeof(update).weak_type else result


def some_of(weights: jax.Array, layers: Sequence[int]) -> jax.Array:
    """The weights of some layers; by a slice, which compiles better, if evenly spaced."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    if list(layers) == list(range(layers[0], layers[-1] + 1, step)):
        return weights[layers[0] : layers[-1] + 1 : step]
    return weights[np.asarray(layers)]
