"""Where depth is, exactly: what the forward pass does with each parameter, read off its jaxpr.

A stack that a loop over layers takes slices of has its layers along that axis. Layers
with leaves of their own are siblings that a number tells apart, in the order in which
they first meet data, each of which meets what the one before it has made.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from depthsmooth.depth.layout import Depth, DepthNotFoundError
from depthsmooth.depth.leaves import Axes, Leaf, Place, Shape, shape_of
from depthsmooth.depth.models import (
    check_no_optimizer,
    ends_of_perceptrons,
    is_array,
    is_model,
    parts_of,
    remedy_of,
    without_parameters,
)
from depthsmooth.depth.names.families import (
    Family,
    besides_layers,
    blocks_within,
    families_of,
    holds_layers,
    name_kinds,
    starred,
)
from depthsmooth.depth.names.nodes import Known, Node
from depthsmooth.depth.names.words import are_beside, is_layer_name
from depthsmooth.depth.paths import common_path
from depthsmooth.depth.tracing.axes import Factor, Origin, Span, spans_of
from depthsmooth.depth.tracing.counters import Loop
from depthsmooth.depth.tracing.evidence import Composition
from depthsmooth.depth.tracing.walk import Chain, Join, Piece, Taken, Walk
from depthsmooth.mesh import manual_axes

if TYPE_CHECKING:
    from jax.extend import core  # its import takes 50 ms

_Chain = tuple[tuple[Loop, ...], list[Span] | None]
"""Loops that take one of another's slices, and the parts of axes that they run along."""


