"""The layers of a group as blocks: inner products, norms, and layers multiplied by a number."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.arrays.layers import Layers, some_of, widened
from depthsmooth.depth.leaves import Axes
from depthsmooth.mesh import AxisName, names_of, rank_along, resharded, size_of, varying_axes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a block, through the layers of a group.

    Attributes:
      arrays: what holds the layers.
      axes: for each array its depth axes, outer to inner.
      layers: for each array the layers it holds, counted in the group, in row-major order
        of its depth axes.
      shards: for each array into how many parts devices split its layers.
      axis_name: in ``jax.shard_map``, the mesh axis that these are split over.
      parts: for each array into how many parts each layer is split, in ``jax.shard_map``.
      names: of the arrays, for messages.
    """

    arrays: Sequence[jax.Array]
    axes: Sequence[Axes]
    layers: Sequence[Sequence[int]]
    shards: Sequence[int]
    axis_name: AxisName | None = None
    parts: Sequence[int] = ()
    names: Sequence[str] = ()

    def of(self, arrays: Sequence[jax.Array]) -> Tensor:
        """The tensor of other arrays."""
        return dataclasses.replace(self, arrays=arrays)

    def summed_over(self, k: int) -> tuple[str, ...]:
        """The mesh axes over which what one device has of the layers of an array is to be summed.

        Raises:
          ValueError: if these are not known.
        """
        parts = self.parts[k] if self.parts else 1
        if parts == 1:
            return ()
        varying = varying_axes(self.arrays[k])
        of_depth = names_of(self.axis_name) if self.shards[k] > 1 else ()
        axes = tuple(sorted((varying or frozenset()) - set(of_depth)))
        if varying is None or size_of(axes) != parts:
            why = (
                "check_vma=False hides which of the mesh axes their norms are to be summed over"
                if varying is None
                else f"they differ along {axes}, over {size_of(axes)} devices"
            )
            raise ValueError(
                f"The layers of {self.names[k]} are split into {parts} parts by shard_map, but "
                f"{why}. Leave check_vma=True, its default, and sum gradients before, or use "
                "variant='standard', which has no norms."
            )
        return axes


Block = Sequence[Tensor]
"""All the tensors of a block that count."""


def layers_of(block: Block) -> int:
    """The number of layers L, as far as they are there."""
    return 1 + max(max(layers) for tensor in block for layers in tensor.layers)


def inner(one: Block, other: Block) -> jax.Array:
    r"""The inner product of each layer with its like: :math:`\mathrm{Re} \sum \bar u v`.

    Args:
      one: u.
      other: v, of the same layout.

    Returns:
      Real array of shape ``(L,)``, of float32 or the widest type there is among the tensors.

    Example:
      >>> stack = Tensor([jnp.array([[3.0, 4.0], [6.0, 8.0]])], [(0,)], [(0, 1)], [1])
      >>> inner([stack], [stack]).tolist()
      [25.0, 100.0]
    """
    dtypes = [widened(array).real.dtype for tensor in one for array in tensor.arrays]
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    totals: dict[tuple[str, ...], jax.Array] = {}
    for ours, theirs in zip(one, other, strict=True):
        for axes, total in _totals(ours, theirs, layers_of(one), dtype).items():
            totals[axes] = totals[axes] + total if axes in totals else total
    sums = [jax.lax.psum(total, axes) if axes else total for axes, total in totals.items()]
    return functools.reduce(jnp.add, sums)


