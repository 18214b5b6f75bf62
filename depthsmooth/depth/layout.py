"""Where depth is: an immutable map from the paths of a parameter tree to their layers."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.depth import rules as rules_
from depthsmooth.depth.leaves import Leaf, Place, Shape, Track, layer_shape, shape_of, stacked
from depthsmooth.depth.paths import (
    hides,
    is_masked,
    is_mixable,
    leaves_of,
    named,
    nodes_of,
    shown,
    some,
)
from depthsmooth.depth.rules import Rule, RuleLike
from depthsmooth.depth.table import leaves_as_table, rules_as_table
from depthsmooth.mesh import manual_axes, varying_axes

Where = Callable[[str, jax.Array], bool]
"""``where(path, leaf)`` selects leaves."""


class DepthNotFoundError(ValueError):
    """No leaf is stacked over depth, as far as can be told with certainty."""


@dataclasses.dataclass(frozen=True, repr=False)
class Depth(Mapping[str, Place]):
    """Which leaves of a parameter tree hold layers, which layers, and along which axes.

    Immutable and hashable; a mapping from path to :class:`Place`; prints as a
    table. :func:`depthsmooth.trace_depth` makes one from a model's forward pass,
    :func:`depthsmooth.find_depth` from the parameter tree alone, :meth:`from_rules`
    from what the user says.

    Attributes:
      leaves: every leaf of the tree, also those left alone; empty while rules
        have not met a tree.
      rules: pairs of path pattern and rule that have not met a tree yet.
    """

    leaves: tuple[Leaf, ...] = ()
    rules: tuple[tuple[str, Rule], ...] = ()

    @classmethod
    def from_rules(cls, rules: Mapping[str, RuleLike]) -> Depth:
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
          A Depth that holds the rules.

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
        return cls(rules=tuple(known))

    def resolve(self, tree: optax.Params) -> Depth:
        """Finds the places of the leaves of one tree, and checks each.

        Args:
          tree: parameters or updates; only paths, shapes, dtypes and shardings are read. In
            ``jax.shard_map`` a Depth of the whole arrays meets the parts of one device.

        Returns:
          The Depth of that tree's leaves. A tree without leaves gives the rules as they are, or
          else a Depth of none.

        Raises:
          ValueError: if a leaf does not fit its place, a rule matches nothing, or
            nothing that would be mixed, or a leaf with a place is missing and not
            masked. The message names the path, the shape and the remedy.

        Example:
          >>> import jax.numpy as jnp
          >>> depth = Depth.from_rules({"layers": 0}).resolve({"layers": jnp.ones((3, 2))})
          >>> depth.groups
          {'layers': 3}
        """
        present, masked = leaves_of(tree)
        if not present:
            return self if self.rules else Depth()
        _check_tree(present)
        shapes = {path: shape_of(leaf) for path, leaf in present}
        arrays = dict(present)
        reasons = {leaf.path: leaf.reason for leaf in self.leaves}
        if self.rules:
            check_whole(present)
            try:
                matched = rules_.match(dict(self.rules), shapes, masked)
            except rules_.AxisError as error:
                raise ValueError(f"{error}{_of_vmap(arrays)}") from None
            places = {path: place.on_devices_of(arrays[path]) for path, place in matched.items()}
        else:
            placed = [leaf for leaf in self.leaves if leaf.path in self]
            _check_paths(placed, shapes, set(masked))
            places = {
                leaf.path: _checked(leaf, self[leaf.path], arrays)
                for leaf in placed
                if leaf.path in arrays
            }
            rules_.check_tensors("the Depth", places, shapes, f" {_SAME_TREE}")
            if manual_axes():
                shapes |= {leaf.path: leaf.shape for leaf in self.leaves if leaf.path in arrays}
        copies = collections.Counter(path for path, _ in present)
        for path, array in present:
            if path in places:
                check_mixable(path, array, copies[path])
        unknown = "no rule matches it" if self.rules else "the Depth was made without it"
        return Depth(
            tuple(
                Leaf(path, shapes[path], places[path])
                if path in places
                else Leaf(path, shapes[path], None, reasons.get(path, unknown))
                for path, _ in present
            )
        )

    def __or__(self, other: Depth) -> Depth:
        """Joins two: a leaf is where either has it.

        Rules that have not met a tree yet meet the leaves of the other Depth.

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
        if not isinstance(other, Depth):
            return NotImplemented
        if not (self and other):
            return self or other
        one, two = self._among(other.leaves), other._among(self.leaves)
        groups = one.group_names & two.group_names
        twice = [leaf for leaf in one.leaves if leaf.path in one and leaf.path in two]
        if (
            one.leaves
            and two.leaves
            and not {leaf.path for leaf in one.leaves} & {leaf.path for leaf in two.leaves}
        ):
            raise ValueError(
                f"The two Depths were made of different trees: {one.leaves[0]} is in one, "
                f"{two.leaves[0]} in the other. Make both from the tree that the optimizer gets."
            )
        if twice or groups:
            both = str(twice[0]) if twice else f"A group named {min(groups)!r}"
            raise ValueError(
                f"{both} is in both of the Depths that are to be joined. Make one of them without "
                "it, so that each leaf has one place in depth."
            )
        leaves = {leaf.path: leaf for leaf in two.leaves}
        leaves |= {leaf.path: leaf for leaf in one.leaves if leaf.path not in two}
        return Depth(tuple(leaves.values()), (*one.rules, *two.rules))

    def _among(self, leaves: Sequence[Leaf]) -> Depth:
        """The Depth, with its rules, if it has any, matched with leaves."""
        if not (self.rules and leaves):
            return self
        shapes = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, "float32") for leaf in leaves}
        return self.resolve(shapes)

    @property
    def group_names(self) -> set[str]:
        """The names of its groups, also while rules have not met a tree."""
        return {pattern for pattern, _ in self.rules} or set(self.groups)

    @functools.cached_property
    def groups(self) -> dict[str, int]:
        """The number of layers of each group."""
        groups: dict[str, int] = {}
        for place in self._places.values():
            groups[place.group] = max(groups.get(place.group, 0), max(place.layers) + 1)
        return groups

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
        depth = self.resolve(tree)
        arrays: dict[str, Any] = dict(leaves_of(tree)[0])
        if manual_axes():  # where it is not to depend on how arrays are split
            whole = {leaf.path: leaf.shape for leaf in depth.leaves}
            for path, array in arrays.items():
                arrays[path] = jax.ShapeDtypeStruct(whole[path], array.dtype)
        selected = {path: where(path, arrays[path]) for path in depth}
        for path, answer in selected.items():
            if not isinstance(answer, bool | np.bool_):
                raise ValueError(
                    f"where gives {answer!r} for {shown(path, shape_of(arrays[path]))}, but has to "
                    "give True or False, from the path, the shape and the dtype alone."
                )
        if selected and not any(selected.values()):
            offered = some(f"{shown(path, shape_of(arrays[path]))}" for path in selected)
            raise ValueError(
                f"where selects none of the leaves that have a place in depth: {offered}. "
                "To smooth nothing, use Depth.from_rules({})."
            )
        return Depth(
            tuple(
                leaf
                if selected.get(leaf.path, True)
                else dataclasses.replace(leaf, place=None, reason="where does not select it")
                for leaf in depth.leaves
            )
        )

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
            hint = (
                "Resolve it first: depth.resolve(params)."
                if self.rules
                else f"It has {some(named(shapes, path), 5)}."
            )
            raise ValueError(f"There is no leaf {path!r} in this Depth. {hint}")
        leaf = leaves[path]
        if leaf.place is None:
            return f"{leaf} is left alone: {leaf.reason or 'it has no place in depth'}."
        place = leaf.place
        axes = f", along {_axes_name(place.axes)}" if place.axes else ""
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

    def to_json(self) -> str:
        """The Depth as JSON, for a file beside a checkpoint; :meth:`from_json` reads it.

        Returns:
          The text. Rules that are not resolved are in it as such.

        Example:
          >>> depth = Depth.from_rules({"layers/.*": 0})
          >>> Depth.from_json(depth.to_json()) == depth
          True
        """
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Depth:
        """The Depth that :meth:`to_json` wrote.

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
            leaves = [
                Leaf(leaf["path"], tuple(leaf["shape"]), _place(leaf["place"]), leaf["reason"])
                for leaf in fields["leaves"]
            ]
            rules = [(name, rules_.as_rule(name, _rule(rule))) for name, rule in fields["rules"]]
            for leaf in leaves:
                _check_place(leaf)
            depth = cls(tuple(leaves), tuple(rules))
            rules_.check_tensors("it", depth, {leaf.path: leaf.shape for leaf in leaves})
            return depth
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"This is not a Depth in JSON, as depth.to_json() writes it: {error!r}."
            ) from error

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

    @functools.cached_property
    def tracks(self) -> tuple[Track, ...]:
        """The leaves that are mixed together, one track for each tensor of each group."""
        together: dict[tuple[str, str], list[str]] = {}
        for path, place in self._places.items():
            together.setdefault((place.group, place.tensor), []).append(path)
        leaves = {leaf.path: leaf for leaf in self.leaves}
        return tuple(Track(tuple(map(leaves.__getitem__, paths))) for paths in together.values())

    def __str__(self) -> str:
        return (
            rules_as_table(self.rules) if self.rules else leaves_as_table(self.leaves, self.groups)
        )

    def __repr__(self) -> str:
        return f"<Depth\n{self}>"


def _check_place(leaf: Leaf) -> None:
    """Raises unless the leaf has the axes and the layers that its place says."""
    if leaf.place is None:
        return
    axes, layers, shards = leaf.place.axes, leaf.place.layers, leaf.place.shards
    fits = len(set(axes)) == len(axes) and all(0 <= axis < len(leaf.shape) for axis in axes)
    if not fits or stacked(leaf.shape, axes) != len(layers) or min(layers, default=-1) < 0:
        raise ValueError(f"{leaf} can't have the layers {layers} on {_axes_name(axes)}")
    if shards < 1 or (leaf.shape[axes[0]] if axes else 1) % shards:
        raise ValueError(f"{leaf} can't have its layers in {shards} shards")


def refuse_depths(function: str, arguments: Mapping[str, object]) -> None:
    """Raises if one of a function's arguments is a Depth, but for ``depth`` itself."""
    for name, value in arguments.items():
        if isinstance(value, Depth) and name != "depth":
            raise ValueError(
                f"{name} of {function} is a Depth. Give that by its name: {function}(..., "
                "depth=depth)."
            )


