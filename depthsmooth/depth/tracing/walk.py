"""What a function does with each parameter: one walk over its jaxpr.

Every parameter is followed with the original axis of every dimension. Where a loop
takes a slice of it at every iteration, that axis is a candidate for depth. The loop is
one over *layers* if a slice that it takes of some parameter is contracted with what a
slot of its carry holds, and the product comes back to that slot: layers compose, while
experts and chunks of a vocabulary only add up.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from depthsmooth.depth.leaves import Shape
from depthsmooth.depth.tracing import counters
from depthsmooth.depth.tracing.axes import (
    UNKNOWN,
    Dimension,
    Dimensions,
    Factor,
    Origin,
    backwards,
    cut,
    own,
    propagate,
)
from depthsmooth.depth.tracing.counters import Loop, Number

if TYPE_CHECKING:
    from jax.extend import core  # its import takes 50 ms

Taken = tuple[tuple[Loop, Dimension], ...]
"""The loops that took a slice of a parameter, outer to inner, and along what."""


class Join(NamedTuple):
    """Where a parameter lies in an axis that a function makes of several, by stacking them.

    It counts as one more axis of the parameter, behind its own.

    Attributes:
      site: the equation that joins them.
      start: where the parameter begins on the axis.
      stop: where that after it begins.
      total: the size of the axis.
      own: what of its own the parameter has along the axis; nothing where it is put there as
        one.
    """

    site: Loop
    start: int
    stop: int
    total: int
    own: Dimension


class Slices(NamedTuple):
    """Slices of a parameter that loops take, and slices of these.

    Attributes:
      taken: the loops, outer to inner, and along what they run.
      origin: where on each axis that begins.
      join: where the parameter lies in an axis that it shares with others, if it does.
    """

    taken: Taken
    origin: Origin
    join: Join | None


Piece = tuple[int, tuple[tuple[int, int, int], ...]]
"""A parameter, and the ranges along its axes, from one place to before another, it is cut to."""

# What JAX has for products with a matrix: convolutions, einsum, the products of MoE by groups
# (ragged), and those of MXFP8 (scaled).
_CONTRACTIONS = frozenset(
    {"conv_general_dilated", "dot_general", "ragged_dot", "ragged_dot_general", "scaled_matmul"}
)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter inside a value.

    Attributes:
      leaf: index of the parameter.
      axes: for each dimension of the value what it runs along.
      origin: where on each axis of the parameter that begins.
      taken: the loops that took a slice of the parameter, and along what.
      ranges: the parts of its axes that it is cut to, like ``w[3]`` or ``w[:3]``: axis,
        first place, and that after the last. Within the steps of a loop along the axis, as
        for the second of each pair of layers, ``~axis``, and the places in the first step.
      join: where it lies in an axis that it shares with other parameters, if it does.
    """

    leaf: int
    axes: Dimensions
    origin: Origin
    taken: Taken = ()
    ranges: tuple[tuple[int, int, int], ...] = ()
    join: Join | None = None


class _Source(NamedTuple):
    """A slot of a loop's carry that a value depends on.

    Attributes:
      loop: the loop.
      slot: index into its carry.
      composed: whether by way of a contraction with a slice that the loop took.
    """

    loop: Loop
    slot: int
    composed: bool = False


_DATA = _Source((), 0)
"""What comes from neither parameters nor a loop that is still running."""

_RAW = 1
"""The bit of data that no matrix has been applied to, beside those of pieces of parameters."""


@dataclasses.dataclass(frozen=True)
class _Value:
    """What an intermediate value is made of.

    Attributes:
      parts: its parameters, if it is made of nothing but parameters and constants, or is a
        weight that is made of them and of data, like a masked one.
      sources: what else it depends on.
      met: the pieces of parameters that data has met on its way here, as bits.
      number: which integers it is, if that is known.
      summed: the matrices whose products it is made of, by sums and element by element, as
        bits of their pieces: after a residual connection those of all blocks before.
      products: where it is a function of one contraction of what a loop carries with slices
        that the loop takes, element by element: these leaves, and the loop.
    """

    parts: frozenset[_Part] = frozenset()
    sources: frozenset[_Source] = frozenset()
    met: int = 0
    number: Number | None = None
    summed: int = 0
    products: frozenset[tuple[int, Loop]] = frozenset()


