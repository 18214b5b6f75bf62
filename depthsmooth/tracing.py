"""Where depth is, exactly: what the forward pass does with each parameter, read off its jaxpr.

Every parameter is followed through the jaxpr of the user's function, with the original
axis of every dimension. Where a loop takes a slice of it at every iteration, that axis
is a candidate for depth. The loop is one over *layers* if a slice that it takes of some
parameter is contracted with what a slot of its carry holds, and the product comes back
to that slot: layers compose, while experts and chunks of a vocabulary only add up.
Layers with leaves of their own are siblings that a number tells apart, in the order in
which they first meet data, each of which meets what the one before it has made.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.axes import (
    UNKNOWN,
    Dimension,
    Dimensions,
    backwards,
    follow,
    own,
    part_of,
    whole_axes,
)
from depthsmooth.layout import Depth, DepthNotFoundError, Leaf
from depthsmooth.places import Place, Shape, common_path, path_string, shape_of
from depthsmooth.siblings import Family, Known, Node, besides_layers, families_of, is_layer_name
from depthsmooth.stencil import Axes

if TYPE_CHECKING:
    from jax.extend import core  # its import takes 50 ms

_Loop = tuple[int, ...]
_Taken = tuple[tuple[_Loop, Dimension], ...]
_Piece = tuple[int, tuple[tuple[int, int], ...]]

_CONTRACTIONS = frozenset(
    {"conv_general_dilated", "dot_general", "ragged_dot", "ragged_dot_general", "scaled_matmul"}
)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter inside a value.

    Attributes:
      leaf: index of the parameter.
      axes: for each dimension of the value what it runs along.
      taken: the loops that took a slice of the parameter, and along what.
      indices: the places along an axis that were taken by themselves, like ``w[3]``.
    """

    leaf: int
    axes: Dimensions
    taken: _Taken = ()
    indices: tuple[tuple[int, int], ...] = ()


class _Source(NamedTuple):
    """A slot of a loop's carry that a value depends on.

    Attributes:
      loop: the loop.
      slot: index into its carry.
      composed: whether by way of a contraction with a slice that the loop took.
    """

    loop: _Loop
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

    loop: _Loop
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
    keyed, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in keyed]
    paths = [path_string(keys) for keys, _ in keyed]

    def of_leaves(leaves: Sequence[jax.Array], /, *args: object, **kwargs: object) -> object:
        return fn(jax.tree_util.tree_unflatten(treedef, leaves), *args, **kwargs)

    walk = _Walk()
    walk.function(_jaxpr_of(of_leaves, leaves, args, kwargs), len(leaves))
    placing = _Placing(walk, paths, [shape_of(leaf) for leaf in leaves])
    if not placing.places:
        raise DepthNotFoundError(
            f"None of the {len(paths)} parameters, like {paths[0]} {shape_of(leaves[0])}, holds "
            "layers that this function composes, in a loop or as numbered siblings one after "
            "another. If there are layers, say where with Depth.from_rules({'.*/layers/.*': axis})."
            if paths
            else "There are no parameters. Give trace_depth the tree that the optimizer is given."
        )
    alone = "it is no layer of a loop, and no sibling of another"
    return Depth(
        tuple(
            Leaf(path, shape_of(leaf), placing.places[index])
            if index in placing.places
            else Leaf(path, shape_of(leaf), None, placing.reasons.get(index, alone))
            for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
        )
    )


def _jaxpr_of(
    fn: Callable[..., object],
    leaves: Sequence[jax.Array],
    args: Sequence[object],
    kwargs: dict[str, object],
) -> core.Jaxpr:
    """The jaxpr of ``fn(leaves, *args, **kwargs)``; its first inputs are the leaves."""
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


