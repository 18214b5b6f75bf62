"""Metrics: exact against NumPy in float64, and the same however layers are laid out or split."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
from jax.sharding import AxisType, NamedSharding

import depthsmooth as ds
from benchmarks import hlo
from tests.reference import ratio

LAYERS = 12


def expected_of(vectors, present=None):
    """The metrics of layers as rows, in float64, from their definitions."""
    vectors = np.asarray(vectors, complex if np.iscomplexobj(vectors) else float)
    layers = len(vectors)
    present = list(range(layers)) if present is None else present
    pairs = [k for k in present if k + 1 in present]
    norms = np.linalg.norm(vectors, axis=1)
    products = (vectors.conj() @ vectors.T).real
    similarity = ratio(products, np.outer(norms, norms))
    cosines = np.array([similarity[k, k + 1] if k in pairs else 0 for k in range(layers - 1)])
    steps = sum(np.linalg.norm(vectors[k + 1] - vectors[k]) ** 2 for k in pairs)
    waves = scipy.fft.dct(vectors.real, norm="ortho", axis=0) + 1j * scipy.fft.dct(
        vectors.imag, norm="ortho", axis=0
    )
    return ds.DepthMetrics(
        roughness=ratio(np.array(steps), np.array((norms**2).sum())),
        adjacent_cosine=cosines.sum() / max(len(pairs), 1),
        mean_norm=norms.sum() / len(present),
        cosines=cosines,
        norms=norms,
        similarity=similarity,
        spectrum=(np.abs(waves) ** 2).sum(1),
    )


def assert_close(ours, expected, tolerance):
    """Powers and norms relative to the largest; the rest are numbers of order 1."""
    for name, one, other in zip(ours._fields, ours, expected, strict=True):
        if other is None:
            assert one is None
            continue
        scale = max(1, np.abs(other).max(initial=0))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale, err_msg=name)


def layers_of(dtype="float64"):
    """Two tensors through the layers, somewhat alike from one layer to the next."""
    rng = np.random.default_rng(0)
    made = {}
    for name, shape in {"kernel": (LAYERS, 4, 6), "bias": (LAYERS, 6)}.items():
        values = rng.normal(size=shape) + rng.normal(size=shape[1:])
        if "complex" in dtype:
            values = values + 1j * rng.normal(size=shape)
        made[name] = values.astype(dtype)
    return made


def vectors_of(tensors):
    return np.concatenate([each.reshape(len(each), -1) for each in tensors.values()], axis=1)


def laid_out(layout, tensors):
    """The same layers as a tree, and the rules for it."""
    kernel, bias = tensors["kernel"], tensors["bias"]
    numbered = range(len(kernel))
    match layout:
        case "stacked":
            return {"layers": tensors}, {"layers/.*": 0}
        case "axis 1":
            moved = {"kernel": kernel.swapaxes(0, 1), "bias": bias.swapaxes(0, 1)}
            return {"layers": moved}, {"layers/.*": 1}
        case "several axes":
            folded = {name: each.reshape(3, 4, *each.shape[1:]) for name, each in tensors.items()}
            return {"layers": folded}, {"layers/.*": (0, 1)}
        case "unrolled":
            tree = {f"block_{k}": {"kernel": kernel[k], "bias": bias[k]} for k in numbered}
            return tree, {"block_.*": ds.numbered()}
        case "interleaved":
            tree = {f"layers_{j}": {"kernel": kernel[j::3], "bias": bias[j::3]} for j in range(3)}
            return tree, {"layers_.*": ds.interleaved(0)}
        case "sequence":
            tree = {
                "in_blocks": {"kernel": kernel[:5], "bias": bias[:5]},
                "mid_block": {"kernel": kernel[5], "bias": bias[5]},
                "out_blocks": {"kernel": kernel[6:], "bias": bias[6:]},
            }
            return tree, {
                ".*_block.*": ds.sequence(("in_blocks", 0), "mid_block", ("out_blocks", 0))
            }


LAYOUTS = ["stacked", "axis 1", "several axes", "unrolled", "interleaved", "sequence"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_equal_to_numpy(layout, dtype):
    with jax.enable_x64(True):
        tensors = layers_of(dtype)
        tree, rules = laid_out(layout, tensors)
        tree = jax.tree.map(jnp.asarray, tree | {"head": np.ones(3)})
        depth = ds.Depth.from_rules(rules)
        [metrics] = ds.depth_metrics(tree, depth, full=True).values()
        assert_close(metrics, expected_of(vectors_of(tensors)), 1e-12)
        by_tensor = ds.depth_metrics(tree, depth, by="tensor", full=True)
        assert len(by_tensor) == 2
        for name, metrics in by_tensor.items():
            tensor = tensors["kernel" if "kernel" in name else "bias"]
            assert_close(metrics, expected_of(tensor.reshape(LAYERS, -1)), 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_every_layout_gives_the_same(layout, dtype):
    """In float32, also of narrower types; whose sums would else be off by parts in a hundred."""
    tensors = layers_of("complex64" if dtype == "complex64" else "float32")
    rounded = jax.tree.map(lambda each: np.asarray(jnp.asarray(each, dtype)), tensors)
    wide = {
        name: each.astype("complex128" if "complex" in dtype else float)
        for name, each in rounded.items()
    }
    tree, rules = laid_out(layout, rounded)
    tree = jax.tree.map(jnp.asarray, tree)
    [metrics] = ds.depth_metrics(tree, ds.Depth.from_rules(rules), full=True).values()
    assert {each.dtype for each in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
    assert_close(metrics, expected_of(vectors_of(wide)), 1e-6)


MODES = ["auto", "explicit", "manual"]
SPECS = {
    "depth": {"kernel": jax.P("stage"), "bias": jax.P("stage")},
    "features": {"kernel": jax.P(None, None, "model"), "bias": jax.P(None, "model")},
    "both": {"kernel": jax.P("stage", None, "model"), "bias": jax.P("stage", "model")},
}


def compiled(measure, tree, spec, mode):
    """What measures arrays that eight devices share, and the arrays."""
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("stage", "model"), axis_types=(kind, kind))
    parts = jax.tree.map(
        lambda leaf, one: jax.device_put(leaf, NamedSharding(mesh, one)), tree, spec
    )
    if mode == "manual":
        measure = jax.shard_map(measure, mesh=mesh, in_specs=(spec,), out_specs=jax.P())
    with jax.set_mesh(mesh):
        return jax.jit(measure).lower(parts).compile(), parts


def in_parts(measure, tree, spec, mode):
    program, parts = compiled(measure, tree, spec, mode)
    return jax.device_get(program(parts)), parts


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
def test_every_sharding_gives_the_same(spec, mode, layout):
    tensors = layers_of("float32")
    tree, rules = laid_out(layout, tensors)
    specs = jax.tree.map_with_path(lambda path, _: SPECS[spec][path[-1].key], tree)
    _, parts = in_parts(lambda tree: 0.0, tree, specs, "auto")
    depth = ds.Depth.from_rules(rules).resolve(parts)
    assert {place.shards for place in depth.values()} == {1 if spec == "features" else 4}
    axis_name = "stage" if mode == "manual" and spec != "features" else None

    def measure(tree):
        return ds.depth_metrics(tree, depth, full=True, axis_name=axis_name)

    result, _ = in_parts(measure, tree, specs, mode)
    [metrics] = result.values()
    assert_close(metrics, expected_of(vectors_of(tensors)), 1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("full", [False, True], ids=["neighbours", "full"])
def test_what_is_sent(spec, mode, full):
    """One layer and some numbers for each; each pair of shards once, if all are compared."""
    tree = {"kernel": np.ones((LAYERS, 16, 16), "float32")}
    specs = {"kernel": SPECS[spec]["kernel"]}
    parts = in_parts(lambda tree: 0.0, tree, specs, "auto")[1]
    depth = ds.Depth.from_rules({".*": 0}).resolve(parts)
    axis_name = "stage" if mode == "manual" and spec != "features" else None
    program = compiled(
        lambda tree: ds.depth_metrics(tree, depth, full=full, axis_name=axis_name),
        tree,
        specs,
        mode,
    )[0]
    layer = 16 * 16 * 4 // (1 if spec == "depth" else 2)
    large = sorted(each for each in hlo.collectives(program.as_text()) if each.size >= layer)
    sent = [] if spec == "features" else [("collective-permute", layer)]
    if full and spec != "features":
        sent += [("collective-permute", 3 * layer)] * 3
    assert [tuple(each) for each in large if "permute" in each.kind] == sent
    assert all(each.size <= LAYERS**2 * 4 * 2 for each in large if "permute" not in each.kind)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mode", MODES)
def test_noise_in_parts(spec, mode):
    batches = {"layers": layers_of("float32")}
    rng = np.random.default_rng(1)
    batches = jax.tree.map(
        lambda each: each + rng.normal(size=(3, *each.shape)).astype("f"), batches
    )
    specs = {"layers": {name: jax.P(None, *one) for name, one in SPECS[spec].items()}}
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
    depth = ds.Depth.from_rules({"layers/.*": 0}).resolve(one)
    axis_name = "stage" if mode == "manual" and spec != "features" else None

    def measure(gradients):
        return ds.gradient_noise_over_depth(gradients, depth, axis_name=axis_name)

    result, _ = in_parts(measure, batches, specs, mode)
    [noise] = result.values()
    assert_noise(noise, batches["layers"], 1e-6)


def assert_noise(noise, batches, tolerance):
    vectors = np.concatenate(
        [np.asarray(each, float).reshape(*each.shape[:2], -1) for each in batches.values()], 2
    )
    variance = vectors.var(0, ddof=1).sum(-1)
    squares = (vectors.mean(0) ** 2).sum(-1)
    np.testing.assert_allclose(noise.variance, variance, rtol=tolerance)
    np.testing.assert_allclose(noise.squared_norm, squares, rtol=tolerance)
    np.testing.assert_allclose(noise.noise_scale, variance / squares, rtol=2 * tolerance)


def test_noise_is_equal_to_numpy():
    """Also where gradients are large and nearly the same: it is no difference of squares."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        one = layers_of()
        batches = {
            name: 1e3 * each + rng.normal(size=(5, *each.shape)) for name, each in one.items()
        }
        depth = ds.Depth.from_rules({".*": 0})
        [noise] = ds.gradient_noise_over_depth(batches, depth).values()
        assert_noise(noise, batches, 1e-12)
        by_tensor = ds.gradient_noise_over_depth(batches, depth, by="tensor")
        assert set(by_tensor) == {"kernel", "bias"}
        assert_noise(by_tensor["bias"], {"bias": batches["bias"]}, 1e-12)
    for dtype, scale in [("float32", 1), ("bfloat16", 1e-3), ("float16", 1e-2)]:
        narrow = jax.tree.map(lambda each, d=dtype, s=scale: jnp.asarray(s * each, d), batches)
        [noise] = ds.gradient_noise_over_depth(narrow, depth).values()
        exact = jax.tree.map(lambda each: np.asarray(each, "float32"), narrow)
        assert_noise(noise, exact, 1e-5)


