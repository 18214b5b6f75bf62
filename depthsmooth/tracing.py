"""Where depth is, exactly: what the forward pass does with each parameter, read off its jaxpr.

A stack that a loop over layers takes slices of has its layers along that axis. Layers
with leaves of their own are siblings that a number tells apart, in the order in which
they first meet data, each of which meets what the one before it has made.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
import optax

from depthsmooth.axes import Origin, Span, spans_of
from depthsmooth.composition import Composition
from depthsmooth.counters import Loop
from depthsmooth.layers import Axes
from depthsmooth.layout import Depth, DepthNotFoundError
from depthsmooth.mesh import manual_axes
from depthsmooth.places import Place, Shape, common_path, leaves_of, shape_of
from depthsmooth.siblings import (
    Family,
    Known,
    Node,
    are_beside,
    besides_layers,
    blocks_within,
    families_of,
    holds_layers,
    is_layer_name,
)
from depthsmooth.track import Leaf
from depthsmooth.walk import Piece, Taken, Walk

if TYPE_CHECKING:
    from jax.extend import core  # its import takes 50 ms

_Chain = tuple[tuple[Loop, ...], list[Span] | None]
"""Loops that take one of another's slices, and the parts of axes that they run along."""


def trace_depth(
    fn: Callable[..., object], params: optax.Params, /, *args: object, **kwargs: object
) -> Depth:
    """Finds the depth axes of parameters by following them through a function.

    An axis is depth where the function scans over it in a loop that composes
    layers. Nothing is computed and nothing is allocated.

    Args:
      fn: the forward pass or the loss, called as ``fn(params, *args, **kwargs)``.
        Prefer the forward pass to its gradient: it is quicker to follow.
      params: the tree that the optimizer will be given: arrays or
        ``jax.ShapeDtypeStruct``.
      *args: further arguments of ``fn``. Arrays and ``jax.ShapeDtypeStruct`` are
        traced by shape and dtype; all else is passed on as it is.
      **kwargs: further keyword arguments, likewise.

    Returns:
      The Depth, with a group for each stack of layers.

    Raises:
      DepthNotFoundError: if no parameter is scanned over in a loop over layers.
      ValueError: if a parameter is scanned over along two axes, or ``fn`` can't be
        called.

    Example:
      >>> def forward(params, x):
      ...     layer = lambda x, kernel: (jax.nn.relu(x @ kernel), None)
      ...     return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]
      >>> float32 = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
      >>> params = {"layers": float32(12, 4, 4), "head": float32(4, 2)}
      >>> print(trace_depth(forward, params, float32(8, 4)))
      group       layers  axis  leaves  parameters  found by
      layers          12     0       1         192  trace
      left alone                     1           8
      left alone: head (4, 2)
    """
    if not callable(fn):
        raise ValueError(
            f"trace_depth takes the function first, then params, but {type(fn).__name__} can't be "
            "called."
        )
    if manual_axes():
        raise ValueError(
            "trace_depth is called in shard_map, where arrays are parts of others. Call it "
            "outside, with the whole ones, or with jax.ShapeDtypeStruct."
        )
    leaves, treedef = jax.tree_util.tree_flatten(params)
    paths = [path for path, _ in leaves_of(params)[0]]
    for path, leaf in zip(paths, leaves, strict=True):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, complex | float | int):
            raise ValueError(
                f"{path} is a {type(leaf).__name__}, but the parameters have to be arrays: the "
                "tree that the optimizer is given, like state.params of a TrainState, or "
                "eqx.filter(model, eqx.is_inexact_array)."
            )

    def of_leaves(leaves: Sequence[jax.Array], /, *args: object, **kwargs: object) -> object:
        return fn(jax.tree_util.tree_unflatten(treedef, leaves), *args, **kwargs)

    walk = Walk()
    walk.function(_jaxpr_of(of_leaves, leaves, args, kwargs), len(leaves))
    placing = _Placing(walk, paths, [shape_of(leaf) for leaf in leaves])
    if not placing.places:
        raise DepthNotFoundError(_nothing_found(placing, paths, leaves, bool(walk.first_met)))
    alone = "it is no layer of a loop, and no sibling of another"
    return Depth(
        tuple(
            Leaf(path, shape_of(leaf), placing.places[index].on_devices_of(leaf))
            if index in placing.places
            else Leaf(path, shape_of(leaf), None, placing.reasons.get(index, alone))
            for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
        )
    )


