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

from depthsmooth.axes import UNKNOWN, Dimension, Dimensions, Origin, backwards, cut, follow, own
from depthsmooth.places import Shape

if TYPE_CHECKING:
    from jax.extend import core  # its import takes 50 ms

Loop = tuple[int, ...]
"""A loop, named by the equations that lead to it."""
Taken = tuple[tuple[Loop, Dimension], ...]
"""The loops that took a slice of a parameter, outer to inner, and along what."""
Piece = tuple[int, tuple[tuple[int, int], ...]]
"""A parameter, and the axes and indices at which something was taken of it by itself."""

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
      indices: the places along an axis that were taken by themselves, like ``w[3]``.
    """

    leaf: int
    axes: Dimensions
    origin: Origin
    taken: Taken = ()
    indices: tuple[tuple[int, int], ...] = ()


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


class _Count(NamedTuple):
    """The number of the iteration, up to a constant.

    Attributes:
      loop: the loop; empty for an array that counts along its only dimension.
      step: 1 if it counts up, -1 if down.
    """

    loop: Loop
    step: int


@dataclasses.dataclass(frozen=True)
class _Value:
    """What an intermediate value is made of.

    Attributes:
      parts: its parameters, if it is made of nothing but parameters and constants.
      sources: what else it depends on.
      met: the pieces of parameters that data has met on its way here, as bits.
      count: the loop that it counts, if it is a counter.
    """

    parts: frozenset[_Part] = frozenset()
    sources: frozenset[_Source] = frozenset()
    met: int = 0
    count: _Count | None = None


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
            is_literal = hasattr(atom, "val")
            return _constant(atom) if is_literal else known[atom]

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
            composed = _composed(values) if name in _CONTRACTIONS else frozenset()
            product = dataclasses.replace(joined, sources=joined.sources | composed)
            return [product] * len(equation.outvars)
        if name in ("dynamic_slice", "gather") and values[0].parts:
            return [self._take(equation, values)]
        if joined.parts:
            return _moved(equation, values)
        return [_Value(met=joined.met, count=_counted(equation, values))] * len(equation.outvars)

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
            piece = (part.leaf, part.indices)
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
        step = -1 if equation.params["reverse"] else 1
        sliced = [self._slice(value, loop, step) for value in values[consts + carries :]]
        carry, results = self._settle(
            body, values[:consts], values[consts : consts + carries], sliced, loop
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
        carry, _ = self._settle(body, ours[:consts], ours[consts:], [], loop)
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
    ) -> tuple[list[_Value], list[_Value]]:
        """Walks a loop's body until its carry depends on nothing more: carry, results."""
        steps = _counter_steps(body, len(consts), len(carry))
        carry = [
            _Value(count=_Count(loop, step)) if step and value == _Value() else value
            for value, step in zip(carry, steps, strict=True)
        ]
        while True:
            results = self._jaxpr(body, [*consts, *carry, *sliced])
            grown = [
                # What comes back as the very same value is a constant of the loop.
                value
                if result is value or value.count
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
        count = value.count
        if count and not count.loop:
            count = _Count(loop, step * count.step)
        return dataclasses.replace(value, parts=parts, count=count)

    def _taken(
        self, part: _Part, dimension: Dimension, axes: Dimensions, loop: Loop, step: int
    ) -> _Part:
        """A part of which a loop takes one slice after another along a dimension."""
        along = backwards(dimension) if step < 0 else dimension
        taken = (*part.taken, (loop, along))
        if along:
            self.taken.setdefault(part.leaf, {}).setdefault((taken, part.origin))
        return dataclasses.replace(part, axes=axes, taken=taken)

    def _take(self, equation: core.JaxprEqn, values: Sequence[_Value]) -> _Value:
        """A slice at an index that is no data: of a loop over layers, if it is its counter."""
        operand, *indices = values
        before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
        sizes = equation.params["slice_sizes"]
        cut = [axis for axis, size in enumerate(sizes) if size != before[axis]]
        counted = [axis for axis, index in enumerate(indices) if index.count]
        if equation.primitive.name == "gather":
            numbers = equation.params["dimension_numbers"]
            plain = numbers.collapsed_slice_dims == numbers.start_index_map and len(after) == len(
                numbers.offset_dims
            )
            counted = list(numbers.start_index_map) if plain and indices[0].count else []
            indices = [indices[0]] * len(before)
        if len(before) == 1 and not cut:
            cut = counted
        parts = set()
        for part in operand.parts:
            if len(counted) != 1 or cut not in ([], counted) or sizes[counted[0]] != 1:
                lost = (UNKNOWN,) * len(after)
                parts.add(dataclasses.replace(part, axes=lost))
                continue
            [axis] = counted
            count = indices[axis].count
            assert count is not None
            rest = list(part.axes)
            dimension, rest[axis] = rest[axis], UNKNOWN
            if len(after) < len(before):
                del rest[axis]
            parts.add(self._taken(part, dimension, tuple(rest), count.loop, count.step))
        return _Value(frozenset(parts), met=operand.met)


def _stack(value: _Value, loop: Loop, step: int, shape: Shape) -> _Value:
    """What leaves a scan stacked: a slice taken by the loop gets its axis back."""
    parts = set()
    for part in value.parts:
        axis, taken = UNKNOWN, part.taken
        if taken and taken[-1][0] == loop:
            axis, taken = taken[-1][1], taken[:-1]
        axis = backwards(axis) if step < 0 else axis
        parts.add(dataclasses.replace(part, axes=(axis, *part.axes), taken=taken))
    count = value.count
    if count and count.loop in ((), loop):
        count = None if shape else _Count((), step * count.step)
    return dataclasses.replace(value, parts=frozenset(parts), count=count)


def _composed(values: Sequence[_Value]) -> frozenset[_Source]:
    """The carry slots that a contraction brings together with a slice their loop took."""
    slicing = {loop for value in values for part in value.parts for loop, _ in part.taken}
    return frozenset(
        source._replace(composed=True)
        for value in values
        for source in value.sources
        if source.loop in slicing
    )


def _outside(value: _Value, loop: Loop) -> _Value:
    """What a loop has carried is data to all that comes after it."""
    inner = {source for source in value.sources if source.loop == loop}
    count = None if value.count and value.count.loop == loop else value.count
    sources = value.sources - inner | {_DATA} if inner else value.sources
    return dataclasses.replace(value, sources=sources, count=count)


def _counter_steps(body: core.Jaxpr, consts: int, carries: int) -> list[int]:
    """For each slot of a carry 1 or -1 if every iteration adds as much to it, else 0."""
    made_by: dict[core.Var | core.Literal, core.JaxprEqn]
    made_by = {variable: equation for equation in body.eqns for variable in equation.outvars}
    steps = []
    for slot, result in zip(body.invars[consts:][:carries], body.outvars, strict=False):
        equation = made_by.get(result)
        steps.append(_step(slot, equation) if equation else 0)
    return steps


def _step(slot: core.Var, equation: core.JaxprEqn) -> int:
    """What an equation adds to a slot of a carry, if that is 1 or -1; else 0."""
    name, (first, *others) = equation.primitive.name, equation.invars
    if name not in ("add", "sub") or _shape(slot) or _is_inexact(slot):
        return 0
    if name == "add" and others[0] is slot:
        first, others = slot, [first]
    literal = getattr(others[0], "val", None)
    if first is not slot or literal is None or abs(int(literal)) != 1:
        return 0
    return int(literal) if name == "add" else -int(literal)


def _counted(equation: core.JaxprEqn, values: Sequence[_Value]) -> _Count | None:
    """The loop that the result of a primitive counts: an index derived from the counter."""
    name, shape = equation.primitive.name, _shape(equation.outvars[0])
    if name == "iota":
        return _Count((), 1) if len(shape) == 1 else None
    counts = [value.count for value in values]
    found = {count for count in counts if count}
    if len(found) != 1:
        return None
    [count] = found
    if not count.loop and shape != _shape(equation.invars[counts.index(count)]):
        return None
    if name == "rev" or name == "neg" or (name == "sub" and counts[0] is None):
        return count._replace(step=-count.step)
    if name == "select_n":
        return count if counts[0] is None and all(counts[1:]) else None
    keeps = ("add", "sub", "convert_element_type", "copy", "broadcast_in_dim", "reshape", "squeeze")
    is_sum = name != "add" or None in counts
    return count if name in keeps and is_sum else None


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
    """A slice of a part. Where one place along an axis is left, that is taken by itself."""
    axes, origin = cut(part.axes, part.origin, before, starts, stops, strides)
    sizes, left = (dict.fromkeys(range(len(origin)), 1) for _ in range(2))
    for size, dimensions in ((sizes, part.axes), (left, axes)):
        for factor in itertools.chain(*dimensions):
            size[factor.axis] *= factor.size
    lost = {f.axis for old, new in zip(part.axes, axes, strict=True) if not new for f in old}
    indices = tuple(
        (axis, origin[axis])
        for axis in range(len(origin))
        if left[axis] == 1 < sizes[axis] and axis not in lost
    )
    return dataclasses.replace(part, axes=axes, origin=origin, indices=part.indices + indices)


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
    return _Value(sources=frozenset({_DATA}) if _shape(atom) else frozenset())


def _is_inexact(atom: core.Var) -> bool:
    return jnp.issubdtype(getattr(atom.aval, "dtype", np.bool_), jnp.inexact)


def _shape(atom: core.Var | core.Literal) -> Shape:
    return getattr(atom.aval, "shape", ())
