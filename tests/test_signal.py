"""Signal and noise over depth: without bias, with intervals that hold, and the same in halves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import depthsmooth as ds
from depthsmooth.metrics.signal import DECAY, GROUPS
from tests.test_metrics import MODES, SPECS, in_parts

LAYERS = 6


def cosine(products):
    sizes = np.sqrt(np.diagonal(products).clip(0))
    total = (sizes[1:] * sizes[:-1]).sum()
    return np.trace(products, 1) / total if total else 0.0


def products_of(vectors):
    """Signal and noise of vectors (micro-batches, layers, features), pair by pair."""
    count = len(vectors)
    each = np.einsum("klf,kmf->lm", vectors, vectors) / count
    pairs = sum(vectors[i] @ vectors[j].T for i in range(count) for j in range(count) if i != j) / (
        count * (count - 1)
    )
    return pairs, each - pairs


def expected_of(vectors):
    """Matrices, and of each scalar its value and the half of its interval."""
    signal, noise = products_of(vectors)
    without = [products_of(np.delete(vectors, k, 0)) for k in range(len(vectors))]

    def estimate(of):
        apart = np.array([of(*each) for each in without])
        spread = np.sqrt((len(apart) - 1) / len(apart) * ((apart - apart.mean()) ** 2).sum())
        return of(signal, noise), scipy.stats.t.ppf(0.975, len(apart) - 1) * spread

    share = estimate(lambda s, n: np.trace(s) / (np.trace(s) + np.trace(n)))
    cosines = estimate(lambda s, _: cosine(s)), estimate(lambda _, n: cosine(n))
    return signal, noise, share, *cosines


def assert_signal(ours, vectors, tolerance):
    ours = jax.device_get(ours)
    signal, noise, *estimates = expected_of(np.asarray(vectors, float))
    scale = np.abs(signal + noise).max()
    np.testing.assert_allclose(ours.signal, signal, rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(ours.noise, noise, rtol=0, atol=tolerance * scale)
    for name, (value, half) in zip(ours._fields[2:], estimates, strict=True):
        told = getattr(ours, name)
        np.testing.assert_allclose(told.value, value, rtol=10 * tolerance, err_msg=name)
        # The quantile of Student's t is a series.
        width = 0.5 * (told.high - told.low)
        np.testing.assert_allclose(width, half, rtol=0.01 + 1e3 * tolerance, err_msg=name)
        np.testing.assert_allclose(told.low + told.high, 2 * told.value, rtol=1e-5)


def drawn(count=8, seed=0):
    """Gradients of two tensors, of shape (micro-batches, layers, ...), somewhat alike."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (LAYERS, 4, 6), "bias": (LAYERS, 6)}
    return {
        name: 2 * rng.normal(size=shape)
        + rng.normal(size=(count, *shape))
        + rng.normal(size=(count, 1, *shape[1:]))
        for name, shape in shapes.items()
    }


def as_tree(layout, stacks):
    if layout == "unrolled":
        return {
            "layers": {
                str(k): {name: each[:, k] for name, each in stacks.items()} for k in range(LAYERS)
            }
        }
    axis = 2 if layout == "second axis" else 1
    return {"layers": {name: np.moveaxis(each, 1, axis) for name, each in stacks.items()}}


def vectors_of(stacks):
    flat = [each.reshape(*each.shape[:2], -1) for each in stacks.values()]
    return np.concatenate(flat, 2)


def depth_of(layout):
    if layout == "unrolled":
        return ds.Depth.from_rules({"layers/.*": ds.numbered()})
    return ds.Depth.from_rules({"layers/.*": 1 if layout == "second axis" else 0})


@pytest.mark.parametrize("layout", ["stacked", "second axis", "unrolled"])
def test_it_is_what_pairs_of_micro_batches_say(layout):
    """From products of different micro-batches, whose noise is independent, one pair at a time."""
    stacks = drawn()
    with jax.enable_x64(True):
        tree = jax.tree.map(jnp.asarray, as_tree(layout, stacks))
        [told] = ds.depth_signal(tree, depth_of(layout)).values()
        assert_signal(told, vectors_of(stacks), 1e-12)
        by_tensor = ds.depth_signal(tree, depth_of(layout), by="tensor")
    for name, told in by_tensor.items():
        assert_signal(told, vectors_of({name: stacks[name.split("/")[-1]]}), 1e-12)
    assert len(by_tensor) == 2


def test_narrow_types_are_measured_in_float32():
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, "bfloat16"), as_tree("stacked", drawn()))
    [told] = ds.depth_signal(tree, depth_of("stacked")).values()
    assert told.signal.dtype == jnp.float32
    assert_signal(told, vectors_of(jax.tree.map(np.float32, tree)["layers"]), 1e-5)


