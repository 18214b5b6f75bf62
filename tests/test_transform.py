"""smooth_over_depth is a citizen of Optax: it chains, nests, compiles and differentiates."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import depthsmooth as ds
from tests import reference

DEPTH = ds.Depth.from_rules({"layers/.*": 0, "last": -1})


def updates(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "embed": normal(7, 3),
        "layers": {"kernel": normal(5, 3, 2), "bias": normal(5, 2)},
        "last": normal(2, 6),
        "nothing": None,
    }


def smoothed(tree, alpha):
    """The tree that the paper's formula gives."""
    layers = {
        path: reference.window(np.asarray(leaf), alpha, 0).astype(leaf.dtype)
        for path, leaf in tree["layers"].items()
    }
    last = reference.window(np.asarray(tree["last"]), alpha, 1).astype(tree["last"].dtype)
    return tree | {"layers": layers, "last": last}


def assert_close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-6)


def run(tx, tree, steps=1, params=None):
    state = tx.init(tree if params is None else params)
    step = jax.jit(tx.update)
    for _ in range(steps):
        result, state = step(tree, state, params)
    return result, state


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.2, 0.99])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_smooths_what_depth_places_and_nothing_else(alpha, jit):
    tree = updates()
    tx = ds.smooth_over_depth(alpha, depth=DEPTH)
    update = jax.jit(tx.update) if jit else tx.update
    result, _ = update(tree, tx.init(tree))
    assert_close(result, smoothed(tree, alpha))
    chex.assert_trees_all_equal_shapes_and_dtypes(result, tree)
    np.testing.assert_array_equal(result["embed"], tree["embed"])


def test_undeclared_leaves_are_the_same_objects():
    tree = updates()
    tree["odd"] = ("text", 3, np.arange(2))
    tx = ds.smooth_over_depth(0.2, depth=DEPTH)
    result, _ = tx.update(tree, tx.init(tree))
    assert result["embed"] is tree["embed"]
    assert all(a is b for a, b in zip(result["odd"], tree["odd"], strict=True))


def test_alpha_zero_is_the_identity_bit_for_bit():
    tree = updates()
    tx = ds.smooth_over_depth(0.0, depth=DEPTH)
    result, _ = tx.update(tree, tx.init(tree))
    assert result["layers"]["kernel"] is tree["layers"]["kernel"]
    chex.assert_trees_all_equal(jax.jit(tx.update)(tree, tx.init(tree))[0], tree)


def test_state_is_a_count_of_updates():
    tx = ds.smooth_over_depth(0.2, depth=DEPTH)
    state = tx.init(updates())
    assert isinstance(state, ds.SmoothOverDepthState)
    assert (state.count.dtype, state.count.shape, int(state.count)) == (jnp.int32, (), 0)
    _, state = run(tx, updates(), steps=3)
    assert (state.count.dtype, int(state.count)) == (jnp.int32, 3)
    # 4 bytes, whatever alpha is: a schedule can be added without changing a checkpoint.
    scheduled = ds.smooth_over_depth(optax.constant_schedule(0.2), depth=DEPTH)
    chex.assert_trees_all_equal_structs(state, scheduled.init(updates()))


