"""From a track and the arrays of a tree to layers, or a refusal.

Outside of ``jax.shard_map`` and of explicit meshes there is nothing to check.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from depthsmooth.arrays.layers import Layers
from depthsmooth.depth.leaves import Leaf, Track
from depthsmooth.depth.paths import some
from depthsmooth.mesh import AxisName, manual_axes, names_of, size_of, varying_axes


def layers_of(
    track: Track,
    arrays: Mapping[str, jax.Array],
    axis_name: AxisName | None = None,
    *,
    with_sums: bool = True,
) -> list[Layers]:
    """The layers that each leaf of a track holds, in the arrays of a tree by path.

    Raises:
      ValueError: if devices split the leaves in a way that their layers cannot be mixed as they
        are, or, ``with_sums``, be summed over.
    """
    ours = [jnp.asarray(arrays[path]) for path in track.paths]
    _check_explicit(track, ours)
    pieces = [
        Layers(array, place.axes, place.layers, place.shards)
        for array, place in zip(ours, track.places, strict=True)
    ]
    return _in_shard_map(track, pieces, axis_name, with_sums) if manual_axes() else pieces


def _in_shard_map(
    track: Track, pieces: Sequence[Layers], axis_name: AxisName | None, with_sums: bool
) -> list[Layers]:
    """The layers, where arrays are what one device has."""
    arrays = [piece.array for piece in pieces]
    are_parts = any(map(_is_part, track.leaves, arrays))
    if are_parts:
        _check_shards(track, axis_name, arrays)
    _check_alike(track, arrays)
    named = [
        dataclasses.replace(piece, axis_name=axis_name if are_parts else None) for piece in pieces
    ]
    if not with_sums:
        return named
    features = map(_features, track.leaves, named)
    return [
        dataclasses.replace(piece, features=axes)
        for piece, axes in zip(named, features, strict=True)
    ]


def _features(leaf: Leaf, piece: Layers) -> tuple[str, ...]:
    """The mesh axes along which shard_map has split each layer; raises if these are not known."""
    parts = _parts(leaf, piece.array)
    if parts == 1:
        return ()
    varying = varying_axes(piece.array)
    of_depth = names_of(piece.axis_name) if piece.is_shard else ()
    axes = tuple(sorted((varying or frozenset()) - set(of_depth)))
    if varying is None or size_of(axes) != parts:
        why = (
            "check_vma=False hides which of the mesh axes their norms are to be summed over"
            if varying is None
            else f"they differ along {axes}, over {size_of(axes)} devices"
        )
        raise ValueError(
            f"The layers of {leaf} are split into {parts} parts by shard_map, but {why}. Leave "
            "check_vma=True, its default, and sum gradients before, or use variant='standard', "
            "which has no norms."
        )
    return axes


def _check_alike(track: Track, arrays: Sequence[jax.Array]) -> None:
    """Raises, in shard_map, if its leaves certainly are parts along different mesh axes."""
    first, *rest = zip(track.leaves, map(varying_axes, arrays), strict=True)
    for leaf, axes in rest:
        if axes != first[1]:
            raise ValueError(
                f"{leaf} is mixed with {first[0]}, but shard_map splits one along "
                f"{sorted(axes or ())}, the other along {sorted(first[1] or ())}. Split them "
                "alike."
            )


def _check_shards(track: Track, axis_name: AxisName | None, arrays: Sequence[jax.Array]) -> None:
    """Raises, in shard_map, unless the shards of its layers are found along the axis."""
    shards = {place.shards for place in track.places}
    [first, *_] = track.leaves
    split = (
        f"{first}, of which shard_map gives each device a part of the "
        f"{len(track.places[0].layers)} layers, is"
    )
    if not _takes_turns(track) or len(shards) > 1:
        raise ValueError(
            f"{split} mixed with {track.paths[-1]} in a way that exchanges more than "
            "neighbouring layers: only those of one stack, or dealt to stacks in turn that are "
            "split alike, can be split in shard_map. Use jax.jit with shardings for these."
        )
    axes = names_of(axis_name)
    varying = varying_axes(arrays[0])
    names = set(manual_axes()) if varying is None else varying
    if not axes or not set(axes) <= names or shards != {size_of(axes)}:
        candidates = [name for name in manual_axes() if name in names]
        raise ValueError(
            f"{split} split into {max(shards)} parts, and axis_name is {axis_name!r}. Say "
            "along which mesh axis the others are, by axis_name=...: it is split along "
            f"{', '.join(f'{name!r} ({size_of(name)})' for name in candidates) or 'none'}."
        )


def _check_explicit(track: Track, arrays: Sequence[jax.Array]) -> None:
    """Raises unless its leaves can be mixed as they are laid out in an explicit mesh."""
    specs = [tuple(jax.typeof(array).sharding.spec) for array in arrays]
    if all(name is None for spec in specs for name in spec):
        return
    pairs = list(zip(specs, track.places, strict=True))
    of_layer = {
        tuple(name for axis, name in enumerate(spec) if axis not in place.axes)
        for spec, place in pairs
    }
    of_depth = {tuple(spec[axis] for axis in place.axes) for spec, place in pairs}
    is_split = any(name is not None for names in of_depth for name in names)
    inner = [name for names in of_depth for name in names[1:] if name is not None]
    alike = len(of_layer) == 1 and (
        not is_split or (len(of_depth) == 1 and not inner and _takes_turns(track))
    )
    if not alike:
        layouts = [
            f"{leaf} by {jax.P(*spec)}" for leaf, spec in zip(track.leaves, specs, strict=True)
        ]
        raise ValueError(
            f"An explicit mesh splits {some(layouts, 4)}, which are mixed. There leaves that "
            "are mixed have to be split alike, and layers along the outermost of their axes, "
            "if they are of one stack or dealt to stacks in turn. Split other axes, or use a "
            "mesh of AxisType.Auto."
        )


def _is_part(leaf: Leaf, array: jax.Array) -> bool:
    """Whether a device has some layers alone of a leaf."""
    axes = () if leaf.place is None else leaf.place.axes
    return any(leaf.shape[axis] != array.shape[axis] for axis in axes)


def _parts(leaf: Leaf, array: jax.Array) -> int:
    """Into how many parts shard_map has split each layer of a leaf."""
    axes = () if leaf.place is None else leaf.place.axes
    whole, ours = (
        math.prod(size for axis, size in enumerate(shape) if axis not in axes)
        for shape in (leaf.shape, array.shape)
    )
    return whole // max(ours, 1)


def _takes_turns(track: Track) -> bool:
    """Whether it is one stack, or stacks alike to which layers are dealt in turn."""
    if len(track.places) == 1:
        [place] = track.places
        return {b - a for a, b in itertools.pairwise(place.layers)} in ({1}, {-1})
    steps = {b - a for place in track.places for a, b in itertools.pairwise(place.layers)}
    starts = sorted(place.layers[0] for place in track.places)
    return (
        len({(place.axes, len(place.layers)) for place in track.places}) == 1
        and starts == list(range(starts[0], starts[-1] + 1))
        and steps == {len(starts)}
    )