def test_noise_of_real_gradients():
    """What the docstring says to pass."""
    params = {"layers": jnp.ones((3, 4))}
    data = jax.random.normal(jax.random.key(0), (6, 4))

    def loss(params, batch):
        return sum(jnp.tanh(batch @ layer) for layer in params["layers"])

    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, data)
    noise = ds.gradient_noise_over_depth(gradients, ds.Depth.from_rules({"layers": 0}))["layers"]
    assert_noise(noise, gradients, 1e-5)
    same = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
    noise = ds.gradient_noise_over_depth(same, ds.Depth.from_rules({"layers": 0}))["layers"]
    np.testing.assert_array_equal(noise.variance, np.zeros(3))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layers": jnp.ones((1, 3, 4))}, r"layers \(1, 3, 4\) has the gradients of 1 micro"),
        (
            {"layers": jnp.ones((2, 3)), "head": jnp.ones(3)},
            r"layers \(2, 3\) has .* of 2 micro-batches",
        ),
        ({"layers": jnp.ones((2, 3)), "head": 1.0}, r"head \(\) has the gradients of 0"),
        ({"layers": jnp.ones((2, 3)), "head": jnp.ones(())}, r"head \(\) has the gradients of 0"),
    ],
)
def test_refuses_what_is_no_stack_of_gradients(tree, message):
    with pytest.raises(ValueError, match=message):
        ds.gradient_noise_over_depth(tree, ds.Depth.from_rules({"layers": 0}))


