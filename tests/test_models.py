"""Models as users have them: what of them is traced, and how they are left."""

import functools
import subprocess
import sys
from typing import Any

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
from depthsmooth.depth.models import parts_of
from depthsmooth.depth.paths import leaves_of

D = 4
X = jnp.ones((5, D))
TOKENS = jnp.zeros((2, 5), "int32")
KEY = jax.random.key(0)


def paths(tree):
    return [path for path, _ in leaves_of(tree)[0]]


def assert_traced(depth, tree, layers=3):
    """The Depth has the leaves of the optimizer's tree, and as many layers as are said."""
    assert [leaf.path for leaf in depth.leaves] == paths(tree)
    assert set(depth.groups.values()) == {layers}


def assert_same(before, after):
    """Each leaf is the very array that it was."""
    assert all(one is other for one, other in zip(before, after, strict=True))


def assert_steps(depth, loss, params):
    """The whole optimizer makes a step with the Depth: smoothed where it has places."""

    @jax.jit
    def updates(params):
        gradients = jax.grad(loss)(params)
        optimizers = [ds.adamw(1e-2, alpha=alpha, depth=depth) for alpha in (0.0, 0.5)]
        return [tx.update(gradients, tx.init(params), params)[0] for tx in optimizers]

    plain, smoothed = (dict(leaves_of(tree)[0]) for tree in updates(params))
    changed = {path for path in plain if not np.array_equal(plain[path], smoothed[path])}
    assert changed
    assert changed <= set(depth)


class NnxBlock(nnx.Module):
    """Everything that a module may hold beside parameters."""

    def __init__(self, rngs):
        self.up = nnx.Linear(D, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.LoRALinear(8, D, lora_rank=2, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))
        self.activation, self.nothing, self.label = nnx.gelu, None, "block"

    def __call__(self, x):
        self.calls[...] += 1
        return x + self.down(self.drop(self.activation(self.norm(self.up(x)))))


