"""What each primitive does to the dimensions of an array: which axis of its input each runs along.

A dimension of a value runs along factors of a parameter's axes, outer to inner: splitting an
axis by a reshape leaves two dimensions with a factor each, merging two leaves one with both.
Where that is not certain there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from depthsmooth.depth.leaves import Shape


class Factor(NamedTuple):
    """An axis, or a factor of it, that a dimension runs along.

    Attributes:
      axis: the axis.
      stride: how far one step goes along it; negative if backwards.
      size: the number of steps.
    """

    axis: int
    stride: int
    size: int


class Span(NamedTuple):
    """A part of an axis, from ``start`` to before ``stop``, run along in one direction."""

    axis: int
    start: int
    stop: int
    backwards: bool = False


Dimension = tuple[Factor, ...]
"""What a dimension runs along, outer to inner; nothing where that is not certain."""
Dimensions = tuple[Dimension, ...]
Origin = tuple[int, ...]
"""How far from the beginning of each axis the part lies that dimensions run along."""

UNKNOWN: Dimension = ()


def own(shape: Shape) -> Dimensions:
    """The dimensions of an array that run along its own axes."""
    return tuple((Factor(axis, 1, size),) for axis, size in enumerate(shape))


def backwards(dimension: Dimension) -> Dimension:
    """The same, from the last to the first."""
    return tuple(factor._replace(stride=-factor.stride) for factor in dimension)


def spans_of(factors: Sequence[Factor], origin: Origin) -> list[Span] | None:
    """What factors, outer to inner, run along step by step: one span of each axis.

    None if the factors of an axis are not together, not in order, or leave steps out.

    Example:
      >>> spans_of([Factor(1, -4, 3), Factor(1, -1, 4)], origin=(0, 2))
      [Span(axis=1, start=2, stop=14, backwards=True)]
    """
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if last and last.axis == factor.axis and last.stride == factor.stride * factor.size:
            merged[-1] = factor._replace(size=last.size * factor.size)
        else:
            merged.append(factor)
    axes = {factor.axis for factor in merged}
    if len(axes) < len(merged) or any(abs(factor.stride) != 1 for factor in merged):
        return None
    starts = [origin[factor.axis] for factor in merged]
    return [
        Span(factor.axis, start, start + factor.size, factor.stride < 0)
        for factor, start in zip(merged, starts, strict=True)
    ]


def cut(
    axes: Dimensions,
    origin: Origin,
    before: Shape,
    starts: Sequence[int],
    stops: Sequence[int],
    strides: Sequence[int],
) -> tuple[Dimensions, Origin]:
    """What the dimensions of a slice run along, and where on each axis it begins.

    Example:
      >>> cut(own((6, 4)), (0, 0), (6, 4), starts=(2, 0), stops=(5, 4), strides=(1, 1))
      (((Factor(axis=0, stride=1, size=3),), (Factor(axis=1, stride=1, size=4),)), (2, 0))
    """
    dimensions, begins = list(axes), list(origin)
    for at, dimension in enumerate(axes):
        start, stop = starts[at], stops[at]
        if (start, stop, strides[at]) == (0, before[at], 1):
            continue
        dimensions[at] = UNKNOWN
        if 0 < stop - start <= strides[at]:
            stop = start + 1  # what is one step alone has no stride
        if len(dimension) == 1 and (strides[at] == 1 or stop == start + 1):
            [factor] = dimension
            dimensions[at] = (factor._replace(size=stop - start),)
            skipped = start if factor.stride > 0 else before[at] - stop
            begins[factor.axis] += skipped * abs(factor.stride)
    return tuple(dimensions), tuple(begins)


_AxisRule = Callable[[Dimensions, Shape, Shape, Mapping[str, Any], int], Dimensions]
"""From an operand's dimensions and shape, the result's shape, the primitive's parameters and the
operand's position to the result's dimensions."""


def propagate(
    primitive: str,
    axes: Dimensions,
    before: Shape,
    result: Shape,
    params: Mapping[str, Any],
    position: int = 0,
) -> Dimensions:
    """What the dimensions of a primitive's result run along, by way of one operand."""
    rule: _AxisRule = _RULES.get(primitive, _lost)
    moved = rule(axes, before, result, params, position)
    return moved if len(moved) == len(result) else _lost(axes, before, result, params, position)


