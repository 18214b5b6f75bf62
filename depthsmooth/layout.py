"""Where depth is: an immutable map from the paths of a parameter tree to their layers."""

import collections
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set

import jax
import jax.numpy as jnp
import numpy as np
import optax

KeyPath = tuple[Hashable, ...]


class DepthNotFoundError(ValueError):
    """No leaf is stacked over depth, as far as can be told with certainty."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the layers of one leaf are.

    Attributes:
      group: name of the depth group; the leaves of a group have the same layers.
      layers: number of layers L.
      axis: the leaf's axis that runs over the layers, counted from 0.
      found_by: what says so, ``"trace"`` or ``"rule"``.
    """

    group: str
    layers: int
    axis: int
    found_by: str


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the tree that a :class:`Depth` was made for.

    Attributes:
      path: its keys joined by ``/``.
      shape: its shape.
      place: where its layers are; None where it is left alone.
    """

    path: str
    shape: tuple[int, ...]
    place: Place | None = None

    def __str__(self) -> str:
        return f"{self.path} {self.shape}"


@dataclasses.dataclass(frozen=True, repr=False)
class Depth(Mapping[str, Place]):
    """Which leaves of a parameter tree are stacked over depth, and along which axis.

    Immutable and hashable; a mapping from path to :class:`Place`; prints as a
    table. :func:`depthsmooth.trace_depth` makes one from a model's forward pass,
    :meth:`from_rules` from what the user says.

    Attributes:
      leaves: every leaf of the tree, also those left alone; empty while rules
        have not met a tree.
      rules: pairs of path pattern and axis that have not met a tree yet.
    """

    leaves: tuple[Leaf, ...] = ()
    rules: tuple[tuple[str, int], ...] = ()

    @classmethod
    def from_rules(cls, rules: Mapping[str, int]) -> "Depth":
        """Says where depth is: the leaves that one pattern matches are one depth group.

        The rules meet the parameters when the optimizer is initialised, and the
        updates when an update is traced.

        Args:
          rules: from a regular expression, which has to match the whole path of
            a leaf (its keys joined by ``/``), to the axis that runs over the
            layers. Negative axes count from the end. ``{}`` smooths nothing.

        Returns:
          A Depth that holds the rules.

        Raises:
          ValueError: if a pattern is no regular expression or an axis no integer.

        Example:
          >>> params = {"layers": {"kernel": jnp.ones((12, 4, 4))}, "head": jnp.ones((4, 2))}
          >>> print(Depth.from_rules({"layers/.*": 0}).resolve(params))
          group       layers  axis  leaves  parameters  found by
          layers/.*       12     0       1         192  rule
          left alone                     1           8
          left alone: head (4, 2)
        """
        if not isinstance(rules, Mapping):
            raise ValueError(
                f"The rules are {rules!r}, but have to map patterns to axes, like "
                "{'.*/layers/.*': 0}."
            )
        for pattern, axis in rules.items():
            try:
                re.compile(pattern)
                known = isinstance(pattern, str)
            except (re.error, TypeError):
                known = False
            if not known:
                raise ValueError(
                    f"The rule {pattern!r} is no regular expression. A rule is a pattern for the "
                    "whole path of a leaf, like '.*/layers/.*'."
                )
            if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
                raise ValueError(
                    f"The rule {pattern!r} has the axis {axis!r}; it needs the integer axis "
                    "that runs over the layers, like 0 or -1."
                )
        return cls(rules=tuple((pattern, int(axis)) for pattern, axis in rules.items()))

    def resolve(self, tree: optax.Params) -> "Depth":
        """Finds the places of the leaves of one tree, and checks each.

        Args:
          tree: parameters or updates; only paths, shapes and dtypes are read.

        Returns:
          The Depth of that tree's leaves. A tree without leaves gives ``self``.

        Raises:
          ValueError: if a leaf does not fit its place, a rule matches nothing, or a
            leaf with a place is missing and not masked. The message names the
            path, the shape and the remedy.
        """
        present, masked = _leaves_of(tree)
        if not present:
            return self
        shapes = {path: np.shape(leaf) for path, leaf in present}
        if self.rules:
            places = _match(self.rules, shapes, masked)
        else:
            places = {path: place for path, place in self.items() if path in shapes}
            hidden = set(masked)
            for leaf in self.leaves:
                if leaf.place is not None and not _hides(hidden, leaf.path):
                    _check_shape(leaf, leaf.place, shapes)
        copies = collections.Counter(path for path, _ in present)
        for path, array in present:
            if path in places:
                _check_mixable(path, array, copies[path])
        return Depth(tuple(Leaf(path, shapes[path], places.get(path)) for path, _ in present))

    def __bool__(self) -> bool:
        return bool(self.rules or self._places)

    def __getitem__(self, path: str) -> Place:
        return self._places[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @functools.cached_property
    def _places(self) -> dict[str, Place]:
        return {leaf.path: leaf.place for leaf in self.leaves if leaf.place is not None}

    def __str__(self) -> str:
        if self.rules:
            rules = [(pattern, str(axis)) for pattern, axis in self.rules]
            return _table([("rule", "axis"), *rules]) + (
                "\nnot matched with a tree yet: print(depth.resolve(params)) shows what they match"
            )
        groups: dict[tuple[str, int, str], list[Leaf]] = {}
        for leaf in self.leaves:
            if leaf.place is not None:
                place = leaf.place
                groups.setdefault((place.group, place.layers, place.found_by), []).append(leaf)
        alone = [leaf for leaf in self.leaves if leaf.place is None]
        rows = [("group", "layers", "axis", "leaves", "parameters", "found by")]
        for (group, layers, found_by), leaves in groups.items():
            axes = sorted({leaf.place.axis for leaf in leaves if leaf.place is not None})
            rows.append((group, str(layers), ", ".join(map(str, axes)), *_size(leaves), found_by))
        if not alone:
            return _table(rows)
        rows.append(("left alone", "", "", *_size(alone), ""))
        return f"{_table(rows)}\nleft alone: {_some([str(leaf) for leaf in alone])}"

    def __repr__(self) -> str:
        return f"<Depth\n{self}>"


def path_string(keys: KeyPath) -> str:
    """A leaf's path as users write it: its keys joined by ``/``.

    The ``value`` of a box such as ``flax.linen.Partitioned`` is the leaf itself, so
    that boxed parameters and plain updates have the same paths.

    Example:
      >>> [(keys, _)] = jax.tree_util.tree_leaves_with_path({"layers": [{"kernel": 0}]})
      >>> path_string(keys)
      'layers/0/kernel'
    """
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_masked(node: object) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _leaves_of(tree: optax.Params) -> tuple[list[tuple[str, jax.Array]], list[str]]:
    """The leaves with their paths, and the paths that are empty: masked, or None."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_masked)
    present = [(path_string(keys), node) for keys, node in nodes if not _is_masked(node)]
    return present, [path_string(keys) for keys, node in nodes if _is_masked(node)]