def test_a_schedule_sees_the_count_before_the_update():
    tx = ds.smooth_over_depth(optax.linear_schedule(0.0, 0.4, 4), depth=DEPTH)
    tree = updates()
    for steps in (1, 2, 3):
        result, _ = run(tx, tree, steps)
        assert_close(result, smoothed(tree, 0.1 * (steps - 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_injected_alpha_is_traced_and_changes_without_a_retrace(dtype):
    tree = updates(dtype)
    tx = optax.inject_hyperparams(ds.smooth_over_depth, static_args=("depth",))(
        alpha=0.25, depth=DEPTH
    )
    traces = []

    @jax.jit
    def step(tree, state):
        traces.append(None)
        return tx.update(tree, state)

    state = tx.init(tree)
    for alpha in (0.25, 0.5, 0.0):
        state.hyperparams["alpha"] = jnp.asarray(alpha, state.hyperparams["alpha"].dtype)
        result, state = step(tree, state)
        expected = smoothed(tree, alpha)
        chex.assert_trees_all_close(result, expected, rtol=1e-2 if dtype == "bfloat16" else 1e-5)
    assert len(traces) == 1


def test_injected_schedule():
    tree = updates()
    tx = optax.inject_hyperparams(ds.smooth_over_depth)(
        alpha=optax.linear_schedule(0.0, 0.4, 4), depth=DEPTH
    )
    result, _ = run(tx, tree, steps=3)
    assert_close(result, smoothed(tree, 0.2))


def test_chains_in_the_papers_place():
    """Smoothed after Adam, outside weight decay, before the learning rate."""
    params = updates(seed=1)
    tree = updates()
    tx = optax.chain(
        optax.scale_by_adam(),
        ds.smooth_over_depth(0.2, depth=DEPTH),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.5),
    )
    result, _ = run(tx, tree, params=params)
    adam, _ = run(optax.scale_by_adam(), tree)
    expected = jax.tree.map(lambda u, p: -0.5 * (u + 0.1 * p), smoothed(adam, 0.2), params)
    assert_close(result, expected)


def test_masked():
    tree = updates()
    mask = jax.tree.map(lambda _: True, tree) | {"last": False}
    tx = optax.masked(ds.smooth_over_depth(0.2, depth=ds.Depth.from_rules({"layers/.*": 0})), mask)
    result, _ = run(tx, tree)
    assert_close(result, smoothed(tree, 0.2) | {"last": tree["last"]})


def test_masked_by_a_prefix():
    tree = updates()
    mask = {"embed": False, "layers": True, "last": False, "nothing": False}
    traced = DEPTH.resolve(tree)
    result, _ = run(optax.masked(ds.smooth_over_depth(0.2, depth=traced), mask), tree)
    assert_close(result, smoothed(tree, 0.2) | {"last": tree["last"]})


@pytest.mark.parametrize("resolved", [False, True], ids=["rules", "resolved"])
def test_partition(resolved):
    """Each part sees the others' leaves masked, and Depth may speak of all of them."""
    tree = updates()
    labels = {"embed": "rest", "layers": "deep", "last": "deep", "nothing": "rest"}
    depth = DEPTH.resolve(tree) if resolved else DEPTH
    tx = optax.partition(
        {"deep": ds.smooth_over_depth(0.2, depth=depth), "rest": optax.set_to_zero()}, labels
    )
    result, _ = run(tx, tree)
    assert_close(result, smoothed(tree, 0.2) | {"embed": jnp.zeros((7, 3))})


def test_multi_steps():
    tree = updates()
    tx = optax.MultiSteps(ds.smooth_over_depth(0.2, depth=DEPTH), every_k_schedule=2)
    halfway, state = run(tx, tree)
    chex.assert_trees_all_equal(halfway, jax.tree.map(jnp.zeros_like, tree))
    result, state = jax.jit(tx.update)(tree, state)
    assert_close(result, smoothed(tree, 0.2))
    assert int(state.inner_opt_state.count) == 1


def test_apply_if_finite():
    tree = updates()
    tx = optax.apply_if_finite(ds.smooth_over_depth(0.2, depth=DEPTH), 2)
    result, state = run(tx, tree)
    assert_close(result, smoothed(tree, 0.2))
    poisoned = tree | {"last": jnp.full((2, 6), jnp.nan)}
    result, state = jax.jit(tx.update)(poisoned, state)
    chex.assert_trees_all_equal(result, jax.tree.map(jnp.zeros_like, tree))
    assert int(state.inner_state.count) == 1


def test_one_nan_reaches_the_neighbours_only():
    tree = {"last": jnp.zeros((1, 6)).at[0, 3].set(jnp.nan)}
    tx = ds.smooth_over_depth(0.2, depth=ds.Depth.from_rules({"last": 1}))
    result, _ = run(tx, tree)
    assert np.isnan(result["last"][0]).tolist() == [False, False, True, True, True, False]


def test_map_params_and_extra_args():
    tx = optax.chain(optax.scale_by_adam(), ds.smooth_over_depth(0.2, depth=DEPTH))
    state = tx.init(updates())
    marked = optax.tree.map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: "other"
    )
    assert marked[1].count == "other"
    assert marked[0].mu["last"] == "param"
    result, _ = tx.update(updates(), state, updates(), value=1.0, grad=None)
    chex.assert_trees_all_equal_shapes(result, updates())


@pytest.mark.parametrize("resolved", [False, True])
def test_a_resolved_depth_of_what_is_not_there(resolved):
    """As map_params asks for the state of no parameters, and where all is masked."""
    depth = DEPTH.resolve(updates()) if resolved else DEPTH
    tx = ds.adamw(0.1, depth=depth, where=lambda path, leaf: path == "last")
    optax.tree.map_params(tx, lambda _: None, tx.init(updates()))
    for masked in False, jax.tree.map(lambda _: False, updates()):
        tx = optax.masked(ds.smooth_over_depth(0.2, depth=depth), masked)
        result, _ = tx.update(updates(), tx.init(updates()))
        chex.assert_trees_all_equal(result, updates())


def test_vmap_over_models():
    """A leading axis that vmap maps is not there: depth stays where it was said to be."""
    trees = [updates(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    tx = ds.smooth_over_depth(0.2, depth=DEPTH)
    state = jax.vmap(tx.init)(stacked)
    result, _ = jax.jit(jax.vmap(tx.update))(stacked, state)
    for index, tree in enumerate(trees):
        assert_close(jax.tree.map(lambda leaf, i=index: leaf[i], result), smoothed(tree, 0.2))


def test_vmap_over_alpha():
    tree = {"last": updates()["last"]}
    depth = ds.Depth.from_rules({"last": 1})

    def update(alpha):
        tx = ds.smooth_over_depth(alpha, depth=depth)
        return tx.update(tree, tx.init(tree))[0]["last"]

    result = jax.vmap(update)(jnp.array([0.1, 0.5]))
    for alpha, row in zip((0.1, 0.5), result, strict=True):
        assert_close(row, reference.window(np.asarray(tree["last"]), alpha, 1).astype("float32"))


def test_gradients_flow_through_the_update_and_alpha():
    tree = updates()
    weights = updates(seed=1)

    def inner(alpha, tree):
        tx = ds.smooth_over_depth(alpha, depth=DEPTH)
        return optax.tree.vdot(tx.update(tree, tx.init(tree))[0], weights)

    by_alpha, by_tree = jax.jit(jax.grad(inner, argnums=(0, 1)))(0.2, tree)
    # The operator is symmetric, so it is its own transpose.
    assert_close(by_tree, smoothed(weights, 0.2))
    difference = (inner(0.3, tree) - inner(0.1, tree)) / 0.2
    np.testing.assert_allclose(by_alpha, difference, rtol=1e-4)


def test_state_is_stable_through_cond_and_scan():
    tree = updates("bfloat16")
    tx = optax.chain(optax.scale_by_adam(), ds.smooth_over_depth(0.2, depth=DEPTH))

    def step(carry, _):
        tree, state = carry
        return jax.lax.cond(True, tx.update, lambda u, s: (u, s), tree, state), None

    (result, state), _ = jax.lax.scan(step, (tree, tx.init(tree)), length=4)
    assert int(state[1].count) == 4
    chex.assert_trees_all_equal_shapes_and_dtypes(result, tree)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64"])
def test_dtypes_are_kept(dtype):
    with jax.enable_x64(True):
        tree = updates(dtype)
        result, _ = run(ds.smooth_over_depth(0.2, depth=DEPTH), tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, tree)


@pytest.mark.parametrize(
    "alpha", [-0.1, 1, 1.0, float("nan"), float("inf"), True, np.float32(1.5), np.int64(-1)]
)
def test_refuses_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"alpha is .* has to be in 0 <= alpha < 1"):
        ds.smooth_over_depth(alpha, depth=DEPTH)
    tx = ds.smooth_over_depth(lambda count: alpha, depth=DEPTH)
    with pytest.raises(ValueError, match=r"alpha is .* has to be in 0 <= alpha < 1"):
        jax.jit(tx.update)(updates(), tx.init(updates()))


@pytest.mark.parametrize("alpha", ["0.1", None, [0.1], np.full(3, 0.1), jnp.full((1,), 0.1)])
def test_refuses_alpha_that_is_no_scalar(alpha):
    with pytest.raises(ValueError, match="has to be a number, a schedule"):
        ds.smooth_over_depth(alpha, depth=DEPTH)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, np.array, jnp.float32])