def test_masked_layers_do_not_count():
    tensors = layers_of("float32")
    tree, rules = laid_out("unrolled", tensors)
    depth = ds.Depth.from_rules(rules).resolve(tree)
    tree["block_4"] = optax.MaskedNode()
    tree = jax.tree.map(jnp.asarray, tree)
    vectors = vectors_of(tensors)
    vectors[4] = 0
    present = [k for k in range(LAYERS) if k != 4]
    [metrics] = ds.depth_metrics(tree, depth, full=True).values()
    assert_close(metrics, expected_of(vectors, present), 1e-6)
    tree["block_11"] = optax.MaskedNode()
    [metrics] = ds.depth_metrics(tree, depth).values()
    assert metrics.norms.shape == (11,)


def test_a_layer_that_lacks_a_tensor():
    """A pair of layers is compared by the tensors that both have."""
    rng = np.random.default_rng(0)
    tree = {f"block_{k}": {"a": rng.normal(size=5).astype("f")} for k in range(4)}
    for k in (1, 2):
        tree[f"block_{k}"]["b"] = rng.normal(size=3).astype("f")
    vectors = np.zeros((4, 8))
    for k in range(4):
        vectors[k, :5] = tree[f"block_{k}"]["a"]
        vectors[k, 5:] = tree[f"block_{k}"].get("b", 0)
    depth = ds.Depth.from_rules({"block_.*": ds.numbered()})
    [metrics] = ds.depth_metrics(jax.tree.map(jnp.asarray, tree), depth, full=True).values()
    expected = expected_of(vectors)
    steps = np.diff(vectors, axis=0)
    steps[[0, 2], 5:] = 0
    rough = (steps**2).sum() / (vectors**2).sum()
    assert_close(metrics, expected._replace(roughness=rough), 1e-6)


