"""Stacks: an axis is depth where a loop slices it, and its carry goes through each of the slices.

Proof is a product that comes back. In a loop over layers a slice is contracted with a slot of the
carry, and the slot holds what comes of it from then on (:mod:`walk` tells which loops do so). Each
slice is then applied to what the slice before has made, and that is what a layer is. Slices of
experts, of a vocabulary or of time meet data that no slice has made, or only add up. All else that
the loop slices, like norms, belongs to the layer of its step. The order of the slices has to be
certain from the first to the last, or the leaf is left alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from depthsmooth.depth.leaves import Axes, Place, Shape
from depthsmooth.depth.names.families import Family, families_of, name_kinds, starred
from depthsmooth.depth.names.words import is_layer_name
from depthsmooth.depth.tracing.axes import Factor, Origin, Span, spans_of
from depthsmooth.depth.tracing.counters import Loop
from depthsmooth.depth.tracing.evidence import Composition, Findings
from depthsmooth.depth.tracing.walk import Join, Piece, Slices, Taken

_Nest = tuple[tuple[Loop, ...], list[Span] | None]
"""Loops that take one of another's slices, and the parts of axes that they run along."""


class _Stack(NamedTuple):
    """A leaf that loops over layers take slices of.

    Attributes:
      loops: those loops, outer to inner, where most of them take one of another's slices.
      axes: the axes that they run along, outer to inner.
      sizes: the sizes of these axes.
      flipped: which of these they run along from the last to the first.
      anywhere: all the loops over layers that take slices of it.
      join: where it lies in an axis that it shares with others, if they run along that.
      sites: the equations that put it together with these: one in each forward pass.
    """

    loops: tuple[Loop, ...]
    axes: Axes
    sizes: Shape
    flipped: tuple[int, ...]
    anywhere: frozenset[Loop]
    join: Join | None = None
    sites: frozenset[Loop] = frozenset()


_Stacks = Mapping[int, _Stack]
"""Stacks whose layers are in one order, by leaf."""


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


def place_stacks(findings: Findings) -> set[int]:
    """Places the leaves that loops over layers take slices of, and gives all of these."""
    stacks, sliced = {}, set()
    for leaf, slices in sorted(findings.walk.taken.items()):
        nests, joins = _nests_of(findings, leaf, slices)
        if not nests:
            why = "the loops that take slices of it do not compose them, as far as can be told"
            findings.leave_alone([leaf], why)
            continue
        sliced.add(leaf)
        stack = _stack_of(findings, leaf, nests, joins)
        if isinstance(stack, str):
            findings.leave_alone([leaf], stack)
        else:
            stacks[leaf] = stack
    for leaves in _sharing({leaf: stack.anywhere for leaf, stack in stacks.items()}):
        for order in _orders_in(findings, {leaf: stacks[leaf] for leaf in leaves}):
            why = _doubt_of_order(findings, order)
            if why:
                findings.leave_alone(order, why)
            else:
                _place_order(findings, order)
    return sliced


def _nests_of(
    findings: Findings, leaf: int, slices: Iterable[Slices]
) -> tuple[list[_Nest], list[Join | None]]:
    """The loops over layers that take slices of a leaf, and where it lies among others there."""
    nests: list[_Nest] = []
    joins: dict[Join | None, None] = {}
    for taken, origin, join in slices:
        over_layers = tuple(step for step in taken if step[0] in findings.walk.layer_loops)
        if over_layers:
            is_first = all(len(loops) < len(over_layers) for loops, _ in nests)
            nests.append(_nest(findings.composition, leaf, over_layers, origin, is_first))
            joins.setdefault(join)
    return nests, list(joins)