class _Walk:
    """One pass over a jaxpr, gathering what happens to parameters.

    A loop is named by the equations that lead to it, so that a function called
    twice has two loops, and a body walked twice has one.

    Attributes:
      taken: for each leaf, the loops that take slices of it, outer to inner, and along
        what: in the order in which they are met.
      layer_loops: the loops that compose what they do with parameter slices.
      first_met: for each piece of a parameter (the parameter, and what was taken of it by
        itself) the pieces that were behind the data it met first; in that order.
      bits: the bit of each piece among those that data has met.
    """

    def __init__(self) -> None:
        self.taken: dict[int, dict[_Taken, None]] = {}
        self.layer_loops: set[_Loop] = set()
        self.first_met: dict[_Piece, int] = {}
        self.bits: dict[_Piece, int] = {}
        self._callers: _Loop = ()

    def function(self, jaxpr: core.Jaxpr, parameters: int) -> None:
        """Walks a function whose first inputs are the parameters."""
        data = _Value(sources=frozenset({_DATA}))
        values = [data] * len(jaxpr.invars)
        for leaf, variable in enumerate(jaxpr.invars[:parameters]):
            # Integers can't be mixed, so they are as good as constants.
            parts = {_Part(leaf, own(_shape(variable)))} if _is_inexact(variable) else ()
            values[leaf] = _Value(parts=frozenset(parts))
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
        stacked = [_stack(value, loop, step) for value in results[carries:]]
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
        loop: _Loop,
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

    def _slice(self, value: _Value, loop: _Loop, step: int) -> _Value:
        """What the body sees of a scanned operand: its leading dimension is taken."""
        parts = frozenset(
            self._taken(part, part.axes[0], part.axes[1:], loop, step) for part in value.parts
        )
        count = _Count(loop, step * value.count.step) if value.count else None
        return dataclasses.replace(value, parts=parts, count=count)

    def _taken(
        self, part: _Part, dimension: Dimension, axes: Dimensions, loop: _Loop, step: int
    ) -> _Part:
        """A part of which a loop takes one slice after another along a dimension."""
        along = backwards(dimension) if step < 0 else dimension
        taken = (*part.taken, (loop, along))
        if along:
            self.taken.setdefault(part.leaf, {}).setdefault(taken)
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


def _stack(value: _Value, loop: _Loop, step: int) -> _Value:
    """What leaves a scan stacked: a slice taken by the loop gets its axis back."""
    parts = set()
    for part in value.parts:
        axis, taken = UNKNOWN, part.taken
        if taken and taken[-1][0] == loop:
            axis, taken = taken[-1][1], taken[:-1]
        axis = backwards(axis) if step < 0 else axis
        parts.add(dataclasses.replace(part, axes=(axis, *part.axes), taken=taken))
    return dataclasses.replace(value, parts=frozenset(parts), count=None)


def _composed(values: Sequence[_Value]) -> frozenset[_Source]:
    """The carry slots that a contraction brings together with a slice their loop took."""
    slicing = {loop for value in values for part in value.parts for loop, _ in part.taken}
    return frozenset(
        source._replace(composed=True)
        for value in values
        for source in value.sources
        if source.loop in slicing
    )


def _outside(value: _Value, loop: _Loop) -> _Value:
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
    name = equation.primitive.name
    if name == "iota":
        return _Count((), 1) if len(_shape(equation.outvars[0])) == 1 else None
    counts = [value.count for value in values]
    found = {count for count in counts if count}
    if len(found) != 1:
        return None
    [count] = found
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
                indices = part.indices
                if name == "slice":
                    indices += _indices(part.axes, before, result, params["start_indices"])
                elif name in ("split", "unstack"):
                    at = params["axis"] % len(before)
                    sizes = params["sizes"] if name == "split" else (1,) * before[at]
                    starts = [0] * len(before)
                    starts[at] = sum(sizes[:output])
                    cut = (*before[:at], sizes[output], *before[at + 1 :])
                    indices += _indices(part.axes, before, cut, starts)
                    axis = part_of(part.axes[at], before[at], sizes[output])
                    middle = (axis,) if name == "split" else ()
                    axes = (*part.axes[:at], *middle, *part.axes[at + 1 :])
                parts.add(dataclasses.replace(part, axes=axes, indices=indices))
        results.append(_Value(frozenset(parts), met=_met(values)))
    return results


def _met(values: Sequence[_Value]) -> int:
    return functools.reduce(operator.or_, (value.met for value in values), 0)


