"""Norms, scope and cuts: which layers are mixed, and what becomes of their norms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import depthsmooth as ds
from tests import reference
from tests.test_tracks import laid_out

VARIANTS = ["standard", "norm_preserving", "directional", "shrunk"]
DEPTH = ds.Depth.from_rules({"layers/.*": 0})


@pytest.fixture(autouse=True, scope="module")
def strictly():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def make(variant, operator, **keywords):
    if variant == "shrunk":
        return ds.shrink_over_depth(operator, **keywords)
    return ds.augment_over_depth(operator, variant=variant, **keywords)


def updated(tx, tree, jit=True):
    return (jax.jit(tx.update) if jit else tx.update)(tree, tx.init(tree))[0]


def layers(seed=0, dtype="float32", count=5):
    rng = np.random.default_rng(seed)
    return {
        "layers": {
            "kernel": jnp.asarray(rng.normal(size=(count, 3, 4)), dtype),
            "bias": jnp.asarray(10 * rng.normal(size=(count, 4)), dtype),
        }
    }


def wide(tree):
    return {name: np.asarray(leaf, float) for name, leaf in tree["layers"].items()}


OPERATORS = {
    "window": ds.window(0.3),
    "ema": ds.ema(0.5),
    "sharpen": ds.sharpen(0.3),
    "diffusion, a matrix": ds.diffusion(2.0),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm_over", ["tensor", "block"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_variants_are_what_the_paper_says(variant, norm_over, operator, jit):
    tree = layers(count=9)
    tx = make(variant, OPERATORS[operator], depth=DEPTH, norm_over=norm_over)
    matrix = ds.operator_matrix(OPERATORS[operator], 9)
    expected = reference.augmented(wide(tree), matrix, variant, norm_over)
    for name, leaf in updated(tx, tree, jit)["layers"].items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64"])
def test_one_rounding_at_the_end(variant, dtype):
    """Narrow types are mixed, measured and scaled in float32, and rounded once."""
    with jax.enable_x64(True):
        tree = layers(dtype=dtype)
        if dtype == "complex64":
            tree = jax.tree.map(jax.lax.complex, layers(0), layers(1))
        tx = make(variant, ds.window(0.3), depth=DEPTH)
        result = updated(tx, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, tree)
        precise = "complex128" if dtype == "complex64" else float
        exact = {name: np.asarray(leaf).astype(precise) for name, leaf in tree["layers"].items()}
        expected = reference.augmented(
            exact, ds.operator_matrix(ds.window(0.3), 5), variant, "tensor"
        )
        for name, leaf in result["layers"].items():
            half_a_unit = {
                "bfloat16": 2**-9,
                "float16": 2**-12,
                "float64": 1e-15,
                "complex64": 1e-6,
            }
            error = np.abs(np.asarray(leaf).astype(precise) - expected[name])
            assert (error <= np.abs(expected[name]) * half_a_unit[dtype] * 2.01 + 1e-7).all()
            if dtype in ("bfloat16", "float16"):
                assert np.median(error / np.abs(expected[name])) <= half_a_unit[dtype]


@settings(max_examples=100)
@given(
    layout=laid_out(),
    variant=st.sampled_from(["norm_preserving", "directional"]),
    norm_over=st.sampled_from(["tensor", "block"]),
    alpha=st.floats(0, 0.49) | st.floats(0.51, 0.99),  # at 0.5, two of ∓1 cancel ±1
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_every_layer_keeps_its_norm_in_every_layout(layout, variant, norm_over, alpha, scale):
    stack, arrays, axes, held = layout
    stack = stack * scale
    tree, leaves = {}, []
    for k, (array, to, ours) in enumerate(zip(arrays, axes, held, strict=True)):
        tree[f"leaf_{k}"] = jnp.asarray(scale * array, "float32")
        leaves.append(ds.Leaf(f"leaf_{k}", array.shape, ds.Place("g", "t", to, ours, "rule")))
    depth = ds.Depth(tuple(leaves))
    tx = make(variant, ds.window(alpha), depth=depth, norm_over=norm_over)
    result = updated(tx, tree)
    matrix = ds.operator_matrix(ds.window(alpha), len(stack))
    exact = reference.augmented({"t": stack}, matrix, variant, norm_over)["t"]
    norm = np.sqrt((stack.reshape(len(stack), -1) ** 2).sum(1))
    for k, (to, ours) in enumerate(zip(axes, held, strict=True)):
        front = np.moveaxis(np.asarray(result[f"leaf_{k}"], float), to, range(len(to)))
        mine = front.reshape(len(ours), -1)
        kept = np.sqrt((mine**2).sum(1))
        np.testing.assert_allclose(kept, norm[list(ours)], rtol=1e-6)
        if alpha < 0.4:  # where neighbours cannot cancel a layer
            theirs = exact[list(ours)].reshape(mine.shape)
            size = np.abs(stack).max() if variant == "directional" else norm[list(ours)][:, None]
            assert (np.abs(mine - theirs) <= 1e-4 * size).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_linear(operator):
    tx = make("standard", OPERATORS[operator], depth=DEPTH)
    smooth = jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])

    @given(a=st.floats(-3, 3), seeds=st.tuples(*[st.integers(0, 9)] * 2))
    def is_linear(a, seeds):
        one, two = (layers(seed) for seed in seeds)
        combined = smooth(jax.tree.map(lambda x, y: jnp.float32(a) * x + y, one, two))
        apart = jax.tree.map(lambda x, y: jnp.float32(a) * x + y, smooth(one), smooth(two))
        chex.assert_trees_all_close(combined, apart, rtol=1e-4, atol=1e-4)

    is_linear()


@pytest.mark.parametrize("variant", ["norm_preserving", "directional", "shrunk"])
def test_a_frozen_layer_stays_frozen(variant):
    tree = layers()
    frozen = jax.tree.map(lambda leaf: leaf.at[2].set(0), tree)
    result = updated(make(variant, ds.window(0.3), depth=DEPTH), frozen)
    for leaf in result["layers"].values():
        assert not leaf[2].any()
        assert leaf[jnp.array([0, 1, 3, 4])].all()


@pytest.mark.parametrize("variant", ["norm_preserving", "directional", "shrunk"])
def test_a_block_is_frozen_as_a_whole(variant):
    """A tensor that is 0 takes from its neighbours if the rest of its block is not."""
    tree = layers()
    tree["layers"]["bias"] = tree["layers"]["bias"].at[2].set(0)
    tx = make(variant, ds.window(0.3), depth=DEPTH, norm_over="block")
    assert updated(tx, tree)["layers"]["bias"][2].any() == (variant != "shrunk")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm_over", ["tensor", "block"])
def test_alpha_zero_and_single_layers_are_the_identity_bit_for_bit(variant, norm_over):
    for tree, alpha in ((layers(), 0.0), (layers(count=1), 0.5)):
        tx = make(variant, ds.window(alpha), depth=DEPTH, norm_over=norm_over)
        chex.assert_trees_all_equal(updated(tx, tree), tree)
        assert updated(tx, tree, jit=False)["layers"]["kernel"] is tree["layers"]["kernel"]


@pytest.mark.parametrize("operator", [ds.exponential(0.5), ds.from_kernel([1, 1, 1], "zero")])
def test_a_single_layer_is_left_as_it_is_by_every_operator(operator):
    tree = layers(count=1)
    chex.assert_trees_all_equal(updated(make("standard", operator, depth=DEPTH), tree), tree)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_shows(variant, bad):
    """No norm of it makes a 0: optax.apply_if_finite sees it."""
    tree = layers()
    tree["layers"]["bias"] = tree["layers"]["bias"].at[2, 1].set(bad)
    result = updated(make(variant, ds.window(0.3), depth=DEPTH), tree)
    assert not jnp.isfinite(result["layers"]["bias"][2, 1])
    assert result["layers"]["bias"][2].all() or variant == "directional"
    assert jnp.isfinite(result["layers"]["bias"][0]).all()
    assert jnp.isfinite(result["layers"]["kernel"]).all()


def test_shrinking_keeps_directions():
    tree = layers()
    smooth = updated(make("standard", ds.window(0.3), depth=DEPTH), tree)
    shrunk = updated(make("shrunk", ds.window(0.3), depth=DEPTH), tree)
    for name, leaf in shrunk["layers"].items():
        ours = np.asarray(leaf).reshape(5, -1)
        before = np.asarray(tree["layers"][name]).reshape(5, -1)
        after = np.asarray(smooth["layers"][name]).reshape(5, -1)
        factor = np.linalg.norm(after, axis=1) / np.linalg.norm(before, axis=1)
        assert (factor < 1).all()
        np.testing.assert_allclose(ours, before * factor[:, None], rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm_over", ["tensor", "block"])
def test_cuts_part_a_stack_in_two(variant, norm_over):
    tree = layers(count=7)
    tx = make(variant, ds.window(0.3), depth=DEPTH, norm_over=norm_over, cuts=(3,))
    result = updated(tx, tree)
    plain = make(variant, ds.window(0.3), depth=DEPTH, norm_over=norm_over)
    for part in (slice(0, 3), slice(3, 7)):
        alone = updated(plain, jax.tree.map(lambda leaf, at=part: leaf[at], tree))
        half = jax.tree.map(lambda leaf, at=part: leaf[at], result)
        chex.assert_trees_all_close(half, alone, rtol=1e-6)


def test_cuts_of_one_group_and_of_numbered_layers():
    tree = {f"block_{k}": jnp.full(2, float(k)) for k in range(4)} | layers(count=3)
    depth = DEPTH | ds.Depth.from_rules({"block_.*": ds.numbered()})
    tx = ds.smooth_over_depth(0.5, depth=depth, cuts={"block_.*": [1, 2]})
    result = updated(tx, tree)
    assert [float(result[f"block_{k}"][0]) for k in range(4)] == [0, 1, 2.25, 2.75]
    chex.assert_trees_all_equal(
        result["layers"], updated(ds.smooth_over_depth(0.5, depth=DEPTH), layers(count=3))["layers"]
    )


def test_cuts_count_layers_that_are_masked():
    tree = {f"block_{k}": jnp.full(2, float(k)) for k in range(5)}
    masked = tree | {"block_0": optax.MaskedNode(), "block_4": optax.MaskedNode()}
    depth = ds.Depth.from_rules({"block_.*": ds.numbered()}).resolve(tree)
    tx = ds.smooth_over_depth(0.5, depth=depth, cuts=(2, 4))
    result = updated(tx, masked)
    assert [float(result[f"block_{k}"][0]) for k in (1, 2, 3)] == [1, 2.25, 2.75]


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (3, r"cuts are 3, but have to be layers, like \(4, 12\)"),
        ("3", r"cuts are '3'"),
        ((0,), r"A cut is at 0, .* at least 1"),
        ((1.5,), r"A cut is at 1\.5"),
        ({"layers/.*": (-1,)}, r"A cut is at -1"),
        ((2, 5), r"a cut at 5, but the group 'layers/\.\*' has the layers 0 to 4"),
        ({"layer": (1,)}, r"cuts has a group 'layer', but the groups are 'layers/\.\*'\. Name"),
    ],
)
def test_refuses_cuts_that_are_not_there(cuts, message):
    with pytest.raises(ValueError, match=message):
        ds.smooth_over_depth(0.2, depth=DEPTH, cuts=cuts).init(layers())


def test_cuts_by_rules_are_refused_where_layers_are_masked():
    """A sequence does not know how many layers a masked container has."""
    tree = {"a": jnp.arange(3.0), "b": jnp.arange(4.0, 7.0)}
    masked = tree | {"a": optax.MaskedNode()}
    rules = ds.Depth.from_rules({".*": ds.sequence(("a", 0), ("b", 0))})
    with pytest.raises(ValueError, match=r"a is masked.*rules\.resolve\(params\)"):
        ds.smooth_over_depth(0.5, depth=rules, cuts=(4,)).init(masked)
    tx = ds.smooth_over_depth(0.5, depth=rules.resolve(tree), cuts=(4,))
    assert updated(tx, masked)["b"].tolist() == [4.0, 5.25, 5.75]


def test_cuts_need_a_depth():
    """What is found in a tree of which a layer is masked counts from the next one."""
    with pytest.raises(ValueError, match=r"cuts are \(3,\), which count .* give it, by depth="):
        ds.smooth_over_depth(0.2, cuts=(3,))


@pytest.mark.parametrize("norm_over", ["tensor", "block"])
def test_where_selects_leaves(norm_over):
    tree = layers()
    tx = ds.smooth_over_depth(
        0.3,
        depth=DEPTH,
        where=lambda path, leaf: path == "layers/kernel" and leaf.shape == (5, 3, 4),
        variant="norm_preserving",
        norm_over=norm_over,
    )
    result = updated(tx, tree, jit=False)
    assert result["layers"]["bias"] is tree["layers"]["bias"]
    alone = {"layers": {"kernel": tree["layers"]["kernel"]}}
    expected = updated(
        ds.smooth_over_depth(0.3, depth=DEPTH, variant="norm_preserving"), alone, jit=False
    )
    chex.assert_trees_all_equal(result["layers"]["kernel"], expected["layers"]["kernel"])


@pytest.mark.parametrize("resolved", [False, True])
def test_depth_is_resolved_once_in_an_update(monkeypatch, resolved):
    """Also with where=, and with cuts."""
    tree = layers()
    depth = DEPTH.resolve(tree) if resolved else DEPTH
    keywords = {"where": lambda path, leaf: "kernel" in path, "cuts": (2,)}
    tx = ds.smooth_over_depth(0.3, depth=depth, **keywords)
    state = tx.init(tree)
    calls = []
    for layout in (ds.Depth, type(DEPTH)):
        resolve = layout.resolve
        monkeypatch.setattr(
            layout, "resolve", lambda *args, of=resolve: calls.append(args) or of(*args)
        )
    tx.update(tree, state)
    assert len(calls) == 1


def test_where_may_leave_out_a_layer():
    """Which keeps those before it and those after it apart."""
    tree = {f"block_{k}": jnp.full(2, float(k)) for k in range(4)}
    tx = ds.smooth_over_depth(
        0.5,
        depth=ds.Depth.from_rules({"block_.*": ds.numbered()}),
        where=lambda path, leaf: path != "block_1",
    )
    result = updated(tx, tree)
    assert [float(result[f"block_{k}"][0]) for k in range(4)] == [0, 1, 2.25, 2.75]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("kernel", r"where is 'kernel', but has to be a function"),
        (lambda path, leaf: None, r"where gives None for layers/\w+ \(5, .*True or False"),
        (lambda path, leaf: leaf.sum() > 0, r"where gives .* for layers/"),
        (lambda path, leaf: False, r"where selects none of .*layers/.*from_rules\(\{\}\)"),
    ],
)
def test_refuses_a_where_that_does_not_tell(where, message):
    with pytest.raises(ValueError, match=message):
        ds.smooth_over_depth(0.2, depth=DEPTH, where=where).init(layers())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"variant": "norm"}, r"variant is 'norm', but has to be one of standard, norm_preserving"),
        ({"variant": ["standard"]}, r"variant is \['standard'\]"),
        ({"norm_over": "layer"}, r"norm_over is 'layer', but has to be 'tensor' or 'block'"),
    ],
)
def test_refuses_what_it_does_not_know(keywords, message):
    with pytest.raises(ValueError, match=message):
        ds.smooth_over_depth(0.2, depth=DEPTH, **keywords)


def test_an_operator_that_does_not_fit_is_refused_on_init():
    tx = ds.augment_over_depth(ds.from_matrix(np.eye(3)), depth=DEPTH)
    with pytest.raises(ValueError, match=r"shape \(3, 3\), but there are 5 layers"):
        tx.init(layers())
    for none in (0.1, [ds.window(0.1)], ds.window, optax.constant_schedule(0.1)):
        with pytest.raises(ValueError, match=r"is no operator: .* window\(0\.1\)"):
            ds.augment_over_depth(none, depth=DEPTH)
    with pytest.raises(ValueError, match=r"is no operator: for 5 layers it gives a ndarray"):
        ds.augment_over_depth(lambda layers, count: np.eye(layers), depth=DEPTH).init(layers())


ROWS = np.full((2, 5), 0.5)


@pytest.mark.parametrize(
    ("stencil", "message"),
    [
        (ds.ema(0.5)(4, 0), r"one row of shape \(5,\) for each of the 4 offsets"),
        (ds.Stencil((0, 0), ROWS), r"its offsets are \(0, 0\), but have to be a tuple"),
        (ds.Stencil((0, 0.5), ROWS), r"distinct integers"),
        (ds.Stencil([0, 1], ROWS), r"a tuple of distinct integers"),
        (ds.Stencil((0, 1), [np.ones(5) * 1j, np.zeros(5)]), r"its weights are complex"),
        (ds.Stencil((0,), ROWS), r"one row of shape \(5,\) for each of the 1 offsets"),
        (ds.Stencil((0, 1), ROWS), r"weights\[1, 4\] is 0.5, but there is no layer 5. Make it 0"),
    ],
)
def test_a_wrong_stencil_is_refused_on_init(stencil, message):
    with pytest.raises(ValueError, match=rf"gives a wrong Stencil for 5 layers: .*{message}"):
        ds.augment_over_depth(lambda layers, count: stencil, depth=DEPTH).init(layers())
    for operator in (
        lambda layers, count: stencil,
        ds.shuffled(lambda layers, count: stencil, seed=0),
        ds.compose(ds.window(0.1), lambda layers, count: stencil),
    ):
        with pytest.raises(ValueError, match=r"<lambda> gives a wrong Stencil for 5 layers"):
            ds.operator_matrix(operator, 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_compilation_while_alpha_changes(variant):
    """Over 100 steps, by a schedule and injected."""
    tree = layers()

    def smooth(alpha):
        return make(variant, ds.window(alpha), depth=DEPTH)

    scheduled = smooth(optax.linear_schedule(0.0, 0.5, 100))
    injected = optax.inject_hyperparams(smooth)(alpha=0.1)
    for tx in (scheduled, injected):
        compiled = []

        @jax.jit
        def step(tree, state, tx=tx, compiled=compiled):
            compiled.append(None)
            return tx.update(tree, state)

        state = tx.init(tree)
        before = jax.tree.map(jnp.asarray, state)
        for k in range(100):
            if tx is injected:
                state.hyperparams["alpha"] = jnp.asarray(k / 200, "float32")
            result, state = step(tree, state)
            plain = updated(smooth(k / 200), tree, jit=False) if k % 33 == 0 else result
            chex.assert_trees_all_close(result, plain, rtol=1e-5, atol=1e-6)
        assert len(compiled) == 1
        chex.assert_trees_all_equal_shapes_and_dtypes(before, state)


def test_the_state_is_one_count_whatever_is_asked_for():
    tree = layers()
    plain = ds.smooth_over_depth(0.2, depth=DEPTH).init(tree)
    for variant in VARIANTS:
        chex.assert_trees_all_equal(make(variant, ds.ema(0.5), depth=DEPTH).init(tree), plain)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_is_the_same(variant, kind):
    """By a Depth that does not know of it. The others are in test_sharding.py."""
    tree = layers(count=8)
    tree["layers"]["kernel"] = jnp.tile(tree["layers"]["kernel"], (1, 4, 1))
    tree["layers"]["bias"] = jnp.tile(tree["layers"]["bias"], (1, 3))
    tx = make(variant, ds.window(0.3), depth=DEPTH)
    expected = updated(tx, tree)
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=types)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, jax.P("a", "b"))), tree
        )
        result = updated(tx, placed)
    for leaf, before in zip(jax.tree.leaves(result), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
    chex.assert_trees_all_close(jax.device_get(result), jax.device_get(expected), rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm_over", ["tensor", "block"])
def test_gradients_of_a_frozen_layer_are_finite(variant, norm_over):
    tree = jax.tree.map(lambda leaf: leaf.at[2].set(0), layers())
    tx = make(variant, ds.window(0.3), depth=DEPTH, norm_over=norm_over)

    def loss(tree):
        return sum((leaf**3).sum() for leaf in jax.tree.leaves(updated(tx, tree)))

    gradient = jax.grad(loss)(tree)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_a_block_of_tensors_of_different_types():
    with jax.enable_x64(True):
        tree = layers()
        tree["layers"]["bias"] = tree["layers"]["bias"].astype("float64")
        tx = make("norm_preserving", ds.window(0.3), depth=DEPTH, norm_over="block")
        result = updated(tx, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, tree)
        matrix = ds.operator_matrix(ds.window(0.3), 5)
        expected = reference.augmented(wide(tree), matrix, "norm_preserving", "block")
        np.testing.assert_allclose(result["layers"]["kernel"], expected["kernel"], rtol=1e-5)


def test_the_range_of_norms_in_float32():
    """What the docstring of augment_over_depth says of small updates and of large ones."""
    unit = np.random.default_rng(0).normal(size=(3, 100))
    tx = make("norm_preserving", ds.window(0.3), depth=DEPTH)

    def kept(size):
        tree = {"layers": {"kernel": jnp.asarray(size * unit, "float32")}}
        after = np.asarray(updated(tx, tree)["layers"]["kernel"], float)
        return np.linalg.norm(after, axis=1) / np.linalg.norm(size * unit, axis=1)

    for size in (1e-16, 1e17):
        np.testing.assert_allclose(kept(size), 1, rtol=1e-6)
    np.testing.assert_array_equal(kept(1e-20), 0)
    assert np.isnan(kept(1e20)).all()
