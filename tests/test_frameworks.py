"""Real models of every framework: traced, found, initialised, and updated once."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import depthsmooth as ds
from depthsmooth.depth.paths import leaves_of, path_string
from tests import reference

X = jax.random.normal(jax.random.key(0), (2, 8))
ALPHA = 0.2


def assert_smoothed(updates, params, depth):
    """One step of smoothing is the paper's formula on each track, and nothing elsewhere."""
    tx = ds.smooth_over_depth(ALPHA, depth=depth)
    mixed, _ = jax.jit(tx.update)(updates, tx.init(params))

    def arrays(tree):
        return {path: np.asarray(leaf) for path, leaf in leaves_of(tree)[0]}

    before, after = arrays(updates), arrays(mixed)
    for track in depth.tracks:
        layers = {}
        for path, place in zip(track.paths, track.places, strict=True):
            for result, tree in enumerate((before, after)):
                front = np.moveaxis(tree[path], place.axes, range(len(place.axes)))
                flat = front.reshape(-1, *front.shape[len(place.axes) :])
                for layer, value in zip(place.layers, flat, strict=True):
                    layers.setdefault(layer, [None, None])[result] = value
        stack = [np.stack([layers[k][result] for k in sorted(layers)]) for result in (0, 1)]
        assert track.spans() == (len(layers),)
        np.testing.assert_allclose(
            stack[1], reference.window(stack[0], ALPHA, 0), rtol=2e-5, atol=1e-6
        )
    for path in set(before) - set(depth):
        np.testing.assert_array_equal(after[path], before[path])


def gradients(loss, params):
    return jax.jit(jax.grad(loss))(params)


class Block(nn.Module):
    """A transformer block's MLP, with experts if asked for."""

    experts: int = 0
    boxed: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, (None, "features")) if self.boxed else init
        if self.experts:
            shape = (self.experts, 8, 8)
            weights = self.param("experts", nn.initializers.lecun_normal(), shape)
            gates = jax.nn.softmax(nn.Dense(self.experts)(h))
            h, _ = jax.lax.scan(
                lambda total, expert: (total + (h @ expert[0]) * expert[1][:, None], None),
                jnp.zeros_like(h),
                (weights, gates.T),
            )
        return x + nn.Dense(8, kernel_init=init)(nn.gelu(nn.Dense(16)(h))), None


class Scanned(nn.Module):
    """Two stacks of blocks, scanned over an axis."""

    axis: int
    experts: int = 0
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        for name, length in (("encoder", 4), ("decoder", 3)):
            stack = nn.scan(
                Block,
                variable_axes={"params": self.axis},
                split_rngs={"params": True},
                length=length,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(self.experts, self.boxed, name=f"{name}_layers")(x, None)
        return nn.Dense(2)(x)


# Flax's own boxes cannot be scanned over a negative axis.
@pytest.mark.parametrize(
    ("axis", "boxed"), [(0, True), (0, False), (1, True), (1, False), (-1, False)]
)
@pytest.mark.parametrize("experts", [0, 3])
def test_linen_scan(axis, experts, boxed):
    model = Scanned(axis, experts, boxed)
    params = model.init(jax.random.key(1), X)["params"]

    def loss(params):
        return model.apply({"params": params}, X).var()

    depth = ds.trace_depth(loss, params)
    assert len(depth) == (9 if experts else 6) * 2
    for path, place in depth.items():
        stack = path.partition("/")[0]
        assert len(place.layers) == {"encoder_layers": 4, "decoder_layers": 3}[stack]
        assert place.group == stack
    kernel = depth["encoder_layers/Dense_0/kernel"]
    assert kernel.axes == (axis % 3,)
    assert_smoothed(gradients(loss, params), params, depth)
    assert depth.resolve(nn.unbox(params)) == depth.resolve(params)


def test_linen_remat_scan():
    model = nn.remat_scan(nn.Dense, lengths=(2, 3))(8)
    params = model.init(jax.random.key(1), X)

    def loss(params):
        return model.apply(params, X).var()

    depth = ds.trace_depth(loss, params)
    assert {place.axes for place in depth.values()} == {(0, 1)}
    assert {place.layers for place in depth.values()} == {tuple(range(6))}
    assert len(depth) == 2
    assert_smoothed(gradients(loss, params), params, depth)


def test_linen_unrolled_train_state():
    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(12):
                x, _ = Block(name=f"block_{i}")(x)
            return nn.Dense(2)(x)

    model = Unrolled()
    params = nn.unbox(model.init(jax.random.key(1), X)["params"])

    def loss(params):
        return model.apply({"params": params}, X).var()

    depth = ds.trace_depth(loss, params)
    assert len(depth) == 72
    assert all(place.layer == int(path.split("/")[0][6:]) for path, place in depth.items())
    found = ds.find_depth(params)
    assert {p: at.layers for p, at in found.items()} == {p: at.layers for p, at in depth.items()}
    assert_smoothed(gradients(loss, params), params, depth)
    smooth = ds.smooth_over_depth(ALPHA, depth=depth)
    by_itself = ds.smooth_over_depth(ALPHA)
    labels = jax.tree_util.tree_map_with_path(
        lambda keys, _: "rest" if "Dense_1" in path_string(keys) else "smooth", params
    )
    mask = jax.tree.map(lambda label: label == "smooth", labels)
    results = []
    for tx in (
        optax.masked(smooth, mask),
        optax.masked(by_itself, mask),
        optax.partition({"smooth": smooth, "rest": optax.identity()}, labels),
    ):
        state = TrainState.create(
            apply_fn=model.apply, params=params, tx=optax.chain(tx, optax.sgd(1.0))
        )
        results.append(jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))(state))
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result.params, results[0].params)


