"""Numbers of iterations, held against what a loop makes of its counter."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from depthsmooth.depth.tracing.counters import Number, fold

LOOP = (7,)
SCALARS = [
    lambda i, k: i + k,
    lambda i, k: k - i,
    lambda i, k: i * k,
    lambda i, k: -i,
    lambda i, k: i + 2 * i,
    lambda i, k: jnp.where(i < k, i + k, i),
    lambda i, k: i.astype("int16"),
    lambda i, k: i // 2,
    lambda i, k: jnp.broadcast_to(i, (3,))[::-1].reshape(3, 1)[0, 0],
]
ARRAYS = [
    lambda a, k: a + k,
    lambda a, k: a[::-1],
    lambda a, k: -a,
    lambda a, k: a[:, None] * jnp.ones((1, 2), int),
    lambda a, k: jnp.where(a < k, a, a + 1),
    lambda a, k: a - a[::-1],
]


def number_of(jaxpr, number):
    """What is known of the last result of a jaxpr whose input is known."""
    known = {jaxpr.invars[0]: number}
    for equation in jaxpr.eqns:
        if "jaxpr" in equation.params:
            return None
        numbers = [
            known.get(atom) if not hasattr(atom, "val") else Number(int(atom.val))
            for atom in equation.invars
        ]
        before = [atom.aval.shape for atom in equation.invars]
        [result] = equation.outvars
        name, params = equation.primitive.name, equation.params
        known[result] = fold(name, numbers, before, result.aval.shape, params)
    return known.get(jaxpr.outvars[0])


def values(number, length):
    return [number.start + number.step * k for k in range(length)]


def composed(steps):
    def fn(x):
        for step, k in steps:
            x = step(x, k)
        return x

    return fn


def chains(of):
    return st.lists(st.tuples(st.sampled_from(of), st.integers(-3, 6)), max_size=4)


@given(steps=chains(SCALARS), start=st.integers(-2, 6), step=st.sampled_from([-1, 1, 2]))
def test_what_is_known_of_a_counter_is_right(steps, start, step):
    fn, length = composed(steps), 5
    with jax.disable_jit():
        jaxpr = jax.make_jaxpr(fn)(0).jaxpr
        number = number_of(jaxpr, Number(start, step, length, LOOP))
        counted = [int(fn(jnp.asarray(start + step * k))) for k in range(length)]
    if number is not None:
        assert number.loop == (LOOP if number.step else number.loop)
        assert values(number, length) == counted


@given(steps=chains(ARRAYS), start=st.integers(-2, 6))
def test_what_is_known_of_an_array_that_counts_is_right(steps, start):
    fn, numbers = composed(steps), np.arange(start, start + 5)
    with jax.disable_jit():
        try:
            jaxpr = jax.make_jaxpr(fn)(jnp.asarray(numbers)).jaxpr
        except (IndexError, TypeError, ValueError):
            return
        number = number_of(jaxpr, Number(start, 1, 5))
        if number is not None:
            counted = np.asarray(fn(jnp.asarray(numbers)))
            assert (counted == (values(number, 5) if number.step else number.start)).all()


def test_the_sum_of_two_loops_is_not_known():
    inner, outer = Number(0, 1, 3, (1, 2)), Number(0, 1, 3, (1,))
    assert fold("add", [inner, outer], [(), ()], (), {}) is None
    assert fold("add", [inner, None], [(), ()], (), {}) is None
