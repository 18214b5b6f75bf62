"""The layers of a group as blocks: inner products, norms, and layers multiplied by a number."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.stencil import Axes, Layers, some_of


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a block, through the layers of a group.

    Attributes:
      arrays: what holds the layers.
      axes: for each array its depth axes, outer to inner.
      layers: for each array the layers it holds, counted in the group, in row-major order
        of its depth axes.
    """

    arrays: Sequence[jax.Array]
    axes: Sequence[Axes]
    layers: Sequence[Sequence[int]]

    def map(self, fn: Callable[..., jax.Array], *rest: Sequence[object]) -> Tensor:
        """The tensor of other arrays: of a function of each, and of its like in ``rest``."""
        return dataclasses.replace(self, arrays=list(map(fn, self.arrays, *rest)))


Block = Sequence[Tensor]
"""All the tensors of a block that count, of float32 or wider types."""


def layers_of(block: Block) -> int:
    """The number of layers L, as far as they are there."""
    return 1 + max(max(layers) for tensor in block for layers in tensor.layers)


def inner(one: Block, other: Block) -> jax.Array:
    r"""The inner product of each layer with its like: :math:`\mathrm{Re} \sum \bar u v`.

    Args:
      one: u.
      other: v, of the same layout.

    Returns:
      Real array of shape ``(L,)``, of the widest type there is among the tensors.

    Example:
      >>> stack = Tensor([jnp.array([[3.0, 4.0], [6.0, 8.0]])], [(0,)], [(0, 1)])
      >>> inner([stack], [stack]).tolist()
      [25.0, 100.0]
    """
    dtypes = [array.real.dtype for tensor in one for array in tensor.arrays]
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    layers = layers_of(one)
    totals = []
    for ours, theirs in zip(one, other, strict=True):
        products = [
            product.astype(dtype) for product in map(_inner, ours.arrays, theirs.arrays, ours.axes)
        ]
        held = [layer for some in ours.layers for layer in some]
        total = jnp.concatenate(products) if len(products) > 1 else products[0]
        if held != list(range(layers)):
            total = jnp.zeros(layers, dtype).at[np.array(held)].set(total)
        totals.append(total)
    return functools.reduce(jnp.add, totals)


def norms(block: Block) -> jax.Array:
    r"""The norm of each layer: :math:`\sqrt{\sum |u|^2}`, of shape ``(L,)``.

    Where it is 0 its gradient is taken to be 0, too.
    """
    squares = inner(block, block)
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def scaled(block: Block, factors: jax.Array) -> Block:
    """Each layer multiplied by its factor.

    Args:
      block: of any inexact dtype.
      factors: of shape ``(L,)``.

    Example:
      >>> stack = Tensor([jnp.array([[3.0, 4.0], [6.0, 8.0]])], [(0,)], [(0, 1)])
      >>> scaled([stack], jnp.array([1.0, 0.5]))[0].arrays[0].tolist()
      [[3.0, 4.0], [3.0, 4.0]]
    """
    return [
        tensor.map(_times, tensor.axes, [some_of(factors, layers) for layers in tensor.layers])
        for tensor in block
    ]


def ratio(one: jax.typing.ArrayLike, other: jax.Array) -> jax.Array:
    """``one / other``, and 0 where the other is 0. What is NaN stays NaN."""
    return jnp.where(other == 0, 0, one / jnp.where(other == 0, 1, other))


# Both are compiled by themselves, so that arrays that are alike are traced and lowered once.


@functools.partial(jax.jit, static_argnums=2)
def _inner(one: jax.Array, other: jax.Array, axes: Axes) -> jax.Array:
    """The inner products of the layers of two arrays, of shape ``(layers,)``."""
    products = one.real * other.real
    if jnp.iscomplexobj(one):
        products = products + one.imag * other.imag
    sums = products.sum([axis for axis in range(one.ndim) if axis not in axes])
    return sums.transpose([sorted(axes).index(axis) for axis in axes]).reshape(-1)


@functools.partial(jax.jit, static_argnums=1)
def _times(array: jax.Array, axes: Axes, factors: jax.Array) -> jax.Array:
    return array * Layers(array, axes).over_layers(factors)