_SAME_TREE = "Make the Depth from the same tree that the optimizer is given."


def _check_tree(leaves: Sequence[tuple[str, object]]) -> None:
    """Raises for the count of a schedule: what a function is called with that is taken for one."""
    [(path, first), *others] = leaves
    dtype = getattr(first, "dtype", np.int64 if isinstance(first, int) else np.bool_)
    if not (path or others or shape_of(first)) and jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{shown(path, ())} of the tree is a whole number, like the count that a schedule is "
            "called with. optax.inject_hyperparams takes every function for a schedule: name those "
            "that are none, like inject_hyperparams(ds.adamw, static_args=('mask', 'where'))."
        )


def _of_vmap(arrays: Mapping[str, jax.Array]) -> str:
    """A hint for leaves that are traced, and may have an axis that jax.vmap hides."""
    if not any(isinstance(array, jax.core.Tracer) for array in arrays.values()):
        return ""
    return (
        " If this is in jax.vmap: the axis that it maps is not there. Count axes without it, and "
        "make a Depth from one of the trees that it maps over."
    )


def _check_paths(placed: Sequence[Leaf], shapes: Mapping[str, Shape], masked: Set[str]) -> None:
    """Raises unless all the leaves with a place are in a tree, or masked there."""

    def is_there(path: str) -> bool:
        return path in shapes or hides(masked, path)

    missing = next((leaf for leaf in placed if not is_there(leaf.path)), None)
    if missing is None:
        return
    remedy = f"whose leaves are {some(named(shapes, missing.path))}. {_SAME_TREE}"
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