def test_where_selects():
    tensors = layers_of("float32")
    tree = {"layers": jax.tree.map(jnp.asarray, tensors)}
    depth = ds.Depth.from_rules({"layers/.*": 0})
    metrics = ds.depth_metrics(tree, depth, where=lambda path, leaf: "bias" in path)
    np.testing.assert_allclose(
        metrics["layers/.*"].cosines, expected_of(tensors["bias"]).cosines, atol=1e-6
    )
    noise = ds.gradient_noise_over_depth(
        jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), tree),
        depth,
        where=lambda path, leaf: leaf.shape == (LAYERS, 6),
    )
    squares = (1.5 * tensors["bias"]).reshape(LAYERS, -1)
    np.testing.assert_allclose(noise["layers/.*"].squared_norm, (squares**2).sum(1), rtol=1e-5)


def test_tensors_of_the_same_name_are_told_apart():
    tree = {name: {"in": jnp.ones((2, 3)), "out": jnp.ones((2, 3))} for name in ("a", "b")}
    rules = {f"{name}/.*": ds.sequence((f"{name}/in", 0), (f"{name}/out", 0)) for name in "ab"}
    metrics = ds.depth_metrics(tree, ds.Depth.from_rules(rules), by="tensor")
    assert len(metrics) == 2
    assert all(each.norms.shape == (4,) for each in metrics.values())


def test_zero_and_single_layers():
    """Nothing is divided by 0, and there may be no neighbour."""
    depth = ds.Depth.from_rules({"layers": 0})
    for shape in [(3, 4), (1, 4)]:
        [zero] = ds.depth_metrics({"layers": jnp.zeros(shape)}, depth, full=True).values()
        assert not any(np.any(each) for each in zero)
    [one] = ds.depth_metrics({"layers": jnp.ones((1, 4))}, depth, full=True).values()
    assert_close(one, expected_of(np.ones((1, 4))), 1e-6)
    assert one.cosines.shape == (0,)


def test_layers_are_compared_with_all_others_on_demand():
    metrics = ds.depth_metrics({"layers": jnp.ones((3, 4))}, ds.Depth.from_rules({"layers": 0}))
    assert metrics["layers"].similarity is metrics["layers"].spectrum is None


def test_roughness_of_what_is_nearly_the_same():
    """It is no difference of large numbers."""
    rng = np.random.default_rng(0)
    layers = (1e3 + rng.normal(size=(6, 50))).astype("float32")
    [metrics] = ds.depth_metrics(
        {"layers": jnp.asarray(layers)}, ds.Depth.from_rules({"layers": 0})
    ).values()
    np.testing.assert_allclose(metrics.roughness, expected_of(layers).roughness, rtol=1e-5)


def test_the_window_multiplies_the_spectrum_by_its_gain():
    tree = {"layers": jnp.asarray(layers_of("float32")["kernel"])}
    depth = ds.Depth.from_rules({"layers": 0})
    tx = ds.smooth_over_depth(0.3, depth=depth)
    after, _ = tx.update(tree, tx.init(tree))
    powers = [ds.depth_metrics(each, depth, full=True)["layers"].spectrum for each in (tree, after)]
    gain = 0.7 + 0.3 * np.cos(np.pi * np.arange(LAYERS) / LAYERS)
    np.testing.assert_allclose(powers[1], gain**2 * powers[0], rtol=1e-4)


