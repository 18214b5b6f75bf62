"""Where depth is: a map from the paths of a tree to their layers, or rules that give one."""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from depthsmooth.depth import rules as rules_
from depthsmooth.depth.fitting import (
    SAME_TREE,
    axes_name,
    check_mixable,
    check_paths,
    check_place,
    check_tree,
    check_whole,
    fitting_place,
    hint_of_vmap,
)
from depthsmooth.depth.leaves import Leaf, Place, Shape, Track, layer_shape, shape_of
from depthsmooth.depth.paths import is_masked, leaves_of, named, nodes_of, shown, some
from depthsmooth.depth.rules import Rule, RuleLike
from depthsmooth.depth.table import leaves_as_table, rules_as_table
from depthsmooth.mesh import manual_axes

Where = Callable[[str, jax.Array], bool]
"""``where(path, leaf)`` selects leaves."""


class DepthNotFoundError(ValueError):
    """No leaf is stacked over depth, as far as can be told with certainty."""


class Layout(abc.ABC):
    """What tells where depth is in a tree.

    A :class:`~depthsmooth.Depth`, or :class:`~depthsmooth.depth.Rules` that become one.
    """

    @abc.abstractmethod
    def resolve(self, tree: optax.Params) -> Depth:
        """The Depth of a tree. Each place in it is checked."""

    @property
    @abc.abstractmethod
    def group_names(self) -> set[str]:
        """The names of its groups."""

    def __or__(self, other: Layout) -> Layout:
        """Joins two: a leaf is where either has it. Rules meet the leaves of a Depth.

        Raises:
          ValueError: if both place a leaf, or have a group of the same name.

        Example:
          >>> import jax.numpy as jnp
          >>> params = {"stem": jnp.ones((2, 4)), "block_0": jnp.ones(4), "block_1": jnp.ones(4)}
          >>> blocks = Depth.from_rules({"block.*": rules_.numbered()}).resolve(params)
          >>> print(blocks | Depth.from_rules({"stem": 0}))
          group    layers  axis  leaves  parameters  found by
          block.*       2     –       2           8  rule
          stem          2     0       1           8  rule
        """
        if not isinstance(other, Layout):
            return NotImplemented
        if not (self and other):
            return self or other
        if isinstance(self, Rules) and isinstance(other, Rules):
            _check_groups(self, other)
            return Rules((*self.rules, *other.rules))
        return joined(self._among(other), other._among(self))

    @abc.abstractmethod
    def _among(self, other: Layout) -> Depth:
        """Itself; of rules, the Depth of the leaves of the other."""

    def select(self, where: Where, tree: optax.Params) -> Depth:
        """The Depth of a tree with the places of those leaves alone that are selected.

        Args:
          where: ``where(path, leaf)`` tells whether a leaf keeps its place, as
            :func:`depthsmooth.projections` does. It is asked for leaves with a place only.
          tree: parameters or updates.

        Returns:
          The Depth.

        Raises:
          ValueError: if no leaf is selected, or what ``where`` gives is no bool.

        Example:
          >>> import jax.numpy as jnp
          >>> params = {"norm": {"scale": jnp.ones((3, 4))}, "mlp": {"kernel": jnp.ones((3, 4, 4))}}
          >>> print(Depth.from_rules({".*": 0}).select(lambda path, leaf: "mlp" in path, params))
          group       layers  axis  leaves  parameters  found by
          .*               3     0       1          48  rule
          left alone                     1          12
          left alone: norm/scale (3, 4)
        """
        return selected(self.resolve(tree), where, tree)

    def map(
        self, fn: Callable[[str, jax.Array, Place | None], object], tree: optax.Params
    ) -> optax.Params:
        """A tree of the same structure, of what a function says of each leaf and its place.

        For whatever of Optax needs to know which axes are not depth: masks, labels, dimension
        numbers. Some of it calls all that can be called, as a model of Equinox can, and the tree
        then, too. Give it a function: ``optax.partition(..., lambda tree: depth.map(fn, tree))``.

        Args:
          fn: called with the path, the leaf and its :class:`Place`, None where it has none.
          tree: parameters or updates. What is masked, or None, stays as it is.

        Returns:
          The tree.

        Raises:
          ValueError: if a leaf does not fit its place.

        Example:
          >>> import jax.numpy as jnp
          >>> params = {"head": jnp.ones(4), "layers": jnp.ones((3, 4))}
          >>> depth = Depth.from_rules({"layers": 0})
          >>> depth.map(lambda path, leaf, place: "rest" if place is None else "deep", params)
          {'head': 'rest', 'layers': 'deep'}
        """
        depth = self.resolve(tree)
        treedef = jax.tree_util.tree_structure(tree, is_leaf=is_masked)
        return jax.tree_util.tree_unflatten(
            treedef,
            [
                leaf if leaf is None or is_masked(leaf) else fn(path, leaf, depth.get(path))
                for path, leaf in nodes_of(tree)
            ],
        )

    def decay_mask(self, params: optax.Params) -> optax.Params:
        """Which leaves to decay: those of two or more axes in one layer.

        So no stacked scale, and no bias but those of attention that have an axis for heads.

        ``optax.add_decayed_weights(0.1, mask=depth.decay_mask)``: the function itself, for Optax
        may call the tree if it can be called, like a model of Equinox. What takes functions for
        schedules has to be told: ``optax.inject_hyperparams(ds.adamw, static_args="mask")``.

        Args:
          params: parameters or updates.

        Returns:
          A tree of the same structure, of bools.

        Raises:
          ValueError: if a leaf does not fit its place.

        Example:
          >>> import jax.numpy as jnp
          >>> params = {"scale": jnp.ones((3, 4)), "kernel": jnp.ones((3, 4, 4))}
          >>> Depth.from_rules({".*": 0}).decay_mask(params)
          {'kernel': True, 'scale': False}
        """
        return self.map(lambda path, leaf, place: len(layer_shape(leaf, place)) >= 2, params)

    def to_json(self) -> str:
        """The layout as JSON, for a file beside a checkpoint. ``Depth.from_json`` reads it.

        Returns:
          The text. Rules that are not resolved are in it as such.

        Example:
          >>> depth = Depth.from_rules({"layers/.*": 0})
          >>> Depth.from_json(depth.to_json()) == depth
          True
        """
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Depth | Rules:
        """The Depth that ``to_json`` wrote.

        Args:
          text: what it wrote.

        Returns:
          The Depth, equal to that which was written.

        Raises:
          ValueError: if the text is something else.

        Example:
          >>> import jax.numpy as jnp
          >>> depth = Depth.from_rules({"layers": 0}).resolve({"layers": jnp.ones((3, 2))})
          >>> Depth.from_json(depth.to_json()) == depth
          True
        """
        try:
            fields = json.loads(text)
            # Earlier versions wrote both, one of them empty.
            written, rules = fields.get("leaves"), fields.get("rules")
            if not written and rules is not None:
                return Depth.from_rules({name: _rule(rule) for name, rule in rules})
            leaves = [
                Leaf(leaf["path"], tuple(leaf["shape"]), _place(leaf["place"]), leaf["reason"])
                for leaf in written
            ]
            for leaf in leaves:
                check_place(leaf)
            depth = Depth(tuple(leaves))
            rules_.check_tensors("it", depth, {leaf.path: leaf.shape for leaf in leaves})
            return depth
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"This is not a Depth in JSON, as depth.to_json() writes it: {error!r}."
            ) from error