class NnxBlock(nnx.Module):
    """A block of nnx."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NnxStacked(nnx.Module):
    """Blocks created by vmap, along an axis."""

    def __init__(self, axis, rngs):
        self.axis = axis

        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=(0,), out_axes=axis)
        def create(rngs):
            return NnxBlock(rngs)

        self.layers = create(rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x)

        return self.head(forward(x, self.layers))


class NnxListed(nnx.Module):
    """A list of blocks."""

    def __init__(self, rngs):
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(11)])
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [0, 1, "list"])
def test_nnx_optimizer(kind):
    model = NnxListed(nnx.Rngs(0)) if kind == "list" else NnxStacked(kind, nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def loss(params):
        return nnx.merge(graph, params)(X).var()

    depth = ds.trace_depth(lambda model: model(X).var(), model)
    assert ds.trace_depth(loss, params) == depth
    if kind == "list":
        assert len(depth) == 66
        assert depth["layers/10/up/kernel"].layer == 10
    else:
        assert len(depth) == 6
        assert {place.axes for place in depth.values()} == {(kind,)}
    found = ds.find_depth(params)
    assert {p: at.layers for p, at in found.items()} == {p: at.layers for p, at in depth.items()}
    updates = jax.grad(loss)(params)
    assert_smoothed(updates, params, depth)

    def step(depth):
        model = nnx.merge(graph, params, copy=True)
        chain = optax.chain(ds.smooth_over_depth(ALPHA, depth=depth), optax.sgd(1.0))
        optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
        gradient = nnx.grad(lambda model: model(X).var())(model)
        nnx.jit(lambda m, o, g: o.update(m, g))(model, optimizer, gradient)
        return jax.tree.leaves(nnx.state(model, nnx.Param))

    tx = ds.smooth_over_depth(ALPHA, depth=depth)
    mixed, _ = tx.update(updates, tx.init(params))
    expected = jax.tree.leaves(optax.apply_updates(params, jax.tree.map(lambda u: -u, mixed)))
    for result in (step(depth), step(None)):
        for after, right in zip(result, expected, strict=True):
            np.testing.assert_allclose(after, right, rtol=1e-5, atol=1e-6)


class EqxBlock(eqx.Module):
    """A block of Equinox."""

    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(8)
        self.mlp = eqx.nn.MLP(8, 8, 16, 2, key=key)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class EqxNet(eqx.Module):
    """Blocks in a list, or stacked by filter_vmap."""

    blocks: list | EqxBlock
    head: eqx.nn.Linear

    def __init__(self, stacked, key):
        keys = jax.random.split(key, 5)
        self.blocks = eqx.filter_vmap(EqxBlock)(keys) if stacked else [EqxBlock(k) for k in keys]
        self.head = eqx.nn.Linear(8, 2, key=key)

    def __call__(self, x):
        if isinstance(self.blocks, list):
            for block in self.blocks:
                x = block(x)
            return self.head(x)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        return self.head(jax.lax.scan(lambda x, a: (eqx.combine(a, static)(x), None), x, arrays)[0])


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_equinox(stacked):
    model = EqxNet(stacked, jax.random.key(2))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        return jax.vmap(eqx.combine(params, static))(X).var()

    depth = ds.trace_depth(lambda model: jax.vmap(model)(X).var(), model)
    assert ds.trace_depth(loss, params) == depth
    assert len(depth) == (8 if stacked else 40)
    if stacked:
        assert {place.axes for place in depth.values()} == {(0,)}
    else:
        assert depth["blocks/4/mlp/layers/1/weight"].layer == 4
    assert {place.group for place in depth.values()} == {"blocks" if stacked else "blocks/*"}
    assert_smoothed(gradients(loss, params), params, depth)


@pytest.mark.parametrize("stacked", [True, False], ids=["layer_stack", "unrolled"])
def test_haiku(stacked):
    def block(x):
        h = hk.LayerNorm(-1, True, True)(x)
        h = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling(), name="attn")(
            h, h, h
        )
        return x + hk.nets.MLP([16, 8], name="mlp")(h)

    def forward(x):
        if stacked:
            x = hk.experimental.layer_stack(4)(block)(x)
        else:
            for _ in range(4):
                x = block(x)
        return hk.Linear(2)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(3), X[None])

    def loss(params):
        return model.apply(params, X[None]).var()

    depth = ds.trace_depth(loss, params)
    assert {track.spans() for track in depth.tracks} == {(4,)}
    assert len(depth) == (14 if stacked else 56)
    assert not any(path.startswith("linear/") for path in depth)
    if not stacked:
        assert depth["mlp/~/linear_1/w"].layer == 0
        assert depth["mlp_3/~/linear_1/w"].layer == 3
    assert_smoothed(gradients(loss, params), params, depth)