def _nothing_found(
    placing: _Placing, paths: Sequence[str], leaves: Sequence[jax.Array], are_used: bool
) -> str:
    """What to do about a function that composes no layers: with what speaks against each."""
    if not paths:
        return "There are no parameters. Give trace_depth the tree that the optimizer is given."
    if not are_used:
        return (
            "In the function no data meets any parameter, like "
            f"{paths[0]} {shape_of(leaves[0])}. Give it as fn(params, *args), with these as its "
            "first argument, and its data among args: what it makes itself are constants."
        )
    examples = {why: leaf for leaf, why in sorted(placing.reasons.items(), reverse=True)}
    reasons = [
        f"{paths[leaf]} {shape_of(leaves[leaf])} is left alone: {why}."
        for why, leaf in sorted(examples.items(), key=lambda example: example[1])
    ]
    return (
        f"No parameter, like {paths[0]} {shape_of(leaves[0])}, certainly holds layers that this "
        "function composes, in a loop or as numbered siblings one after another. "
        f"{' '.join([*reasons[:4], ''])}If there are layers, say where: "
        "Depth.from_rules({'.*layers/.*': axis}) if they are stacked, "
        "Depth.from_rules({'.*block_.*': numbered()}) if each has leaves of its own."
    )


def _jaxpr_of(
    fn: Callable[..., object],
    leaves: Sequence[jax.Array],
    args: Sequence[object],
    kwargs: dict[str, object],
) -> core.Jaxpr:
    """The jaxpr of ``fn(leaves, *args, **kwargs)``; its first inputs are the leaves."""
    leaves, (args, kwargs) = jax.tree.map(_unsplit, (leaves, (args, kwargs)))
    values, treedef = jax.tree_util.tree_flatten((args, kwargs))
    is_array = [hasattr(value, "shape") and hasattr(value, "dtype") for value in values]
    traced = {i: value for i, value in enumerate(values) if is_array[i]}

    def of_arrays(leaves: Sequence[jax.Array], arrays: dict[int, jax.Array]) -> object:
        merged = [arrays.get(i, value) for i, value in enumerate(values)]
        args, kwargs = jax.tree_util.tree_unflatten(treedef, merged)
        return fn(leaves, *args, **kwargs)

    with jax.disable_jit(False):  # with it, a scan would be unrolled
        jaxpr: core.Jaxpr = jax.make_jaxpr(of_arrays)(leaves, traced).jaxpr
    return jaxpr


def _unsplit(leaf: object) -> object:
    """An array by its shape and dtype alone: how devices split it changes no depth.

    In an explicit mesh it could not even be scanned over.
    """
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    weak = bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)


class _Stack(NamedTuple):
    """A leaf that loops over layers take slices of.

    Attributes:
      loops: those loops, outer to inner, where most of them take one of another's slices.
      axes: the axes that they run along, outer to inner.
      flipped: which of these they run along from the last to the first.
      anywhere: all the loops over layers that take slices of it.
    """

    loops: tuple[Loop, ...]
    axes: Axes
    flipped: tuple[int, ...]
    anywhere: frozenset[Loop]


class _Turn(NamedTuple):
    """When the layers of a stack have their turn in each round of a loop.

    Attributes:
      first: the place of its first layer in the round.
      each: its layers in a round.
      round: all layers in a round.
      tensor: which of the layer's tensors it holds.
    """

    first: int
    each: int
    round: int
    tensor: str


