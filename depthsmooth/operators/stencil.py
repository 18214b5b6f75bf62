"""An operator over depth for L layers: static offsets and a weight for each offset and layer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MOST_SHIFTS = 16
"""Stencils of more offsets are dense: see benchmarks/large_radius.py."""


Array = np.ndarray | jax.Array
Weights = Array | Sequence[Array]


@jax.tree_util.register_pytree_node_class
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

    def tree_flatten(self) -> tuple[tuple[Weights, ...], tuple[Any, ...]]:
        """Weights that are traced, and what is static: others are constants of a program."""
        known = self.known
        if known is None or self.is_dense:
            return (self.weights,), (self.offsets, self.runs)
        return (), (self.offsets, self.runs, known.shape, known.tobytes())

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], traced: tuple[Weights, ...]) -> Stencil:
        """The same with other traced weights."""
        offsets, runs, *known = static
        [weights] = traced or [np.frombuffer(known[1]).reshape(known[0])]
        return cls(offsets, weights, runs)

    @property
    def layers(self) -> int:
        """The number of layers L."""
        return len(self.weights[0])

    @property
    def known(self) -> np.ndarray | None:
        """The weights as one array, if all of them are known while tracing."""
        if isinstance(self.weights, jax.Array):
            return None
        is_known = all(isinstance(row, np.ndarray) for row in self.weights)
        return np.asarray(self.weights, float) if is_known else None

    @property
    def is_dense(self) -> bool:
        """Whether it is faster as a matrix."""
        return len(self.offsets) > _MOST_SHIFTS

    @functools.cached_property
    def is_identity(self) -> bool:
        """Whether the operator is known, while tracing, to change nothing."""
        known = self.known
        return known is not None and (np.equal(self.offsets, 0) == known.T).all()

    def neighbours(self, offset: int) -> list[int | None]:
        """For each layer the one at that offset, None where its run has none."""
        ends = itertools.accumulate(self.runs or (self.layers,))
        return [
            layer + offset if start <= layer + offset < end else None
            for start, end in itertools.pairwise([0, *ends])
            for layer in range(start, end)
        ]


def misfit_of(stencil: Stencil, layers: int) -> str:
    """Why this is no operator for that many layers; empty if it is one.

    Example:
      >>> misfit_of(Stencil((0, 1), np.array([[1.0, 1.0], [0.5, 0.5]])), layers=2)
      'weights[1, 1] is 0.5, but there is no layer 2. Make it 0: boundaries are in the weights.'
    """
    distinct = {offset for offset in stencil.offsets if isinstance(offset, int | np.integer)}
    if not isinstance(stencil.offsets, tuple) or len(distinct) < len(stencil.offsets):
        return f"its offsets are {stencil.offsets}, but have to be a tuple of distinct integers."
    shapes = [np.shape(row) for row in stencil.weights]
    if shapes != [(layers,)] * len(stencil.offsets):
        return (
            f"its weights are rows of shapes {shapes}, but have to be one row of shape "
            f"({layers},) for each of the {len(stencil.offsets)} offsets."
        )
    if any(map(np.iscomplexobj, stencil.weights)):
        return "its weights are complex, but have to be real."
    for k, (offset, row) in enumerate(zip(stencil.offsets, stencil.weights, strict=True)):
        beyond = ~exists((offset,), layers)[0]
        if isinstance(row, np.ndarray) and row[beyond].any():
            i = int(np.flatnonzero(beyond & (row != 0))[0])
            return (
                f"weights[{k}, {i}] is {row[i]:g}, but there is no layer {i + offset}. Make "
                "it 0: boundaries are in the weights."
            )
    return ""


def exists(offsets: tuple[int, ...], layers: int) -> np.ndarray:
    """Whether there is a neighbour at each offset of each layer, of shape ``(len(offsets), L)``.

    Example:
      >>> exists((-1, 0, 1), 3).astype(int)
      array([[0, 1, 1],
             [1, 1, 1],
             [1, 1, 0]])
    """
    neighbour = np.arange(layers) + np.asarray(offsets)[:, None]
    mask: np.ndarray = (neighbour >= 0) & (neighbour < layers)
    return mask


def matrix_of(stencil: Stencil) -> Array:
    """The operator as a matrix of shape ``(L, L)``.

    Example:
      >>> matrix_of(Stencil((-1, 1), np.array([[0, 0.5], [1, 0]])))
      array([[0. , 1. ],
             [0.5, 0. ]])
    """
    weights = stencil.weights
    tap = np.full((stencil.layers, stencil.layers), -1)
    for k, offset in enumerate(stencil.offsets):
        for i, j in enumerate(stencil.neighbours(offset)):
            if j is not None:
                tap[i, j] = k
    rows = np.arange(stencil.layers)[:, None]
    if stencil.known is not None:
        return np.where(tap < 0, 0.0, stencil.known[tap, rows])
    traced = weights if isinstance(weights, jax.Array) else jnp.stack(list(weights))
    return jnp.where(tap < 0, 0, traced[tap, rows])


def stencil_of(matrix: Array, radius: int | None = None) -> Stencil:
    """The operator of a matrix: the main diagonal, and others that are not known to be 0.

    ``radius`` is how far from the middle one there are diagonals, if that is known.

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

    def row(stencil: Stencil, offset: int) -> Array:
        if offset in stencil.offsets:
            return stencil.weights[stencil.offsets.index(offset)]
        return np.zeros(stencil.layers)

    def joined(rows: Sequence[Array]) -> Array:
        known = all(isinstance(row, np.ndarray) for row in rows)
        return np.concatenate(rows) if known else jnp.concatenate(rows)

    rows = [joined([row(stencil, offset) for stencil in stencils]) for offset in offsets]
    runs = tuple(run for stencil in stencils for run in stencil.runs or (stencil.layers,))
    return Stencil(offsets, rows, runs)


Operator = Callable[[int, jax.typing.ArrayLike], Stencil]
"""``operator(layers, count)`` is the :class:`Stencil` for that many layers at step ``count``."""
