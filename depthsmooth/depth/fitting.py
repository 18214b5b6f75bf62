"""Whether a tree has the leaves and the layers that a Depth or its rules say, and can be mixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.depth.leaves import Leaf, Place, Shape, shape_of, stacked
from depthsmooth.depth.paths import hides, is_mixable, named, shown, some
from depthsmooth.mesh import manual_axes, varying_axes

SAME_TREE = "Make the Depth from the same tree that the optimizer is given."


def axes_name(axes: Sequence[int]) -> str:
    """Axes as messages name them."""
    return f"{'axes' if len(axes) > 1 else 'axis'} {', '.join(map(str, axes))}"


def check_tree(leaves: Sequence[tuple[str, object]]) -> None:
    """Raises for the count of a schedule: what a function is called with that is taken for one."""
    [(path, first), *others] = leaves
    dtype = getattr(first, "dtype", np.int64 if isinstance(first, int) else np.bool_)
    if not (path or others or shape_of(first)) and jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{shown(path, ())} of the tree is a whole number, like the count that a schedule is "
            "called with. optax.inject_hyperparams takes every function for a schedule: name those "
            "that are none, like inject_hyperparams(ds.adamw, static_args=('mask', 'where'))."
        )


def hint_of_vmap(arrays: Mapping[str, jax.Array]) -> str:
    """A hint for leaves that are traced, and may have an axis that jax.vmap hides."""
    if not any(isinstance(array, jax.core.Tracer) for array in arrays.values()):
        return ""
    return (
        " If this is in jax.vmap: the axis that it maps is not there. Count axes without it, and "
        "make a Depth from one of the trees that it maps over."
    )


def check_paths(placed: Sequence[Leaf], shapes: Mapping[str, Shape], masked: Set[str]) -> None:
    """Raises unless all the leaves with a place are in a tree, or masked there."""

    def is_there(path: str) -> bool:
        return path in shapes or hides(masked, path)

    missing = next((leaf for leaf in placed if not is_there(leaf.path)), None)
    if missing is None:
        return
    remedy = f"whose leaves are {some(named(shapes, missing.path))}. {SAME_TREE}"
    for path in shapes:
        outer = path.removesuffix(f"/{missing.path}")
        inner = missing.path.removesuffix(f"/{path}")
        if outer != path and all(is_there(f"{outer}/{leaf.path}") for leaf in placed):
            remedy = (
                f"where it is {path}: the Depth was made from what is at {outer!r} there. Make "
                "both from the same tree: give init and update of the optimizer this part, or "
                "make the Depth from the whole tree, as trace_depth(model.apply, variables, x) "
                "does with Flax."
            )
        if inner != missing.path and all(
            leaf.path.startswith(f"{inner}/") and is_there(leaf.path.removeprefix(f"{inner}/"))
            for leaf in placed
        ):
            remedy = (
                f"where it is {path}: the Depth was made from a whole tree, of which the optimizer "
                f"is given what is at {inner!r}. Make both from the same tree: give init and "
                "update of the optimizer the whole tree, or make the Depth from this part, with "
                "Flax by trace_depth(lambda p, x: model.apply({'params': p}, x), "
                "params['params'], x)."
            )
    raise ValueError(f"{missing} has a place in this Depth, but is not in the tree, {remedy}")


def fitting_place(leaf: Leaf, place: Place, arrays: Mapping[str, jax.Array]) -> Place:
    """The place of the leaf in a tree; raises unless its layers are there, where they were."""
    array = arrays[leaf.path]
    shape = shape_of(array)
    layers = len(place.layers)
    if len(shape) == len(leaf.shape):
        if manual_axes() and place.axes:
            outer = place.axes[0]
            shards = max(leaf.shape[outer] // max(shape[outer], 1), 1)
            if stacked(shape, place.axes) * shards == layers:
                own = dataclasses.replace(place, shards=shards)
                return own if shards > 1 else own.on_devices_of(array)
        elif stacked(shape, place.axes) == layers:
            return place.on_devices_of(array)
    count = f"{layers} layers on {axes_name(place.axes)}" if place.axes else "one layer"
    part = ", or an even part of them," if manual_axes() else ""
    raise ValueError(
        f"{shown(leaf.path, shape)} does not have the {count}{part} that this Depth found by "
        f"{place.found_by} in {leaf.shape}. {SAME_TREE}{hint_of_vmap(arrays)}"
    )


def check_place(leaf: Leaf) -> None:
    """Raises unless the leaf has the axes and the layers that its place says."""
    if leaf.place is None:
        return
    axes, layers, shards = leaf.place.axes, leaf.place.layers, leaf.place.shards
    fits = len(set(axes)) == len(axes) and all(0 <= axis < len(leaf.shape) for axis in axes)
    if not fits or stacked(leaf.shape, axes) != len(layers) or min(layers, default=-1) < 0:
        raise ValueError(f"{leaf} can't have the layers {layers} on {axes_name(axes)}")
    if shards < 1 or (leaf.shape[axes[0]] if axes else 1) % shards:
        raise ValueError(f"{leaf} can't have its layers in {shards} shards")


def check_whole(leaves: Sequence[tuple[str, jax.Array]]) -> None:
    """Raises in shard_map, where leaves may be parts of what they look like."""
    for path, leaf in leaves if manual_axes() else []:
        axes = varying_axes(leaf) if isinstance(leaf, jax.core.Tracer) else frozenset()
        if axes is None or axes:
            raise ValueError(
                f"{shown(path, shape_of(leaf))} is what shard_map gives one device, and whether "
                "that is a part of the layers only the depth of the whole arrays tells: give it, "
                "by depth=find_depth(params), trace_depth(...) or rules.resolve(params), called "
                "outside."
            )


def check_mixable(path: str, leaf: jax.Array, copies: int) -> None:
    """Raises unless the leaf's layers can be mixed."""
    if not is_mixable(leaf):
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        raise ValueError(
            f"{shown(path, shape_of(leaf))} is of type {kind}, but only floating point and complex "
            "updates can be mixed. Leave it out of the rules, or keep it from the optimizer with "
            "optax.masked or optax.partition."
        )
    if copies > 1:
        raise ValueError(
            f"{shown(path, shape_of(leaf))} is the path of {copies} leaves, so its place in depth "
            "is not certain. Rename a key that holds a '/'."
        )
