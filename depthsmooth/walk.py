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
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from depthsmooth import counters
from depthsmooth.axes import UNKNOWN, Dimension, Dimensions, Origin, backwards, cut, follow, own
from depthsmooth.counters import Loop, Number
from depthsmooth.places import Shape

if TYPE_CHECKING:
    from jax.extend import core  # its import takes 50 ms

Taken = tuple[tuple[Loop, Dimension], ...]
"""The loops that took a slice of a parameter, outer to inner, and along what."""
Piece = tuple[int, tuple[tuple[int, int, int], ...]]
"""A parameter, and the ranges along its axes, from one place to before another, it is cut to."""

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
        first place, and that after the last.
    """

    leaf: int
    axes: Dimensions
    origin: Origin
    taken: Taken = ()
    ranges: tuple[tuple[int, int, int], ...] = ()


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


@dataclasses.dataclass(frozen=True)
class _Value:
    """What an intermediate value is made of.

    Attributes:
      parts: its parameters, if it is made of nothing but parameters and constants.
      sources: what else it depends on.
      met: the pieces of parameters that data has met on its way here, as bits.
      number: which integers it is, if that is known.
    """

    parts: frozenset[_Part] = frozenset()
    sources: frozenset[_Source] = frozenset()
    met: int = 0
    number: Number | None = None


class Walk:
    """One pass over a jaxpr, gathering what happens to parameters.

    A loop is named by the equations that lead to it, so that a function called
    twice has two loops, and a body walked twice has one.

    Attributes:
      taken: for each leaf, the loops that take slices of it, outer to inner, along what,
        and where that begins: in the order in which they are met.
      layer_loops: the loops that compose what they do with parameter slices.
      first_met: for each piece of a parameter (the parameter, and what was taken of it by
        itself) the pieces that were behind the data it met first; in that order.
      bits: the bit of each piece among those that data has met.
    """

    def __init__(self) -> None:
        self.taken: dict[int, dict[tuple[Taken, Origin], None]] = {}
        self.layer_loops: set[Loop] = set()
        self.first_met: dict[Piece, int] = {}
        self.bits: dict[Piece, int] = {}
        self._callers: Loop = ()

    def function(self, jaxpr: core.Jaxpr, parameters: int) -> None:
        """Walks a function whose first inputs are the parameters."""
        data = _Value(sources=frozenset({_DATA}))
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
        if name == "scan":
            follow = self._scan
        elif name == "while":
            follow = self._while
        elif name == "cond":
            follow = self._cond
        elif name != "pallas_call" and _callee(equation) is not None:
            follow = self._call
        else:
            return self._primitive(equation, values)
        callers, self._callers = self._callers, (*self._callers, id(equation))
        results = follow(equation, values)
        self._callers = callers
        return results

    def _primitive(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        name = equation.primitive.name
        if name == "optimization_barrier":
            return list(values)
        joined = self._join(values)
        if joined.sources:
            composed = _composed(equation, values) if name in _CONTRACTIONS else frozenset()
            product = dataclasses.replace(joined, sources=joined.sources | composed)
            return [
                product if _is_inexact(variable) else _chosen(product)
                for variable in equation.outvars
            ]
        if name in ("dynamic_slice", "gather") and values[0].parts:
            return [self._take(equation, values)]
        if joined.parts:
            return _moved(equation, values)
        return [_Value(met=joined.met, number=_number(equation, values))] * len(equation.outvars)

    def _join(self, values: Sequence[_Value]) -> _Value:
        """A value that depends on several; if on data, what it has met is noted."""
        sources = frozenset().union(*(value.sources for value in values))
        parts = frozenset().union(*(value.parts for value in values))
        met = 0
        for value in values:
            met |= value.met
        if not sources:
            return _Value(parts, met=met)
        behind = met
        for part in sorted(parts, key=lambda part: part.leaf):
            piece = (part.leaf, part.ranges)
            self.first_met.setdefault(piece, behind)
            met |= self.bits.setdefault(piece, 1 << len(self.bits))
        return _Value(sources=sources, met=met)

    def _call(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        callee = _callee(equation)
        assert callee is not None
        return self._jaxpr(callee, values)

    def _cond(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        predicate, *operands = values
        branches = [self._jaxpr(branch.jaxpr, operands) for branch in equation.params["branches"]]
        return [self._join([predicate, *results]) for results in zip(*branches, strict=True)]

    def _scan(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        body = equation.params["jaxpr"].jaxpr
        consts, carries = _scan_split(equation, body)
        loop = self._callers
        step, length = (-1 if equation.params["reverse"] else 1), equation.params["length"]
        sliced = [self._slice(value, loop, step) for value in values[consts + carries :]]
        carry, results = self._settle(
            body, values[:consts], values[consts : consts + carries], sliced, loop, length
        )
        if any(_Source(loop, k, True) in value.sources for k, value in enumerate(carry)):
            self.layer_loops.add(loop)
        stacked = [
            _stack(value, loop, step, _shape(variable))
            for value, variable in zip(results[carries:], body.outvars[carries:], strict=True)
        ]
        return [_outside(value, loop) for value in carry + stacked]

    def _while(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        body = equation.params["body_jaxpr"].jaxpr
        loop = self._callers
        ours = values[equation.params["cond_nconsts"] :]
        consts = equation.params["body_nconsts"]
        carry, _ = self._settle(body, ours[:consts], ours[consts:], [], loop, None)
        if any(_Source(loop, k, True) in value.sources for k, value in enumerate(carry)):
            self.layer_loops.add(loop)
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
            grown = [
                # What comes back as the very same value is a constant of the loop.
                value
                if result is value or (value.number is not None and value.number.loop == loop)
                else self._carried(value, result, _Source(loop, slot))
                for slot, (value, result) in enumerate(zip(carry, results, strict=False))
            ]
            if grown == carry:
                return carry, results
            carry = grown

    def _carried(self, value: _Value, result: _Value, slot: _Source) -> _Value:
        """A carry as later iterations see it."""
        return _Value(sources=value.sources | result.sources | {slot}, met=value.met | result.met)

    def _slice(self, value: _Value, loop: Loop, step: int) -> _Value:
        """What the body sees of a scanned operand: its leading dimension is taken."""
        parts = frozenset(
            self._taken(part, part.axes[0], part.axes[1:], loop, step) for part in value.parts
        )
        number = value.number
        if number is not None and number.is_array:
            number = number.by(loop, step < 0)
        return dataclasses.replace(value, parts=parts, number=number)

    def _taken(
        self, part: _Part, dimension: Dimension, axes: Dimensions, loop: Loop, step: int
    ) -> _Part:
        """A part of which a loop takes one slice after another along a dimension."""
        along = backwards(dimension) if step < 0 else dimension
        taken = (*part.taken, (loop, along))
        self.taken.setdefault(part.leaf, {}).setdefault((taken, part.origin))
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
            part = _cut(part, before, starts, stops, (1,) * len(before))
            rest = list(part.axes)
            dimension, rest[axis] = rest[axis], UNKNOWN
            if len(after) < len(before):
                del rest[axis]
            parts.add(self._taken(part, dimension, tuple(rest), number.loop, number.step))
        return _Value(frozenset(parts), met=operand.met)


def _range(number: Number | None, size: int) -> tuple[int, int] | None:
    """The first of the places that a counter takes one after another, and that after the last."""
    if number is None or abs(number.step) != 1 or not number.loop:
        return None
    last = number.last if number.last is not None else (size - 1 if number.step > 0 else 0)
    first, last = sorted((number.start, last))
    return (first, last + 1) if first >= 0 and last < size else None


def _stack(value: _Value, loop: Loop, step: int, shape: Shape) -> _Value:
    """What leaves a scan stacked: a slice taken by the loop gets its axis back."""
    parts = set()
    for part in value.parts:
        axis, taken = UNKNOWN, part.taken
        if taken and taken[-1][0] == loop:
            axis, taken = taken[-1][1], taken[:-1]
        axis = backwards(axis) if step < 0 else axis
        parts.add(dataclasses.replace(part, axes=(axis, *part.axes), taken=taken))
    number = value.number
    if number is not None and (number.is_array or number.loop == loop):
        number = None if shape else number.by((), step < 0)
    return dataclasses.replace(value, parts=frozenset(parts), number=number)


def _composed(equation: core.JaxprEqn, values: Sequence[_Value]) -> frozenset[_Source]:
    """The carry slots that a contraction brings together with a slice their loop took.

    The slice has to be a matrix at least: a vector may be a row of one.
    """
    slicing = {
        loop
        for atom, value in zip(equation.invars, values, strict=True)
        for part in value.parts
        for loop, _ in part.taken
        if sum(size > 1 for size in _shape(atom)) > 1
    }
    return frozenset(
        source._replace(composed=True)
        for value in values
        for source in value.sources
        if source.loop in slicing
    )


def _chosen(value: _Value) -> _Value:
    """What goes on as an index, like that of the nearest code, is not composed."""
    sources = frozenset(source._replace(composed=False) for source in value.sources)
    return dataclasses.replace(value, sources=sources)


def _outside(value: _Value, loop: Loop) -> _Value:
    """What a loop has carried is data to all that comes after it."""
    inner = {source for source in value.sources if source.loop == loop}
    number = value.number if value.number and value.number.loop != loop else None
    sources = value.sources - inner | {_DATA} if inner else value.sources
    return dataclasses.replace(value, sources=sources, number=number)


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
    return counters.follow(
        equation.primitive.name,
        [value.number for value in values],
        [_shape(atom) for atom in equation.invars],
        _shape(equation.outvars[0]),
        equation.params,
    )


def _moved(equation: core.JaxprEqn, values: Sequence[_Value]) -> list[_Value]:
    """The results of a primitive on parameters, with what each of their dimensions runs along."""
    name, params = equation.primitive.name, equation.params
    results = []
    for output, variable in enumerate(equation.outvars):
        parts = set()
        for k, (atom, value) in enumerate(zip(equation.invars, values, strict=True)):
            for part in value.parts:
                before, result = _shape(atom), _shape(variable)
                axes = follow(name, part.axes, before, result, params, k)
                moved = dataclasses.replace(part, axes=axes)
                if name == "slice":
                    strides = params["strides"] or (1,) * len(before)
                    ends = params["start_indices"], params["limit_indices"]
                    moved = _cut(part, before, *ends, strides)
                elif name in ("split", "unstack"):
                    at = params["axis"] % len(before)
                    sizes = params["sizes"] if name == "split" else (1,) * before[at]
                    starts, stops = [0] * len(before), list(before)
                    starts[at], stops[at] = sum(sizes[:output]), sum(sizes[: output + 1])
                    moved = _cut(part, before, starts, stops, (1,) * len(before))
                    if name == "unstack":
                        axes = (*moved.axes[:at], *moved.axes[at + 1 :])
                        moved = dataclasses.replace(moved, axes=axes)
                parts.add(moved)
        results.append(_Value(frozenset(parts), met=_met(values)))
    return results


def _cut(
    part: _Part, before: Shape, starts: Sequence[int], stops: Sequence[int], strides: Sequence[int]
) -> _Part:
    """A slice of a part, with the range along each axis that it is cut to."""
    axes, origin = cut(part.axes, part.origin, before, starts, stops, strides)
    changed = [(old, new) for old, new in zip(part.axes, axes, strict=True) if old != new]
    certain = {factor.axis for old, new in changed if new for factor in old}
    lost = {factor.axis for old, new in changed if not new for factor in old}
    ranges = {axis: (axis, start, stop) for axis, start, stop in part.ranges}
    for axis in certain - lost:
        factors = [factor for factor in itertools.chain(*axes) if factor.axis == axis]
        length = 1 + sum((factor.size - 1) * abs(factor.stride) for factor in factors)
        ranges[axis] = (axis, origin[axis], origin[axis] + length)
    return dataclasses.replace(
        part, axes=axes, origin=origin, ranges=tuple(ranges[axis] for axis in sorted(ranges))
    )


def _met(values: Sequence[_Value]) -> int:
    return functools.reduce(operator.or_, (value.met for value in values), 0)


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
    if _shape(atom):
        return _Value(sources=frozenset({_DATA}))
    literal = getattr(atom, "val", None)
    is_integer = jnp.issubdtype(getattr(atom.aval, "dtype", np.bool_), np.integer)
    return _Value(number=Number(int(literal)) if literal is not None and is_integer else None)


def _is_inexact(atom: core.Var) -> bool:
    return jnp.issubdtype(getattr(atom.aval, "dtype", np.bool_), jnp.inexact)


def _shape(atom: core.Var | core.Literal) -> Shape:
    return getattr(atom.aval, "shape", ())
