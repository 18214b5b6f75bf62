"""An array with the axes that run over its layers, and the types that it is mixed in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.depth.leaves import Axes
from depthsmooth.mesh import AxisName, rank_along, resharded
from depthsmooth.operators.stencil import Array

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers that one array holds.

    A tensor of a network is a sequence of these: one for a stack, one for each block if blocks have
    leaves of their own. A block is a sequence of tensors. Both are pytrees, so transformations of
    JAX apply to them, and ``jax.jit`` compiles one program for all tensors that are alike.

    Attributes:
      array: the array. Within ``jax.shard_map`` with an ``axis_name``, this device's shard of it.
      axes: the axes that run over its layers, outer to inner.
      layers: the layers that it holds, counted in the group, in row-major order of ``axes``.
      shards: the number of parts that devices split its layers into, as one run after another.
      axis_name: the mesh axis that the shards lie along, within ``jax.shard_map``.
      features: the mesh axes that split each layer, within ``jax.shard_map``: sums over a layer
        have to be completed along them.
    """

    array: jax.Array
    axes: Axes = dataclasses.field(metadata=STATIC)
    layers: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    shards: int = dataclasses.field(default=1, metadata=STATIC)
    axis_name: AxisName | None = dataclasses.field(default=None, metadata=STATIC)
    features: tuple[str, ...] = dataclasses.field(default=(), metadata=STATIC)

    @property
    def sizes(self) -> Axes:
        """The sizes of the depth axes."""
        return tuple(self.array.shape[axis] for axis in self.axes)

    @property
    def is_shard(self) -> bool:
        """Whether the array is this device's shard, and not the whole."""
        return self.shards > 1 and self.axis_name is not None

    def of(self, array: jax.Array) -> Layers:
        """The same layers of another array."""
        return dataclasses.replace(self, array=array)

    def merged(self) -> jax.Array:
        """The array in the shape (layers, ...)."""
        front = jnp.moveaxis(self.array, self.axes, range(len(self.axes)))
        return front.reshape(math.prod(self.sizes), *front.shape[len(self.axes) :])

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """An array of shape (layers, ...) in the shape of this one."""
        front = merged.reshape(*self.sizes, *merged.shape[1:])
        return jnp.moveaxis(front, range(len(self.axes)), self.axes)

    def over_layers(
        self, values: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        """One value for each layer, in a shape that multiplies the array, and in its type."""
        cast = jnp.asarray(values, self.array.dtype if dtype is None else dtype)
        if self.is_shard:
            cast = self.of_shards(cast.reshape(self.shards, -1)).reshape(-1)
        if not self.axes:
            return cast.reshape(())
        if list(self.axes) == sorted(self.axes):
            shape = [size if k in self.axes else 1 for k, size in enumerate(self.array.shape)]
            return cast.reshape(shape)
        ones = (1,) * (self.array.ndim - len(self.axes))
        return self.unmerge(cast.reshape(-1, *ones))

    def only(self, which: np.ndarray, array: jax.Array) -> jax.Array:
        """An array of this shape, with zeros in all but some of its layers."""
        if which.all():
            return array
        return jnp.where(self.over_layers(which, jnp.int8) != 0, array, 0)

    def of_shards(self, values: jax.Array) -> jax.Array:
        """Values for each shard, of shape (shards, ...): the part that this device needs."""
        if self.is_shard and self.axis_name is not None:
            index = rank_along(self.axis_name)
            own: jax.Array = jax.lax.dynamic_index_in_dim(values, index, keepdims=True)
            return own
        axis = jax.typeof(self.array).sharding.spec[self.axes[0]]
        return values if axis is None else resharded(values, self.array, jax.P(axis))

    def shifted(self, offset: int) -> jax.Array:
        """The array with layer ``i + offset`` in place i, and zeros where there is none."""
        if offset == 0:
            return self.array
        if len(self.axes) == 1:
            return pad(self.array, offset, self.axes[0])
        return self.unmerge(pad(self.merged(), offset, 0))


Tensor = Sequence[Layers]
"""One tensor through the layers of a group."""

Block = Sequence[Tensor]
"""Tensors whose layers have norms in common."""


def pad(array: jax.Array, offset: int, axis: int) -> jax.Array:
    """Puts entry ``i + offset`` in place i, along an axis, and zeros where there is none."""
    padding = [(0, 0, 0)] * array.ndim
    padding[axis] = (-offset, offset, 0)
    return jax.lax.pad(array, jnp.zeros((), array.dtype), padding)


def upcast(array: jax.Array) -> jax.Array:
    """The array in float32, if its type is narrower."""
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array


def cast_like(mixed: jax.Array, update: jax.Array) -> jax.Array:
    """The result in the type of the update that it replaces, also if that is a weak one."""
    result = mixed.astype(update.dtype)
    # Setting into the original is the public way to keep a weak type.
    return update.at[...].set(result) if jax.typeof(update).weak_type else result


def some_of(values: Array, layers: Sequence[int]) -> Array:
    """The values of some layers; by a slice, which compiles better, if evenly spaced."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    if list(layers) == list(range(len(values))):
        return values
    if list(layers) == list(range(layers[0], layers[-1] + 1, step)):
        return values[layers[0] : layers[-1] + 1 : step]
    return values[np.asarray(layers)]