def test_a_nan_is_seen_where_it_is():
    tree = {"layers": jnp.asarray(layers_of("float32")["kernel"]).at[5, 0, 0].set(jnp.nan)}
    [metrics] = ds.depth_metrics(tree, ds.Depth.from_rules({"layers": 0}), full=True).values()
    assert np.flatnonzero(np.isnan(metrics.norms)).tolist() == [5]
    assert np.flatnonzero(np.isnan(metrics.cosines)).tolist() == [4, 5]
    rows, columns = np.nonzero(np.isnan(metrics.similarity))
    assert set(rows[columns != 5]) == {5}
    assert set(columns[rows != 5]) == {5}


def test_refusals():
    tree = {"layers": jnp.ones((3, 4))}
    depth = ds.Depth.from_rules({"layers": 0})
    with pytest.raises(ValueError, match=r"depth is a dict, but .* Updates come before it"):
        ds.depth_metrics(depth, tree)
    with pytest.raises(ValueError, match=r"depth is a dict"):
        ds.gradient_noise_over_depth(tree, tree)
    with pytest.raises(ValueError, match=r"by is 'layer', but has to be 'group' or 'tensor'"):
        ds.depth_metrics(tree, depth, by="layer")
    with pytest.raises(ValueError, match=r"layers \(\) .*"):
        ds.depth_metrics({"layers": jnp.ones(())}, depth)


def a_path(shape=(9, 5, 7, 16), dtype="float64"):
    return np.random.default_rng(0).normal(size=shape).cumsum(0).astype(dtype)


def test_line_shape_score():
    """From 1, for a line, up: as the replication computes it, and for each token by itself."""
    with jax.enable_x64(True):
        states = a_path()
        steps = np.diff(states, axis=0)
        units = steps / np.linalg.norm(steps, axis=-1, keepdims=True)
        expected = 8 / np.linalg.norm(units.sum(0), axis=-1)
        np.testing.assert_allclose(ds.line_shape_score(states), expected, rtol=1e-12)
        line = np.arange(1.0, 6.0)[:, None] ** 2 * np.array([1.0, -2.0, 0.5])
        np.testing.assert_allclose(ds.line_shape_score(line), 1, rtol=1e-12)
    there_and_back = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert ds.line_shape_score(there_and_back) == jnp.inf
    assert ds.line_shape_score(jnp.array([[0.0], [0.0], [1.0], [2.0]])) == 1.5
    assert (ds.line_shape_score(a_path()) >= 1).all()


def test_residual_alignment():
    with jax.enable_x64(True):
        states = a_path()
        steps = np.diff(states, axis=0)
        units = steps / np.linalg.norm(steps, axis=-1, keepdims=True)
        expected = (units[1:] * units[:-1]).sum(-1)
        np.testing.assert_allclose(ds.residual_alignment(states), expected, atol=1e-12)
        assert expected.shape == (7, 5, 7)
    still = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    np.testing.assert_array_equal(ds.residual_alignment(still), [0, 0])


@pytest.mark.parametrize("measure", [ds.line_shape_score, ds.residual_alignment])
def test_hidden_states(measure):
    """Narrow types are measured in float32; a list of states will do; what are none is refused."""
    states = jnp.asarray(a_path(), "bfloat16")
    exact = measure(np.asarray(states, "float32"))
    np.testing.assert_allclose(measure(states), exact, rtol=1e-6)
    np.testing.assert_array_equal(measure(list(states)), measure(states))
    assert measure(states).dtype == jnp.float32
    for shape in [(3,), (1, 4), ()]:
        with pytest.raises(ValueError, match=r"The states are of shape .* have to be of \(L \+ 1"):
            measure(jnp.ones(shape))


def test_metrics_have_gradients():
    """For whoever puts them into a loss."""
    tree = {"layers": jnp.asarray(layers_of("float32")["kernel"]).at[3].set(0)}
    depth = ds.Depth.from_rules({"layers": 0})

    def roughness(tree):
        [metrics] = ds.depth_metrics(tree, depth, full=True).values()
        return metrics.roughness + metrics.adjacent_cosine + metrics.similarity.sum()

    chex.assert_tree_all_finite(jax.grad(roughness)(tree))


def test_under_vmap():
    trees = {"layers": jnp.asarray(a_path((3, 6, 4), "float32"))}
    depth = ds.Depth.from_rules({"layers": 0}).resolve({"layers": trees["layers"][0]})
    measure = functools.partial(ds.depth_metrics, depth=depth, full=True)
    together = jax.vmap(measure)(trees)["layers"]
    for k in range(3):
        alone = measure({"layers": trees["layers"][k]})["layers"]
        chex.assert_trees_all_close(
            jax.tree.map(lambda each, k=k: each[k], together), alone, rtol=1e-5, atol=1e-5
        )
