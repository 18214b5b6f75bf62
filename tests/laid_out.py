"""The kernel on arrays that are not leaves of a tree."""

from depthsmooth.arrays.layers import Layers, cast_like
from depthsmooth.arrays.shifts import apply


def mixed(stencil, updates, axes, layers, *, shards=None, axis_name=None):
    """What a stencil makes of arrays with these depth axes, which hold these layers."""
    shards = [1] * len(updates) if shards is None else shards
    tensor = [
        Layers(array, tuple(along), tuple(held), parts, axis_name)
        for array, along, held, parts in zip(updates, axes, layers, shards, strict=True)
    ]
    results = apply(stencil, tensor)
    return [cast_like(each.array, array) for each, array in zip(results, updates, strict=True)]
