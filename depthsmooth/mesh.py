"""How devices split an array, as far as that is known while tracing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

T = TypeVar("T")
Results = TypeVar("Results")

AxisName = str | tuple[str, ...]
"""A mesh axis, or several that split the same axis of an array, outer to inner."""


def shards_along(leaf: object, axis: int) -> int | None:
    """Into how many parts devices split an axis of a leaf; None where that is not known.

    Arrays know it, and ``jax.ShapeDtypeStruct`` that have a sharding. Of what is traced it is
    known along the axes of an explicit mesh (``AxisType.Explicit``) alone.

    Example:
      >>> mesh = jax.make_mesh((1,), ("stage",))
      >>> sharding = jax.NamedSharding(mesh, jax.P("stage"))
      >>> shards_along(jax.ShapeDtypeStruct((6, 4), "float32", sharding=sharding), 0)
      1
    """
    traced = isinstance(leaf, jax.core.Tracer)
    sharding = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None)
    if sharding is None:
        return None
    shape = tuple(getattr(leaf, "shape", ()))
    if not isinstance(sharding, jax.NamedSharding):
        return int(shape[axis] // sharding.shard_shape(shape)[axis])
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    if names is None or names is jax.P.UNCONSTRAINED:
        return None if traced else 1
    parts = math.prod(sharding.mesh.shape[name] for name in names_of(names))
    return parts if shape[axis] % parts == 0 else None


def manual_axes() -> tuple[str, ...]:
    """The mesh axes along which ``jax.shard_map`` has taken arrays apart; none outside of it."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def size_of(axes: AxisName | Iterable[str]) -> int:
    """The number of devices along mesh axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in names_of(axes))


def rank_along(axes: AxisName) -> jax.Array:
    """Which of the parts that mesh axes split an array into this device has, outer to inner."""
    rank = jnp.zeros((), jnp.int32)
    for name in names_of(axes):
        rank = rank * size_of(name) + jax.lax.axis_index(name)
    return rank


def moved_along(axes: AxisName, array: jax.Array, distance: int) -> jax.Array:
    """What the device has that is so far ahead in rank; zeros where there is none."""
    names = names_of(axes)
    in_mesh = [name for name in jax.sharding.get_abstract_mesh().axis_names if name in names]
    ranks = np.arange(size_of(names)).reshape([size_of(name) for name in names])
    # JAX counts devices along several axes in the order of the mesh.
    counted = np.argsort(ranks.transpose([names.index(name) for name in in_mesh]).reshape(-1))
    pairs = [
        (int(counted[rank + distance]), int(counted[rank]))
        for rank in range(ranks.size)
        if 0 <= rank + distance < ranks.size
    ]
    moved: jax.Array = jax.lax.ppermute(array, tuple(in_mesh), pairs)
    return moved


def resharded(array: jax.Array, like: jax.Array, spec: jax.P) -> jax.Array:
    """The array, laid out by ``spec`` in the explicit mesh that another one is in."""
    sharding = jax.NamedSharding(jax.typeof(like).sharding.mesh, spec)
    other: jax.Array = jax.reshard(array, sharding)
    return other


def replicated(array: jax.Array) -> jax.Array:
    """The array on every device, where an explicit mesh has split it."""
    spec = jax.typeof(array).sharding.spec
    return array if all(axis is None for axis in spec) else resharded(array, array, jax.P())


def with_automatic_axes(
    fn: Callable[[T], Results], arrays: T, spec: jax.P | None = None
) -> Results:
    """Calls a function of a tree that leaves to the compiler how an explicit mesh splits arrays.

    ``spec`` is how the mesh splits each result; not at all, by default.
    """
    [first, *_] = jax.tree.leaves(arrays) or [0.0]
    mesh = jax.typeof(first).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not explicit:
        return fn(arrays)
    sharding = jax.NamedSharding(mesh, jax.P() if spec is None else spec)
    results: Results = jax.sharding.auto_axes(fn, axes=explicit, out_sharding=sharding)(arrays)
    return results


def names_of(axes: AxisName | Iterable[str] | None) -> tuple[str, ...]:
    """The axes that a name, several, or None stand for."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def varying_axes(array: jax.Array) -> frozenset[str] | None:
    """The manual axes along which devices hold different values; None if that is not known.

    ``jax.shard_map`` keeps account of it unless it is told not to, by ``check_vma=False``.
    """
    checked = all(_varies(jax.lax.axis_index(name)) for name in manual_axes())
    return _varies(array) if checked else None


def _varies(array: jax.Array) -> frozenset[str]:
    axes: frozenset[str] = jax.typeof(array).manual_axis_type.varying
    return axes