def _checked(leaf: Leaf, place: Place, arrays: Mapping[str, jax.Array]) -> Place:
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
    count = f"{layers} layers on {_axes_name(place.axes)}" if place.axes else "one layer"
    part = ", or an even part of them," if manual_axes() else ""
    raise ValueError(
        f"{shown(leaf.path, shape)} does not have the {count}{part} that this Depth found by "
        f"{place.found_by} in {leaf.shape}. {_SAME_TREE}{_of_vmap(arrays)}"
    )


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


def _axes_name(axes: Sequence[int]) -> str:
    return f"{'axes' if len(axes) > 1 else 'axis'} {', '.join(map(str, axes))}"


def _layers_name(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {some(map(str, layers))}"


Cuts = Sequence[int] | Mapping[str, Sequence[int]]
"""The layers before which a run of layers ends: in every group, or in those of these names."""


def check_cuts(cuts: Cuts) -> None:
    """Raises unless these are cuts of some depth."""
    each = cuts.values() if isinstance(cuts, Mapping) else [cuts]
    for positions in each:
        if not isinstance(positions, list | tuple | range):
            raise ValueError(
                f"cuts are {cuts!r}, but have to be layers, like (4, 12), or a mapping from the "
                "name of a group to its cuts."
            )
        for position in positions:
            if not isinstance(position, int | np.integer) or position < 1:
                raise ValueError(
                    f"A cut is at {position!r}, but has to be an integer of at least 1: the first "
                    "layer, counted from 0, of those behind it."
                )


def cuts_of_groups(
    cuts: Cuts, depth: Depth, within: Depth, masked: Sequence[str]
) -> dict[str, Sequence[int]]:
    """The cuts of each group.

    Args:
      cuts: as a user gives them.
      depth: of the leaves that are there.
      within: as it was given: of all the leaves, also those that are masked.
      masked: the paths of these.

    Raises:
      ValueError: if there is no such group, or it does not have that many layers, or rules
        cannot tell how many there are.
    """
    if cuts and within.rules and masked:
        raise ValueError(
            f"cuts are {cuts!r}, but {masked[0]} is masked, and rules cannot tell how many layers "
            "it has: give the depth of the whole tree, by depth=rules.resolve(params)."
        )
    sizes = {**depth.groups, **within.groups}
    names = depth.group_names | within.group_names
    of_group = dict(cuts) if isinstance(cuts, Mapping) else dict.fromkeys(depth.groups, cuts)
    for name, positions in of_group.items():
        if name not in names:
            raise ValueError(
                f"cuts has a group {name!r}, but the groups are {', '.join(map(repr, names))}. "
                "Name one of these, or leave it out."
            )
        kinds = [group for group in depth.groups if group.startswith(f"{name} (kind ")]
        if kinds and name not in sizes:
            raise ValueError(
                f"cuts has a group {name!r}, but {name!r} has {len(kinds)} kinds of layers, each "
                f"in an order of its own. Give the cuts of {' or '.join(map(repr, kinds))}."
            )
        if name in sizes and max(positions, default=0) >= sizes[name]:
            raise ValueError(
                f"There is a cut at {max(positions)}, but the group {name!r} has the layers 0 to "
                f"{sizes[name] - 1}. Cuts of one group alone are given by its name: "
                f"cuts={{{name!r}: (...)}}."
            )
    return of_group