def made(rng, count, share, signal_cosine, noise_cosine, layers=8, features=300):
    """Gradients with known answers, and their signal."""

    def alike(share, *shape):
        common, own = (
            rng.normal(size=(*shape, 1, features)),
            rng.normal(size=(*shape, layers, features)),
        )
        return np.sqrt(share) * common + np.sqrt(1 - share) * own

    signal = np.sqrt(share) * alike(signal_cosine)
    return signal + np.sqrt(1 - share) * alike(noise_cosine, count), signal


@pytest.mark.parametrize(("count", "share"), [(16, 0.05), (64, 0.01), (3, 0.5)])
def test_intervals_hold_what_is_true(count, share):
    """In 95 of 100 cases: here in no fewer than 88, and values are right in the mean."""
    rng = np.random.default_rng(0)
    depth = ds.Depth.from_rules({"layers": 0})
    hits, values = [], []
    for _ in range(100):
        gradients, signal = made(rng, count, share, 0.5, 0.2)
        told = ds.depth_signal({"layers": jnp.asarray(gradients, "float32")}, depth)["layers"]
        truth = (signal**2).sum() / ((signal**2).sum() + (1 - share) * signal.size)
        true = truth, cosine(signal @ signal.T), 0.2
        ours = told.share, told.signal_cosine, told.noise_cosine
        hits.append([one.low <= it <= one.high for one, it in zip(ours, true, strict=True)])
        values.append([one.value - it for one, it in zip(ours, true, strict=True)])
    assert (np.mean(hits, 0) >= 0.88).all()
    error = np.std(values, 0) / 10
    assert (np.abs(np.mean(values, 0)) <= 4 * error).all()


def test_noise_that_layers_share_is_no_signal():
    """All layers see one batch: their gradients are alike, and nothing of it is signal."""
    rng = np.random.default_rng(1)
    gradients, _ = made(rng, 64, 0.0, 0.0, 0.9)
    told = ds.depth_signal({"w": jnp.asarray(gradients, "float32")}, ds.Depth.from_rules({"w": 0}))
    assert told["w"].noise_cosine.value > 0.85
    assert told["w"].share.low <= 0 <= told["w"].share.high


def test_nothing_is_measured_of_nothing_and_gradients_of_what_is_are_finite():
    """Also where no signal is seen, whose estimate is below 0 in some layer."""
    depth = ds.Depth.from_rules({"layers": 0})
    assert ds.depth_signal({}, ds.Depth.from_rules({})) == {}
    noise = {"layers": jax.random.normal(jax.random.key(0), (4, 6, 3))}
    told = ds.depth_signal(noise, depth)["layers"]
    assert (jnp.diagonal(told.signal) < 0).any()
    for name in ("share", "signal_cosine", "noise_cosine"):
        slope = jax.grad(lambda g, name=name: getattr(ds.depth_signal(g, depth)["layers"], name)[0])
        assert jnp.isfinite(slope(noise)["layers"]).all()


def test_layers_that_lack_a_tensor_have_nothing_there():
    gradients = {"layers": {"0": jnp.ones((4, 2)), "1": optax.MaskedNode(), "2": jnp.ones((4, 2))}}
    whole = {"layers": {str(k): jnp.ones(2) for k in range(3)}}
    depth = ds.Depth.from_rules({"layers/.*": ds.numbered()}).resolve(whole)
    [told] = ds.depth_signal(gradients, depth).values()
    np.testing.assert_array_equal(told.signal, 2 * np.outer([1, 0, 1], [1, 0, 1]))
    np.testing.assert_array_equal(told.noise, np.zeros((3, 3)))
    assert told.share.value == 1
    assert told.signal_cosine.value == 0


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_same_in_parts(spec, mode):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (12, 4, 6), "bias": (12, 6)}
    stacks = {
        name: (rng.normal(size=shape) + rng.normal(size=(4, *shape))).astype("float32")
        for name, shape in shapes.items()
    }
    tree = {"layers": stacks}
    specs = {"layers": {name: jax.P(None, *one) for name, one in SPECS[spec].items()}}
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
    depth = ds.Depth.from_rules({"layers/.*": 0}).resolve(one)
    axis_name = "stage" if mode == "manual" and spec != "features" else None
    measure = functools.partial(ds.depth_signal, depth=depth, axis_name=axis_name)
    result, _ = in_parts(measure, tree, specs, mode)
    [told] = result.values()
    assert_signal(told, vectors_of(stacks), 1e-5)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layers": jnp.ones((2, 3, 4))}, r"layers \(2, 3, 4\) .* of 2 micro-.* 3 or more"),
        ({"layers": jnp.ones((4, 3)), "head": jnp.ones(3)}, r"head \(3,\) .* of 3 micro-batches"),
    ],
)
def test_refuses_too_few_micro_batches(tree, message):
    with pytest.raises(ValueError, match=message):
        ds.depth_signal(tree, ds.Depth.from_rules({"layers": 0}))


# In a stream of halves.

DEPTH = ds.Depth.from_rules({"layers/.*": 0}).resolve(
    {"layers": {"kernel": jnp.ones((LAYERS, 4, 6)), "bias": jnp.ones((LAYERS, 6))}}
)