class _Placing:
    """What a walk has seen, turned into the places of the leaves.

    Attributes:
      places: for each leaf that is depth its place.
      reasons: for others that could have been taken for it, why they are not.
    """

    def __init__(self, walk: Walk, paths: Sequence[str], shapes: Sequence[Shape]) -> None:
        self.places: dict[int, Place] = {}
        self.reasons: dict[int, str] = {}
        self._walk, self._paths, self._shapes = walk, paths, shapes
        self._index = {path: leaf for leaf, path in enumerate(paths)}
        self._names = collections.Counter[str]()
        self._composition = Composition(walk, self._index)
        # A leaf that a loop over layers takes slices of holds many layers, or none: never one.
        stacked = self._place_stacks()
        self._place_siblings(self._node(sorted(self._composition.pieces.keys() - stacked)))
        # What is within layers that have leaves of their own is no stack of layers.
        self._place_indexed(stacked)

    def _place_stacks(self) -> set[int]:
        """Places the leaves that loops over layers take slices of, and gives all of these."""
        stacks, seen = {}, set()
        for leaf, chains in sorted(self._walk.taken.items()):
            if any(loop in self._walk.layer_loops for taken, _ in chains for loop, _ in taken):
                seen.add(leaf)
                stack = self._stack(leaf, chains)
                if stack:
                    stacks[leaf] = stack
            else:
                self.reasons[leaf] = "the loops that take slices of it do not compose them"
        for leaves in _groups({leaf: stack.anywhere for leaf, stack in stacks.items()}):
            why = self._doubt_of(leaves, stacks)
            if why:
                self.reasons |= dict.fromkeys(leaves, why)
                continue
            group = self._name(leaves)
            turns = self._turns(leaves, stacks)
            for leaf in leaves:
                shape, (_, axes, flipped, _) = self._shapes[leaf], stacks[leaf]
                sizes = [shape[axis] for axis in axes]
                index = np.arange(math.prod(sizes)).reshape(sizes)
                order = np.flip(index, flipped).reshape(-1)
                first, each, round_, tensor = turns[leaf]
                layers = order // each * round_ + first + order % each
                if layers.size:
                    held = tuple(map(int, layers))
                    self.places[leaf] = Place(group, tensor, axes, held, "trace")
        return seen

    def _stack(self, leaf: int, chains: Iterable[tuple[Taken, Origin]]) -> _Stack | None:
        """What loops over layers make of a leaf, from the slices they take of slices."""
        found: list[_Chain] = []
        for chain, origin in chains:
            taken = [(loop, along) for loop, along in chain if loop in self._walk.layer_loops]
            if taken:
                known = all(along for _, along in taken)
                factors = [factor for _, along in taken for factor in along]
                found.append(
                    (tuple(loop for loop, _ in taken), spans_of(factors, origin) if known else None)
                )
        loops, spans = max(found, key=lambda taken: (taken[1] is not None, len(taken[0])))
        same = all(others == spans for by, others in found if by == loops)
        if spans is None or not same or not self._are_in_order(leaf, spans, found):
            self.reasons[leaf] = "the order in which loops take its slices is not certain"
            return None
        axes = tuple(span.axis for span in spans)
        seen = sorted({span.axis for _, others in found for span in others or ()})
        if not set(seen) <= set(axes):
            raise ValueError(
                f"{self._paths[leaf]} {self._shapes[leaf]} is scanned over along the axes {seen} "
                "by different loops, but its layers have to be in one order. Say which with "
                "Depth.from_rules."
            )
        flipped = tuple(k for k, span in enumerate(spans) if span.backwards)
        anywhere = frozenset(loop for loops, _ in found for loop in loops)
        return _Stack(loops, axes, flipped, anywhere)

    def _are_in_order(self, leaf: int, spans: Sequence[Span], found: Sequence[_Chain]) -> bool:
        """Whether the parts of a stack that are taken one after another are so in the stack.

        Each has to meet what the one before has made: halves of a stack may be two models.
        """
        for along in spans:
            backwards: dict[tuple[int, int], bool] = {}
            for span in itertools.chain.from_iterable(others or () for _, others in found):
                if span.axis == along.axis:
                    # The backward pass takes the same parts the other way round.
                    backwards.setdefault((span.start, span.stop), span.backwards)
            parts: dict[tuple[int, int], Piece] = {}
            for piece in self._composition.pieces.get(leaf, []):
                cuts = [(start, stop) for axis, start, stop in piece[1] if axis == along.axis]
                parts.setdefault(cuts[0] if cuts else (0, self._shapes[leaf][along.axis]), piece)
            in_loops = [part for part in parts if part[1] - part[0] > 1]
            order = list(parts)[:: -1 if along.backwards else 1]
            if len(parts) > 1 and (
                not set(in_loops) <= backwards.keys()
                or any(before[1] > after[0] for before, after in itertools.pairwise(order))
                or not self._composition.is_chain(list(parts.values()))
            ):
                return False
            if set(backwards.values()) != {along.backwards}:
                return False
        return True

    def _doubt_of(self, leaves: Sequence[int], stacks: Mapping[int, _Stack]) -> str:
        """Why the layers of a group may not be those that loops take slices of, if so."""
        depths = {len(stacks[leaf].loops) for leaf in leaves}
        if len(depths) > 1 and any(
            len(stacks[leaf].loops) > len(stacks[leaf].axes) > 0 for leaf in leaves
        ):
            return "loops within loops run over one axis of it, and other layers are beside them"
        if any(self._is_taken_further(leaf, stacks[leaf].axes) for leaf in leaves):
            return "loops run over some of its layers, and indices over others"
        return ""

    def _is_taken_further(self, leaf: int, axes: Axes) -> bool:
        """Whether matrices are also taken by themselves, along an axis beside those of loops."""
        if len(self._shapes[leaf]) < len(axes) + 3:
            return False
        taken: dict[int, list[Piece]] = {}
        for piece in self._composition.pieces.get(leaf, []):
            for axis, start, stop in piece[1]:
                if stop == start + 1:
                    taken.setdefault(axis, []).append(piece)
        return any(
            axis not in axes and len(pieces) > 1 and self._composition.is_chain(pieces)
            for axis, pieces in taken.items()
        )

    def _turns(self, leaves: Sequence[int], stacks: Mapping[int, _Stack]) -> dict[int, _Turn]:
        """How the layers of the leaves of one group take turns."""
        inner = {leaf: stacks[leaf].loops[1:] for leaf in leaves}
        if len(set(inner.values())) > 1 and len({stacks[leaf].loops[0] for leaf in leaves}) == 1:
            return self._nested_turns(leaves, stacks, inner)
        turns = {leaf: _Turn(0, 1, 1, self._paths[leaf]) for leaf in leaves}
        node = self._node(leaves)
        while len(node.children) == 1 and not node.is_leaf:
            [node] = node.children.values()
        for family in families_of(node):
            members = list(family.members.values())
            whole = sum(len(member.leaves) for member in members) == len(leaves)
            are_blocks = members[0].is_block and family.repeats
            if not (whole and is_layer_name(family.name) and are_blocks):
                continue
            ordered = self._composition.in_order(members) if len(members) > 1 else None
            for j, member in enumerate(ordered or []):
                for leaf in member.leaves:
                    tensor = family.tensor(member, leaf)
                    turns[self._index[leaf.path]] = _Turn(j, 1, len(members), tensor)
        return turns

    def _nested_turns(
        self,
        leaves: Sequence[int],
        stacks: Mapping[int, _Stack],
        inner: Mapping[int, tuple[Loop, ...]],
    ) -> dict[int, _Turn]:
        """The turns in a loop that runs further loops over layers, and layers beside them."""
        counts = {
            leaf: math.prod(self._shapes[leaf][axis] for axis in stacks[leaf].axes[1:])
            for leaf in leaves
        }
        units = sorted(
            set(inner.values()),
            key=lambda unit: min(
                self._composition.first(leaf) for leaf in leaves if inner[leaf] == unit
            ),
        )
        sizes = [max(counts[leaf] for leaf in leaves if inner[leaf] == unit) for unit in units]
        starts = dict(zip(units, itertools.accumulate([0, *sizes]), strict=False))
        return {
            leaf: _Turn(starts[inner[leaf]], counts[leaf], sum(sizes), self._paths[leaf])
            for leaf in leaves
        }

    def _place_siblings(self, node: Node) -> None:
        """Places the siblings below a node that are layers; within layers nothing else is."""
        for child in besides_layers(node, self._place_family):
            if not child.is_leaf:
                self._place_siblings(child)

    def _place_family(self, family: Family, parts: bool) -> bool:
        """Whether siblings are layers, or named like it: there is nothing more to find there."""
        members = list(family.members.values())
        is_named = is_layer_name(family.name)
        if len(members) == 1:
            return is_named and members[0].is_block and not holds_layers(members[0])
        if not (family.repeats or parts):
            return False
        # What comes before and after the layers in one list with them is none of them.
        layers = [member for member in members if member not in family.strangers]
        ordered = self._composition.in_order(layers)
        inner = [
            inner
            for inner in blocks_within(family)
            if self._composition.in_order(list(inner.members.values()))
        ]
        why = ""
        if not (is_named or family.is_list or parts):
            why = "its siblings are not named after layers"
        elif ordered is None:
            why = "its siblings do not compose"
        elif inner:
            why = f"its siblings hold what may be layers, {inner[0].group}, themselves"
        elif not (is_named or parts) and (
            not family.is_uniform
            or len(members) < 3
            or members[0].is_leaf
            or are_beside([family.name])
        ):
            why = "its siblings, a list that is not named after layers, may be parts of a network"
        if why or ordered is None:
            self.reasons |= {self._index[leaf.path]: why for m in members for leaf in m.leaves}
            return is_named and bool(inner)
        for layer, member in enumerate(ordered):
            for leaf in member.leaves:
                place = Place(family.group, family.tensor(member, leaf), (), (layer,), "trace")
                self.places[self._index[leaf.path]] = place
        return True

    def _place_indexed(self, stacked: Set[int]) -> None:
        """Places the stacks whose slices are taken one by one, as by ``w[0]`` and ``w[1]``."""
        found: dict[tuple[int, str], dict[int, tuple[int, list[int]]]] = {}
        for leaf, pieces in self._composition.pieces.items():
            at = [ranges[0] for _, ranges in pieces if len(ranges) == 1]
            axes = {axis for axis, _, _ in at}
            if leaf in self.places or leaf in stacked or len(axes) != 1 or len(at) != len(pieces):
                continue
            [axis] = axes
            order = [start for _, start, stop in at if stop == start + 1]
            size = self._shapes[leaf][axis]
            in_full = size > 1 and sorted(order) == list(range(size))
            if in_full and self._composition.is_chain(pieces):
                container = self._paths[leaf].rpartition("/")[0]
                found.setdefault((size, container), {})[leaf] = (axis, order)
        pairs = {leaf for (size, _), leaves in found.items() if size == 2 for leaf in leaves}
        for (size, _), leaves in found.items():
            matrices = any(len(self._shapes[leaf]) > 2 for leaf in leaves)
            if not matrices or (size == 2 and not self._are_pairs_of_layers(leaves, pairs)):
                why = "its slices compose, but they may be parts of a layer"
                self.reasons |= dict.fromkeys(leaves, why)
                continue
            group = self._name(list(leaves))
            for leaf, (axis, order) in leaves.items():
                layers = tuple(order.index(index) for index in range(len(order)))
                self.places[leaf] = Place(group, self._paths[leaf], (axis,), layers, "trace")

    def _are_pairs_of_layers(self, leaves: Iterable[int], pairs: Set[int]) -> bool:
        """Whether leaves with two slices hold two layers, and not two matrices of one.

        Then there are two of all tensors: of those below a key that names layers, or else of
        several side by side. Below a key that names a single layer, nothing else is layers.
        """
        keys = self._paths[next(iter(leaves))].split("/")
        named = [at for at, key in enumerate(keys, 1) if is_layer_name(key)]
        container = keys[: named[-1]] if named else keys[:-1]
        if named and not (container[-1] == "h" or container[-1].endswith("s")):
            return False
        beside = {
            leaf
            for leaf, path in enumerate(self._paths)
            if path.split("/")[: len(container)] == container
        }
        return beside <= pairs and (bool(named) or len(beside) > 1)

    def _node(self, leaves: Iterable[int]) -> Node:
        return Node("", tuple(Known(self._paths[leaf], self._shapes[leaf]) for leaf in leaves))

    def _name(self, leaves: Sequence[int]) -> str:
        """A name of its own for a group: what the paths have in common."""
        name = common_path([self._paths[leaf] for leaf in leaves]) or "layers"
        self._names[name] += 1
        return f"{name} ({self._names[name]})" if self._names[name] > 1 else name


def _groups(loops_of: Mapping[int, frozenset[Loop]]) -> list[list[int]]:
    """Leaves that share a loop, as the forward and the backward pass do, are one group."""
    groups: list[tuple[list[int], frozenset[Loop]]] = []
    for leaf, loops in loops_of.items():
        leaves, joined = [leaf], loops
        for group in [group for group in groups if group[1] & loops]:
            groups.remove(group)
            leaves, joined = group[0] + leaves, joined | group[1]
        groups.append((leaves, joined))
    return [sorted(leaves) for leaves, _ in groups]