def _lost(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    return (UNKNOWN,) * len(result)


def _elementwise(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    if len(before) != len(result):
        return _lost(axes, before, result, params, k)
    sizes = zip(axes, before, result, strict=True)
    return tuple(axis if size == to else UNKNOWN for axis, size, to in sizes)


def _transpose(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    return tuple(axes[dimension] for dimension in params["permutation"])


def _broadcast(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    if k:
        return _lost(axes, before, result, params, k)
    origin = {to: at for at, to in enumerate(params["broadcast_dimensions"])}
    return tuple(
        axes[origin[to]] if to in origin and before[origin[to]] == size else UNKNOWN
        for to, size in enumerate(result)
    )


def _reshape(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    """Splits and merges factors; dimensions of size 1 keep theirs if there are as many of them."""
    ones = [axis for axis, size in zip(axes, before, strict=True) if size == 1]
    if result.count(1) != len(ones):
        ones = [UNKNOWN] * result.count(1)
    factors: list[Factor | int] = []
    for axis, size in zip(axes, before, strict=True):
        known = math.prod(factor.size for factor in axis) == size
        factors += (f for f in axis if f.size > 1) if known and axis else [size] if size > 1 else []
    dimensions: list[Dimension] = []
    for size in result:
        if size == 1:
            dimensions.append(ones.pop(0))
            continue
        taken: list[Factor] = []
        certain = True
        while size > 1:
            if not factors:
                return _lost(axes, before, result, params, k)
            first = factors.pop(0)
            if isinstance(first, int):
                certain, first = False, Factor(-1, 1, first)
            if size % first.size == 0:
                taken.append(first)
                size //= first.size
            elif first.size % size == 0:
                inner = first.size // size
                taken.append(Factor(first.axis, first.stride * inner, size))
                factors.insert(0, first._replace(size=inner) if certain else inner)
                size = 1
            else:
                return _lost(axes, before, result, params, k)
        dimensions.append(tuple(taken) if certain else UNKNOWN)
    return tuple(dimensions)


def _drop(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    dropped = params["dimensions"] if "dimensions" in params else params["axes"]
    gone = {dimension % len(before) for dimension in dropped}
    return tuple(axis for at, axis in enumerate(axes) if at not in gone)


def _reverse(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    flipped = params["dimensions"]
    return tuple(backwards(axis) if at in flipped else axis for at, axis in enumerate(axes))


def _lose_one(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    at = params["dimension"] if "dimension" in params else params["axis"]
    return (*axes[:at], UNKNOWN, *axes[at + 1 :])


def _insert(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    at = params["axis"] % len(result)
    return (*axes[:at], UNKNOWN, *axes[at:])


def _pad(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    return (_lost if k else _elementwise)(axes, before, result, params, k)


def _contract(axes: Dimensions, before: Shape, result: Shape, params: Any, k: int) -> Dimensions:
    contracted, batch = (sides[k] for sides in params["dimension_numbers"])
    free = [axis for at, axis in enumerate(axes) if at not in (*contracted, *batch)]
    others = len(result) - len(batch) - len(free)
    rest = [*free, *[UNKNOWN] * others] if k == 0 else [*[UNKNOWN] * others, *free]
    return (*(axes[at] for at in batch), *rest)


_ELEMENTWISE = [
    *("abs", "add", "add_any", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p"),
    *("cos", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "integer_pow"),
    *("log", "log1p", "logistic", "max", "mesh_cast", "min", "mul", "name", "neg", "nextafter"),
    *("pcast", "pow", "pvary", "reduce_precision", "rem", "reshard", "round", "rsqrt", "select_n"),
    *("sharding_constraint", "sign", "sin", "sqrt", "square", "sub", "tanh"),
]
_RULES: dict[str, _AxisRule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(["cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"], _lose_one),
    **dict.fromkeys(["reduce_max", "reduce_min", "reduce_prod", "reduce_sum", "squeeze"], _drop),
    "broadcast_in_dim": _broadcast,
    "concatenate": _lose_one,
    "dot_general": _contract,
    "expand_dims": _reshape,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "stack": _insert,
    "transpose": _transpose,
}