@dataclasses.dataclass(frozen=True, repr=False)
class Depth(Layout, Mapping[str, Place]):
    """Which leaves of a parameter tree hold layers, which layers, and along which axes.

    Immutable and hashable; a mapping from path to :class:`Place`; prints as a table.
    :func:`depthsmooth.trace_depth` makes one from a model's forward pass,
    :func:`depthsmooth.find_depth` from the parameter tree alone. :meth:`from_rules` takes what
    the user says.

    Attributes:
      leaves: every leaf of the tree, also those left alone.
    """

    leaves: tuple[Leaf, ...] = ()

    @classmethod
    def from_rules(cls, rules: Mapping[str, RuleLike]) -> Rules:
        """Says where depth is: the leaves that one pattern matches are one depth group.

        Layers of several kinds that take turns, like attention and MLP, are a group for
        each kind. The rules meet the parameters when the optimizer is initialised, and the
        updates when an update is traced.

        Args:
          rules: from a regular expression, which has to match the whole path of
            a leaf (its keys joined by ``/``), to the layout of the layers there:
            the axis that they are stacked along, or several from outer to inner as
            a tuple (negative axes count from the end);
            :func:`~depthsmooth.numbered` for layers with leaves of their own,
            :func:`~depthsmooth.interleaved` for stacks whose layers alternate,
            :func:`~depthsmooth.sequence` for containers that follow one another.
            ``{}`` smooths nothing.

        Returns:
          The :class:`~depthsmooth.depth.Rules`. Every ``depth=`` takes them, and
          ``resolve(params)`` gives the Depth.

        Raises:
          ValueError: if a pattern is no regular expression, or a rule is none.

        Example:
          >>> import jax.numpy as jnp
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
                "{'.*layers/.*': 0}."
            )
        known = [(pattern, rules_.as_rule(pattern, rule)) for pattern, rule in rules.items()]
        return Rules(tuple(known))

    def resolve(self, tree: optax.Params) -> Depth:
        """The places of the same leaves in another tree of the same paths, each of them checked.

        Args:
          tree: parameters or updates; only paths, shapes, dtypes and shardings are read. In
            ``jax.shard_map`` a Depth of the whole arrays meets the parts of one device.

        Returns:
          The Depth of that tree's leaves; of none, if the tree has no leaves.

        Raises:
          ValueError: if a leaf does not fit its place, or a leaf with a place is missing and not
            masked. The message names the path, the shape and the remedy.

        Example:
          >>> import jax.numpy as jnp
          >>> depth = Depth.from_rules({"layers": 0}).resolve({"layers": jnp.ones((3, 2))})
          >>> depth.resolve({"layers": jnp.ones((3, 2), "bfloat16")}).groups
          {'layers': 3}
        """
        present, masked = leaves_of(tree)
        if not present:
            return Depth()
        check_tree(present)
        shapes = {path: shape_of(leaf) for path, leaf in present}
        arrays = dict(present)
        placed = [leaf for leaf in self.leaves if leaf.path in self]
        check_paths(placed, shapes, set(masked))
        places = {
            leaf.path: fitting_place(leaf, self[leaf.path], arrays)
            for leaf in placed
            if leaf.path in arrays
        }
        rules_.check_tensors("the Depth", places, shapes, f" {SAME_TREE}")
        if manual_axes():
            shapes |= {leaf.path: leaf.shape for leaf in self.leaves if leaf.path in arrays}
        reasons = {leaf.path: leaf.reason for leaf in self.leaves}
        return depth_of(present, shapes, places, reasons, "the Depth was made without it")

    @property
    def group_names(self) -> set[str]:
        """The names of its groups."""
        return set(self.groups)

    @functools.cached_property
    def groups(self) -> dict[str, int]:
        """The number of layers of each group."""
        groups: dict[str, int] = {}
        for place in self._places.values():
            groups[place.group] = max(groups.get(place.group, 0), max(place.layers) + 1)
        return groups

    def explain(self, path: str) -> str:
        """Says why a leaf is, or is not, smoothed, and with which others.

        Args:
          path: the path of a leaf, as the table has it.

        Returns:
          A sentence or two.

        Raises:
          ValueError: if there is no such leaf.

        Example:
          >>> import jax.numpy as jnp
          >>> params = {f"block_{i}": jnp.ones((4, 4)) for i in range(3)} | {"head": jnp.ones(4)}
          >>> depth = Depth.from_rules({"block.*": rules_.numbered()}).resolve(params)
          >>> print(depth.explain("block_1"))
          block_1 (4, 4) is layer 1 of 3 of the group 'block.*', found by rule. Its neighbours are
          block_0 (layer 0), block_2 (layer 2).
          >>> print(depth.explain("head"))
          head (4,) is left alone: no rule matches it.
        """
        leaves = {leaf.path: leaf for leaf in self.leaves}
        if path not in leaves:
            shapes = {leaf.path: leaf.shape for leaf in self.leaves}
            raise ValueError(
                f"There is no leaf {path!r} in this Depth. It has {some(named(shapes, path), 5)}."
            )
        leaf = leaves[path]
        if leaf.place is None:
            return f"{leaf} is left alone: {leaf.reason or 'it has no place in depth'}."
        place = leaf.place
        axes = f", along {axes_name(place.axes)}" if place.axes else ""
        first = (
            f"{leaf} is {_layers_name(place.layers)} of {self.groups[place.group]} of the group "
            f"{place.group!r}{axes}, found by {place.found_by}."
        )
        [track] = [track for track in self.tracks if path in track.paths]
        beside = {layer + step for layer in place.layers for step in (-1, 1)}
        neighbours = [
            f"{other} ({_layers_name(at.layers)})"
            for other, at in zip(track.paths, track.places, strict=True)
            if other != path and beside & set(at.layers)
        ]
        if neighbours:
            return f"{first} Its neighbours are\n{some(neighbours)}."
        return first if len(place.layers) > 1 else f"{first} It has no neighbour."

    def __getitem__(self, path: str) -> Place:
        return self._places[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @functools.cached_property
    def _places(self) -> dict[str, Place]:
        return {leaf.path: leaf.place for leaf in self.leaves if leaf.place is not None}

    @functools.cached_property
    def tracks(self) -> tuple[Track, ...]:
        """The leaves that are mixed together, one track for each tensor of each group."""
        together: dict[tuple[str, str], list[str]] = {}
        for path, place in self._places.items():
            together.setdefault((place.group, place.tensor), []).append(path)
        leaves = {leaf.path: leaf for leaf in self.leaves}
        return tuple(Track(tuple(map(leaves.__getitem__, paths))) for paths in together.values())

    def _among(self, other: Layout) -> Depth:
        return self

    def __str__(self) -> str:
        return leaves_as_table(self.leaves, self.groups)

    def __repr__(self) -> str:
        return f"<Depth\n{self}>"


@dataclasses.dataclass(frozen=True, repr=False)
class Rules(Layout):
    """Rules that have not met a tree: patterns of paths, and how layers lie in what they match.

    ``Depth.from_rules`` makes them. Every ``depth=`` takes them as it takes a Depth: they meet
    the parameters when an optimizer is initialised, and the updates when an update is traced.

    Attributes:
      rules: pairs of a path pattern and its :class:`~depthsmooth.depth.Rule`.
    """

    rules: tuple[tuple[str, Rule], ...] = ()

    def resolve(self, tree: optax.Params) -> Depth:
        """Finds the places of the leaves of one tree, and checks each.

        Args:
          tree: parameters or updates; only paths, shapes, dtypes and shardings are read.

        Returns:
          The Depth of that tree's leaves; of none, if the tree has no leaves.

        Raises:
          ValueError: if a rule matches nothing, or nothing that would be mixed, or a leaf does not
            have the axes that its rule says. The message names the path, the shape and the remedy.

        Example:
          >>> import jax.numpy as jnp
          >>> depth = Depth.from_rules({"layers": 0}).resolve({"layers": jnp.ones((3, 2))})
          >>> depth.groups
          {'layers': 3}
        """
        present, masked = leaves_of(tree)
        if not present:
            return Depth()
        check_tree(present)
        check_whole(present)
        shapes = {path: shape_of(leaf) for path, leaf in present}
        arrays = dict(present)
        try:
            matched = rules_.match(dict(self.rules), shapes, masked)
        except rules_.AxisError as error:
            raise ValueError(f"{error}{hint_of_vmap(arrays)}") from None
        places = {path: place.on_devices_of(arrays[path]) for path, place in matched.items()}
        return depth_of(present, shapes, places, {}, "no rule matches it")

    @property
    def group_names(self) -> set[str]:
        """The names of its groups: the patterns."""
        return {pattern for pattern, _ in self.rules}

    def explain(self, path: str) -> str:
        """Raises: only a Depth knows leaves."""
        raise ValueError(
            f"There is no leaf {path!r} in rules. Resolve them first: depth.resolve(params)."
        )

    def _among(self, other: Layout) -> Depth:
        leaves = other.leaves if isinstance(other, Depth) else ()
        return self.resolve(
            {leaf.path: jax.ShapeDtypeStruct(leaf.shape, "float32") for leaf in leaves}
        )

    def __bool__(self) -> bool:
        return bool(self.rules)

    def __str__(self) -> str:
        return rules_as_table(self.rules) if self.rules else "no rules: nothing is mixed"

    def __repr__(self) -> str:
        return f"<Rules\n{self}>"


def depth_of(
    present: Sequence[tuple[str, jax.Array]],
    shapes: Mapping[str, Shape],
    places: Mapping[str, Place],
    reasons: Mapping[str, str],
    otherwise: str,
) -> Depth:
    """The Depth of leaves of which some have a place; raises unless these can be mixed."""
    copies = collections.Counter(path for path, _ in present)
    for path, array in present:
        if path in places:
            check_mixable(path, array, copies[path])
    return Depth(
        tuple(
            Leaf(path, shapes[path], places[path])
            if path in places
            else Leaf(path, shapes[path], None, reasons.get(path, otherwise))
            for path, _ in present
        )
    )


def whole_groups(found: Depth, given: Layout | None, masked: Sequence[str]) -> dict[str, int]:
    """The number of layers of each group of a tree, with those that are masked in it.

    Args:
      found: the Depth of the leaves that are there.
      given: as a user gave it.
      masked: the paths of the leaves that are not there.

    Raises:
      ValueError: if some are masked, and what was given cannot tell how many layers these have.
    """
    if isinstance(given, Depth):
        return found.groups | given.groups
    if masked:
        raise ValueError(
            f"{masked[0]} is masked, and neither rules nor names can tell how many layers it has: "
            "give the depth of the whole tree, by depth=rules.resolve(params), find_depth(params) "
            "or trace_depth(loss_fn, params, batch)."
        )
    return found.groups


def selected(depth: Depth, where: Where, tree: optax.Params) -> Depth:
    """The Depth of this very tree, with the places of the leaves that are selected alone."""
    arrays: dict[str, Any] = dict(leaves_of(tree)[0])
    if manual_axes():  # where it is not to depend on how arrays are split
        whole = {leaf.path: leaf.shape for leaf in depth.leaves}
        for path, array in arrays.items():
            arrays[path] = jax.ShapeDtypeStruct(whole[path], array.dtype)
    kept = {path: where(path, arrays[path]) for path in depth}
    for path, answer in kept.items():
        if not isinstance(answer, bool | np.bool_):
            raise ValueError(
                f"where gives {answer!r} for {shown(path, shape_of(arrays[path]))}, but has to "
                "give True or False, from the path, the shape and the dtype alone."
            )
    if kept and not any(kept.values()):
        offered = some(f"{shown(path, shape_of(arrays[path]))}" for path in kept)
        raise ValueError(
            f"where selects none of the leaves that have a place in depth: {offered}. "
            "To smooth nothing, use Depth.from_rules({})."
        )
    return Depth(
        tuple(
            leaf
            if kept.get(leaf.path, True)
            else dataclasses.replace(leaf, place=None, reason="where does not select it")
            for leaf in depth.leaves
        )
    )


def joined(one: Depth, two: Depth) -> Depth:
    """The Depth of all leaves, each with the place that it has in either."""
    if not (one and two):
        return one or two
    if not {leaf.path for leaf in one.leaves} & {leaf.path for leaf in two.leaves}:
        raise ValueError(
            f"The two Depths were made of different trees: {one.leaves[0]} is in one, "
            f"{two.leaves[0]} in the other. Make both from the tree that the optimizer gets."
        )
    twice = next((leaf for leaf in one.leaves if leaf.path in one and leaf.path in two), None)
    if twice is not None:
        raise ValueError(_twice(str(twice)))
    _check_groups(one, two)
    leaves = {leaf.path: leaf for leaf in two.leaves}
    leaves |= {leaf.path: leaf for leaf in one.leaves if leaf.path not in two}
    return Depth(tuple(leaves.values()))


def _check_groups(one: Layout, two: Layout) -> None:
    groups = one.group_names & two.group_names
    if groups:
        raise ValueError(_twice(f"A group named {min(groups)!r}"))


def _twice(both: str) -> str:
    return (
        f"{both} is in both of the Depths that are to be joined. Make one of them without it, so "
        "that each leaf has one place in depth."
    )


def refuse_depths(function: str, arguments: Mapping[str, object]) -> None:
    """Raises if one of a function's arguments is a Depth, but for ``depth`` itself."""
    for name, value in arguments.items():
        if isinstance(value, Layout) and name != "depth":
            raise ValueError(
                f"{name} of {function} is a Depth. Give that by its name: {function}(..., "
                "depth=depth)."
            )


def _place(fields: Mapping[str, Any] | None) -> Place | None:
    if fields is None:
        return None
    axes, layers = tuple(fields["axes"]), tuple(fields["layers"])
    return Place(
        fields["group"], fields["tensor"], axes, layers, fields["found_by"], int(fields["shards"])
    )


def _rule(fields: Mapping[str, Any]) -> Rule:
    containers = tuple((name, _rule(rule)) for name, rule in fields["containers"])
    return Rule(tuple(fields["axes"]), bool(fields["numbered"]), containers)


def _layers_name(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {some(map(str, layers))}"
