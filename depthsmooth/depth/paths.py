"""Paths of leaves: masked and boxed ones, and how messages name them."""

from __future__ import annotations

import collections
import difflib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.depth.leaves import Shape

KeyPath = tuple[Hashable, ...]


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


def with_leaves(tree: optax.Params, leaves: Mapping[str, jax.Array]) -> optax.Params:
    """The tree with other leaves at some of its paths."""
    structure = jax.tree_util.tree_structure(tree, is_leaf=is_masked)
    nodes = [leaves.get(path, node) for path, node in nodes_of(tree)]
    return jax.tree_util.tree_unflatten(structure, nodes)


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
