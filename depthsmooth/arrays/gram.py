"""The inner products of every layer of a group with every other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.arrays.halos import Shards
from depthsmooth.arrays.layers import Block, Tensor, upcast
from depthsmooth.mesh import manual_axes, names_of


def gram(block: Block, layers: int) -> jax.Array:
    r"""The inner products of L layers: :math:`G_{ij} = \mathrm{Re} \sum \bar u_i u_j`.

    Where devices split the layers, each shard passes half of the others. Layers with leaves of
    their own are concatenated. The result is real, of float32 or the widest type among tensors.

    Example:
      >>> from depthsmooth.arrays.layers import Layers
      >>> stack = Layers(jnp.array([[3.0, 4.0], [0.0, 2.0]]), axes=(0,), layers=(0, 1))
      >>> gram([[stack]], 2).tolist()
      [[25.0, 8.0], [8.0, 4.0]]
    """
    products: list[jax.Array] = []
    for tensor in block:
        at_hand = tensor
        if products and not manual_axes():  # where it would hide that devices hold the same
            # One tensor is concatenated, or passes, when the last is done.
            at_hand, products[-1] = jax.lax.optimization_barrier((tensor, products[-1]))
        products.append(_of_tensor(at_hand, layers))
    dtype = max((product.dtype for product in products), key=lambda dtype: dtype.itemsize)
    return functools.reduce(jnp.add, [product.astype(dtype) for product in products])


def _of_tensor(tensor: Tensor, layers: int) -> jax.Array:
    """The products of each shard with itself, and with those after it as they pass."""
    [first, *rest] = tensor
    shards = first.shards if {piece.shards for piece in rest} <= {first.shards} else 1
    shard = Shards(_together(tensor, shards), (0, 1), (), shards, first.axis_name)
    held = np.concatenate([np.reshape(piece.layers, (shards, -1)) for piece in tensor], 1)
    array, total = shard.array, jnp.zeros((layers, layers), upcast(shard.array).real.dtype)
    for distance in range(shards):
        if distance:
            array, total = jax.lax.optimization_barrier((array, total))
        products = _products(upcast(array), upcast(shard.from_shard(array, distance)))
        # Beyond the last shard there are zeros, which add nothing to those that they are put to.
        others_held = np.roll(held, -distance, 0)
        rows, columns = (shard.of_shards(jnp.asarray(which)) for which in (held, others_held))
        total = total.at[rows[:, :, None], columns[:, None, :]].add(products)
        if distance:
            total = total.at[columns[:, None, :], rows[:, :, None]].add(products)
    axes = (*first.features, *(names_of(first.axis_name) if shards > 1 else ()))
    return jax.lax.psum(total, axes) if axes else total


def _together(tensor: Tensor, shards: int) -> jax.Array:
    """All of its layers, of shape (shards, layers of a shard, ...); in shard_map of one shard."""
    merged = [piece.merged() for piece in tensor]
    if len({array.dtype for array in merged}) > 1:
        merged = list(map(upcast, merged))
    count = 1 if tensor[0].axis_name is not None else shards
    parts = [array.reshape(count, -1, *array.shape[1:]) for array in merged]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def _products(one: jax.Array, other: jax.Array) -> jax.Array:
    """The inner products of layers of shape (shards, layers, ...): (shards, layers, layers)."""
    features = tuple(range(2, one.ndim))
    products = jax.lax.dot_general(
        one.conj(),
        other,
        ((features, features), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST,
    )
    return products.real
