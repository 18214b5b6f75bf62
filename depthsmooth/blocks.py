"""The layers of a group as blocks: the norm of each, and each multiplied by a number."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

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


def norms(tensors: Sequence[Tensor], layers: int) -> jax.Array:
    r"""The norm of each layer over some of its tensors: :math:`\sqrt{\sum |u|^2}`.

    Args:
      tensors: float32, float64, or complex.
      layers: the number of layers L.

    Returns:
      Real array of shape ``(L,)``, of the widest type there is among the tensors.

    Example:
      >>> stack = Tensor([jnp.array([[3.0, 4.0], [6.0, 8.0]])], [(0,)], [(0, 1)])
      >>> norms([stack], 2).tolist()
      [5.0, 10.0]
    """
    dtype = jnp.result_type(*(array.real.dtype for tensor in tensors for array in tensor.arrays))
    total = jnp.zeros(layers, dtype)
    for tensor in tensors:
        squares = map(_squares, tensor.arrays, tensor.axes)
        held = jnp.array([layer for ours in tensor.layers for layer in ours], int)
        total = total.at[held].add(jnp.concatenate(list(squares)).astype(dtype))
    return jnp.sqrt(total)


def scaled(tensor: Tensor, factors: jax.Array) -> Tensor:
    """Each layer multiplied by its factor.

    Args:
      tensor: of any inexact dtype.
      factors: of shape ``(L,)``.

    Example:
      >>> stack = Tensor([jnp.array([[3.0, 4.0], [6.0, 8.0]])], [(0,)], [(0, 1)])
      >>> scaled(stack, jnp.array([1.0, 0.5])).arrays[0].tolist()
      [[3.0, 4.0], [3.0, 4.0]]
    """
    ours = [some_of(factors, layers) for layers in tensor.layers]
    return tensor.map(_times, tensor.axes, ours)


def ratio(one: jax.typing.ArrayLike, other: jax.Array) -> jax.Array:
    """``one / other``, 0 where the other is 0: what is zero stays zero, whatever NaN is."""
    return jnp.where(other == 0, 0, one / jnp.where(other == 0, 1, other))


# Both are compiled by themselves, so that arrays that are alike are traced and lowered once.


@functools.partial(jax.jit, static_argnums=1)
def _squares(array: jax.Array, axes: Axes) -> jax.Array:
    """The sums of squares of the layers of one array, of shape ``(layers,)``."""
    others = tuple(axis for axis in range(array.ndim) if axis not in axes)
    squares = jnp.square(jnp.abs(array)).sum(others)
    order = [sorted(axes).index(axis) for axis in axes]
    return squares.transpose(order).reshape(-1)


@functools.partial(jax.jit, static_argnums=1)
def _times(array: jax.Array, axes: Axes, factors: jax.Array) -> jax.Array:
    return array * Layers(array, axes).over_layers(factors)
