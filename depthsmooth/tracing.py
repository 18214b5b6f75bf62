"""Where depth is, exactly: the axes over which the forward pass scans its layers.

Every parameter is followed through the jaxpr of the user's function. Where a value
made of a parameter enters a ``scan`` as a scanned operand, the parameter's axis that
became its leading dimension is a candidate for depth. The loop is one over *layers*
if a slice it takes of some parameter is contracted with what a slot of its carry
holds, and the product comes back to that slot: layers compose, while experts and
chunks of a vocabulary only add up.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.layout import Depth, DepthNotFoundError, Leaf
from depthsmooth.places import Place, path_string

if TYPE_CHECKING:
    from jax.extend import core  # its import takes 50 ms

_Axes = tuple[int | None, ...]
_Shape = tuple[int, ...]
_Loop = tuple[int, ...]

_CONTRACTIONS = frozenset(
    {"conv_general_dilated", "dot_general", "ragged_dot", "ragged_dot_general", "scaled_matmul"}
)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter inside a value.

    Attributes:
      leaf: index of the parameter.
      axes: for each dimension of the value, the parameter's axis that it runs
        along; None where that is not certain.
      taken: the loops that took a slice of the parameter, and along which axis.
    """

    leaf: int
    axes: _Axes
    taken: tuple[tuple[_Loop, int | None], ...] = ()


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


