"""Where one tensor is over depth: the leaves that hold it, and the place of each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from depthsmooth.mesh import shards_along

Axes = tuple[int, ...]
"""The axes of a leaf that run over its layers, outer to inner; none for a leaf of one layer."""


Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Which layers a leaf holds, and where in the leaf they are.

    Attributes:
      group: name of the depth group: one sequence of L layers.
      tensor: which of a layer's tensors the leaf holds. Leaves of the same group
        and tensor are mixed with each other.
      axes: the leaf's axes that run over its layers, outer to inner, counted from
        0. Empty for a leaf that holds one layer, as of ``block_0``, ``block_1``, …
      layers: the layers that the leaf holds, counted from 0, in row-major order of
        ``axes``.
      found_by: what says so: ``"trace"``, ``"rule"``, ``"names"`` or ``"metadata"``.
      shards: into how many parts devices split the layers, as far as is known. It
        changes no result, but how much devices have to tell each other.
    """

    group: str
    tensor: str
    axes: Axes
    layers: tuple[int, ...]
    found_by: str
    shards: int = 1

    def on_devices_of(self, leaf: object) -> Place:
        """The place with the shards of a leaf, if it has a sharding that tells them."""
        known = [shards_along(leaf, axis) for axis in self.axes]
        shards = [count for count in known if count is not None]
        if not shards or len(shards) < len(known):
            return self
        # Layers that are split along an inner axis are no runs of layers.
        return dataclasses.replace(self, shards=shards[0] if set(shards[1:]) <= {1} else 1)

    @property
    def layer(self) -> int:
        """The first, or only, layer that the leaf holds."""
        return self.layers[0]

    def layer_shape(self, shape: Shape) -> Shape:
        """The shape of the tensor in one layer: that of the leaf without its depth axes."""
        return tuple(size for axis, size in enumerate(shape) if axis not in self.axes)


def layer_shape(leaf: object, place: Place | None) -> Shape:
    """The shape of a leaf in one layer: its own where it has no place in depth."""
    return shape_of(leaf) if place is None else place.layer_shape(shape_of(leaf))


def stacked(shape: Shape, axes: Sequence[int]) -> int:
    """The number of layers in a leaf with these depth axes."""
    return math.prod(shape[axis] for axis in axes)


def shape_of(leaf: object) -> Shape:
    """The shape of a leaf; () for a number."""
    return tuple(getattr(leaf, "shape", ()))


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

    @functools.cached_property
    def present(self) -> list[int]:
        """The layers that are there."""
        return sorted(layer for place in self.places for layer in place.layers)

    def spans(self, cuts: Sequence[int] = ()) -> tuple[int, ...]:
        """The lengths of the runs that all layers up to its last one fall into.

        Args:
          cuts: layers before which a run ends.

        Returns:
          The lengths, in order. A layer that is absent is a run by itself.
        """
        layers = self.present[-1] + 1
        ends = [k for k in range(1, layers) if k in cuts or not {k - 1, k} <= self.held]
        return tuple(b - a for a, b in itertools.pairwise([0, *ends, layers]))

    @functools.cached_property
    def held(self) -> frozenset[int]:
        """The layers that are present, as a set."""
        return frozenset(self.present)