def _hides(masked: Set[str], path: str) -> bool:
    """Whether the leaf is masked, by itself or with a subtree that holds it."""
    keys = path.split("/")
    return any("/".join(keys[: k + 1]) in masked for k in range(len(keys)))


def _match(
    rules: Sequence[tuple[str, int]],
    shapes: Mapping[str, tuple[int, ...]],
    masked: Sequence[str],
) -> dict[str, Place]:
    """The place of every leaf that a rule matches."""
    places: dict[str, Place] = {}
    for pattern, axis in rules:
        matched = [path for path in shapes if re.fullmatch(pattern, path)]
        if not matched and not any(re.fullmatch(pattern, path) for path in masked):
            hidden = (
                f" {_some(masked)} is masked: if the rule is for a leaf in there, match it before "
                "masking, with Depth.from_rules(rules).resolve(params)."
            )
            raise ValueError(
                f"The rule {pattern!r} matches no leaf. A rule has to match the whole path of "
                f"a leaf, and the leaves are {_some(_named(shapes, like=pattern))}. Correct it or "
                f"leave the rule out.{hidden if masked else ''}"
            )
        for path in matched:
            shape = shapes[path]
            if path in places:
                raise ValueError(
                    f"{path} {shape} is matched by two rules, {places[path].group!r} and "
                    f"{pattern!r}. Narrow one of them, so that each leaf has one place in depth."
                )
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"{path} {shape} has no axis {axis}, where the rule {pattern!r} says its "
                    "layers are. Correct the axis, or give this leaf a rule of its own."
                )
            first = matched[0]
            if shape[axis] != shapes[first][axis]:
                raise ValueError(
                    f"{path} {shape} has {shape[axis]} layers on axis {axis}, but "
                    f"{first} {shapes[first]} of the same rule {pattern!r} has "
                    f"{shapes[first][axis]}. The leaves of a rule share their layers: give each "
                    "stack a rule of its own, or correct the axis."
                )
            places[path] = Place(pattern, shape[axis], axis % len(shape), "rule")
    return places


def _check_shape(leaf: Leaf, place: Place, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises unless the tree has the leaf, with its layers where they were."""
    if leaf.path not in shapes:
        raise ValueError(
            f"{leaf} has a place in this Depth, but is not in the tree, whose leaves are "
            f"{_some(_named(shapes))}. Make the Depth from the same tree that the optimizer is "
            "given."
        )
    shape = shapes[leaf.path]
    if len(shape) != len(leaf.shape) or shape[place.axis] != place.layers:
        raise ValueError(
            f"{leaf.path} {shape} does not have the {place.layers} layers on axis {place.axis} "
            f"that this Depth found by {place.found_by} in {leaf.shape}. Make the Depth from the "
            "same tree that the optimizer is given."
        )


def _check_mixable(path: str, leaf: jax.Array, copies: int) -> None:
    """Raises unless the leaf's layers can be mixed."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ValueError(
            f"{path} {leaf.shape} is of type {leaf.dtype}, but only floating point and complex "
            "updates can be mixed. Leave it out of the rules, or keep it from the optimizer with "
            "optax.masked or optax.partition."
        )
    if copies > 1:
        raise ValueError(
            f"{path} {leaf.shape} is the path of {copies} leaves, so its place in depth is not "
            "certain. Rename a key that holds a '/'."
        )


def _size(leaves: Sequence[Leaf]) -> tuple[str, str]:
    return str(len(leaves)), f"{sum(math.prod(leaf.shape) for leaf in leaves):,}"


def _named(shapes: Mapping[str, tuple[int, ...]], like: str = "") -> list[str]:
    """Paths with shapes, those that are most like a misspelt one first."""
    paths = sorted(shapes, key=lambda path: -difflib.SequenceMatcher(None, like, path).ratio())
    return [f"{path} {shapes[path]}" for path in paths]


def _some(names: Sequence[str], most: int = 12) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns in line, numbers to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [any(cell.replace(",", "").isdigit() for cell in column) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    )
