"""The inner products of every layer of a group with every other, and the powers over depth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.arrays.layers import Layers, widened
from depthsmooth.arrays.norms import Block, Tensor
from depthsmooth.mesh import manual_axes, names_of


def gram(block: Block, layers: int) -> jax.Array:
    r"""The inner products of layers: :math:`G_{ij} = \mathrm{Re} \sum \bar u_i u_j`.

    Where devices split the layers, each shard passes half of the others. Layers with leaves of
    their own are brought together.

    Args:
      block: the tensors :math:`u`.
      layers: the number of layers L.

    Returns:
      Real array of shape ``(L, L)``, of float32 or the widest type there is among the tensors.

    Example:
      >>> stack = Tensor([jnp.array([[3.0, 4.0], [0.0, 2.0]])], [(0,)], [(0, 1)], [1])
      >>> gram([stack], 2).tolist()
      [[25.0, 8.0], [8.0, 4.0]]
    """
    products: list[jax.Array] = []
    for tensor in block:
        arrays = list(tensor.arrays)
        if products and not manual_axes():  # where it would hide that devices have the same
            # One tensor is brought together, or passes, when the last is done.
            arrays, products[-1] = jax.lax.optimization_barrier((arrays, products[-1]))
        products.append(_of_tensor(tensor.of(arrays), layers))
    dtype = max((product.dtype for product in products), key=lambda dtype: dtype.itemsize)
    return functools.reduce(jnp.add, [product.astype(dtype) for product in products])


def _of_tensor(tensor: Tensor, layers: int) -> jax.Array:
    """The products of each shard with itself, and with those after it as they pass."""
    [shards, *others] = tensor.shards
    shards = shards if set(others) <= {shards} else 1
    shard = Layers(_together(tensor, shards), (0, 1), shards, tensor.axis_name)
    held = np.concatenate([np.reshape(ours, (shards, -1)) for ours in tensor.layers], 1)
    array, total = shard.array, jnp.zeros((layers, layers), widened(shard.array).real.dtype)
    for distance in range(shards):
        if distance:
            array, total = jax.lax.optimization_barrier((array, total))
        products = _products(widened(array), widened(shard.from_shard(array, distance)))
        # Beyond the last shard there are zeros, which add nothing to those that they are put to.
        others_held = np.roll(held, -distance, 0)
        rows, columns = (shard.of_shards(jnp.asarray(which)) for which in (held, others_held))
        total = total.at[rows[:, :, None], columns[:, None, :]].add(products)
        if distance:
            total = total.at[columns[:, None, :], rows[:, :, None]].add(products)
    axes = (*tensor.summed_over(0), *(names_of(tensor.axis_name) if shards > 1 else ()))
    return jax.lax.psum(total, axes) if axes else total


def _together(tensor: Tensor, shards: int) -> jax.Array:
    """All of its layers, of shape (shards, layers of a shard, ...); in shard_map of one shard."""
    merged = [
        Layers(array, axes).merged() for array, axes in zip(tensor.arrays, tensor.axes, strict=True)
    ]
    if len({array.dtype for array in merged}) > 1:
        merged = list(map(widened, merged))
    count = 1 if tensor.axis_name is not None else shards
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
