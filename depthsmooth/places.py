"""The names of leaves, and the place that each has in depth."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.layers import Axes
from depthsmooth.mesh import shards_along

KeyPath = tuple[Hashable, ...]
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
        """The place with the shards of a leaf, if these are known.

        Args:
          leaf: an array or anything with a sharding.

        Returns:
          The place with ``shards`` set; where they are not known, as it is.
        """
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
        """The shape of the tensor in one layer.

        Args:
          shape: of the leaf.

        Returns:
          It without the depth axes.
        """
        return tuple(size for axis, size in enumerate(shape) if axis not in self.axes)


def layer_shape(leaf: object, place: Place | None) -> Shape:
    """The shape of a leaf in one layer: its own where it has no place in depth."""
    return shape_of(leaf) if place is None else place.layer_shape(shape_of(leaf))


def stacked(shape: Shape, axes: Sequence[int]) -> int:
    """The number of layers in a leaf with these depth axes."""
    return math.prod(shape[axis] for axis in axes)


def path_string(keys: KeyPath) -> str:
    """A leaf's path as users write it: its keys joined by ``/``.

    Example:
      >>> [(keys, _)] = jax.tree_util.tree_leaves_with_path({"layers": [{"kernel": 0}]})
      >>> path_string(keys)
      'layers/0/kernel'
    """
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def is_masked(node: object) -> bool:
    """Whether a node of a tree is there in place of a leaf that is not."""
    return node is None or isinstance(node, optax.MaskedNode)


def nodes_of(tree: optax.Params) -> list[tuple[str, jax.Array | None]]:
    """The leaves with their paths, in order, and what is there in place of leaves that are not.

    The ``value`` of a box such as ``flax.linen.Partitioned``, and the bare index of a box
    that names nothing, is the leaf itself, so that boxed parameters and plain updates
    have the same paths. It is a box if it holds nothing else.

    Example:
      >>> import flax.linen as nn
      >>> nodes_of({"wi": nn.Partitioned(1, ("in", "out")), "wo": 2})
      [('wi', 1), ('wo', 2)]
    """
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
    boxes = {keys[:-1] for keys, _ in nodes if _is_of_box(keys)}
    lengths = {len(box) for box in boxes}
    held = collections.Counter(keys[:end] for keys, _ in nodes for end in lengths)
    return [
        (path_string(keys[:-1] if _is_of_box(keys) and held[keys[:-1]] == 1 else keys), node)
        for keys, node in nodes
    ]


def _is_of_box(keys: KeyPath) -> bool:
    """Whether the last key could be that of a box."""
    box = jax.tree_util.GetAttrKey("value")
    return bool(keys) and (keys[-1] == box or isinstance(keys[-1], jax.tree_util.FlattenedIndexKey))


def leaves_of(tree: optax.Params) -> tuple[list[tuple[str, jax.Array]], list[str]]:
    """The leaves with their paths, and the paths that are empty: masked, or None."""
    nodes = nodes_of(tree)
    present = [(path, node) for path, node in nodes if node is not None and not is_masked(node)]
    return present, [path for path, node in nodes if is_masked(node)]


def is_mixable(leaf: object) -> bool:
    """Whether a leaf is of a type whose layers can be mixed: floating point or complex."""
    is_number = isinstance(leaf, float | complex)
    return is_number or jnp.issubdtype(getattr(leaf, "dtype", np.bool_), jnp.inexact)


def hides(masked: Set[str], path: str) -> bool:
    """Whether the leaf is masked, by itself or with a subtree that holds it."""
    keys = path.split("/")
    return any("/".join(keys[: k + 1]) in masked for k in range(len(keys)))


def numbered_key(key: str) -> tuple[str, int | None]:
    """A key without the number at its end, and the number, None where there is none.

    Example:
      >>> [numbered_key(key) for key in ("block_03", "block10", "7", "block")]
      [('block', 3), ('block', 10), ('', 7), ('block', None)]
    """
    match = re.fullmatch(r"(.*?)[-_]?(\d+)", key)
    return (match[1], int(match[2])) if match else (key, None)


def common_path(paths: Sequence[str]) -> str:
    """The keys that all the paths begin with."""
    keys = zip(*(path.split("/") for path in paths), strict=False)
    common = []
    for level in keys:
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return "/".join(common)


def named(shapes: Mapping[str, Shape], like: str = "") -> list[str]:
    """Paths with shapes, those that are most like a misspelt one first."""
    paths = sorted(shapes, key=lambda path: -difflib.SequenceMatcher(None, like, path).ratio())
    return [shown(path, shapes[path]) for path in paths]


def shown(path: str, shape: Shape | None) -> str:
    """A leaf as messages name it; a tree that is a leaf itself has no path.

    Example:
      >>> shown("layers/kernel", (3, 4)), shown("", (2, 10))
      ('layers/kernel (3, 4)', 'the only leaf (2, 10)')
    """
    name = path or "the only leaf"
    return name if shape is None else f"{name} {shape}"


def some(names: Iterable[str], most: int = 12) -> str:
    """The first of several names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def shape_of(leaf: object) -> Shape:
    """The shape of a leaf; () for a number."""
    return tuple(getattr(leaf, "shape", ()))