def test_every_kind_of_number_gives_the_same(kind):
    result, _ = run(ds.smooth_over_depth(kind(0.25), depth=DEPTH), updates())
    chex.assert_trees_all_equal(result, run(ds.smooth_over_depth(0.25, depth=DEPTH), updates())[0])


@pytest.mark.parametrize("depth", ["layers", {"layers/.*": 0}, 0])
def test_refuses_a_depth_that_is_none(depth):
    with pytest.raises(ValueError, match=r"has to be a Depth: from trace_depth"):
        ds.smooth_over_depth(0.1, depth=depth)


@pytest.mark.parametrize("when", ["init", "update"])
def test_refuses_what_does_not_fit_before_any_training(when):
    good, bad = updates(), updates()
    bad["layers"]["kernel"] = jnp.ones((5, 3, 2), "int32")
    tx = ds.smooth_over_depth(0.2, depth=DEPTH)
    with pytest.raises(ValueError, match=r"layers/kernel \(5, 3, 2\) is of type int32.*masked"):
        tx.init(bad) if when == "init" else jax.jit(tx.update)(bad, tx.init(good))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_placement_on_devices_is_kept(kind):
    axis_type = getattr(jax.sharding.AxisType, kind.capitalize())
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(axis_type,))
    tree = {"layers": {"kernel": jnp.arange(5 * 16 * 2.0).reshape(5, 16, 2)}}
    sharding = jax.NamedSharding(mesh, jax.P(None, "devices", None))
    with jax.set_mesh(mesh):
        placed = jax.device_put(tree, sharding)
        result, _ = run(ds.smooth_over_depth(0.2, depth=ds.Depth.from_rules({".*": 0})), placed)
    leaf = result["layers"]["kernel"]
    assert leaf.sharding.is_equivalent_to(sharding, 3)
    assert_close(leaf, reference.window(np.asarray(tree["layers"]["kernel"]), 0.2, 0))