def _indices(
    axes: Dimensions, before: Shape, cut: Shape, starts: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """The places along axes that a slice takes by themselves."""
    return tuple(
        (axis[0].axis, start if axis[0].stride > 0 else size - 1 - start)
        for axis, size, to, start in zip(axes, before, cut, starts, strict=True)
        if to == 1 < size and len(axis) == 1 and axis[0].size == size
    )


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


class _Stack(NamedTuple):
    """A leaf that loops over layers take slices of.

    Attributes:
      loops: those loops, outer to inner, where most of them take one of another's slices.
      axes: the axes that they run along, outer to inner.
      flipped: which of these they run along from the last to the first.
      anywhere: all the loops over layers that take slices of it.
    """

    loops: tuple[_Loop, ...]
    axes: Axes
    flipped: tuple[int, ...]
    anywhere: frozenset[_Loop]


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

    def __init__(self, walk: _Walk, paths: Sequence[str], shapes: Sequence[Shape]) -> None:
        self.places: dict[int, Place] = {}
        self.reasons: dict[int, str] = {}
        self._walk, self._paths, self._shapes = walk, paths, shapes
        self._index = {path: leaf for leaf, path in enumerate(paths)}
        self._names = collections.Counter[str]()
        self._pieces: dict[int, list[_Piece]] = {}
        for piece in walk.first_met:
            self._pieces.setdefault(piece[0], []).append(piece)
        self._order = {piece: k for k, piece in enumerate(walk.first_met)}
        self._place_stacks()
        self._place_indexed()
        rest = [leaf for leaf in sorted(self._pieces) if leaf not in self.places]
        self._place_siblings(self._node(rest))

    def _place_stacks(self) -> None:
        """Places the leaves that loops over layers take slices of."""
        stacks = {}
        for leaf, chains in sorted(self._walk.taken.items()):
            stack = self._stack(leaf, chains)
            if stack:
                stacks[leaf] = stack
        for leaves in _groups({leaf: stack.anywhere for leaf, stack in stacks.items()}):
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

    def _stack(self, leaf: int, chains: Iterable[_Taken]) -> _Stack | None:
        """What loops over layers make of a leaf, from the slices they take of slices."""
        path, shape = self._paths[leaf], self._shapes[leaf]
        found = []
        for chain in chains:
            taken = [(loop, along) for loop, along in chain if loop in self._walk.layer_loops]
            if taken:
                axes = whole_axes([factor for _, along in taken for factor in along], shape)
                found.append((tuple(loop for loop, _ in taken), axes))
        if not found:
            self.reasons[leaf] = "the loops that take slices of it do not compose them"
            return None
        loops, axes = max(found, key=lambda taken: len(taken[0]))
        if axes is None:
            self.reasons[leaf] = "the order in which loops take its slices is not certain"
            return None
        order = [axis for axis, _ in axes]
        for _, others in found:
            if not {axis for axis, _ in others or ()} <= set(order):
                seen = sorted({axis for _, axes in found for axis, _ in axes or ()})
                raise ValueError(
                    f"{path} {shape} is scanned over along the axes {seen} by different loops, but "
                    "its layers have to be in one order. Say which with Depth.from_rules."
                )
        flipped = tuple(k for k, (_, backwards) in enumerate(axes) if backwards)
        anywhere = frozenset(loop for loops, _ in found for loop in loops)
        return _Stack(loops, tuple(order), flipped, anywhere)

    def _turns(self, leaves: Sequence[int], stacks: Mapping[int, _Stack]) -> dict[int, _Turn]:
        """How the layers of the leaves of one group take turns."""
        inner = {leaf: stacks[leaf].loops[1:] for leaf in leaves}
        if len(set(inner.values())) > 1 and len({stacks[leaf].loops[0] for leaf in leaves}) == 1:
            return self._nested_turns(leaves, stacks, inner)
        node = self._node(leaves)
        while len(node.children) == 1 and not node.is_leaf:
            [node] = node.children.values()
        for family in families_of(node):
            members = list(family.members.values())
            if sum(len(member.leaves) for member in members) == len(leaves) and (
                len(members) > 1 and is_layer_name(family.name) and self._compose(members)
            ):
                members.sort(key=self._first_met)
                return {
                    self._index[leaf.path]: _Turn(j, 1, len(members), member.inside(leaf))
                    for j, member in enumerate(members)
                    for leaf in member.leaves
                }
        return {leaf: _Turn(0, 1, 1, self._paths[leaf]) for leaf in leaves}

    def _nested_turns(
        self,
        leaves: Sequence[int],
        stacks: Mapping[int, _Stack],
        inner: Mapping[int, tuple[_Loop, ...]],
    ) -> dict[int, _Turn]:
        """The turns in a loop that runs further loops over layers, and layers beside them."""
        counts = {
            leaf: math.prod(self._shapes[leaf][axis] for axis in stacks[leaf].axes[1:])
            for leaf in leaves
        }
        units = sorted(
            set(inner.values()),
            key=lambda unit: min(self._when(leaf) for leaf in leaves if inner[leaf] == unit),
        )
        sizes = [max(counts[leaf] for leaf in leaves if inner[leaf] == unit) for unit in units]
        starts = dict(zip(units, itertools.accumulate([0, *sizes]), strict=False))
        return {
            leaf: _Turn(starts[inner[leaf]], counts[leaf], sum(sizes), self._paths[leaf])
            for leaf in leaves
        }

    def _place_indexed(self) -> None:
        """Places the stacks whose slices are taken one by one, as by ``w[0]`` and ``w[1]``."""
        found: dict[tuple[int, str], dict[int, tuple[int, list[int]]]] = {}
        for leaf, pieces in self._pieces.items():
            at = [indices[0] for _, indices in pieces if len(indices) == 1]
            axes = {axis for axis, _ in at}
            if leaf in self.places or len(axes) != 1 or len(at) != len(pieces):
                continue
            [axis] = axes
            order = [index for _, index in at]
            size = self._shapes[leaf][axis]
            if size > 1 and sorted(order) == list(range(size)) and self._chained(pieces):
                top = self._paths[leaf].partition("/")[0]
                found.setdefault((size, top), {})[leaf] = (axis, order)
        for leaves in found.values():
            group = self._name(list(leaves))
            for leaf, (axis, order) in leaves.items():
                layers = tuple(order.index(index) for index in range(len(order)))
                self.places[leaf] = Place(group, self._paths[leaf], (axis,), layers, "trace")

    def _place_siblings(self, node: Node) -> None:
        """Places the siblings below a node that are layers; within layers nothing else is."""
        for child in besides_layers(node, self._place_family):
            if not child.is_leaf:
                self._place_siblings(child)

    def _place_family(self, family: Family, parts: bool) -> bool:
        """Whether siblings are layers, or named like it: there is nothing more to find there."""
        members = sorted(family.members.values(), key=self._first_met)
        is_named = is_layer_name(family.name)
        is_list = members[0].key.isdigit()
        if len(members) == 1:
            return is_named and members[0].is_block
        if not (is_named or is_list or parts) or not self._compose(members):
            why = "its siblings do not compose" if is_named else "its siblings are not named layers"
            self.reasons |= {self._index[leaf.path]: why for m in members for leaf in m.leaves}
            return False
        for layer, member in enumerate(members):
            for leaf in member.leaves:
                tensor = member.inside(leaf)
                if len(set(family.tensors[tensor].values())) > 1:
                    tensor = f"{tensor} {leaf.shape}"
                place = Place(family.group, tensor, (), (layer,), "trace")
                self.places[self._index[leaf.path]] = place
        return True

    def _compose(self, members: Sequence[Node]) -> bool:
        """Whether each of some nodes meets what the one before it has made."""
        ordered = sorted(members, key=self._first_met)
        pieces = [
            [
                piece
                for leaf in node.leaves
                for piece in self._pieces.get(self._index[leaf.path], [])
            ]
            for node in ordered
        ]
        return all(
            any(self._walk.first_met[late] & self._walk.bits[early] for late in b for early in a)
            for a, b in itertools.pairwise(pieces)
        )

    def _chained(self, pieces: Sequence[_Piece]) -> bool:
        """Whether each piece meets what the one before it has made."""
        return all(
            self._walk.first_met[late] & self._walk.bits[early]
            for early, late in itertools.pairwise(pieces)
        )

    def _first_met(self, node: Node) -> int:
        return min(self._when(self._index[leaf.path]) for leaf in node.leaves)

    def _when(self, leaf: int) -> int:
        """When data first meets a leaf."""
        return min((self._order[piece] for piece in self._pieces.get(leaf, [])), default=1 << 60)

    def _node(self, leaves: Iterable[int]) -> Node:
        return Node("", tuple(Known(self._paths[leaf], self._shapes[leaf]) for leaf in leaves))

    def _name(self, leaves: Sequence[int]) -> str:
        """A name of its own for a group: what the paths have in common."""
        name = common_path([self._paths[leaf] for leaf in leaves]) or "layers"
        self._names[name] += 1
        return f"{name} ({self._names[name]})" if self._names[name] > 1 else name


def _groups(loops_of: Mapping[int, frozenset[_Loop]]) -> list[list[int]]:
    """Leaves that share a loop, as the forward and the backward pass do, are one group."""
    groups: list[tuple[list[int], frozenset[_Loop]]] = []
    for leaf, loops in loops_of.items():
        leaves, joined = [leaf], loops
        for group in [group for group in groups if group[1] & loops]:
            groups.remove(group)
            leaves, joined = group[0] + leaves, joined | group[1]
        groups.append((leaves, joined))
    return [sorted(leaves) for leaves, _ in groups]