def halves(step):
    """The gradients of both halves of a step, and their mean."""
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), {"layers": drawn(2, step)})
    one, other = (jax.tree.map(lambda leaf, k=k: leaf[k], tree) for k in (0, 1))
    return one, other, jax.tree.map(lambda a, b: (a + b) / 2, one, other)


def streamed(steps, **keywords):
    tx = optax.chain(ds.monitor_depth(DEPTH, signal=True, **keywords), optax.scale(-0.1))
    params = halves(0)[0]
    state = tx.init(params)
    update = jax.jit(lambda g, s, h: tx.update(g, s, params, half_gradients=h))
    for step in range(steps):
        one, _, mean = halves(step)
        updates, state = update(mean, state, one)
    return updates, state


def of_step(step):
    one, other, _ = halves(step)
    pair = {name: np.stack([one["layers"][name], other["layers"][name]]) for name in one["layers"]}
    return products_of(vectors_of(pair).astype(float))


@pytest.mark.parametrize("every", [1, 3])
def test_a_stream_is_the_mean_of_its_steps(every):
    steps = 40
    updates, state = streamed(steps, every=every)
    np.testing.assert_allclose(
        updates["layers"]["bias"], -0.1 * halves(steps - 1)[2]["layers"]["bias"], rtol=1e-6
    )
    [metrics] = ds.read_metrics(state).values()
    measured = list(range(0, steps, every))
    weights = DECAY ** np.arange(len(measured))[::-1]
    products = np.array([of_step(step) for step in measured])
    signal, noise = np.einsum("k,kplm->plm", weights / weights.sum(), products)
    np.testing.assert_allclose(metrics.signal.signal, signal, rtol=0, atol=1e-5 * signal.max())
    np.testing.assert_allclose(metrics.signal.noise, noise, rtol=0, atol=1e-5 * noise.max())
    np.testing.assert_allclose(metrics.signal.signal_cosine.value, cosine(signal), rtol=1e-4)
    group = np.arange(len(measured)) % GROUPS
    without = []
    for g in range(GROUPS):
        kept = group != g
        mean = np.einsum("k,klm->lm", weights[kept] / weights[kept].sum(), products[kept, 0])
        without.append(cosine(mean))
    half = scipy.stats.t.ppf(0.975, GROUPS - 1) * np.sqrt((GROUPS - 1) * np.var(without))
    told = metrics.signal.signal_cosine
    np.testing.assert_allclose(told.high - told.value, half, rtol=0.02)


def test_a_stream_is_read_wherever_it_is_and_unknown_before_it_begins():
    tx = ds.monitor_depth(DEPTH, signal=True, name="raw", by="tensor")
    state = tx.init(halves(0)[0])
    metrics = ds.read_metrics(state)
    assert set(metrics) == {"raw/layers/kernel", "raw/layers/bias"}
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(metrics))
    one, _, mean = halves(0)
    _, state = tx.update(mean, state, half_gradients=one)
    as_dictionaries = {
        "count": state.count,
        "depth_metrics": {
            name: {**each._asdict(), "signal": each.signal._asdict()}
            for name, each in state.depth_metrics.items()
        },
    }
    for kept in (state, as_dictionaries):
        scalars = ds.as_scalars(ds.read_metrics(kept))
        assert {
            f"raw/layers/bias/{each}" for each in ("share", "signal_cosine", "noise_cosine")
        } <= set(scalars)
        assert all(np.isfinite(value) for value in scalars.values())


def test_streams_of_several_optimizers_are_told_apart():
    tx = ds.monitor_depth(DEPTH, signal=True)
    batched = [jax.tree.map(lambda *x: jnp.stack(x), *map(halves, (0, 1)))][0]
    one, _, mean = batched
    state = jax.vmap(tx.init)(one)
    _, state = jax.vmap(lambda g, s, h: tx.update(g, s, half_gradients=h))(mean, state, one)
    [metrics] = ds.read_metrics(state).values()
    for step in (0, 1):
        np.testing.assert_allclose(metrics.signal.signal[step], of_step(step)[0], rtol=0, atol=1e-4)


def test_a_stream_needs_its_half():
    tx = ds.monitor_depth(DEPTH, signal=True)
    one, _, mean = halves(0)
    with pytest.raises(ValueError, match="half_gradients=first"):
        tx.update(mean, tx.init(one))
    other = {"layers": {**one["layers"], "bias": jnp.ones((LAYERS, 7))}}
    with pytest.raises(ValueError, match=r"half_gradients is not like layers/bias \(6, 6\)"):
        tx.update(mean, tx.init(one), half_gradients=other)


def test_without_a_signal_the_state_is_as_it_was():
    """Checkpoints of earlier versions fit."""
    one = halves(0)[0]
    plain = ds.monitor_depth(DEPTH).init(one)
    assert len(jax.tree.leaves(plain)) == 6
    assert len(jax.tree.leaves(ds.monitor_depth(DEPTH, signal=True).init(one))) == 8