STACK = {"layers": {"scale": jnp.ones((4, 8)), "kernel": jnp.ones((4, 8, 8))}}
BLOCKS = {f"block_{i}": {"w": jnp.ones((8, 8)), "o": jnp.ones((8, 8))} for i in range(3)}


@pytest.mark.parametrize("make", [ds.smooth_over_depth, functools.partial(ds.muon, 0.1), ds.adamw])
def test_a_depth_that_was_forgotten_is_asked_for(make):
    tx = make(0.1) if make is ds.adamw else make()
    params = STACK | BLOCKS
    message = (
        r"^No depth= was given, so layers were looked for by name\. Names leave open where they "
        r"are: layers/\w+ \(4, 8(, 8)?\) may be \{'layers/\.\*': 0\} or \{'layers/\.\*': 1\} or .*"
        r"depth=trace_depth\(.*depth=find_depth\(params, known=Depth\.from_rules\(\{pattern: rule\}"
    )
    with pytest.raises(ds.AmbiguousDepthError, match=message) as error:
        tx.init(params)
    assert error.value.readings["layers/.*"][:2] == ("0", "1")
    for rule, placed in (0, 8), (1, 8), ((), 8):
        depth = ds.find_depth(params, known=ds.Depth.from_rules({"layers/.*": rule}))
        assert len(depth) == placed
        ds.smooth_over_depth(0.1, depth=depth).init(params)


def test_a_depth_that_was_forgotten_where_nothing_is_named_like_layers():
    message = r"^No depth= was given, .* Nothing in the tree .* head \(8, 2\).*trace_depth\(fn"
    with pytest.raises(ds.DepthNotFoundError, match=message):
        ds.smooth_over_depth().init({"head": jnp.ones((8, 2))})
    with pytest.raises(ds.AmbiguousDepthError, match=r"^Depth is not certain"):
        ds.find_depth(STACK)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ds.smooth_over_depth, r"^alpha of smooth_over_depth is a Depth\. .*\(\.\.\., depth=depth"),
        (ds.augment_over_depth, r"^operator of augment_over_depth is a Depth"),
        (ds.shrink_over_depth, r"^operator of shrink_over_depth is a Depth"),
    ],
)
def test_refuses_a_depth_in_the_place_of_another_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make(DEPTH)