def trace_depth(
    fn: Callable[..., object], model: object, /, *args: object, **kwargs: object
) -> Depth:
    """Finds the depth axes of parameters by following them through a function.

    An axis is depth where the function scans over it in a loop that composes
    layers. Nothing is computed or allocated, and the model stays as it is.

    Args:
      fn: the forward pass or the loss, called as ``fn(model, *args, **kwargs)``.
        Prefer the forward pass to its gradient: it is quicker to follow.
      model: what ``fn`` takes: a tree of parameters, a Flax NNX or an Equinox module,
        or any tree that holds these. ``jax.ShapeDtypeStruct`` may stand for arrays.
      *args: further arguments of ``fn``. Arrays and ``jax.ShapeDtypeStruct`` are
        traced by shape and dtype; all else is passed on as it is.
      **kwargs: further keyword arguments, likewise.

    Returns:
      The Depth, with a group for each stack, or each kind of siblings. Its paths are those of the
      tree that the optimizer gets: the tree of parameters,
      ``nnx.state(model, nnx.Param)``, or ``eqx.filter(model, eqx.is_inexact_array)``.

    Raises:
      DepthNotFoundError: if no parameter is scanned over in a loop over layers.
      ValueError: if a parameter is scanned over along two axes, ``fn`` can't be
        called, or it takes another kind of model.

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
            "trace_depth takes the function first, then the parameters or the model, but "
            f"{type(fn).__name__} can't be called."
        )
    if manual_axes():
        raise ValueError(
            "trace_depth is called in shard_map, where arrays are parts of others. Call it "
            "outside, with the whole ones, or with jax.ShapeDtypeStruct."
        )
    check_no_optimizer(model)
    paths, leaves, rest, join = parts_of(model)
    if not paths:
        raise DepthNotFoundError(without_parameters(fn, model))

    def of_leaves(
        leaves: Sequence[jax.Array], rest: Sequence[jax.Array], /, *args: object, **kwargs: object
    ) -> object:
        return fn(join(leaves, rest), *args, **kwargs)

    try:
        jaxpr = _jaxpr_of(of_leaves, leaves, (rest, *args), kwargs)
    except Exception as error:
        remedy = remedy_of(error, model)
        if remedy:
            raise ValueError(remedy) from error
        if is_model(fn):
            error.add_note(_function_first(fn))
        raise
    walk = Walk()
    walk.function(jaxpr, len(leaves))
    shapes = [shape_of(leaf) for leaf in leaves]
    placing = _Placing(walk, paths, shapes, ends_of_perceptrons(model))
    if not placing.places:
        nothing = _nothing_found(placing, paths, leaves, bool(walk.first_met))
        raise DepthNotFoundError(f"{_function_first(fn)} {nothing}" if is_model(fn) else nothing)
    alone = "it is no layer of a loop, nor one of siblings of a kind that compose"
    return Depth(
        tuple(
            Leaf(path, shape_of(leaf), placing.places[index].on_devices_of(leaf))
            if index in placing.places
            else Leaf(path, shape_of(leaf), None, placing.reasons.get(index, alone))
            for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
        )
    )


def _function_first(fn: Callable[..., object]) -> str:
    """What to do about a model that is given in the place of the function."""
    return (
        f"The function that was given is a {type(fn).__name__} with parameters of its own. If "
        "these are to be followed, give the function first, then the model: "
        "trace_depth(loss, model, *args)."
    )


def _nothing_found(
    placing: _Placing, paths: Sequence[str], leaves: Sequence[jax.Array], are_used: bool
) -> str:
    """What to do about a function that composes no layers: with what speaks against each."""
    named = [
        f"{path or 'the array'} {shape_of(leaf)}" for path, leaf in zip(paths, leaves, strict=True)
    ]
    if not are_used:
        return (
            f"In the function no data meets any parameter, like {named[0]}. Give it as "
            "fn(model, *args), with these in its first argument, and its data among args: what it "
            "makes itself are constants."
        )
    examples = {why: leaf for leaf, why in sorted(placing.reasons.items(), reverse=True)}
    reasons = [
        f"{named[leaf]} is left alone: {why}."
        for why, leaf in sorted(examples.items(), key=lambda example: example[1])
    ]
    return (
        f"No parameter, like {named[0]}, certainly holds layers that this "
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
    traced = {i: value for i, value in enumerate(values) if is_array(value)}

    def of_arrays(leaves: Sequence[jax.Array], arrays: dict[int, jax.Array]) -> list[jax.Array]:
        merged = [arrays.get(i, value) for i, value in enumerate(values)]
        args, kwargs = jax.tree_util.tree_unflatten(treedef, merged)
        out = jax.tree.leaves(fn(leaves, *args, **kwargs))
        return [leaf for leaf in out if isinstance(leaf, jax.Array)]

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
      join: where it lies in an axis that it shares with others, if they run along that.
      sites: the equations that put it together with these: one in each forward pass.
    """

    loops: tuple[Loop, ...]
    axes: Axes
    flipped: tuple[int, ...]
    anywhere: frozenset[Loop]
    join: Join | None = None
    sites: frozenset[Loop] = frozenset()


class _Turn(NamedTuple):
    """When the layers of a stack have their turn in each round of a loop.

    Attributes:
      first: the place of its first layer in the round.
      each: its layers in a round.
      round: all layers in a round.
      group: the group of the layers.
      tensor: which of the layer's tensors it holds.
    """

    first: int
    each: int
    round: int
    group: str
    tensor: str