class Walk:
    """One pass over a jaxpr, gathering what happens to parameters.

    A loop is named by the equations that lead to it, so that a function called
    twice has two loops, and a body walked twice has one.

    Attributes:
      taken: for each leaf, the loops that take slices of it, in the order in which they are
        met.
      layer_loops: the loops that compose what they do with parameter slices.
      composing: the leaves that are contracted with what a loop carries, and that loop, but
        for those of gates: what their product is multiplied with is made by others.
      summed: for each leaf that is contracted with data the matrices whose products that
        data is made of.
      first_met: for each piece of a parameter (the parameter, and what was taken of it by
        itself) the pieces that were behind the data it met first; in that order.
      bits: the bit of each piece among those that data has met.
    """

    def __init__(self) -> None:
        self.taken: dict[int, dict[Slices, None]] = {}
        self.layer_loops: set[Loop] = set()
        self.composing: set[tuple[int, Loop]] = set()
        self.summed: dict[int, int] = {}
        self.first_met: dict[Piece, int] = {}
        self.bits: dict[Piece, int] = {}
        self._site: Loop = ()

    def function(self, jaxpr: core.Jaxpr, parameters: int) -> None:
        """Walks a function whose first inputs are the parameters."""
        data = _Value(sources=frozenset({_DATA}), summed=_RAW)
        values = [data] * len(jaxpr.invars)
        for leaf, variable in enumerate(jaxpr.invars[:parameters]):
            # Integers can't be mixed, so they are as good as constants.
            if _is_inexact(variable):
                shape = _shape(variable)
                part = _Part(leaf, own(shape), (0,) * len(shape))
                values[leaf] = _Value(parts=frozenset({part}))
            else:
                values[leaf] = _Value()
        self._jaxpr(jaxpr, values)

    def _jaxpr(self, jaxpr: core.Jaxpr, values: Sequence[_Value]) -> list[_Value]:
        known: dict[core.Var | core.Literal, _Value]
        known = dict(zip(jaxpr.invars, values, strict=True))
        known |= {variable: _constant(variable) for variable in jaxpr.constvars}

        def read(atom: core.Var | core.Literal) -> _Value:
            return _constant(atom) if _is_literal(atom) else known[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        name = equation.primitive.name
        outer, self._site = self._site, (*self._site, id(equation))
        if name == "scan":
            results = self._scan(equation, values)
        elif name == "while":
            results = self._while(equation, values)
        elif name == "cond":
            results = self._cond(equation, values)
        # The jaxpr of a Pallas kernel reads from references, which are no arrays.
        elif name != "pallas_call" and (callee := _callee(equation)) is not None:
            results = self._jaxpr(callee, values)
        else:
            results = self._primitive(equation, values)
        self._site = outer
        return results

    def _primitive(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        name = equation.primitive.name
        # Each result of a barrier is one of its operands. Experts may be behind one.
        if name == "optimization_barrier":
            return list(values)
        are_indices = name in ("dynamic_slice", "gather") and values[0].parts
        if are_indices and not any(index.sources for index in values[1:]):
            return [self._take(equation, values)]
        if not any(value.sources for value in values):
            if any(value.parts for value in values):
                return _moved(equation, values, self._site)
            met, number = _met(values), _number(equation, values)
            return [_Value(met=met, number=number)] * len(equation.outvars)
        composed: frozenset[_Source] = frozenset()
        weights: list[frozenset[_Part]] = [frozenset()] * len(equation.outvars)
        if name in _CONTRACTIONS:
            composed, products = self._composed(equation, values)
            self._use(values)
            summed = self._sum_of(values)
        else:
            weights = _weights(equation, values, self._site)
            products = self._element_by_element(name, values)
            summed = _summed(values)
        sources = frozenset().union(composed, *(value.sources for value in values))
        met = self._meet_all(values, frozenset().union(*weights))
        results = []
        for variable, parts in zip(equation.outvars, weights, strict=True):
            is_data = _is_inexact(variable)
            own = sources if is_data else _chosen(sources)
            results.append(
                _Value(parts if is_data else frozenset(), own, met, None, summed, products)
            )
        return results

    def _sum_of(self, values: Sequence[_Value]) -> int:
        """What a contraction is made of: the weights in it, and notes what these are applied to."""
        weights = [tuple(self._weights_in(value)) for value in values]
        for k, parts in enumerate(weights):
            others = _summed([*values[:k], *values[k + 1 :]])
            for part in parts:
                self.summed.setdefault(part.leaf, others)
        made = union(self._bit((part.leaf, part.ranges)) for part in itertools.chain(*weights))
        return made or _summed(values)

    def _weights_in(self, value: _Value) -> Iterable[_Part]:
        """The parameters of a weight; none of activations that one has multiplied."""
        if not (value.parts and value.sources):
            return value.parts
        own = union(self.bits.get((part.leaf, part.ranges), 0) for part in value.parts)
        return () if value.met & ~own else value.parts

    def _element_by_element(
        self, name: str, values: Sequence[_Value]
    ) -> frozenset[tuple[int, Loop]]:
        """The products that a result is a function of, if it is one of nothing else.

        If it is not, they are used, unless they are what something else is multiplied with.
        """
        if not any(value.products for value in values):
            return frozenset()
        products = frozenset().union(*(value.products for value in values))
        loops = {loop for _, loop in products}
        carried = [value for value in values if any(s.loop in loops for s in value.sources)]
        if all(value.products == products for value in carried):
            return products
        # A gate multiplies what inner layers have made: sigmoid(x @ gate) * inner(x). A softmax of
        # it, or a sum with a constant, is a gate as well. A residual connection is a use.
        if name != "mul":
            self._use(values)
        return frozenset()

    def _use(self, values: Sequence[_Value]) -> None:
        """Notes that products are used for more than a factor."""
        for value in values:
            self.composing |= value.products

    def _composed(
        self, equation: core.JaxprEqn, values: Sequence[_Value]
    ) -> tuple[frozenset[_Source], frozenset[tuple[int, Loop]]]:
        """The carry slots that a contraction brings together with a slice their loop took.

        The slice has to be a matrix at least: a vector may be a row of one. It may be made of
        data too, as where a mask is drawn from a key that the loop carries, but not of the
        slot itself: what data makes of a slice, like a table of positions that it is added
        to, is no weight.
        """
        composed, products = set(), set()
        for k, (atom, value) in enumerate(zip(equation.invars, values, strict=True)):
            # A loop over time takes an embedded token, forward substitution takes a row.
            if not value.parts or sum(size > 1 for size in _shape(atom)) < 2:
                continue
            slicing = {
                (loop, part.leaf)
                for part in value.parts
                for loop, along in part.taken
                # Where time modulates one weight, its slices run along no axis of the weight.
                if along or not value.sources
            }
            if not slicing:
                continue
            loops = {loop for loop, _ in slicing}
            # A table of positions is added to the carry, and the sum attends to itself.
            mine = {(source.loop, source.slot) for source in value.sources}
            slots = {
                source
                for other in (*values[:k], *values[k + 1 :])
                for source in other.sources
                if source.loop in loops and (source.loop, source.slot) not in mine
            }
            carrying = {source.loop for source in slots}
            products |= {(leaf, loop) for loop, leaf in slicing if loop in carrying}
            composed |= {_Source(source.loop, source.slot, True) for source in slots}
        return frozenset(composed), frozenset(products)

    def _merge(self, values: Sequence[_Value]) -> _Value:
        """A value that depends on several; if on data, what it has met is noted."""
        sources = frozenset().union(*(value.sources for value in values))
        if not sources:
            parts = frozenset().union(*(value.parts for value in values))
            return _Value(parts, met=_met(values))
        met = self._meet_all(values, frozenset())
        return _Value(sources=sources, met=met, summed=_summed(values))

    def _meet_all(self, values: Sequence[_Value], weights: frozenset[_Part]) -> int:
        """Notes what data meets in several values; gives all that has been met.

        What is still a weight, like a masked one, has not met the data proper, which other
        parameters have made something of.
        """
        met = _met(values)
        held = [{(part.leaf, part.ranges) for part in value.parts} for value in values]
        pieces = set().union(*held)
        if not pieces:
            return met
        kept = {part.leaf for part in weights}
        for piece in sorted(pieces):
            others = [value for value, own in zip(values, held, strict=True) if piece not in own]
            behind = _met(others)
            # A stack may be masked before its layers are indexed.
            if behind or piece[0] not in kept:
                met |= self._meet(piece, behind)
        return met

    def _bit(self, piece: Piece) -> int:
        return self.bits.setdefault(piece, 2 * _RAW << len(self.bits))

    def _meet(self, piece: Piece, behind: int) -> int:
        """Notes what is behind the data that a piece meets; gives the piece's bit.

        What counts is when it first meets data that others have made, before what it has made
        itself comes back to it: a mask has nothing behind it, and the gradient has all.
        """
        bit = self._bit(piece)
        # A spectral norm multiplies the weight by a vector before data comes to it.
        if behind and self.first_met.get(piece) == 0 and not behind & bit:
            del self.first_met[piece]  # its place in the order is that of now
        self.first_met.setdefault(piece, behind)
        return bit

    def _cond(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        predicate, *operands = values
        self._use(values)
        branches = [self._jaxpr(branch.jaxpr, operands) for branch in equation.params["branches"]]
        return [self._merge([predicate, *results]) for results in zip(*branches, strict=True)]

    def _scan(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        body = equation.params["jaxpr"].jaxpr
        consts, carries = _scan_split(equation, body)
        loop = self._site
        step, length = (-1 if equation.params["reverse"] else 1), equation.params["length"]
        sliced = [self._slice(value, loop, step) for value in values[consts + carries :]]
        carry, results = self._settle(
            body, values[:consts], values[consts : consts + carries], sliced, loop, length
        )
        stacked = [
            _collected(value, loop, step, _shape(variable))
            for value, variable in zip(results[carries:], body.outvars[carries:], strict=True)
        ]
        return [_outside(value, loop) for value in carry + stacked]

    def _while(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        body = equation.params["body_jaxpr"].jaxpr
        loop = self._site
        ours = values[equation.params["cond_nconsts"] :]
        consts = equation.params["body_nconsts"]
        carry, _ = self._settle(body, ours[:consts], ours[consts:], [], loop, None)
        return [_outside(value, loop) for value in carry]

    def _settle(
        self,
        body: core.Jaxpr,
        consts: list[_Value],
        carry: list[_Value],
        sliced: list[_Value],
        loop: Loop,
        length: int | None,
    ) -> tuple[list[_Value], list[_Value]]:
        """Walks a loop's body until its carry depends on nothing more: carry, results."""
        steps = _counter_steps(body, len(consts), len(carry))
        carry = [
            _Value(number=Number(value.number.start, step, length, loop))
            if step and value.number is not None and value.number.step == 0
            # What comes back as the very same value is a constant; all else changes.
            else value
            if before is after
            else dataclasses.replace(value, number=None)
            for value, step, before, after in zip(
                carry, steps, body.invars[len(consts) :][: len(carry)], body.outvars, strict=False
            )
        ]
        while True:
            results = self._jaxpr(body, [*consts, *carry, *sliced])
            self._use(results[: len(carry)])
            grown = [
                # What comes back as the very same value is a constant of the loop.
                value
                if result is value or (value.number is not None and value.number.loop == loop)
                else self._carried(value, result, _Source(loop, slot))
                for slot, (value, result) in enumerate(zip(carry, results, strict=False))
            ]
            if grown == carry:
                if any(_Source(loop, k, True) in of.sources for k, of in enumerate(carry)):
                    self.layer_loops.add(loop)
                return carry, results
            carry = grown

    def _carried(self, value: _Value, result: _Value, slot: _Source) -> _Value:
        """A carry as later iterations see it."""
        sources = value.sources | result.sources | {slot}
        met, summed = value.met | result.met, value.summed | result.summed
        return _Value(sources=sources, met=met, summed=summed)

    def _slice(self, value: _Value, loop: Loop, step: int) -> _Value:
        """What the body sees of a scanned operand: its leading dimension is taken."""
        parts = frozenset(
            self._taken(part, part.axes[0], part.axes[1:], loop, step) for part in value.parts
        )
        number = value.number
        if number is not None and number.in_array:
            number = number.by(loop, step < 0)
        return dataclasses.replace(value, parts=parts, number=number)

    def _taken(
        self, part: _Part, dimension: Dimension, axes: Dimensions, loop: Loop, step: int
    ) -> _Part:
        """A part of which a loop takes one slice after another along a dimension."""
        along = backwards(dimension) if step < 0 else dimension
        taken = (*part.taken, (loop, along))
        self.taken.setdefault(part.leaf, {}).setdefault(Slices(taken, part.origin, part.join))
        return dataclasses.replace(part, axes=axes, taken=taken)

    def _take(self, equation: core.JaxprEqn, values: Sequence[_Value]) -> _Value:
        """A slice at an index that is no data: of a loop over layers, if it is its number."""
        operand, *indices = values
        before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
        sizes = equation.params["slice_sizes"]
        places = {axis: value.number for axis, value in enumerate(indices)}
        if equation.primitive.name == "gather":
            numbers = equation.params["dimension_numbers"]
            plain = numbers.collapsed_slice_dims == numbers.start_index_map and len(after) == len(
                numbers.offset_dims
            )
            places = {axis: indices[0].number for axis in numbers.start_index_map if plain}
        moving = [axis for axis, number in places.items() if number and number.step]
        short = [axis for axis, size in enumerate(sizes) if size != before[axis]]
        range_ = _range(places[moving[0]], before[moving[0]]) if len(moving) == 1 else None
        parts = set()
        for part in operand.parts:
            if range_ is None or short not in ([], moving) or sizes[moving[0]] != 1:
                lost = (UNKNOWN,) * len(after)
                parts.add(dataclasses.replace(part, axes=lost))
                continue
            [axis] = moving
            number = places[axis]
            assert number is not None
            starts, stops = [0] * len(before), list(before)
            starts[axis], stops[axis] = range_
            ours = _cut_part(part, before, starts, stops, (1,) * len(before))
            if ours is None:
                continue
            rest = list(ours.axes)
            dimension, rest[axis] = rest[axis], UNKNOWN
            if len(after) < len(before):
                del rest[axis]
            parts.add(self._taken(ours, dimension, tuple(rest), number.loop, number.step))
        return dataclasses.replace(operand, parts=frozenset(parts), number=None)


def _range(number: Number | None, size: int) -> tuple[int, int] | None:
    """The first of the places that a counter takes one after another, and that after the last."""
    if number is None or abs(number.step) != 1 or not number.loop:
        return None
    last = number.last if number.last is not None else (size - 1 if number.step > 0 else 0)
    first, last = sorted((number.start, last))
    return (first, last + 1) if first >= 0 and last < size else None


def _collected(value: _Value, loop: Loop, step: int, shape: Shape) -> _Value:
    """What leaves a scan stacked: a slice taken by the loop gets its axis back."""
    parts = set()
    for part in value.parts:
        axis, taken = UNKNOWN, part.taken
        if taken and taken[-1][0] == loop:
            axis, taken = taken[-1][1], taken[:-1]
        axis = backwards(axis) if step < 0 else axis
        parts.add(dataclasses.replace(part, axes=(axis, *part.axes), taken=taken))
    number = value.number
    if number is not None and (number.in_array or number.loop == loop):
        number = None if shape else number.by((), step < 0)
    return dataclasses.replace(value, parts=frozenset(parts), number=number)


def _chosen(sources: frozenset[_Source]) -> frozenset[_Source]:
    """What goes on as an index, like that of the nearest code, is not composed."""
    # Each codebook of a residual quantiser is contracted with what the one before has left.
    return frozenset(_Source(source.loop, source.slot) for source in sources)


def _outside(value: _Value, loop: Loop) -> _Value:
    """What a loop has carried is data to all that comes after it."""
    inner = {source for source in value.sources if source.loop == loop}
    number = value.number if value.number and value.number.loop != loop else None
    sources = value.sources - inner | {_DATA} if inner else value.sources
    products = frozenset((leaf, of) for leaf, of in value.products if of != loop)
    # Outside, what is made of a carry is no weight: tables of positions in a gradient.
    parts = frozenset[_Part]() if inner else value.parts
    return dataclasses.replace(
        value, parts=parts, sources=sources, number=number, products=products
    )


def _counter_steps(body: core.Jaxpr, consts: int, carries: int) -> list[int]:
    """For each slot of a carry what every iteration adds to it; 0 if that is not known."""
    made_by: dict[core.Var | core.Literal, core.JaxprEqn]
    made_by = {variable: equation for equation in body.eqns for variable in equation.outvars}
    steps = []
    for slot, result in zip(body.invars[consts:][:carries], body.outvars, strict=False):
        is_made = not _is_literal(result) and result in made_by
        steps.append(_step(slot, made_by[result]) if is_made else 0)
    return steps


def _is_literal(atom: core.Var | core.Literal) -> bool:
    """Whether it is a number, which can't be looked up: literals have no hash."""
    return hasattr(atom, "val")


def _step(slot: core.Var, equation: core.JaxprEqn) -> int:
    """What an equation adds to a slot of a carry, if that is a constant; else 0."""
    name, (first, *_) = equation.primitive.name, equation.invars
    added = [_constant(atom).number for atom in equation.invars if atom is not slot]
    if len(added) != 1 or added[0] is None:
        return 0
    return {"add": added[0].start, "sub": -added[0].start if first is slot else 0}.get(name, 0)


def _number(equation: core.JaxprEqn, values: Sequence[_Value]) -> Number | None:
    """Which integers the result of a primitive is."""
    return counters.fold(
        equation.primitive.name,
        [value.number for value in values],
        [_shape(atom) for atom in equation.invars],
        _shape(equation.outvars[0]),
        equation.params,
    )


def _weights(
    equation: core.JaxprEqn, values: Sequence[_Value], site: Loop
) -> list[frozenset[_Part]]:
    """The parameters of which the results, which data is in too, are still weights.

    Whatever is done to a weight before it meets the data proper leaves it a matrix along its own
    axes: a mask, a frozen part that it is added to, a norm that it is divided by. A scale that
    activations are multiplied by has but one axis in common with them.
    """
    # VeRA scales a frozen matrix by a vector, a table of vectors scales data row by row.
    big = any(sum(size > 1 for size in _shape(variable)) > 1 for variable in equation.outvars)
    if not big or not any(value.parts for value in values):
        return [frozenset()] * len(equation.outvars)
    return [
        moved.parts if _known_dimensions(moved.parts) > 1 else frozenset()
        for moved in _moved(equation, values, site)
    ]


def _known_dimensions(parts: Iterable[_Part]) -> int:
    """The number of dimensions of a value that run along an axis of one of its parameters."""
    return sum(
        any(factor.size > 1 for factor in itertools.chain(*dimension))
        for dimension in zip(*(part.axes for part in parts), strict=True)
    )


def _moved(equation: core.JaxprEqn, values: Sequence[_Value], site: Loop) -> list[_Value]:
    """The results of a primitive on parameters, with what each of their dimensions runs along."""
    operands = [(k, _shape(atom)) for k, atom in enumerate(equation.invars)]
    held = [(part, *of) for of, value in zip(operands, values, strict=True) for part in value.parts]
    met, results = _met(values), []
    for output in range(len(equation.outvars)):
        moved = {_moved_part(equation, *operand, output, site) for operand in held}
        results.append(_Value(frozenset(part for part in moved if part is not None), met=met))
    return results


def _moved_part(
    equation: core.JaxprEqn, part: _Part, k: int, before: Shape, output: int, site: Loop
) -> _Part | None:
    """A part of one operand in one result; None if it is not in it."""
    name, params = equation.primitive.name, equation.params
    if name == "slice":
        strides = params["strides"] or (1,) * len(before)
        return _cut_part(part, before, params["start_indices"], params["limit_indices"], strides)
    if name in ("split", "unstack"):
        at = params["axis"] % len(before)
        sizes = params["sizes"] if name == "split" else (1,) * before[at]
        starts, stops = [0] * len(before), list(before)
        starts[at], stops[at] = sum(sizes[:output]), sum(sizes[: output + 1])
        moved = _cut_part(part, before, starts, stops, (1,) * len(before))
        if moved is not None and name == "unstack":
            axes = (*moved.axes[:at], *moved.axes[at + 1 :])
            return dataclasses.replace(moved, axes=axes)
        return moved
    result = _shape(equation.outvars[output])
    axes = propagate(name, part.axes, before, result, params, k)
    moved = dataclasses.replace(part, axes=axes)
    if name == "concatenate" and len(equation.invars) > 1 and part.join is None:
        at = params["dimension"]
        sizes = [_shape(atom)[at] for atom in equation.invars]
        return _joined(moved, at, part.axes[at], sizes, k, site)
    if name == "stack" and len(equation.invars) > 1 and part.join is None:
        at = params["axis"] % len(result)
        return _joined(moved, at, UNKNOWN, [1] * len(equation.invars), k, site)
    return moved


def _joined(
    part: _Part, at: int, own: Dimension, sizes: Sequence[int], k: int, site: Loop
) -> _Part:
    """A part that is put together with others along a dimension, which becomes an axis of it."""
    start, total = sum(sizes[:k]), sum(sizes)
    axes = list(part.axes)
    axes[at] = (Factor(len(part.origin), 1, total),)
    join = Join(site, start, start + sizes[k], total, own)
    return dataclasses.replace(part, axes=tuple(axes), origin=(*part.origin, 0), join=join)


def _cut_part(
    part: _Part, before: Shape, starts: Sequence[int], stops: Sequence[int], strides: Sequence[int]
) -> _Part | None:
    """A slice of a part, with the range along each axis that it is cut to; None if it is not in."""
    axes, origin = cut(part.axes, part.origin, before, starts, stops, strides)
    changed = [(old, new) for old, new in zip(part.axes, axes, strict=True) if old != new]
    certain = {factor.axis for old, new in changed if new for factor in old}
    lost = {factor.axis for old, new in changed if not new for factor in old}
    ranges = {axis: (axis, start, stop) for axis, start, stop in part.ranges}
    shared = len(origin) - 1 if part.join is not None else -1
    in_loops = {factor.axis for _, along in part.taken for factor in along}
    for axis in certain - lost - {shared}:
        factors = [factor for factor in itertools.chain(*axes) if factor.axis == axis]
        length = 1 + sum((factor.size - 1) * abs(factor.stride) for factor in factors)
        key = ~axis if axis in in_loops else axis
        ranges[key] = (key, origin[axis], origin[axis] + length)
    part = dataclasses.replace(
        part, axes=axes, origin=origin, ranges=tuple(ranges[axis] for axis in sorted(ranges))
    )
    return None if shared in certain - lost and not _is_within(part, shared) else part


def _is_within(part: _Part, axis: int) -> bool:
    """Whether what is left of an axis that a part shares with others has some of the part."""
    assert part.join is not None
    dimensions = [*part.axes, *(along for _, along in part.taken)]
    factors = [factor for factor in itertools.chain(*dimensions) if factor.axis == axis]
    places = {part.origin[axis]}
    for factor in factors:
        places = {at + abs(factor.stride) * k for at in places for k in range(factor.size)}
    return any(part.join.start <= at < part.join.stop for at in places)


def union(bits: Iterable[int]) -> int:
    """Sets of bits as one."""
    return functools.reduce(operator.or_, bits, 0)


def _met(values: Iterable[_Value]) -> int:
    # A loop is quicker than a union of a generator, and this runs for each equation.
    met = 0
    for value in values:
        met |= value.met
    return met


def _summed(values: Iterable[_Value]) -> int:
    summed = 0
    for value in values:
        summed |= value.summed
    return summed


def _scan_split(equation: core.JaxprEqn, body: core.Jaxpr) -> tuple[int, int]:
    """The number of constants and of carries of a scan.

    Told by shapes, as the names of a scan's parameters differ between versions of
    JAX: in the body scanned operands and stacked results lack their leading axis.
    """
    unlike = [
        sum(_shape(a) != _shape(b) for a, b in zip(outer, inner, strict=True))
        for outer, inner in ((equation.invars, body.invars), (equation.outvars, body.outvars))
    ]
    carries = len(equation.outvars) - unlike[1]
    return len(equation.invars) - unlike[0] - carries, carries


def _callee(equation: core.JaxprEqn) -> core.Jaxpr | None:
    """The jaxpr that an equation calls with its own operands, like jit and remat do."""
    for parameter in equation.params.values():
        jaxpr: core.Jaxpr = getattr(parameter, "jaxpr", parameter)
        if hasattr(jaxpr, "eqns"):
            operands = [len(_shape(atom)) for atom in equation.invars]
            if operands == [len(_shape(variable)) for variable in jaxpr.invars]:
                return jaxpr
    return None


def _constant(atom: core.Var | core.Literal) -> _Value:
    """A literal, or an array the function closes over: that may be its data."""
    # A loss may close over its batch.
    if _shape(atom):
        return _Value(sources=frozenset({_DATA}), summed=_RAW)
    literal = getattr(atom, "val", None)
    is_integer = jnp.issubdtype(getattr(atom.aval, "dtype", np.bool_), np.integer)
    return _Value(number=Number(int(literal)) if literal is not None and is_integer else None)


def _is_inexact(atom: core.Var) -> bool:
    return jnp.issubdtype(getattr(atom.aval, "dtype", np.bool_), jnp.inexact)


def _shape(atom: core.Var | core.Literal) -> Shape:
    return getattr(atom.aval, "shape", ())
