"""Layers that devices split into shards: what each shard reads of the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from depthsmooth.arrays.layers import Layers, Tensor, pad
from depthsmooth.arrays.reads import offsets_in, reads_of
from depthsmooth.mesh import moved_along
from depthsmooth.operators.stencil import Stencil

Halo = tuple[jax.Array | None, jax.Array | None]
"""The layers before the first of each shard, and after its last; None where none are read."""


@dataclasses.dataclass(frozen=True)
class Shards(Layers):
    """Layers by shards.

    The array has an axis for the shards before the one for the layers of a shard. Within
    ``jax.shard_map`` it is this device's shard, and has the latter axis alone.

    Attributes:
      halo: what the shards read of each other.
    """

    halo: Halo = (None, None)

    def shifted(self, offset: int) -> jax.Array:
        """The array with layer ``i + offset`` in place i, also where another shard holds that."""
        axis, (before, after) = self.axes[-1], self.halo
        around = jnp.concatenate(
            [part for part in (before, self.array, after) if part is not None], axis
        )
        start = offset + (0 if before is None else before.shape[axis])
        return jax.lax.slice_in_dim(around, start, start + self.array.shape[axis], axis=axis)

    def beyond(self, side: int, reach: int) -> jax.Array:
        """The layers on one side of each shard, from the nearest shards on that side."""
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
        """What the shard at that distance has; zeros if there is none."""
        if distance == 0:
            return piece
        if abs(distance) >= self.shards:
            return jnp.zeros_like(piece)
        if self.axis_name is None:
            return pad(piece, distance, self.axes[0])
        return moved_along(self.axis_name, piece, distance)


def split(whole: Layers, halo: Halo = (None, None)) -> Layers:
    """The layers by shards; as they are, if devices do not split them."""
    if whole.shards == 1:
        return whole
    merged = len(whole.axes) > 1
    array, axis = (whole.merged(), 0) if merged else (whole.array, whole.axes[0])
    axes: tuple[int, ...] = (axis,)
    if not whole.is_shard:
        array = array.reshape(*array.shape[:axis], whole.shards, -1, *array.shape[axis + 1 :])
        axes = (axis, axis + 1)
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(Layers)}
    return Shards(**fields | {"array": array, "axes": axes, "halo": halo})


def joined(whole: Layers, array: jax.Array) -> jax.Array:
    """An array of the shape that :func:`split` gives, in the shape of the whole."""
    if whole.shards == 1 or len(whole.axes) == 1:
        return array.reshape(whole.array.shape)
    return whole.unmerge(array.reshape(-1, *array.shape[1 if whole.is_shard else 2 :]))


def exchange(stencil: Stencil, tensor: Tensor) -> list[Halo] | None:
    """What a stencil reads of other shards: r layers on either side, for the radius r.

    For each array its halo, in its type. None if devices do not split the layers, or the stencil
    is applied as a matrix.
    """
    if {piece.shards for piece in tensor} <= {1} or stencil.is_identity or stencil.is_dense:
        return None
    halos: list[Halo] = _exchange(stencil, list(tensor))
    return halos


@jax.jit
def _exchange(stencil: Stencil, tensor: Tensor) -> list[Halo]:
    reads = reads_of(stencil, tensor)
    return [_halo_of(split(piece), offsets_in(j, reads)) for j, piece in enumerate(tensor)]


def _halo_of(piece: Layers, offsets: Sequence[int]) -> Halo:
    if not isinstance(piece, Shards):
        return None, None
    before, after = -min([0, *offsets]), max([0, *offsets])
    return (
        piece.beyond(-1, before) if before else None,
        piece.beyond(1, after) if after else None,
    )
