"""How devices split an array, as far as that is known while tracing."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax

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
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        known = sharding.spec[axis] is not None
    else:
        sharding = getattr(leaf, "sharding", None)
        known = sharding is not None
    if not known:
        return None
    shape = tuple(getattr(leaf, "shape", ()))
    return int(shape[axis] // sharding.shard_shape(shape)[axis])


def manual_axes() -> tuple[str, ...]:
    """The mesh axes along which ``jax.shard_map`` has taken arrays apart; none outside of it."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def size_of(axes: AxisName | Iterable[str]) -> int:
    """The number of devices along mesh axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in names_of(axes))


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