@dataclasses.dataclass(frozen=True)
class _Value:
    """What an intermediate value is made of.

    Attributes:
      parts: its parameters, if it is made of nothing but parameters and constants.
      sources: what else it depends on.
    """

    parts: frozenset[_Part] = frozenset()
    sources: frozenset[_Source] = frozenset()


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
    places = _places(walk, paths, [np.shape(leaf) for leaf in leaves])
    if not places:
        raise DepthNotFoundError(
            f"None of the {len(paths)} parameters, like {paths[0]} {np.shape(leaves[0])}, is "
            "scanned over by a loop over layers in this function. If layers are stacked there, "
            "say where with Depth.from_rules({'.*/layers/.*': axis})."
            if paths
            else "There are no parameters. Give trace_depth the tree that the optimizer is given."
        )
    return Depth(
        tuple(
            Leaf(path, np.shape(leaf), places.get(index))
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
    """One pass over a jaxpr, gathering what its loops do to parameters.

    A loop is named by the equations that lead to it, so that a function called
    twice has two loops, and a body walked twice has one.

    Attributes:
      scanned: for each leaf, the axes and the loops that scan over it.
      layer_loops: the loops that compose what they do with parameter slices.
    """

    def __init__(self) -> None:
        self.scanned: dict[int, set[tuple[int, _Loop]]] = {}
        self.layer_loops: set[_Loop] = set()
        self._callers: _Loop = ()

    def function(self, jaxpr: core.Jaxpr, parameters: int) -> None:
        """Walks a function whose first inputs are the parameters."""
        data = _Value(sources=frozenset({_DATA}))
        values = [data] * len(jaxpr.invars)
        for leaf, variable in enumerate(jaxpr.invars[:parameters]):
            axes = tuple(range(len(_shape(variable))))
            # Integers can't be mixed, so they are as good as constants.
            parts = {_Part(leaf, axes)} if _is_inexact(variable) else ()
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
        if name in _CONTRACTIONS and (composed := _composed(values)):
            product = _Value(sources=_join(values).sources | composed)
            return [product] * len(equation.outvars)
        if name == "scan":
            follow = self._scan
        elif name == "while":
            follow = self._while
        elif name == "cond":
            follow = self._cond
        elif _callee(equation) is not None:
            follow = self._call
        else:
            return _outputs(equation, values)
        callers, self._callers = self._callers, (*self._callers, id(equation))
        results = follow(equation, values)
        self._callers = callers
        return results

    def _call(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        callee = _callee(equation)
        assert callee is not None
        return self._jaxpr(callee, values)

    def _cond(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        predicate, *operands = values
        branches = [self._jaxpr(branch.jaxpr, operands) for branch in equation.params["branches"]]
        return [_join([predicate, *results]) for results in zip(*branches, strict=True)]

    def _scan(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        body = equation.params["jaxpr"].jaxpr
        consts, carries = _scan_split(equation, body)
        loop = self._callers
        sliced = [self._slice(value, loop) for value in values[consts + carries :]]
        carry, results = self._settle(
            body, values[:consts], values[consts : consts + carries], sliced, loop
        )
        if any(_Source(loop, k, True) in value.sources for k, value in enumerate(carry)):
            self.layer_loops.add(loop)
        stacked = [_stack(value, loop) for value in results[carries:]]
        return [_outside(value, loop) for value in carry + stacked]

    def _while(self, equation: core.JaxprEqn, values: list[_Value]) -> list[_Value]:
        body = equation.params["body_jaxpr"].jaxpr
        ours = values[equation.params["cond_nconsts"] :]
        consts = equation.params["body_nconsts"]
        carry, _ = self._settle(body, ours[:consts], ours[consts:], [], self._callers)
        return [_outside(value, self._callers) for value in carry]

    def _settle(
        self,
        body: core.Jaxpr,
        consts: list[_Value],
        carry: list[_Value],
        sliced: list[_Value],
        loop: _Loop,
    ) -> tuple[list[_Value], list[_Value]]:
        """Walks a loop's body until its carry depends on nothing more: carry, results."""
        while True:
            results = self._jaxpr(body, [*consts, *carry, *sliced])
            grown = [
                # What comes back as the very same value is a constant of the loop.
                value if result is value else _carried(value, result, _Source(loop, slot))
                for slot, (value, result) in enumerate(zip(carry, results, strict=False))
            ]
            if grown == carry:
                return carry, results
            carry = grown

    def _slice(self, value: _Value, loop: _Loop) -> _Value:
        """What the body sees of a scanned operand: its leading dimension is taken."""
        for part in value.parts:
            if part.axes[0] is not None:
                self.scanned.setdefault(part.leaf, set()).add((part.axes[0], loop))
        parts = (
            _Part(part.leaf, part.axes[1:], (*part.taken, (loop, part.axes[0])))
            for part in value.parts
        )
        return _Value(frozenset(parts), value.sources)


def _stack(value: _Value, loop: _Loop) -> _Value:
    """What leaves a scan stacked: a slice taken by the loop gets its axis back."""
    parts = set()
    for part in value.parts:
        if part.taken and part.taken[-1][0] == loop:
            parts.add(_Part(part.leaf, (part.taken[-1][1], *part.axes), part.taken[:-1]))
        else:
            parts.add(_Part(part.leaf, (None, *part.axes), part.taken))
    return _Value(frozenset(parts), value.sources)


def _composed(values: Sequence[_Value]) -> frozenset[_Source]:
    """The carry slots that a contraction brings together with a slice their loop took."""
    slicing = {loop for value in values for part in value.parts for loop, _ in part.taken}
    return frozenset(
        source._replace(composed=True)
        for value in values
        for source in value.sources
        if source.loop in slicing
    )


def _carried(value: _Value, result: _Value, slot: _Source) -> _Value:
    """A carry as later iterations see it."""
    return _Value(sources=value.sources | result.sources | {slot})


def _outside(value: _Value, loop: _Loop) -> _Value:
    """What a loop has carried is data to all that comes after it."""
    inner = {source for source in value.sources if source.loop == loop}
    return _Value(value.parts, value.sources - inner | {_DATA}) if inner else value


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


def _join(values: Sequence[_Value]) -> _Value:
    """A value that may be any of several, or depends on all of them."""
    sources = frozenset().union(*(value.sources for value in values))
    parts = frozenset().union(*(value.parts for value in values))
    return _Value(frozenset() if sources else parts, sources)


def _outputs(equation: core.JaxprEqn, values: Sequence[_Value]) -> list[_Value]:
    """The results of a primitive, with the parameter axis of each dimension."""
    name = equation.primitive.name
    if name == "optimization_barrier":
        return list(values)
    joined = _join(values)
    if not joined.parts:
        return [joined] * len(equation.outvars)
    moved = _AXIS_RULES.get(name, _lost)
    operands = [
        (part, _shape(atom))
        for atom, value in zip(equation.invars, values, strict=True)
        for part in value.parts
    ]
    results = []
    for after in map(_shape, equation.outvars):
        parts = (
            _Part(part.leaf, moved(part.axes, before, after, equation.params), part.taken)
            for part, before in operands
        )
        results.append(_Value(frozenset(parts)))
    return results


def _is_inexact(atom: core.Var) -> bool:
    return jnp.issubdtype(getattr(atom.aval, "dtype", np.bool_), jnp.inexact)


def _shape(atom: core.Var | core.Literal) -> _Shape:
    return getattr(atom.aval, "shape", ())


_AxisRule = Callable[[_Axes, _Shape, _Shape, Mapping[str, Any]], _Axes]


def _lost(axes: _Axes, before: _Shape, after: _Shape, params: Mapping[str, Any]) -> _Axes:
    return (None,) * len(after)


def _elementwise(axes: _Axes, before: _Shape, after: _Shape, params: Mapping[str, Any]) -> _Axes:
    return axes if before == after else (None,) * len(after)


def _transpose(axes: _Axes, before: _Shape, after: _Shape, params: Mapping[str, Any]) -> _Axes:
    return tuple(axes[dimension] for dimension in params["permutation"])


def _broadcast(axes: _Axes, before: _Shape, after: _Shape, params: Mapping[str, Any]) -> _Axes:
    origin = {to: at for at, to in enumerate(params["broadcast_dimensions"])}
    return tuple(
        axes[origin[to]] if to in origin and before[origin[to]] == size else None
        for to, size in enumerate(after)
    )


def _reshape(axes: _Axes, before: _Shape, after: _Shape, params: Mapping[str, Any]) -> _Axes:
    """Adding and dropping dimensions of size 1 keeps the others."""
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        return (None,) * len(after)
    kept = iter([axis for axis, size in zip(axes, before, strict=True) if size != 1])
    return tuple(None if size == 1 else next(kept) for size in after)


_ELEMENTWISE = [
    *("abs", "add", "clamp", "convert_element_type", "copy", "copy_p", "cos", "div", "exp", "exp2"),
    *("expm1", "integer_pow", "log", "log1p", "logistic", "max", "mesh_cast", "min", "mul", "name"),
    *("neg", "pow", "pvary", "reduce_precision", "reshard", "rsqrt", "select_n", "sign", "sin"),
    *("sharding_constraint", "sqrt", "square", "sub", "tanh"),
]
_AXIS_RULES: dict[str, _AxisRule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
}


def _places(walk: _Walk, paths: Sequence[str], shapes: Sequence[_Shape]) -> dict[int, Place]:
    """The place of every leaf that a loop over layers scans over."""
    found = {}
    for leaf, entries in sorted(walk.scanned.items()):
        axes = {axis for axis, loop in entries if loop in walk.layer_loops}
        if len(axes) > 1:
            raise ValueError(
                f"{paths[leaf]} {shapes[leaf]} is scanned over along the axes {sorted(axes)}, "
                "but depth has to be one axis. Say which with Depth.from_rules."
            )
        if axes:
            loops = {loop for _, loop in entries if loop in walk.layer_loops}
            found[leaf] = (axes.pop(), loops)
    places = {}
    names = collections.Counter[str]()
    for leaves in _groups({leaf: loops for leaf, (_, loops) in found.items()}):
        name = _common_path([paths[leaf] for leaf in leaves])
        names[name] += 1
        name += f" ({names[name]})" if names[name] > 1 else ""
        for leaf in leaves:
            axis = found[leaf][0]
            places[leaf] = Place(
                name, paths[leaf], (axis,), tuple(range(shapes[leaf][axis])), "trace"
            )
    return places


def _groups(loops_of: Mapping[int, set[_Loop]]) -> list[list[int]]:
    """Leaves that share a loop, as the forward and the backward pass do, are one group."""
    groups: list[tuple[list[int], set[_Loop]]] = []
    for leaf, loops in loops_of.items():
        leaves, joined = [leaf], set(loops)
        for group in [group for group in groups if group[1] & loops]:
            groups.remove(group)
            leaves, joined = group[0] + leaves, joined | group[1]
        groups.append((leaves, joined))
    return [leaves for leaves, _ in groups]


def _common_path(paths: Sequence[str]) -> str:
    """The keys that all the paths begin with."""
    keys = zip(*(path.split("/") for path in paths), strict=False)
    common = itertools.takewhile(lambda key: len(set(key)) == 1, keys)
    return "/".join(key[0] for key in common) or "layers"
