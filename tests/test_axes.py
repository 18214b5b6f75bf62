"""The table of axis rules, held against what the operations do to an array of coordinates."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from depthsmooth.depth.tracing.axes import UNKNOWN, cut, own, propagate


@st.composite
def operations(draw, shape):
    """An operation on an array of that shape, and whether it keeps all that is known."""
    axis = draw(st.integers(0, len(shape) - 1))
    kind = draw(
        st.sampled_from(
            [
                "transpose",
                "merge",
                "split",
                "rev",
                "slice",
                "squeeze",
                "expand",
                "strided",
                "double",
            ]
        )
    )
    if kind == "transpose":
        order = draw(st.permutations(range(len(shape))))
        return lambda x: jax.lax.transpose(x, order)
    if kind == "merge":
        end = draw(st.integers(axis, len(shape)))
        return lambda x: jax.lax.reshape(
            x, (*shape[:axis], math.prod(shape[axis:end]), *shape[end:])
        )
    if kind == "split":
        outer = draw(
            st.sampled_from([k for k in range(1, shape[axis] + 1) if shape[axis] % k == 0])
        )
        sizes = (*shape[:axis], outer, shape[axis] // outer, *shape[axis + 1 :])
        return lambda x: jax.lax.reshape(x, sizes)
    if kind == "rev":
        return lambda x: jax.lax.rev(x, (axis,))
    if kind == "slice":
        start = draw(st.integers(0, shape[axis] - 1))
        stop = draw(st.integers(start + 1, shape[axis]))
        return lambda x: jax.lax.slice_in_dim(x, start, stop, axis=axis)
    if kind == "squeeze" and 1 in shape and len(shape) > 1:
        return lambda x: jax.lax.squeeze(x, (shape.index(1),))
    if kind == "expand" and len(shape) < 5:
        return lambda x: jax.lax.expand_dims(x, (axis,))
    if kind == "strided":
        return lambda x: jax.lax.slice_in_dim(x, 0, shape[axis], 2, axis)
    if kind == "double" and shape[axis] < 4:
        return lambda x: jax.lax.concatenate([x, x], axis)
    return lambda x: x * 1.0


@st.composite
def chains(draw):
    """A shape, and operations one after another."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    first, steps = shape, []
    for _ in range(draw(st.integers(0, 6))):
        step = draw(operations(shape))
        steps.append(step)
        shape = jax.eval_shape(step, jax.ShapeDtypeStruct(shape, "float32")).shape
    return first, steps


def followed(shape, steps):
    """What the dimensions after some operations run along, and from where if that is certain."""
    axes, origin, certain = own(shape), (0,) * len(shape), True
    for step in steps:
        jaxpr = jax.make_jaxpr(step)(jax.ShapeDtypeStruct(shape, "float32"))
        for equation in jaxpr.eqns:
            name, params = equation.primitive.name, equation.params
            if name == "slice":
                strides = params["strides"] or (1,) * len(shape)
                ends = params["start_indices"], params["limit_indices"]
                axes, origin = cut(axes, origin, shape, *ends, strides)
            else:
                axes = propagate(name, axes, shape, equation.outvars[0].aval.shape, params)
            shape = equation.outvars[0].aval.shape
            certain &= not any(
                axis == UNKNOWN and n > 1 for axis, n in zip(axes, shape, strict=True)
            )
    return axes, np.asarray(origin) if certain else None


def along(dimension, axes):
    """The coordinates that the steps along a dimension add up to."""
    steps = [
        range(0, f.size * f.stride, f.stride)
        if f.stride > 0
        else range((1 - f.size) * f.stride, f.stride, f.stride)
        for f in dimension
    ]
    sums = np.zeros((math.prod(f.size for f in dimension), axes), int)
    for k, digits in enumerate(itertools.product(*steps)):
        for factor, digit in zip(dimension, digits, strict=True):
            sums[k, factor.axis] += digit
    return sums


@given(chain=chains())
@example(((2,), [lambda x: jax.lax.rev(x, (0,)), lambda x: jax.lax.slice_in_dim(x, 0, 2, 2, 0)]))
@example(((3,), [lambda x: jax.lax.slice_in_dim(x, 1, 3, 2, 0)]))
def test_dimensions_run_along_the_axes_they_are_said_to(chain):
    shape, steps = chain
    axes, expected = followed(shape, steps)
    coordinates = [jnp.asarray(index, "float32") for index in np.indices(shape)]
    for step in steps:
        coordinates = [step(index) for index in coordinates]
    coordinates = np.stack(coordinates, -1).astype(int)
    assert len(axes) == coordinates.ndim - 1
    for at, dimension in enumerate(axes):
        moved = np.moveaxis(coordinates, at, 0)
        if dimension == UNKNOWN:
            continue
        steps_along = along(dimension, len(shape))
        steps_along -= (beginning := steps_along[0].copy())
        front = steps_along.reshape(len(moved), *[1] * (moved.ndim - 2), len(shape))
        assert (moved - moved[:1] == front).all()
        if expected is not None:
            expected = expected + beginning
    if expected is not None:
        np.testing.assert_array_equal(coordinates[(0,) * len(axes)], expected)