class NnxListed(nnx.Module):
    """Blocks in a list; the head is the embedding, and there by another name, too."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(10, D, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.head = self.embed.embedding

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x)
        return x @ self.head.T

    def loss(self, tokens):
        return self(tokens).var()


class NnxStacked(nnx.Module):
    """Blocks created by vmap and run by scan, each with a key of its own."""

    def __init__(self, rngs, remat=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def create(rngs):
            return NnxBlock(rngs)

        self.layers, self.remat = create(rngs), remat

    def __call__(self, x):
        def one(x, block):
            return block(x)

        body = nnx.remat(one) if self.remat else one
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class NnxNoTree(nnx.Module, pytree=False):
    """A module that is no tree, with a plain list in it."""

    def __init__(self, rngs):
        self.layers = [NnxBlock(rngs) for _ in range(3)]

    def __call__(self, x):
        return functools.reduce(lambda x, block: block(x), self.layers, x)


def nnx_loss(model, x):
    return model(x).var()


NNX = {
    "list": (lambda: NnxListed(nnx.Rngs(0)), nnx_loss, TOKENS),
    "method": (lambda: NnxListed(nnx.Rngs(0)), NnxListed.loss, TOKENS),
    "jit": (lambda: NnxListed(nnx.Rngs(0)), nnx.jit(nnx_loss), TOKENS),
    "stack": (lambda: NnxStacked(nnx.Rngs(0)), nnx_loss, X),
    "remat": (lambda: NnxStacked(nnx.Rngs(0), remat=True), nnx_loss, X),
    "jitted stack": (lambda: NnxStacked(nnx.Rngs(0)), nnx.jit(nnx_loss), X),
    "no tree": (lambda: NnxNoTree(nnx.Rngs(0)), nnx_loss, X),
}


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_model_is_traced_and_stays_as_it_is(name):
    make, loss, x = NNX[name]
    model = make()
    before = jax.tree.leaves(nnx.state(model))
    with jax.checking_leaks():
        depth = ds.trace_depth(loss, model, x)
    after = jax.tree.leaves(nnx.state(model))
    assert_same(before, after)
    assert_traced(depth, nnx.state(model, nnx.Param))
    assert any("/lora" in path for path in depth)
    assert not any("head" in leaf.path for leaf in depth.leaves)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model, x))

    step(model, nnx.Optimizer(model, ds.adamw(1e-2, alpha=0.5, depth=depth), wrt=nnx.Param))
    assert jax.tree.leaves(nnx.state(model))[0] is not before[0]


@pytest.mark.parametrize("name", ["list", "stack"])
def test_an_abstract_nnx_model(name):
    make, loss, x = NNX[name]
    model = make()
    depth = ds.trace_depth(loss, nnx.eval_shape(make), jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert depth == ds.trace_depth(loss, model, x)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert_steps(depth, lambda p: loss(nnx.merge(graph, p, rest, copy=True), x), params)


def test_nnx_models_in_a_tree():
    models = {"one": NnxListed(nnx.Rngs(0)), "other": [NnxStacked(nnx.Rngs(1)), jnp.ones(3)]}
    before = jax.tree.leaves(nnx.state(models))

    def loss(models, tokens, x):
        return models["one"](tokens).var() + models["other"][0](x).var() * models["other"][1].sum()

    depth = ds.trace_depth(loss, models, TOKENS, X)
    assert set(depth.groups) == {"one/layers/*", "other/0/layers"}
    assert_traced(depth, nnx.state(models, nnx.Param))
    after = jax.tree.leaves(nnx.state(models))
    assert_same(before, after)


def test_nnx_modules_as_further_arguments():
    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(3)])
            self.drop = nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            for layer in self.layers:
                x = x + self.drop(jnp.tanh(layer(x)), rngs=rngs)
            return x

    student, teacher, rngs = Dropped(nnx.Rngs(0)), Dropped(nnx.Rngs(1)), nnx.Rngs(2)
    before = jax.tree.leaves((nnx.state(teacher), nnx.state(rngs)))

    def distil(student, teacher, x, *, rngs):
        return (student(x, rngs) - teacher(x, rngs)).var()

    depth = ds.trace_depth(distil, student, teacher, X, rngs=rngs)
    assert_traced(depth, nnx.state(student, nnx.Param))
    after = jax.tree.leaves((nnx.state(teacher), nnx.state(rngs)))
    assert_same(before, after)


def test_nnx_in_tree_mode():
    with nnx.set_graph_mode(False):
        listed = NnxListed(nnx.Rngs(0))
        del listed.head  # it is the embedding, which only graphs can say

        def loss(model, tokens):
            x = model.embed(tokens)
            for block in model.layers:
                x = block(x)
            return x.var()

        depth = ds.trace_depth(loss, listed, TOKENS)
        assert_traced(depth, nnx.state(listed, nnx.Param))


def test_some_of_an_nnx_models_parameters():
    """As an optimizer gets them by another ``wrt``: the depth of what it gets."""
    model = NnxListed(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    depth = ds.trace_depth(
        lambda p, rest, x: nnx_loss(nnx.merge(graph, p, rest), x), params, rest, TOKENS
    )
    assert_traced(depth, params)
    nnx.Optimizer(model, ds.adamw(1e-2, depth=depth), wrt=nnx.LoRAParam)
    assert int(model.layers[0].calls[...]) == 0


class EqxBlock(eqx.Module):
    """Everything that a module may hold beside parameters."""

    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    drop: eqx.nn.Dropout
    gain: float
    rounds: jax.Array
    key: jax.Array
    table: np.ndarray
    activation: Any
    label: str = "block"
    nothing: None = None

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(D)
        self.mlp = eqx.nn.MLP(D, D, 8, 1, key=key)
        self.drop = eqx.nn.Dropout(0.5)
        self.gain, self.rounds, self.key = 0.5, jnp.array(1), key
        self.table, self.activation = np.ones(D, "float32"), jax.nn.gelu

    def __call__(self, x, key):
        assert type(self.gain) is float
        h = self.activation(self.mlp(self.norm(x)) + self.table)
        return x + self.gain * self.drop(h, key=jax.random.fold_in(key, self.rounds))


class EqxNet(eqx.Module):
    """Blocks in a list, or stacked by filter_vmap."""

    blocks: list | EqxBlock
    checkpoint: bool

    def __init__(self, stacked, checkpoint, key):
        keys = jax.random.split(key, 3)
        self.blocks = eqx.filter_vmap(EqxBlock)(keys) if stacked else [EqxBlock(k) for k in keys]
        self.checkpoint = checkpoint

    def __call__(self, x, key):
        keys = jax.random.split(key, 3)
        wrapped = eqx.filter_checkpoint if self.checkpoint else lambda block: block
        if isinstance(self.blocks, list):
            for block, key in zip(self.blocks, keys, strict=True):
                x = wrapped(block)(x, key)
            return x
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def body(x, one):
            arrays, key = one
            return wrapped(eqx.combine(arrays, static))(x, key), None

        return jax.lax.scan(body, x, (arrays, keys))[0]


def eqx_loss(model, x, key):
    return jax.vmap(model)(x, jax.random.split(key, len(x))).var()


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", ""])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_an_equinox_model_is_traced_and_stays_as_it_is(stacked, checkpoint):
    model = EqxNet(stacked, checkpoint, KEY)
    before = jax.tree.leaves(model)
    depth = ds.trace_depth(eqx_loss, model, X, KEY)
    assert_same(before, jax.tree.leaves(model))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    assert_traced(depth, params)
    assert_steps(depth, lambda p: eqx_loss(eqx.combine(p, rest), X, KEY), params)

    @eqx.filter_jit
    def step(model):
        tx = ds.adamw(1e-2, depth=depth)
        gradients = eqx.filter_grad(eqx_loss)(model, X, KEY)
        return eqx.apply_updates(model, tx.update(gradients, tx.init(params), model)[0])

    assert jax.tree.structure(step(model)) == jax.tree.structure(model)
    assert ds.trace_depth(eqx.filter_jit(eqx_loss), model, X, KEY) == depth
    assert ds.trace_depth(eqx.filter_value_and_grad(eqx_loss), model, X, KEY) == depth
    assert ds.trace_depth(eqx_loss, eqx.nn.inference_mode(model), X, KEY) == depth
    abstract = eqx.filter_eval_shape(EqxNet, stacked, checkpoint, KEY)
    assert ds.trace_depth(eqx_loss, abstract, X, KEY) == depth


def test_an_equinox_model_of_nothing_but_numbers_and_arrays():
    """Its floats and integers are still no parameters."""

    class Net(eqx.Module):
        weights: list
        gain: float
        count: jax.Array

        def __call__(self, x):
            assert type(self.gain) is float
            for weight in self.weights:
                x = x + self.gain * jnp.tanh(x @ weight) * self.count
            return x

    net = Net([jnp.ones((D, D)) for _ in range(3)], 0.5, jnp.array(2))
    parts = parts_of(net)
    assert parts.paths == paths(eqx.filter(net, eqx.is_inexact_array))
    assert parts.join(parts.params, parts.rest)(X).shape == X.shape


def test_an_equinox_model_with_state():
    class Net(eqx.Module):
        layers: list
        norms: list

        def __init__(self, key):
            self.layers = [eqx.nn.Linear(D, D, key=k) for k in jax.random.split(key, 3)]
            self.norms = [eqx.nn.BatchNorm(D, "batch", mode="ema") for _ in range(3)]

        def __call__(self, x, state):
            for layer, norm in zip(self.layers, self.norms, strict=True):
                h, state = norm(layer(x), state)
                x = x + jnp.tanh(h)
            return x, state

    def loss(model, state, x):
        y, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            x, state
        )
        return y.var(), state

    model, state = eqx.nn.make_with_state(Net)(KEY)
    before = jax.tree.leaves((model, state))
    depth = ds.trace_depth(loss, model, state, X)
    assert_same(before, jax.tree.leaves((model, state)))
    assert_traced(depth, eqx.filter(model, eqx.is_inexact_array))
    loss(model, state, X)


class Frozen:
    """A leaf that is no array, and refuses to be looked at."""

    __hash__ = None

    def __eq__(self, other):
        raise AssertionError


def test_a_tree_with_leaves_that_are_no_arrays():
    square = jnp.ones((3, D, D))
    model = {
        "act": jnp.tanh,
        "cells": (None, Frozen(), {"flag": True, "size": D, "rate": 0.5}),
        "dtype": np.float32,
        "key": KEY,
        "layers": {"name": "layers", "w": square, "b": square[:, 0]},
        "rounds": jnp.array(2),
        "sizes": np.arange(3),
    }

    def forward(model, x, *, kind):
        assert (model["cells"][2], model["dtype"]) == ({"flag": True, "size": D, "rate": 0.5}, kind)
        assert int(model["rounds"]) == model["sizes"].tolist()[2] == 2
        x = x * jax.random.normal(model["key"], x.shape)
        layers = model["layers"]["w"], model["layers"]["b"]
        return jax.lax.scan(lambda x, o: (model["act"](x @ o[0] + o[1]), None), x, layers)[0]

    depth = ds.trace_depth(forward, model, X, kind=np.float32)
    assert [leaf.path for leaf in depth.leaves] == ["layers/b", "layers/w"]
    assert list(depth.groups.values()) == [3]


@pytest.mark.parametrize("leaf", [np.float32, jnp.bfloat16, np.dtype("float32"), True, 3, len])
def test_a_leaf_that_is_no_array_is_passed_on(leaf):
    def forward(model, x):
        assert model["a"] is leaf
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, model["w"])[0]

    depth = ds.trace_depth(forward, {"a": leaf, "w": jnp.ones((3, D, D)), "z": 0.5}, X)
    assert [each.path for each in depth.leaves] == ["w"]


def test_what_is_returned_need_not_be_arrays():
    def forward(p, x):
        y = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
        return y, "a name", None, nn.relu, {"params": p}, nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    assert list(ds.trace_depth(forward, {"w": jnp.ones((3, D, D))}, X)) == ["w"]


def test_numbers_are_parameters_of_a_tree_that_has_nothing_but_numbers_and_arrays():
    params = {f"block_{i}": {"w": jnp.ones((D, D)), "gate": 0.0} for i in range(3)}

    def loss(params, x):
        for block in params.values():
            x = x + block["gate"] * jnp.tanh(x @ block["w"])
        return x.var()

    depth = ds.trace_depth(loss, params, X)
    assert_traced(depth, params)
    assert len(depth) == 6


def test_a_haiku_tree_and_a_key():
    def forward(x):
        x = hk.experimental.layer_stack(3)(lambda x: x + jnp.tanh(hk.Linear(D)(x)))(x)
        return hk.dropout(hk.next_rng_key(), 0.5, x)

    model = hk.transform(forward)
    params = model.init(KEY, X)
    depth = ds.trace_depth(model.apply, params, KEY, X)
    assert_traced(depth, params)
    assert_steps(depth, lambda p: model.apply(p, KEY, X).var(), params)
    assert ds.trace_depth(model.apply, jax.eval_shape(model.init, KEY, X), KEY, X) == depth
    with pytest.raises(ds.DepthNotFoundError, match="no parameters in a Transformed: its init"):
        ds.trace_depth(lambda model, x: x, model, X)


class Linen(nn.Module):
    """Blocks with batch norm, if asked for."""

    norm: bool = False

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            h = nn.Dense(D, name=f"block_{i}")(x)
            h = nn.BatchNorm(use_running_average=False)(h) if self.norm else h
            x = x + jnp.tanh(h)
        return x


def test_the_inner_tree_of_a_linen_model_is_wrapped_as_the_message_says():
    model = Linen()
    params = model.init(KEY, X)
    with pytest.raises(ValueError, match=r"\{'params': …\}") as refused:
        ds.trace_depth(model.apply, params["params"], X)
    assert type(refused.value.__cause__).__name__ == "ScopeCollectionNotFound"
    names = {"model": model, "params": params, "x": X, "trace_depth": ds.trace_depth}
    code = str(refused.value).partition("wrap it: ")[2].partition(", where params")[0]
    inner = eval(code, names)
    assert_traced(inner, params["params"])
    assert_steps(inner, lambda p: model.apply({"params": p}, X).var(), params["params"])
    whole = ds.trace_depth(model.apply, params, X)
    assert_traced(whole, params)


def test_other_slips_with_the_tree_of_a_linen_model():
    model, dense = Linen(), nn.Dense(D)
    params, bare = model.init(KEY, X), dense.init(KEY, X)

    def own(params, x):
        return model.apply({"params": params["params"]}, x)

    for fn, inner in ((dense.apply, bare["params"]), (own, params["params"])):
        with pytest.raises(ValueError, match=r"takes the whole tree .*\{'params': p\}"):
            ds.trace_depth(fn, inner, X)

    def blocks(params, x):
        return x @ params["block_0"]["kernel"]

    for fn in (lambda p, x: model.apply({"params": p}, x), blocks):
        with pytest.raises(
            ValueError, match=r"takes the inner tree .*params\['params'\]"
        ) as refused:
            ds.trace_depth(fn, params, X)
        assert refused.value.__cause__ is not None
    ds.trace_depth(lambda p, x: model.apply({"params": p}, x), params["params"], X)


def test_an_error_of_the_function_is_its_own():
    model = Linen(norm=True)
    variables = model.init(KEY, X)

    def loss(params, inputs, targets):
        return ((inputs @ params["w"] - targets) ** 2).mean()

    params = {"w": jnp.ones((D, D))}
    with pytest.raises(TypeError, match=r"loss\(\) missing 1 required.*'targets'"):
        ds.trace_depth(loss, params, X)
    with pytest.raises(TypeError, match=r"loss\(\) takes 3 positional arguments but 4"):
        ds.trace_depth(loss, params, X, X, X)
    with pytest.raises(KeyError, match="labels"):
        ds.trace_depth(lambda p, batch: batch["labels"], params, {})
    with pytest.raises(ZeroDivisionError):
        ds.trace_depth(lambda p: 1 / 0, params)
    with pytest.raises(Exception, match="batch_stats") as raised:
        ds.trace_depth(lambda p, x: model.apply({"params": p}, x), variables["params"], X)
    assert type(raised.value).__name__ == "ScopeCollectionNotFound"


def test_the_function_comes_first():
    """A model that can be called is the trap: it is taken for the function."""
    model = EqxNet(stacked=True, checkpoint=False, key=KEY)
    mlp = eqx.nn.MLP(D, D, D, 2, key=KEY)
    listed = NnxListed(nnx.Rngs(0))
    for first in (model, listed, eqx.filter_jit(model)):
        with pytest.raises(ds.DepthNotFoundError, match=r"function first, then the model: trace_d"):
            ds.trace_depth(first, eqx_loss, X, KEY)
    with pytest.raises(ds.DepthNotFoundError, match=r"give the function first, then the model"):
        ds.trace_depth(mlp, jnp.ones(D))
    for first in (model, listed.loss):
        with pytest.raises(Exception, match=r"missing|Cannot mutate") as raised:
            ds.trace_depth(first, TOKENS)
        assert "trace_depth(loss, model, *args)" in "".join(raised.value.__notes__)
    with pytest.raises(ValueError, match="takes the function first"):
        ds.trace_depth({"w": X}, eqx_loss, X)


def test_states_of_optimizers_are_refused_with_what_to_give():
    model = Linen()
    variables, tx = model.init(KEY, X), optax.adam(1e-3)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    def loss(state, x):
        return state.apply_fn(state.params, x).var()

    listed = NnxListed(nnx.Rngs(0))
    optimizer = nnx.Optimizer(listed, tx, wrt=nnx.Param)
    both = {"params": variables, "state": tx.init(variables)}
    for given in (state, optimizer, both, tx.init(variables), tx):
        with pytest.raises(ValueError, match=r"holds an optimizer or its state") as refused:
            ds.trace_depth(loss, given, X)
    code = str(refused.value).partition("TrainState: ")[2].partition(". Where")[0]
    names = {"loss": loss, "state": state, "args": (X,), "trace_depth": ds.trace_depth}
    assert_traced(eval(code, names), variables)


def test_a_masked_tree_is_no_state_of_an_optimizer():
    params = {"head": optax.MaskedNode(), "w": jnp.ones((3, D, D))}
    depth = ds.trace_depth(
        lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], params, X
    )
    assert list(depth) == ["w"]


def test_an_nnx_state_for_its_model():
    model = NnxListed(nnx.Rngs(0))
    for fn in (nnx_loss, lambda m, x: m.loss(x), lambda m, x: m.layers[0](m.embed(x))):
        with pytest.raises(ValueError, match=r"Give it the model itself: trace_depth\(loss, mode"):
            ds.trace_depth(fn, nnx.state(model, nnx.Param), TOKENS)


@pytest.mark.parametrize("model", [Linen(), {}, [None], "a name", {"n": np.arange(3), "f": len}])
def test_there_are_no_parameters(model):
    with pytest.raises(ds.DepthNotFoundError, match="There are no parameters in"):
        ds.trace_depth(lambda model, x: x, model, X)


def test_a_bare_array_is_named():
    with pytest.raises(ds.DepthNotFoundError, match=r"like the array \(2, 10\)"):
        ds.trace_depth(lambda w, x: x @ w, jnp.ones((2, 10)), jnp.ones((5, 2)))
    with pytest.raises(ds.DepthNotFoundError, match=r"parameter, like the array \(2, 10\). Give"):
        ds.trace_depth(lambda w, x: x, jnp.ones((2, 10)), jnp.ones((5, 2)))


def test_the_parts_of_a_model_make_it_again():
    model = EqxNet(stacked=False, checkpoint=False, key=KEY)
    parts = parts_of(model)
    assert parts.paths == paths(eqx.filter(model, eqx.is_inexact_array))
    again = parts.join(parts.params, parts.rest)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert_same(jax.tree.leaves(model), jax.tree.leaves(again))


def test_no_framework_is_imported():
    code = """