def _totals(
    ours: Tensor, theirs: Tensor, layers: int, dtype: jax.typing.DTypeLike
) -> dict[tuple[str, ...], jax.Array]:
    """The inner products of one tensor, by the mesh axes over which they are still to be summed."""
    parts: dict[tuple[str, ...], list[tuple[jax.Array, np.ndarray | jax.Array]]] = {}
    for k, (array, like) in enumerate(zip(ours.arrays, theirs.arrays, strict=True)):
        product = _inner(array, like, ours.axes[k], ours.shards[k], ours.axis_name).astype(dtype)
        axes = ours.summed_over(k)
        held: np.ndarray | jax.Array = np.array(ours.layers[k])
        if ours.axis_name is not None and ours.shards[k] > 1:
            shards = jnp.asarray(held.reshape(ours.shards[k], -1))
            held = shards[rank_along(ours.axis_name)]
            axes = (*axes, *names_of(ours.axis_name))
        parts.setdefault(axes, []).append((product, held))
    totals = {}
    for axes, some in parts.items():
        products, helds = zip(*some, strict=True)
        total = products[0] if len(products) == 1 else jnp.concatenate(products)
        known = all(isinstance(held, np.ndarray) for held in helds)
        together = np.concatenate(helds) if known else jnp.concatenate(helds)
        if not known or together.tolist() != list(range(layers)):
            total = jnp.zeros(layers, dtype).at[together].set(everywhere(total))
        totals[axes] = total
    return totals


def scaled(block: Block, factors: jax.Array) -> Block:
    """Each layer multiplied by its factor, in float32 or a wider type.

    Args:
      block: of any inexact dtype.
      factors: of shape ``(L,)``.

    Example:
      >>> stack = Tensor([jnp.array([[3.0, 4.0], [6.0, 8.0]])], [(0,)], [(0, 1)], [1])
      >>> scaled([stack], jnp.array([1.0, 0.5]))[0].arrays[0].tolist()
      [[3.0, 4.0], [3.0, 4.0]]
    """
    return [
        tensor.of(
            [
                _times(array, factors_of(factors, layers), axes, shards, tensor.axis_name)
                for array, axes, layers, shards in zip(
                    tensor.arrays, tensor.axes, tensor.layers, tensor.shards, strict=True
                )
            ]
        )
        for tensor in block
    ]


def factors_of(factors: jax.Array, layers: Sequence[int]) -> jax.Array:
    """The factors of some layers."""
    if list(layers) == list(range(len(factors))):
        return factors
    return some_of(everywhere(factors), layers)


def everywhere(values: jax.Array) -> jax.Array:
    """What an explicit mesh has split, on every device."""
    spec = jax.typeof(values).sharding.spec
    return values if all(axis is None for axis in spec) else resharded(values, values, jax.P())


def norms(block: Block) -> jax.Array:
    r"""The norm of each layer: :math:`\sqrt{\sum |u|^2}`, of shape ``(L,)``.

    Where it is 0 its gradient is taken to be 0, too.
    """
    squares = inner(block, block)
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def ratio(one: jax.typing.ArrayLike, other: jax.Array) -> jax.Array:
    """``one / other``, and 0 where the other is 0. What is NaN stays NaN."""
    return jnp.where(other == 0, 0, one / jnp.where(other == 0, 1, other))


# Both are compiled by themselves, so that arrays that are alike are traced and lowered once.


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _inner(
    one: jax.Array, other: jax.Array, axes: Axes, shards: int, axis_name: AxisName | None
) -> jax.Array:
    """The inner products of the layers of two arrays, of shape ``(layers,)``."""
    # As they are when they are mixed: a compiler that sees another shape reads them once more.
    ours, theirs = (Layers(array, axes, shards, axis_name).split() for array in (one, other))
    one, other, axes = widened(ours.array), widened(theirs.array), ours.axes
    products = one.real * other.real
    if jnp.iscomplexobj(one):
        products = products + one.imag * other.imag
    sums = products.sum([axis for axis in range(one.ndim) if axis not in axes])
    return sums.transpose([sorted(axes).index(axis) for axis in axes]).reshape(-1)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _times(
    array: jax.Array, factors: jax.Array, axes: Axes, shards: int, axis_name: AxisName | None
) -> jax.Array:
    wide = widened(array)
    return wide * Layers(wide, axes, shards, axis_name).over_layers(factors)
