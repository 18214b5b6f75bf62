"""The numeric kernel: values, dtypes, weak types, shardings, memory traffic's shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthsmooth import window
from depthsmooth.operators.stencil import Stencil
from tests import reference
from tests.laid_out import mixed as mixed_by

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.optimised]

DTYPES = {
    "bfloat16": 1e-2,
    "float16": 1e-3,
    "float32": 1e-6,
    "float64": 1e-14,
    "complex64": 1e-6,
}


def apply_along(stencil, updates, axis):
    """Applies a stencil to one stack of layers."""
    [mixed] = mixed_by(stencil, [updates], [(axis,)], [range(updates.shape[axis])])
    return mixed


def smooth(updates, alpha, axis):
    axis %= updates.ndim
    return apply_along(window(alpha)(updates.shape[axis], 0), updates, axis)


def random(shape, dtype="float32", seed=0):
    values = np.random.default_rng(seed).normal(size=(2, *shape))
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.asarray(values[0] + 1j * values[1] if is_complex else values[0], dtype)


def assert_close(actual, desired, tolerance):
    scale = np.abs(desired).max() if desired.size else 1.0
    difference = np.abs(np.asarray(actual).astype(desired.dtype) - desired)
    assert difference.max(initial=0.0) <= tolerance * scale


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 24])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.99])
def test_equals_the_reference(layers, axis, dtype, tolerance, alpha):
    shape = [4, 3, 5]
    shape[axis] = layers
    with jax.enable_x64(True):
        updates = random(shape, dtype)
        assert_close(
            jax.jit(smooth, static_argnums=(1, 2))(updates, alpha, axis),
            reference.window(np.asarray(updates), alpha, axis),
            tolerance,
        )


@st.composite
def stacks(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    shape[axis] = draw(st.integers(1, 9))
    return tuple(shape), axis


@given(
    stack=stacks(),
    dtype=st.sampled_from(sorted(DTYPES)),
    alpha=st.floats(0, 0.999),
    seed=st.integers(0, 2**32 - 1),
)
def test_properties_hold_for_every_shape_axis_and_dtype(stack, dtype, alpha, seed):
    shape, axis = stack
    tolerance = DTYPES[dtype]
    with jax.enable_x64(True):
        updates = random(shape, dtype, seed)
        mixed = smooth(updates, alpha, axis)
        expected = reference.window(np.asarray(updates), alpha, axis)
        constant = jnp.broadcast_to(updates.take(jnp.array([0]), axis), shape)
        assert mixed.dtype == updates.dtype
        assert mixed.shape == updates.shape
        assert_close(mixed, expected, tolerance)
        mean = np.asarray(updates).astype(expected.dtype).mean(axis)
        assert_close(np.asarray(mixed).astype(expected.dtype).mean(axis), mean, 9 * tolerance)
        assert_close(
            smooth(constant, alpha, axis), np.asarray(constant).astype(expected.dtype), tolerance
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_narrow_types_are_mixed_in_float32(dtype):
    updates = random((3, 64), dtype)
    in_float32 = smooth(updates.astype("float32"), 0.3, 0).astype(dtype)
    assert np.asarray(smooth(updates, 0.3, 0)).tobytes() == np.asarray(in_float32).tobytes()


@pytest.mark.parametrize(
    ("alpha", "layers"), [(0, 4), (0.0, 4), (0.5, 1)], ids=["int 0", "float 0", "one layer"]
)
def test_identities_are_bit_exact(alpha, layers):
    special = jnp.array([-0.0, jnp.inf, jnp.nan, 1e-45], "float32")
    updates = jnp.broadcast_to(special, (layers, 4))
    mixed = jax.jit(smooth, static_argnums=(1, 2))(updates, alpha, 0)
    assert np.asarray(mixed).tobytes() == np.asarray(updates).tobytes()


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_traced_alpha_keeps_one_layer_bit_for_bit(jit):
    updates = jnp.array([[-0.0, jnp.inf, jnp.nan, 1e-45]], "float32")
    mixed = (jax.jit(smooth, static_argnums=2) if jit else smooth)(updates, jnp.float32(0.5), 0)
    assert np.asarray(mixed).tobytes() == np.asarray(updates).tobytes()


def test_traced_alpha_gives_float64_weights():
    with jax.enable_x64(True):
        updates = random((5, 3), "float64")
        mixed = jax.jit(smooth, static_argnums=2)(updates, jnp.float32(0.25), 0)
        assert_close(mixed, reference.window(np.asarray(updates), 0.25, 0), 1e-14)


@pytest.mark.parametrize("dtype", [None, "float32"], ids=["weak", "strong"])
def test_weak_type_is_kept(dtype):
    def aval(x):
        return jax.typeof(x)

    updates = jnp.full((4, 2), 0.5, dtype)
    assert aval(updates).weak_type == (dtype is None)
    assert aval(smooth(updates, 0.2, 0)) == aval(updates)
    assert jax.eval_shape(lambda x: smooth(x, 0.2, 0), updates).weak_type == (dtype is None)


def test_infinity_stays_away_from_where_there_is_no_neighbour():
    updates = jnp.zeros((4, 1)).at[0].set(jnp.inf)
    mixed = smooth(updates, 0.2, 0)[:, 0]
    np.testing.assert_array_equal(jnp.isfinite(mixed), jnp.array([False, False, True, True]))


def test_any_radius_and_per_layer_weights():
    matrix = np.random.default_rng(0).normal(size=(5, 5))
    offsets = tuple(range(-4, 5))
    weights = np.zeros((9, 5))
    for k, offset in enumerate(offsets):
        for i in range(max(0, -offset), min(5, 5 - offset)):
            weights[k, i] = matrix[i, i + offset]
    updates = random((3, 5, 2))
    mixed = apply_along(Stencil(offsets, weights), updates, 1)
    assert_close(mixed, np.einsum("ij,ajb->aib", matrix, np.asarray(updates, float)), 1e-6)


def test_is_pads_and_products_only():
    """No gather, concatenate, or product of matrices: these cost traffic or memory."""
    primitives = {
        str(equation.primitive)
        for call in jax.make_jaxpr(lambda x: smooth(x, 0.2, 1))(random((3, 4))).eqns
        for equation in call.params["jaxpr"].eqns
    }
    assert "pad" in primitives
    costly = {"gather", "dynamic_slice", "concatenate", "scatter", "dot_general", "while", "scan"}
    assert not primitives & costly


def test_weights_that_are_known_are_constants():
    """Programs have them for numbers, and Stencils of the same numbers are one program."""

    def kernel(alpha):
        traced = jax.make_jaxpr(lambda x: smooth(x, alpha, 0))(random((5, 4)))
        [call] = (eqn for eqn in traced.eqns if eqn.params.get("name") == "_shift_and_add")
        return call

    call = kernel(0.2)
    factors = [
        eqn.invars[0].aval.shape for eqn in call.params["jaxpr"].eqns if str(eqn.primitive) == "mul"
    ]
    assert len(call.invars) == 1
    assert factors == [(), (5, 1), ()]
    assert len(kernel(jnp.float32(0.2)).invars) == 4
    one, same, other = (jax.tree.structure(window(alpha)(5, 0)) for alpha in (0.2, 0.2, 0.3))
    assert one == same
    assert one != other


@pytest.mark.parametrize("alpha", [0.2, jnp.float32(0.2)], ids=["known", "traced"])
def test_a_stencil_is_a_tree(alpha):
    stencil = window(alpha)(5, 0)
    again = jax.tree.map(lambda row: row, stencil)
    assert again.offsets == stencil.offsets
    np.testing.assert_array_equal(again.weights, stencil.weights)


@pytest.mark.parametrize("spec", ["layers", "features", "both"])
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_sharding_is_kept(spec, explicit, jit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("layers", "features"), axis_types=(kind, kind))
    axes = {"layers": ("layers", None), "features": (None, "features")}.get(
        spec, ("layers", "features")
    )
    sharding = jax.NamedSharding(mesh, jax.P(*axes))
    updates = random((4, 8))
    with jax.set_mesh(mesh):
        placed = jax.device_put(updates, sharding)
        mixed = (jax.jit(smooth, static_argnums=(1, 2)) if jit else smooth)(placed, 0.2, 0)
    assert mixed.sharding.is_equivalent_to(sharding, 2)
    assert_close(mixed, reference.window(np.asarray(updates), 0.2, 0), 1e-6)
