"""One tensor through the layers of a group: the leaves that hold it, and their arrays."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from depthsmooth.blocks import Tensor
from depthsmooth.mesh import AxisName, manual_axes, names_of, size_of, varying_axes
from depthsmooth.places import Place, Shape, some


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the tree that a :class:`Depth` was made for.

    Attributes:
      path: its keys joined by ``/``.
      shape: its shape.
      place: where its layers are; None where it is left alone.
      reason: why it is left alone.
    """

    path: str
    shape: Shape
    place: Place | None = None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.path} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Track:
    """One tensor through all the layers of a group: the leaves that are mixed together.

    Attributes:
      leaves: those that hold its layers: one stack, or a leaf for each layer, or several
        stacks that the layers are dealt to in turn. All have a place.
    """

    leaves: tuple[Leaf, ...]

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The path of each leaf."""
        return tuple(leaf.path for leaf in self.leaves)

    @functools.cached_property
    def places(self) -> tuple[Place, ...]:
        """The place of each leaf."""
        return tuple(leaf.place for leaf in self.leaves if leaf.place is not None)

    @property
    def group(self) -> str:
        """The depth group of the layers."""
        return self.places[0].group

    @property
    def tensor_name(self) -> str:
        """Which of a layer's tensors it is."""
        return self.places[0].tensor

    def tensor(self, arrays: Mapping[str, jax.Array], axis_name: AxisName | None = None) -> Tensor:
        """The arrays that hold it, and how.

        Args:
          arrays: by path.
          axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

        Raises:
          ValueError: in ``jax.shard_map``, if layers are split over another axis.
        """
        ours = [jnp.asarray(arrays[path]) for path in self.paths]
        inside = bool(manual_axes())
        are_parts = inside and any(map(_is_part, self.leaves, ours))
        if are_parts:
            self._check_shards(axis_name, ours)
        if inside:
            self._check_alike(ours)
        self._check_explicit(ours)
        return Tensor(
            ours,
            [place.axes for place in self.places],
            [place.layers for place in self.places],
            [place.shards for place in self.places],
            axis_name if are_parts else None,
            list(map(_parts, self.leaves, ours)) if inside else (),
            list(map(str, self.leaves)),
        )

    @property
    def _takes_turns(self) -> bool:
        """Whether it is one stack, or stacks alike to which layers are dealt in turn."""
        if len(self.places) == 1:
            [place] = self.places
            return {b - a for a, b in itertools.pairwise(place.layers)} in ({1}, {-1})
        steps = {b - a for place in self.places for a, b in itertools.pairwise(place.layers)}
        starts = sorted(place.layers[0] for place in self.places)
        return (
            len({(place.axes, len(place.layers)) for place in self.places}) == 1
            and starts == list(range(starts[0], starts[-1] + 1))
            and steps == {len(starts)}
        )

    def _check_alike(self, arrays: Sequence[jax.Array]) -> None:
        """Raises, in shard_map, if its leaves certainly are parts along different mesh axes."""
        first, *rest = zip(self.leaves, map(varying_axes, arrays), strict=True)
        for leaf, axes in rest:
            if axes != first[1]:
                raise ValueError(
                    f"{leaf} is mixed with {first[0]}, but shard_map splits one along "
                    f"{sorted(axes or ())}, the other along {sorted(first[1] or ())}. Split them "
                    "alike."
                )

    def _check_shards(self, axis_name: AxisName | None, arrays: Sequence[jax.Array]) -> None:
        """Raises, in shard_map, unless the shards of its layers are found along the axis."""
        shards = {place.shards for place in self.places}
        [first, *_] = self.leaves
        split = (
            f"{first}, of which shard_map gives each device a part of the "
            f"{len(self.places[0].layers)} layers, is"
        )
        if not self._takes_turns or len(shards) > 1:
            raise ValueError(
                f"{split} mixed with {self.paths[-1]} in a way that exchanges more than "
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

    def _check_explicit(self, arrays: Sequence[jax.Array]) -> None:
        """Raises unless its leaves can be mixed as they are laid out in an explicit mesh."""
        specs = [tuple(jax.typeof(array).sharding.spec) for array in arrays]
        if all(name is None for spec in specs for name in spec):
            return
        pairs = list(zip(specs, self.places, strict=True))
        of_layer = {
            tuple(name for axis, name in enumerate(spec) if axis not in place.axes)
            for spec, place in pairs
        }
        of_depth = {tuple(spec[axis] for axis in place.axes) for spec, place in pairs}
        is_split = any(name is not None for names in of_depth for name in names)
        inner = [name for names in of_depth for name in names[1:] if name is not None]
        alike = len(of_layer) == 1 and (
            not is_split or (len(of_depth) == 1 and not inner and self._takes_turns)
        )
        if not alike:
            layouts = [
                f"{leaf} by {jax.P(*spec)}" for leaf, spec in zip(self.leaves, specs, strict=True)
            ]
            raise ValueError(
                f"An explicit mesh splits {some(layouts, 4)}, which are mixed. There leaves that "
                "are mixed have to be split alike, and layers along the outermost of their axes, "
                "if they are of one stack or dealt to stacks in turn. Split other axes, or use a "
                "mesh of AxisType.Auto."
            )

    @functools.cached_property
    def present(self) -> list[int]:
        """The layers that are there."""
        return sorted(layer for place in self.places for layer in place.layers)

    @property
    def runs(self) -> tuple[int, ...]:
        """The lengths of its runs of layers without a gap: a gap keeps two runs apart."""
        return self.runs_between(())

    def runs_between(self, cuts: Sequence[int]) -> tuple[int, ...]:
        """The same if a run also ends before each of these layers.

        Args:
          cuts: layers, counted among all of the group.

        Returns:
          The number of layers of each run, in order.
        """
        ends = [
            k
            for k, (a, b) in enumerate(itertools.pairwise(self.present), 1)
            if b > a + 1 or b in cuts
        ]
        return tuple(b - a for a, b in itertools.pairwise([0, *ends, len(self.present)]))

    @functools.cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """For each leaf the layers it holds, counted among those that are present."""
        rank = {layer: k for k, layer in enumerate(self.present)}
        return tuple(tuple(rank[layer] for layer in place.layers) for place in self.places)


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
