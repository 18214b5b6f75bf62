"""Operators of many diagonals are applied as a matrix, wherever the layers are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import depthsmooth as ds
from depthsmooth.operators.stencil import Stencil, exists, join, matrix_of
from tests.laid_out import mixed as mixed_by
from tests.test_tracks import laid_out, random_stencil

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.optimised]


def lowered(layers, radius):
    stencil = random_stencil(layers, radius, 0)
    updates = jnp.ones((layers, 3))
    fn = jax.jit(lambda u: mixed_by(stencil, [u], [(0,)], [range(layers)]))
    return fn.lower(updates).as_text()


def test_the_crossover_is_at_sixteen_diagonals():
    assert "dot_general" not in lowered(24, 7)
    assert "dot_general" in lowered(24, 8)
    assert "pad" not in lowered(24, 8)


@given(
    layout=laid_out(),
    dtype=st.sampled_from(["float32", "bfloat16", "complex64"]),
    traced=st.booleans(),
    seed=st.integers(0, 9),
)
def test_is_the_same_product_in_every_layout(layout, dtype, traced, seed):
    stack, arrays, axes, held = layout
    layers = len(stack)
    # A radius beyond the ends makes diagonals enough for any number of layers.
    offsets = tuple(range(-max(layers, 9), max(layers, 9) + 1))
    weights = np.random.default_rng(seed).normal(size=(len(offsets), layers))
    weights = weights * exists(offsets, layers)
    matrix = matrix_of(Stencil(offsets, weights))

    def mix(updates, weights):
        return mixed_by(Stencil(offsets, weights), updates, axes, held)

    updates = [jnp.asarray(array, dtype) for array in arrays]
    mixed = jax.jit(mix)(updates, weights) if traced else mix(updates, weights)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "complex64": 1e-5}[dtype]
    stack = np.asarray(jnp.asarray(stack, dtype)).astype(complex)
    for result, update, to, ours in zip(mixed, updates, axes, held, strict=True):
        assert result.dtype == update.dtype
        front = np.moveaxis(np.asarray(result).astype(complex), to, range(len(to)))
        expected = np.tensordot(matrix[list(ours)], stack, 1)
        np.testing.assert_allclose(
            front.reshape(expected.shape), expected, rtol=tolerance, atol=tolerance * 10
        )


def test_in_highest_precision_and_float64():
    stencil = random_stencil(24, 9, 1)
    updates = np.random.default_rng(0).normal(size=(24, 6))
    text = jax.jit(lambda u: mixed_by(stencil, [u], [(0,)], [range(24)])).lower(
        jnp.asarray(updates, "float32")
    )
    assert "HIGHEST" in text.as_text()
    with jax.enable_x64(True):
        [mixed] = mixed_by(stencil, [jnp.asarray(updates)], [(0,)], [range(24)])
        assert mixed.dtype == "float64"
        np.testing.assert_allclose(mixed, matrix_of(stencil) @ updates, rtol=1e-13, atol=1e-13)


def test_runs_are_kept_apart():
    one, two = random_stencil(12, 9, 0), random_stencil(9, 8, 1)
    updates = jnp.asarray(np.random.default_rng(0).normal(size=(21, 4)), "float32")
    [mixed] = mixed_by(join([one, two]), [updates], [(0,)], [range(21)])
    for stencil, part in ((one, slice(0, 12)), (two, slice(12, 21))):
        expected = matrix_of(stencil) @ np.asarray(updates)[part]
        np.testing.assert_allclose(mixed[part], expected, rtol=1e-4, atol=1e-5)


def test_a_nan_stays_between_cuts():
    updates = {"layers": jnp.ones((24, 3)).at[20].set(jnp.nan)}
    depth = ds.Depth.from_rules({"layers": 0})
    tx = ds.augment_over_depth(ds.diffusion(1.0), depth=depth, cuts=(12,))
    bad = jnp.isnan(tx.update(updates, tx.init(updates))[0]["layers"]).any(1)
    assert bad.tolist() == [False] * 12 + [True] * 12


@pytest.mark.parametrize("traced", [False, True])
def test_weak_types_are_kept(traced):
    stencil = random_stencil(12, 9, 0)
    parts = [jnp.asarray(float(k)) for k in range(12)]
    assert all(part.weak_type for part in parts)
    run = jax.jit(mixed_by, static_argnums=(0, 2, 3)) if traced else mixed_by
    mixed = run(stencil, parts, ((),) * 12, tuple((k,) for k in range(12)))
    assert all(part.weak_type for part in mixed)


def test_operators_of_large_radius():
    updates = {"layers": jnp.asarray(np.random.default_rng(0).normal(size=(3, 24)), "float32")}
    depth = ds.Depth.from_rules({"layers": 1})
    for operator, cuts in itertools.product(
        [ds.ema(0.9), ds.diffusion(3.0), ds.mean(0.5)], [(), (7,)]
    ):
        tx = ds.augment_over_depth(operator, depth=depth, cuts=cuts)
        [mixed] = jax.tree.leaves(tx.update(updates, tx.init(updates))[0])
        ends = [0, *cuts, 24]
        for a, b in itertools.pairwise(ends):
            matrix = ds.operator_matrix(operator, b - a)
            expected = np.asarray(updates["layers"])[:, a:b] @ matrix.T
            np.testing.assert_allclose(mixed[:, a:b], expected, rtol=1e-4, atol=1e-5)