import jax, sys, depthsmooth as ds
params = {"act": jax.nn.relu, "w": jax.ShapeDtypeStruct((3, 4, 4), "float32")}
fn = lambda p, x: jax.lax.scan(lambda x, w: (p["act"](x @ w), None), x, p["w"])[0]
assert list(ds.trace_depth(fn, params, jax.ShapeDtypeStruct((2, 4), "float32"))) == ["w"]
assert not {"flax", "equinox", "haiku"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("sizes", [(4, 4), (3, 2)], ids=["of one size", "of other sizes"])
@pytest.mark.parametrize("way", ["alone", "in a model"])
def test_the_ends_of_a_perceptron_are_no_hidden_layers(sizes, way):
    """Whether the sizes of inputs and outputs are those of the hidden units is a coincidence."""
    inputs, outputs = sizes
    mlp = eqx.nn.MLP(inputs, outputs, 4, 6, key=jax.random.key(0))
    model, path = (mlp, "") if way == "alone" else ({"net": mlp}, "net/")

    def loss(model, x):
        return jax.vmap(model if way == "alone" else model["net"])(x).sum()

    depth = ds.trace_depth(loss, model, jnp.ones((5, inputs)))
    assert {path: place.layer for path, place in depth.items()} == {
        f"{path}layers/{i}/{tensor}": i - 1 for i in range(1, 6) for tensor in ("weight", "bias")
    }
    if inputs == 4:
        assert "no hidden layer" in depth.explain(f"{path}layers/0/weight")