def _nest(
    composition: Composition, leaf: int, taken: Taken, origin: Origin, is_first: bool
) -> _Nest:
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
    pieces = composition.pieces.get(leaf, [])
    cuts = _cuts_along(~last.axis, pieces)
    # A loop over pairs of layers applies both in each step, w[0] before w[1].
    if cuts:
        start, direction = origin[last.axis], 1 if last.stride > 0 else -1
        steps = [(start + k, start + k + 1) for k in range(abs(last.stride))][::direction]
        if not is_first or cuts != steps or not composition.is_chain(pieces):
            return loops, None
        factors.append(Factor(last.axis, direction, abs(last.stride)))
        loops = (*loops, (*loops[-1], -1))
    return loops, spans_of(factors, origin)


def _cuts_along(axis: int, pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    """The ranges along an axis that pieces are cut to."""
    return [(start, stop) for _, ranges in pieces for along, start, stop in ranges if along == axis]


def _stack_of(
    findings: Findings, leaf: int, nests: Sequence[_Nest], joins: Sequence[Join | None]
) -> _Stack | str:
    """What loops over layers make of a leaf, or why that is not certain."""
    shape = findings.shapes[leaf]
    # An inner loop may take one layer again and again, by an index that is not its counter.
    loops, spans = max(nests, key=lambda nest: (nest[1] is not None, len(nest[0])))
    are_same = all(others == spans for by, others in nests if by == loops)
    runs = [span for _, others in nests for span in others or ()]
    if spans is None or not are_same or not _are_in_order(findings, leaf, spans, runs):
        return "the order in which loops take its slices is not certain"
    axes = tuple(span.axis for span in spans)
    seen = sorted({span.axis for span in runs})
    is_joined = len(shape) in seen
    join = _join_of(shape, runs, joins) if is_joined else None
    if is_joined and (join is None or not set(seen) <= set(axes)):
        return "it is put together with others in an order that is not certain"
    if not set(seen) <= set(axes):
        raise ValueError(
            f"{findings.paths[leaf]} {shape} is scanned over along the axes {seen} "
            "by different loops, but its layers have to be in one order. Say which with "
            "Depth.from_rules."
        )
    return _Stack(
        loops,
        axes,
        sizes=tuple((*shape, join.total if join else 0)[axis] for axis in axes),
        flipped=tuple(k for k, span in enumerate(spans) if span.backwards),
        anywhere=frozenset(loop for loops, _ in nests for loop in loops),
        join=join,
        sites=frozenset(each.site for each in joins if each and join),
    )


def _are_in_order(
    findings: Findings, leaf: int, spans: Sequence[Span], runs: Sequence[Span]
) -> bool:
    """Whether the parts of a stack that are taken one after another are so in the stack.

    Each has to meet what the one before has made: halves of a stack may be two models.
    """
    for along in spans:
        backwards: dict[tuple[int, int], bool] = {}
        for run in runs:
            if run.axis == along.axis:
                # The backward pass takes the same parts the other way round.
                backwards.setdefault((run.start, run.stop), run.backwards)
        parts: dict[tuple[int, int], Piece] = {}
        for piece in findings.composition.pieces.get(leaf, []):
            whole = (0, (*findings.shapes[leaf], along.stop)[along.axis])
            parts.setdefault((*_cuts_along(along.axis, [piece]), whole)[0], piece)
        # A stack may have its first layer applied by itself, and the rest in a loop.
        met, looped = ({part for part in of if part[1] - part[0] > 1} for of in (parts, backwards))
        order = list(parts)[:: -1 if along.backwards else 1]
        if (
            met != looped
            or set(backwards.values()) != {along.backwards}
            or any(before[1] > after[0] for before, after in itertools.pairwise(order))
            or not findings.composition.is_chain(list(parts.values()))
        ):
            return False
    return True


def _join_of(shape: Shape, runs: Iterable[Span], joins: Sequence[Join | None]) -> Join | None:
    """Where in an axis that it shares with others a leaf lies with all that it has, if so.

    The loops have to run over all of that axis, so that each of the others has its turn.
    """
    join = joins[0]
    if join is None or len({each and each[1:] for each in joins}) > 1:
        return None
    # A function may concatenate whole stacks and single layers, w[None], but not parts, w[::2].
    own = [factor for factor in join.own if abs(factor.stride) == 1]
    is_new = not join.own and join.stop - join.start == 1
    is_whole = len(own) == 1 and own[0].size == shape[own[0].axis] == join.stop - join.start
    is_all = {(run.start, run.stop) for run in runs if run.axis == len(shape)} == {(0, join.total)}
    return join if is_all and (is_new or is_whole) else None


def _orders_in(findings: Findings, stacks: _Stacks) -> list[_Stacks]:
    """The stacks in their orders: that of the innermost loops, and those of rounds.

    What only the outer of two loops takes nests of is a layer in each round if data that
    the loop carries is contracted with it, as with the global attention of gemma4 behind
    five local ones. Projections of other data, norms and gates beside the inner loop are
    none: they have an order of their own.
    """
    nests = {stack.loops for stack in stacks.values()}
    composing = {
        stack.loops
        for leaf, stack in stacks.items()
        if (leaf, stack.loops[-1]) in findings.walk.composing
    }
    beside = {
        loops
        for loops in nests - composing
        if any(other[: len(loops)] == loops != other for other in nests)
    }
    inner = {leaf: stack for leaf, stack in stacks.items() if stack.loops not in beside}
    rounds = [{k: of for k, of in stacks.items() if of.loops == loops} for loops in sorted(beside)]
    return [inner, *rounds]


def _doubt_of_order(findings: Findings, stacks: _Stacks) -> str:
    """Why the layers of an order may not be those that loops take slices of, if so."""
    # Rounds of two recurrent blocks and an attention, of which the recurrent ones are stored along
    # one axis.
    depths = {len(stack.loops) for stack in stacks.values()}
    if len(depths) > 1 and any(len(of.loops) > len(of.axes) > 0 for of in stacks.values()):
        return "loops within loops run over one axis of it, and other layers are beside them"
    if any(_is_taken_further(findings, leaf, stack.axes) for leaf, stack in stacks.items()):
        return "the steps of a loop take parts of its slices, which may be layers or parts of one"
    return ""


def _is_taken_further(findings: Findings, leaf: int, axes: Axes) -> bool:
    """Whether matrices are also taken by themselves, along an axis beside those of loops."""
    # The two norms of a scanned block may be one array: ln[0] and ln[1] are vectors in each layer.
    if len(findings.shapes[leaf]) < len(axes) + 3:
        return False
    taken: dict[int, list[Piece]] = {}
    for piece in findings.composition.pieces.get(leaf, []):
        for axis, start, stop in piece[1]:
            if axis >= 0 and stop == start + 1:
                taken.setdefault(axis, []).append(piece)
    return any(
        axis not in axes and len(pieces) > 1 and findings.composition.is_chain(pieces)
        for axis, pieces in taken.items()
    )


def _place_order(findings: Findings, stacks: _Stacks) -> None:
    """Places stacks whose layers are in one order."""
    for leaf, turn in _turns(findings, stacks).items():
        axes, order = _layers_in(stacks[leaf], len(findings.shapes[leaf]))
        layers = order // turn.each * turn.round + turn.first + order % turn.each
        if layers.size:
            held = tuple(map(int, layers))
            findings.places[leaf] = Place(turn.group, turn.tensor, axes, held, "trace")


def _layers_in(stack: _Stack, rank: int) -> tuple[Axes, np.ndarray]:
    """The axes of a leaf that run over its layers, and the number of each layer on them."""
    order = np.flip(np.arange(math.prod(stack.sizes)).reshape(stack.sizes), stack.flipped)
    if stack.join is None:
        return stack.axes, order.reshape(-1)
    at = stack.axes.index(rank)
    order = np.take(order, range(stack.join.start, stack.join.stop), at)
    for own in stack.join.own:
        order = np.flip(order, at) if own.stride < 0 else order
    mine = tuple(factor.axis for factor in stack.join.own)
    return (*stack.axes[:at], *mine, *stack.axes[at + 1 :]), order.reshape(-1)


def _turns(findings: Findings, stacks: _Stacks) -> dict[int, _Turn]:
    """How the layers of stacks in one order take turns."""
    paths = {leaf: findings.paths[leaf] for leaf in stacks}
    if any(stack.join for stack in stacks.values()):
        name = findings.name_group(stacks, starred([*paths.values()])[0])
        tensors = paths | _tensors_of_joined(findings, stacks)
        return {leaf: _Turn(0, 1, 1, name, tensors[leaf]) for leaf in stacks}
    name = findings.name_group(stacks)
    inner = {stack.loops[1:] for stack in stacks.values()}
    if len(inner) > 1 and len({stack.loops[0] for stack in stacks.values()}) == 1:
        return _turns_of_nests(findings, stacks, name)
    turns = {leaf: _Turn(0, 1, 1, name, path) for leaf, path in paths.items()}
    for family in families_of(findings.node(stacks).fork):
        # layers_0 to layers_5 of Gemma 3 in MaxText take turns. Dense_0 and Dense_1 of a scanned
        # block are parts of each layer, and so are layers_0 and layers_1 of its perceptron.
        is_whole = sum(len(member.leaves) for member in family.members.values()) == len(stacks)
        if is_whole and is_layer_name(family.name) and family.first.is_block:
            turns |= _turns_of_blocks(findings.composition, family, name)
    return turns


def _turns_of_blocks(composition: Composition, family: Family, name: str) -> dict[int, _Turn]:
    """The turns of stacks that are blocks one after another in each round, by their kinds."""
    kinds = family.kinds
    orders = [composition.in_order(list(kind.members.values())) for kind in kinds]
    names = name_kinds(name, [2] * len(kinds))
    turns: dict[int, _Turn] = {}
    for group, kind, order in zip(names, kinds, orders, strict=True):
        # layer_0 and layer_1 of T5's blocks are an attention and an MLP: one of each kind.
        if order is None or len(kinds) == len(family.members):
            return {}
        for j, member in enumerate(order):
            turns |= {
                composition.index[leaf.path]: _Turn(
                    j, 1, len(order), group, kind.tensor(member, leaf)
                )
                for leaf in member.leaves
            }
    return turns


def _turns_of_nests(findings: Findings, stacks: _Stacks, name: str) -> dict[int, _Turn]:
    """The turns in a loop that runs further loops over layers, and layers beside them."""
    units: dict[tuple[Loop, ...], list[int]] = {}
    for leaf in sorted(stacks, key=findings.composition.met_at):
        units.setdefault(stacks[leaf].loops[1:], []).append(leaf)
    counts = {leaf: math.prod(stack.sizes[1:]) for leaf, stack in stacks.items()}
    sizes = [max(counts[leaf] for leaf in unit) for unit in units.values()]
    return {
        leaf: _Turn(start, counts[leaf], sum(sizes), name, findings.paths[leaf])
        for start, unit in zip(itertools.accumulate([0, *sizes]), units.values(), strict=False)
        for leaf in unit
    }


def _tensors_of_joined(findings: Findings, stacks: _Stacks) -> dict[int, str]:
    """The names of tensors whose leaves are put together before the loop: one for all of them."""
    return {
        leaf: "/".join(filter(None, starred([findings.paths[other] for other in together])))
        for together in _sharing({leaf: of.sites for leaf, of in stacks.items() if of.sites})
        for leaf in together
    }


def _sharing(loops_of: Mapping[int, frozenset[Loop]]) -> list[list[int]]:
    """The leaves in groups: those that share a loop, as forward and backward pass do, are one."""
    groups: list[tuple[list[int], frozenset[Loop]]] = []
    for leaf, loops in loops_of.items():
        leaves, joined = [leaf], loops
        for group in [group for group in groups if group[1] & loops]:
            groups.remove(group)
            leaves, joined = group[0] + leaves, joined | group[1]
        groups.append((leaves, joined))
    return [sorted(leaves) for leaves, _ in groups]
