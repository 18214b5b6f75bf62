"""How an array holds layers, and what devices that each have some of them tell each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.depth.leaves import Axes
from depthsmooth.mesh import AxisName, moved_along, rank_along, resharded

Halo = tuple[jax.Array | None, jax.Array | None]
"""The layers before the first of each shard, and after the last; None where none are read."""


Shift = Callable[[int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Layers:
    """An array with the axes that run over its layers.

    Attributes:
      array: the array; with an ``axis_name`` the shard of it that this device has.
      axes: those that run over its layers, outer to inner.
      shards: into how many parts devices split its layers, one run of layers after another.
      axis_name: the mesh axis along which the shards are, in ``jax.shard_map``.
    """

    array: jax.Array
    axes: Axes
    shards: int = 1
    axis_name: AxisName | None = None

    @property
    def sizes(self) -> Axes:
        """How long each of the axes is."""
        return tuple(self.array.shape[axis] for axis in self.axes)

    @property
    def is_shard(self) -> bool:
        """Whether the array is a part of what it stands for."""
        return self.shards > 1 and self.axis_name is not None

    def merged(self) -> jax.Array:
        """The array of shape (layers, ...)."""
        front = jnp.moveaxis(self.array, self.axes, range(len(self.axes)))
        return front.reshape(math.prod(self.sizes), *front.shape[len(self.axes) :])

    def unmerge(self, merged: jax.Array) -> jax.Array:
        """An array of shape (layers, ...) in this one's shape."""
        front = merged.reshape(*self.sizes, *merged.shape[1:])
        return jnp.moveaxis(front, range(len(self.axes)), self.axes)

    def over_layers(
        self, values: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        """One value for each layer, in a shape that multiplies the array, and in its type."""
        ones = (1,) * (self.array.ndim - len(self.axes))
        cast = jnp.asarray(values, self.array.dtype if dtype is None else dtype)
        if self.is_shard:
            cast = self.of_shards(cast.reshape(self.shards, -1))
        return self.unmerge(cast.reshape(-1, *ones))

    def only(self, which: np.ndarray, array: jax.Array) -> jax.Array:
        """An array like this one with zeros in all but some of its layers."""
        if which.all():
            return array
        return jnp.where(self.over_layers(which, jnp.int8) != 0, array, 0)

    def of_shards(self, values: jax.Array) -> jax.Array:
        """What is there for each shard, of shape (shards, ...): the part that devices have."""
        if self.is_shard and self.axis_name is not None:
            index = rank_along(self.axis_name)
            own: jax.Array = jax.lax.dynamic_index_in_dim(values, index, keepdims=True)
            return own
        axis = jax.typeof(self.array).sharding.spec[self.axes[0]]
        return values if axis is None else resharded(values, self.array, jax.P(axis))

    def split(self) -> Layers:
        """The array with its layers along one axis; with the shards, if it has all, before that."""
        if self.shards == 1:
            return self
        array, axis = (self.array, self.axes[0]) if len(self.axes) == 1 else (self.merged(), 0)
        if self.is_shard:
            return Layers(array, (axis,), self.shards, self.axis_name)
        shape = (*array.shape[:axis], self.shards, -1, *array.shape[axis + 1 :])
        return Layers(array.reshape(shape), (axis, axis + 1), self.shards)

    def join(self, split: jax.Array) -> jax.Array:
        """What has the shape of :meth:`split` in this one's shape."""
        if self.shards == 1:
            return split
        if len(self.axes) == 1:
            return split.reshape(self.array.shape)
        return self.unmerge(split.reshape(-1, *split.shape[1 if self.is_shard else 2 :]))

    def shifts(self, halo: Halo) -> Shift:
        """A function that puts layer ``i + offset`` in place i, and zeros where there is none.

        Args:
          halo: that of a :meth:`split` array.
        """
        if self.shards == 1:
            return self._shift
        axis = self.axes[-1]
        parts = [part for part in (halo[0], self.array, halo[1]) if part is not None]
        around = jnp.concatenate(parts, axis)
        before = 0 if halo[0] is None else halo[0].shape[axis]
        size = self.array.shape[axis]
        return lambda offset: jax.lax.slice_in_dim(
            around, before + offset, before + offset + size, axis=axis
        )

    def _shift(self, offset: int) -> jax.Array:
        if offset == 0:
            return self.array
        if len(self.axes) == 1:
            return pad(self.array, offset, self.axes[0])
        return self.unmerge(pad(self.merged(), offset, 0))

    def halo(self, offsets: Sequence[int]) -> Halo:
        """What shifts by these offsets read of other shards, split like the array."""
        if self.shards == 1:
            return None, None
        before, after = -min([0, *offsets]), max([0, *offsets])
        split = self.split()
        return (
            split.beyond(-1, before) if before else None,
            split.beyond(1, after) if after else None,
        )

    def beyond(self, side: int, reach: int) -> jax.Array:
        """The layers on one side of each shard, from nearer and farther ones."""
        axis = self.axes[-1]
        size = self.array.shape[axis]
        pieces = []
        for distance in range(1, -(-reach // size) + 1):
            count = min(size, reach - (distance - 1) * size)
            start = 0 if side > 0 else size - count
            piece = jax.lax.slice_in_dim(self.array, start, start + count, axis=axis)
            pieces.append(self.from_shard(piece, side * distance))
        return jnp.concatenate(pieces[::side], axis)

    def from_shard(self, piece: jax.Array, distance: int) -> jax.Array:
        """What the shard at that distance has of a :meth:`split` array; zeros if there is none."""
        if distance == 0:
            return piece
        if abs(distance) >= self.shards:
            return jnp.zeros_like(piece)
        if self.axis_name is None:
            return pad(piece, distance, self.axes[0])
        return moved_along(self.axis_name, piece, distance)


def pad(array: jax.Array, offset: int, axis: int) -> jax.Array:
    """Puts what is at ``i + offset`` in place i, along an axis, and zeros where there is none."""
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