class _Placing:
    """What a walk has seen, turned into the places of the leaves.

    Attributes:
      places: for each leaf that is depth its place.
      reasons: for others that could have been taken for it, why they are not.
    """

    def __init__(
        self, walk: Walk, paths: Sequence[str], shapes: Sequence[Shape], ends: Set[str]
    ) -> None:
        self.places: dict[int, Place] = {}
        self.reasons: dict[int, str] = {}
        self._walk, self._paths, self._shapes, self._ends = walk, paths, shapes, ends
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
            if any(loop in self._walk.layer_loops for chain in chains for loop, _ in chain.taken):
                seen.add(leaf)
                stack = self._stack(leaf, chains)
                if stack:
                    stacks[leaf] = stack
            else:
                self.reasons[leaf] = (
                    "the loops that take slices of it do not compose them, as far as can be told"
                )
        for together in _groups({leaf: stack.anywhere for leaf, stack in stacks.items()}):
            for leaves in self._orders_in(together, stacks):
                why = self._doubt_of(leaves, stacks)
                if why:
                    self.reasons |= dict.fromkeys(leaves, why)
                else:
                    self._place_stack(leaves, stacks)
        return seen

    def _orders_in(
        self, leaves: Sequence[int], stacks: Mapping[int, _Stack]
    ) -> list[Sequence[int]]:
        """The leaves of loops in their orders: that of the innermost loops, and one of rounds.

        What only the outer of two loops takes slices of is a layer in each round if data that
        the loop carries is contracted with it, as with the global attention of gemma4 behind
        five local ones. Projections of other data, norms and gates beside the inner loop are
        none: they have an order of their own.
        """
        most = max(len(stacks[leaf].loops) for leaf in leaves)
        chains = {stacks[leaf].loops for leaf in leaves}
        beside = {
            chain
            for chain in chains
            if len(chain) < most
            and any(other[: len(chain)] == chain != other for other in chains)
            and not any(
                (leaf, chain[-1]) in self._walk.composing
                for leaf in leaves
                if stacks[leaf].loops == chain
            )
        }
        orders = [[leaf for leaf in leaves if stacks[leaf].loops not in beside]]
        orders += [[leaf for leaf in leaves if stacks[leaf].loops == c] for c in sorted(beside)]
        return [order for order in orders if order]

    def _place_stack(self, leaves: Sequence[int], stacks: Mapping[int, _Stack]) -> None:
        """Places the leaves of one group."""
        turns = self._turns(leaves, stacks)
        for leaf in leaves:
            axes, order = self._layers_in(leaf, stacks[leaf])
            turn = turns[leaf]
            layers = order // turn.each * turn.round + turn.first + order % turn.each
            if layers.size:
                held = tuple(map(int, layers))
                self.places[leaf] = Place(turn.group, turn.tensor, axes, held, "trace")

    def _layers_in(self, leaf: int, stack: _Stack) -> tuple[Axes, np.ndarray]:
        """The axes of a leaf that run over its layers, and the number of each layer on them."""
        sizes = self._sizes(leaf, stack)
        order = np.flip(np.arange(math.prod(sizes)).reshape(sizes), stack.flipped)
        if stack.join is None:
            return stack.axes, order.reshape(-1)
        at = stack.axes.index(len(self._shapes[leaf]))
        order = np.take(order, range(stack.join.start, stack.join.stop), at)
        for own in stack.join.own:
            order = np.flip(order, at) if own.stride < 0 else order
        mine = tuple(factor.axis for factor in stack.join.own)
        return (*stack.axes[:at], *mine, *stack.axes[at + 1 :]), order.reshape(-1)

    def _sizes(self, leaf: int, stack: _Stack) -> list[int]:
        """The sizes of the axes that loops run along."""
        shared = () if stack.join is None else (stack.join.total,)
        sizes = (*self._shapes[leaf], *shared)
        return [sizes[axis] for axis in stack.axes]

    def _stack(self, leaf: int, chains: Iterable[Chain]) -> _Stack | None:
        """What loops over layers make of a leaf, from the slices they take of slices."""
        found: list[_Chain] = []
        joins: dict[Join | None, None] = {}
        for taken, origin, join in chains:
            over_layers = tuple(step for step in taken if step[0] in self._walk.layer_loops)
            if over_layers:
                is_first = all(len(loops) < len(over_layers) for loops, _ in found)
                found.append(self._chain(leaf, over_layers, origin, is_first))
                joins.setdefault(join)
        loops, spans = max(found, key=lambda taken: (taken[1] is not None, len(taken[0])))
        same = all(others == spans for by, others in found if by == loops)
        if spans is None or not same or not self._are_in_order(leaf, spans, found):
            self.reasons[leaf] = "the order in which loops take its slices is not certain"
            return None
        axes = tuple(span.axis for span in spans)
        runs = [span for _, others in found for span in others or ()]
        seen = sorted({span.axis for span in runs})
        shared = None
        if len(self._shapes[leaf]) in seen:
            shared = self._join_of(leaf, runs, joins)
            if shared is None or not set(seen) <= set(axes):
                self.reasons[leaf] = (
                    "it is put together with others in an order that is not certain"
                )
                return None
        if not set(seen) <= set(axes):
            raise ValueError(
                f"{self._paths[leaf]} {self._shapes[leaf]} is scanned over along the axes {seen} "
                "by different loops, but its layers have to be in one order. Say which with "
                "Depth.from_rules."
            )
        flipped = tuple(k for k, span in enumerate(spans) if span.backwards)
        anywhere = frozenset(loop for loops, _ in found for loop in loops)
        sites = frozenset(join.site for join in joins if join is not None and shared is not None)
        return _Stack(loops, axes, flipped, anywhere, shared, sites)

    def _chain(self, leaf: int, taken: Taken, origin: Origin, is_first: bool) -> _Chain:
        """Loops that take one of another's slices, with what they run along, if it is certain.

        Steps along an axis that are taken by themselves within those of a loop along it, as in
        a loop over pairs of layers, count as the loop that they would be. Their order is that
        of the first loops: those of the backward pass come back to what has been met.
        """
        loops = tuple(loop for loop, _ in taken)
        if not all(along for _, along in taken):
            return loops, None
        factors = [factor for _, along in taken for factor in along]
        last = factors[-1]
        pieces = self._composition.pieces.get(leaf, [])
        cuts = [
            (start, stop)
            for _, ranges in pieces
            for axis, start, stop in ranges
            if axis == ~last.axis
        ]
        if cuts:
            start, direction = origin[last.axis], 1 if last.stride > 0 else -1
            steps = [(start + k, start + k + 1) for k in range(abs(last.stride))][::direction]
            if not is_first or cuts != steps or not self._composition.is_chain(pieces):
                return loops, None
            factors.append(Factor(last.axis, direction, abs(last.stride)))
            loops = (*loops, (*loops[-1], -1))
        return loops, spans_of(factors, origin)

    def _join_of(
        self, leaf: int, spans: Sequence[Span], joins: Iterable[Join | None]
    ) -> Join | None:
        """Where in an axis that it shares with others a leaf lies with all that it has, if so.

        The loops have to run over all of that axis, so that each of the others has its turn.
        """
        shape, places = self._shapes[leaf], {join and join[1:] for join in joins}
        join = next(iter(joins))
        if len(places) > 1 or join is None:
            return None
        runs = {(span.start, span.stop) for span in spans if span.axis == len(shape)}
        own = [factor for factor in join.own if abs(factor.stride) == 1]
        is_new = not join.own and join.stop - join.start == 1
        is_whole = len(own) == 1 and own[0].size == shape[own[0].axis] == join.stop - join.start
        is_apart = not {span.axis for span in spans} & {factor.axis for factor in own}
        return join if runs == {(0, join.total)} and (is_new or (is_whole and is_apart)) else None

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
                sizes = (*self._shapes[leaf], along.stop)
                parts.setdefault(cuts[0] if cuts else (0, sizes[along.axis]), piece)
            order = list(parts)[:: -1 if along.backwards else 1]
            in_loops, taken = (
                {part for part in found if part[1] - part[0] > 1} for found in (parts, backwards)
            )
            if in_loops != taken or (
                len(parts) > 1
                and (
                    any(before[1] > after[0] for before, after in itertools.pairwise(order))
                    or not self._composition.is_chain(list(parts.values()))
                )
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
            return (
                "the steps of a loop take parts of its slices, which may be layers or parts of one"
            )
        return ""

    def _is_taken_further(self, leaf: int, axes: Axes) -> bool:
        """Whether matrices are also taken by themselves, along an axis beside those of loops."""
        if len(self._shapes[leaf]) < len(axes) + 3:
            return False
        taken: dict[int, list[Piece]] = {}
        for piece in self._composition.pieces.get(leaf, []):
            for axis, start, stop in piece[1]:
                if axis >= 0 and stop == start + 1:
                    taken.setdefault(axis, []).append(piece)
        return any(
            axis not in axes and len(pieces) > 1 and self._composition.is_chain(pieces)
            for axis, pieces in taken.items()
        )

    def _turns(self, leaves: Sequence[int], stacks: Mapping[int, _Stack]) -> dict[int, _Turn]:
        """How the layers of the leaves of one group take turns."""
        inner = {leaf: stacks[leaf].loops[1:] for leaf in leaves}
        tensors = self._tensors(leaves, stacks)
        if any(stacks[leaf].join for leaf in leaves):
            group = self._name(leaves, starred([self._paths[leaf] for leaf in leaves])[0])
            return {leaf: _Turn(0, 1, 1, group, tensors[leaf]) for leaf in leaves}
        group = self._name(leaves)
        if len(set(inner.values())) > 1 and len({stacks[leaf].loops[0] for leaf in leaves}) == 1:
            return self._nested_turns(leaves, stacks, inner, group)
        turns = {leaf: _Turn(0, 1, 1, group, self._paths[leaf]) for leaf in leaves}
        node = self._node(leaves)
        while len(node.children) == 1 and not node.is_leaf:
            [node] = node.children.values()
        for family in families_of(node):
            whole = sum(len(member.leaves) for member in family.members.values()) == len(leaves)
            if whole and is_layer_name(family.name) and family.first.is_block:
                turns |= self._turns_of(family, group)
        return turns

    def _turns_of(self, family: Family, group: str) -> dict[int, _Turn]:
        """The turns of stacks that are blocks one after another in each round, by their kinds."""
        kinds = family.kinds
        orders = [self._composition.in_order(list(kind.members.values())) for kind in kinds]
        names = name_kinds(group, [2] * len(kinds))
        turns: dict[int, _Turn] = {}
        for name, kind, order in zip(names, kinds, orders, strict=True):
            if order is None or len(kinds) == len(family.members):
                return {}
            for j, member in enumerate(order):
                turns |= {
                    self._index[leaf.path]: _Turn(j, 1, len(order), name, kind.tensor(member, leaf))
                    for leaf in member.leaves
                }
        return turns

    def _tensors(self, leaves: Sequence[int], stacks: Mapping[int, _Stack]) -> dict[int, str]:
        """The names of the tensors of leaves, of which some are put together before the loop."""
        alone = {leaf: self._paths[leaf] for leaf in leaves}
        joined = {leaf: stacks[leaf].sites for leaf in leaves if stacks[leaf].sites}
        return alone | {
            leaf: "/".join(filter(None, starred([self._paths[other] for other in together])))
            for together in _groups(joined)
            for leaf in together
        }

    def _nested_turns(
        self,
        leaves: Sequence[int],
        stacks: Mapping[int, _Stack],
        inner: Mapping[int, tuple[Loop, ...]],
        group: str,
    ) -> dict[int, _Turn]:
        """The turns in a loop that runs further loops over layers, and layers beside them."""
        counts = {leaf: math.prod(self._sizes(leaf, stacks[leaf])[1:]) for leaf in leaves}
        units = sorted(
            set(inner.values()),
            key=lambda unit: min(
                self._composition.first(leaf) for leaf in leaves if inner[leaf] == unit
            ),
        )
        sizes = [max(counts[leaf] for leaf in leaves if inner[leaf] == unit) for unit in units]
        starts = dict(zip(units, itertools.accumulate([0, *sizes]), strict=False))
        return {
            leaf: _Turn(starts[inner[leaf]], counts[leaf], sum(sizes), group, self._paths[leaf])
            for leaf in leaves
        }

    def _place_siblings(self, node: Node) -> None:
        """Places the siblings below a node that are layers; within layers nothing else is."""
        for child in besides_layers(node, self._layers_among):
            if not child.is_leaf:
                self._place_siblings(child)

    def _layers_among(self, family: Family, parts: bool) -> Iterable[Node]:
        """The siblings that are layers, or named like it: there is nothing more to find in them."""
        is_named = is_layer_name(family.name)
        family = self._without_ends(family)
        if len(family.members) < 2:
            nodes = family.members.values()
            return [node for node in nodes if is_named and node.is_block and not holds_layers(node)]
        if not (family.repeats or parts):
            return []
        # What is alone of its kind, before and after the layers in one list, is none of them.
        kinds = [kind for kind in family.kinds if len(kind.members) > 1]
        settled = [self._place_kind(kind, family, is_named, parts) for kind in kinds]
        return [node for nodes in settled for node in nodes]

    def _without_ends(self, family: Family) -> Family:
        """The siblings without those that are known to be the first and the last of a model."""
        members = {k: node for k, node in family.members.items() if node.path not in self._ends}
        why = "it is the first or the last matrix of a perceptron, and no hidden layer"
        for node in family.members.values():
            if node.path in self._ends:
                self.reasons |= {self._index[leaf.path]: why for leaf in node.leaves}
        return dataclasses.replace(family, members=members)

    def _place_kind(
        self, kind: Family, family: Family, is_named: bool, parts: bool
    ) -> Iterable[Node]:
        """Places siblings of one kind if they are layers; those in which nothing else is."""
        members = list(kind.members.values())
        ordered = self._composition.in_order(members)
        inner = [
            inner
            for inner in blocks_within(kind)
            if self._composition.in_order(list(inner.members.values()))
        ]
        why = ""
        if ordered is None:
            why = "its siblings do not compose"
        elif inner:
            why = f"its siblings hold what may be layers, {inner[0].group}, themselves"
        elif not (is_named or parts):
            why = self._doubt_of_names(kind, ordered, family)
        if why or ordered is None:
            self.reasons |= {self._index[leaf.path]: why for m in members for leaf in m.leaves}
            return members if is_named and inner else []
        for layer, member in enumerate(ordered):
            for leaf in member.leaves:
                place = Place(kind.group, kind.tensor(member, leaf), (), (layer,), "trace")
                self.places[self._index[leaf.path]] = place
        return members

    def _doubt_of_names(self, kind: Family, ordered: Sequence[Node], family: Family) -> str:
        """Why siblings that compose, and are not named after layers, may be none, if so.

        A generator and a discriminator compose, a block's matrices do, and so do the towers of
        a model. What is certain are three or more, in the order of their numbers.
        """
        members = list(kind.members.values())
        # The first and the last matrix of a perceptron have other shapes.
        count = len(family.members) if family.is_uniform else len(members)
        if are_beside([kind.name]):
            return "its siblings are named after what is side by side"
        if any(member.is_leaf for member in members) or count < 3:
            return "its siblings, which are not named after layers, may be parts of a network"
        if list(ordered) != members:
            return "its siblings, which are not named after layers, are not in numeric order"
        is_sequential = family.is_list and family.is_uniform
        is_module = sum(not _is_bias(leaf) for leaf in kind.first.leaves) < 2
        is_regular = is_sequential or self._composition.is_regular(ordered)
        if is_module and not (is_regular and self._composition.is_plain(ordered)):
            return "its siblings, which are not named after layers, may be parts of a block"
        return ""

    def _place_indexed(self, stacked: Set[int]) -> None:
        """Places the stacks whose slices are taken one by one, as by ``w[0]`` and ``w[1]``."""
        found: dict[tuple[int, str], dict[int, tuple[int, list[int]]]] = {}
        for leaf in self._composition.pieces:
            if leaf in self.places or leaf in stacked:
                continue
            orders = self._composition.orders_along_axes(leaf, self._shapes[leaf])
            if len(orders) == 1:
                [(axis, order)] = orders.items()
                container = self._paths[leaf].rpartition("/")[0]
                found.setdefault((len(order), container), {})[leaf] = (axis, order)
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
        met, contracted = self._composition.pieces, self._walk.summed
        return Node(
            "",
            tuple(
                Known(
                    self._paths[leaf],
                    self._shapes[leaf],
                    multiplies=leaf in met and leaf not in contracted,
                    in_pieces=len(met.get(leaf, ())) > 1,
                )
                for leaf in leaves
            ),
        )

    def _name(self, leaves: Sequence[int], name: str = "") -> str:
        """A name of its own for a group: what the paths have in common, or a given one."""
        name = name or common_path([self._paths[leaf] for leaf in leaves]) or "layers"
        self._names[name] += 1
        return f"{name} ({self._names[name]})" if self._names[name] > 1 else name


def _is_bias(leaf: Known) -> bool:
    return len(leaf.shape) < 2 and leaf.keys[-1] in ("b", "bias")


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
