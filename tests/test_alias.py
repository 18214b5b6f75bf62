"""Complete optimizers: Optax's own, with the updates smoothed before decay and learning rate."""

import functools
import inspect

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import _common_test as common

import depthsmooth as ds
from depthsmooth import muon_dimension_numbers

DEPTH = ds.Depth.from_rules({"layers/.*": 0})
OURS = ("alpha", "depth", "where", "variant", "norm_over", "cuts", "axis_name")
OPTIMIZERS = {
    "sgd": (ds.sgd, optax.sgd, {"learning_rate": 0.1}),
    "momentum": (ds.sgd, optax.sgd, {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (ds.adamw, optax.adamw, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "lion": (ds.lion, optax.lion, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "muon": (
        ds.muon,
        optax.contrib.muon,
        {"learning_rate": 0.1, "weight_decay": 0.1, "adam_weight_decay": 0.2, "ns_steps": 1},
    ),
    "normuon": (ds.normuon, None, {"learning_rate": 0.1, "b2": 0.9, "ns_steps": 1}),
}


def tree(seed, dtype="float32"):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "embed": normal(7, 4),
        "layers": {"kernel": normal(5, 4, 3), "scale": normal(5, 4), "heads": normal(5, 4, 2, 3)},
        "norm": normal(4),
    }


def run(tx, params, steps=3, dtype="float32"):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(tree(step + 1, dtype), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "normuon"])
def test_signatures_are_those_of_optax(name):
    ours, theirs, _ = OPTIMIZERS[name]
    mine, others = (inspect.signature(each).parameters for each in (ours, theirs))
    assert [*others, *OURS] == list(mine)
    for parameter in others:
        assert mine[parameter].kind == others[parameter].kind
        assert mine[parameter].default == others[parameter].default
    smooth = inspect.signature(ds.smooth_over_depth).parameters
    assert all(mine[parameter].default == smooth[parameter].default for parameter in OURS)
    assert all(mine[p].kind is inspect.Parameter.KEYWORD_ONLY for p in OURS)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "muon" not in name])
def test_unsmoothed_it_is_the_optimizer_of_optax(name):
    ours, theirs, keywords = OPTIMIZERS[name]
    smoothless = run(ours(**keywords, alpha=0.0, depth=DEPTH), tree(0))
    chex.assert_trees_all_close(smoothless, run(theirs(**keywords), tree(0)), rtol=1e-6)


ARGUMENTS = {
    "sgd": {"momentum": 0.8, "nesterov": True, "accumulator_dtype": "bfloat16"},
    "adamw": {
        "b1": 0.5,
        "b2": 0.9,
        "eps": 0.1,
        "eps_root": 0.1,
        "mu_dtype": "bfloat16",
        "weight_decay": optax.linear_schedule(0.0, 0.5, 3),
        "mask": {"embed": True, "layers": False, "norm": True},
        "nesterov": True,
    },
    "lion": {
        "b1": 0.1,
        "b2": 0.5,
        "mu_dtype": "bfloat16",
        "weight_decay": optax.linear_schedule(0.0, 0.5, 3),
        "mask": lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    },
    "muon": {
        "ns_coeffs": (3.0, -3.2, 1.2),
        "ns_steps": 2,
        "beta": 0.5,
        "eps": 0.5,
        "weight_decay": 0.5,
        "weight_decay_mask": {"embed": True, "layers": False, "norm": True},
        "mu_dtype": "bfloat16",
        "nesterov": False,
        "adaptive": True,
        "preconditioning": "aol",
        "adam_b1": 0.5,
        "adam_b2": 0.9,
        "adam_eps_root": 0.1,
        "adam_weight_decay": 0.5,
        "adam_learning_rate": 0.01,
        "muon_weight_dimension_numbers": {
            "embed": None,
            "layers": {
                "kernel": optax.contrib.MuonDimensionNumbers(0, (1, 2)),
                "scale": None,
                "heads": None,
            },
            "norm": None,
        },
        "consistent_rms": 0.7,
    },
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, one) for name, some in ARGUMENTS.items() for one in some]
)
def test_every_argument_does_what_it_does_in_optax(name, argument):
    """Nothing is smoothed here, and nothing stacked."""
    ours, theirs, _ = OPTIMIZERS[name]
    # A single iteration compiles quickly.
    keywords = {"ns_steps": 1} if name == "muon" else {}
    keywords |= {argument: ARGUMENTS[name][argument]}
    needs = {"nesterov": "momentum", "accumulator_dtype": "momentum", "mask": "weight_decay"}
    needs |= {"weight_decay_mask": "weight_decay"}
    if needs.get(argument) in ARGUMENTS[name]:
        keywords[needs[argument]] = ARGUMENTS[name][needs[argument]]
    nowhere = ds.Depth.from_rules({})
    tx = ours(0.1, **keywords, depth=nowhere)
    if argument.endswith("dtype"):
        kept = {leaf.dtype for leaf in jax.tree.leaves(tx.init(tree(0))) if leaf.ndim > 0}
        assert jnp.dtype("bfloat16") in kept
    result = run(tx, tree(0))
    chex.assert_trees_all_close(result, run(theirs(0.1, **keywords), tree(0)), rtol=1e-5)
    if (name, argument) == ("lion", "mu_dtype"):
        return  # changes no sign here
    keywords.pop(argument)
    without = run(theirs(0.1, **keywords), tree(0))
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), result, without)
    assert max(jax.tree.leaves(difference)) > 1e-5


def test_the_arguments_are_all_that_there_are():
    for name, some in ARGUMENTS.items():
        parameters = inspect.signature(OPTIMIZERS[name][1]).parameters
        assert set(parameters) == {"learning_rate", *some}


@pytest.mark.parametrize("variant", ["standard", "norm_preserving", "directional"])
@pytest.mark.parametrize(
    ("name", "before", "decay"),
    [
        ("sgd", optax.identity(), 0.0),
        ("momentum", optax.trace(0.9, nesterov=True), 0.0),
        ("adamw", optax.scale_by_adam(), 0.1),
        ("lion", optax.scale_by_lion(b2=0.99), 0.1),
    ],
)
def test_smoothing_is_after_preconditioning_and_before_decay(name, before, decay, variant):
    ours, _, keywords = OPTIMIZERS[name]
    scope = {
        "depth": DEPTH,
        "where": ds.projections,
        "variant": variant,
        "norm_over": "block",
        "cuts": (2,),
    }
    chain = optax.chain(
        before,
        ds.smooth_over_depth(0.3, **scope),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(0.1),
    )
    result = run(ours(**keywords, alpha=0.3, **scope), tree(0))
    chex.assert_trees_all_close(result, run(chain, tree(0)), rtol=1e-6)


def per_layer(params):
    """The same parameters with leaves of their own for each layer."""
    stack = params["layers"]
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    return rest | {f"block_{k}": {name: leaf[k] for name, leaf in stack.items()} for k in range(5)}


@pytest.mark.parametrize(
    ("axis", "keywords"),
    [
        (0, {}),
        (1, {"consistent_rms": 0.2, "weight_decay": 0.1, "adam_weight_decay": 0.05, "ns_steps": 2}),
        (2, {"ns_coeffs": "dion", "nesterov": False, "adam_learning_rate": 0.03}),
        (1, {"preconditioning": "schatten", "beta": 0.8, "ns_steps": 2}),
    ],
)
def test_muon_on_a_stack_is_muon_on_every_layer(keywords, axis):
    """Optax's own, on layers with leaves of their own, smoothed or not."""

    def restacked(params):
        layers = {
            name: jnp.moveaxis(leaf, 0, min(axis, leaf.ndim - 1))
            for name, leaf in params["layers"].items()
        }
        return params | {"layers": layers}

    depth = ds.Depth.from_rules({"layers/scale": min(axis, 1), "layers/(kernel|heads)": axis})
    tx = ds.muon(0.1, alpha=0.0, depth=depth, **keywords)
    alone = optax.contrib.muon(0.1, **keywords)
    smoothed = ds.muon(0.1, alpha=0.3, depth=depth, **keywords)
    apart = ds.muon(
        0.1, alpha=0.3, depth=ds.Depth.from_rules({r"block_\d/.*": ds.numbered()}), **keywords
    )
    for stacked, unrolled in ((tx, alone), (smoothed, apart)):
        ours, theirs = restacked(tree(0)), per_layer(tree(0))
        states = stacked.init(ours), unrolled.init(theirs)
        for step in range(3):
            grads = tree(step + 1)
            updates, state = jax.jit(stacked.update)(restacked(grads), states[0], ours)
            others, other = jax.jit(unrolled.update)(per_layer(grads), states[1], theirs)
            ours, theirs = (
                optax.apply_updates(ours, updates),
                optax.apply_updates(theirs, others),
            )
            states = state, other
        back = ours | {
            "layers": {
                name: jnp.moveaxis(leaf, min(axis, leaf.ndim - 1), 0)
                for name, leaf in ours["layers"].items()
            }
        }
        chex.assert_trees_all_close(per_layer(back), theirs, rtol=1e-5, atol=1e-6)


def test_plain_muon_does_the_opposite_on_a_stack():
    """Which is why there is one of ours."""
    params, grads = tree(0), tree(1)
    plain = optax.contrib.muon(0.1)
    [theirs, _] = plain.update(grads, plain.init(params), params)
    scale = theirs["layers"]["scale"]
    singular = np.linalg.svd(scale, compute_uv=False)
    assert singular.max() / singular.min() < 2  # the stack of scales, made orthogonal
    adam = optax.adam(0.1)
    [kernels, _] = adam.update(grads, adam.init(params), params)
    nesterov = optax.adam(0.1, nesterov=True)
    [kernels, _] = nesterov.update(grads, nesterov.init(params), params)
    chex.assert_trees_all_close(theirs["layers"]["kernel"], kernels["layers"]["kernel"], rtol=1e-5)


def test_dimension_numbers_of_every_layout():
    params = {
        "head": jnp.ones((4, 7)),
        "bias": jnp.ones(7),
        "deep": {
            "kernel": jnp.ones((4, 6, 3)),
            "scale": jnp.ones((4, 6)),
            "conv": jnp.ones((2, 6, 3, 4)),
        },
        "twice": {"kernel": jnp.ones((2, 4, 3, 5)), "scale": jnp.ones((2, 3, 4))},
        "block_0": jnp.ones((4, 4)),
        "block_1": jnp.ones((4, 4)),
        "nothing": None,
        "masked": optax.MaskedNode(),
    }
    stacks = {"deep/.*": 1, "twice/kernel": (0, 2), "twice/scale": (0, 1)}
    depth = ds.Depth.from_rules({**stacks, "block_.*": ds.numbered()})
    numbers = muon_dimension_numbers(depth, params)
    of = optax.contrib.MuonDimensionNumbers
    assert numbers == {
        "head": of(0, 1),
        "bias": None,
        "deep": {"kernel": of(0, 2), "scale": None, "conv": None},
        "twice": {"kernel": of(1, 3), "scale": None},
        "block_0": of(0, 1),
        "block_1": of(0, 1),
        "nothing": None,
        "masked": optax.MaskedNode(),
    }


@pytest.mark.parametrize("as_function", [False, True])
def test_dimension_numbers_of_ones_own(as_function):
    """For attention heads, and only them; a prefix of the tree will do."""
    of = optax.contrib.MuonDimensionNumbers
    numbers = {
        "embed": None,
        "layers": {"kernel": None, "scale": None, "heads": of(1, (2, 3))},
        "norm": None,
    }
    given = (lambda params: numbers) if as_function else numbers
    keywords = {"muon_weight_dimension_numbers": given, "weight_decay": 0.1}
    ours = run(ds.muon(0.1, alpha=0.0, depth=DEPTH, **keywords), tree(0))
    theirs = run(optax.contrib.muon(0.1, **keywords), tree(0))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [ds.muon, ds.normuon])
def test_a_matrix_across_layers_is_refused(optimizer):
    """Optax's own numbers, by default, are of the first two axes, whatever they are."""
    numbers = {"kernel": optax.contrib.MuonDimensionNumbers()}
    depth = ds.Depth.from_rules({"kernel": 0})
    tx = optimizer(0.1, depth=depth, muon_weight_dimension_numbers=numbers)
    message = r"kernel \(5, 4, 3\) has its layers along axis 0, which MuonDim.* Name other axes"
    with pytest.raises(ValueError, match=message):
        tx.init({"kernel": jnp.ones((5, 4, 3))})
    tx.init({"kernel": optax.MaskedNode()})


def test_adaptive_muon_is_refused_on_a_stack():
    with pytest.raises(ValueError, match=r"layers/\w+ \(5, .* holds 5 layers, but adaptive=True"):
        ds.muon(0.1, adaptive=True, depth=DEPTH).init(tree(0))
    vectors = {"layers": {"scale": jnp.ones((4, 3))}}
    ds.muon(0.1, adaptive=True, depth=DEPTH).init(vectors)
    unrolled = per_layer(tree(0))
    depth = ds.Depth.from_rules({r"block_\d/.*": ds.numbered()})
    ours = ds.muon(0.1, adaptive=True, ns_steps=1, alpha=0.0, depth=depth)
    theirs = optax.contrib.muon(0.1, adaptive=True, ns_steps=1)
    chex.assert_trees_all_close(
        *(jax.jit(tx.update)(unrolled, tx.init(unrolled), unrolled)[0] for tx in (ours, theirs)),
        rtol=1e-5,
    )


def test_muon_refuses_what_smoothing_refuses_at_once():
    with pytest.raises(ValueError, match=r"alpha is 2"):
        ds.muon(0.1, alpha=2)
    with pytest.raises(ValueError, match=r"has to be a Depth"):
        ds.muon(0.1, depth=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_normuon_is_what_its_paper_says(alpha):
    """Layer by layer, from what Muon makes orthogonal, over three steps."""
    params = per_layer(tree(0))
    orthogonal = optax.contrib.muon(-1.0, ns_steps=2)
    keywords = {"weight_decay": 0.1, "adam_learning_rate": 0.1, "ns_steps": 2}
    tx = ds.normuon(0.5, b2=0.9, alpha=alpha, depth=DEPTH, **keywords)
    adam = optax.adam(0.1, nesterov=True)
    states = orthogonal.init(params), tx.init(tree(0)), adam.init(params)
    moments = np.zeros((5, 1, 3))
    for step in range(3):
        grads = tree(step + 1)
        matrices, first = jax.jit(orthogonal.update)(per_layer(grads), states[0], params)
        updates, second = jax.jit(tx.update)(grads, states[1], tree(0))
        vectors, third = jax.jit(adam.update)(per_layer(grads), states[2], params)
        states = first, second, third
        steps = np.stack([matrices[f"block_{k}"]["kernel"] for k in range(5)]).astype(float)
        moments = 0.9 * moments + 0.1 * (steps**2).mean(1, keepdims=True)
        even = steps / np.sqrt(moments)
        even *= 0.2 * np.sqrt(12) / np.sqrt((even**2).sum((1, 2), keepdims=True))
        mixed = np.tensordot(ds.operator_matrix(ds.window(alpha), 5), even, 1)
        expected = -0.5 * (mixed + 0.1 * np.asarray(tree(0)["layers"]["kernel"]))
        np.testing.assert_allclose(updates["layers"]["kernel"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(updates["norm"], vectors["norm"], rtol=1e-5)


def test_normuon_leaves_frozen_layers_alone_and_takes_what_muon_takes():
    grads = tree(1)
    grads["layers"]["kernel"] = grads["layers"]["kernel"].at[2].set(0)
    tx = ds.normuon(0.1, alpha=0.0, depth=DEPTH, ns_steps=3, nesterov=False, mu_dtype="bfloat16")
    updates, _ = tx.update(grads, tx.init(tree(0)), tree(0))
    assert not updates["layers"]["kernel"][2].any()
    rms = np.sqrt((np.asarray(updates["layers"]["kernel"]) ** 2).mean((1, 2)))
    np.testing.assert_allclose(rms, [0.02, 0.02, 0, 0.02, 0.02], rtol=1e-5)


@pytest.mark.parametrize(
    "argument", [name for name in ARGUMENTS["muon"] if name not in ("adaptive", "consistent_rms")]
)
def test_every_argument_of_normuon_does_something(argument):
    """The same as that of Muon, which is compared with Optax's."""
    params = {"embed": tree(0)["embed"], "norm": tree(0)["norm"]}
    value = ARGUMENTS["muon"][argument]
    if argument == "weight_decay_mask":
        value = {"embed": False, "norm": True}
    if argument == "muon_weight_dimension_numbers":
        value = {"embed": None, "norm": None}
    keywords = {"depth": ds.Depth.from_rules({}), "ns_steps": 1, "weight_decay": 0.1}

    def after(**others):
        tx = ds.normuon(0.1, **keywords | others)
        now, state = params, tx.init(params)
        update = jax.jit(tx.update)
        for step in (1, 2):
            grads = {name: tree(step)[name] for name in params}
            updates, state = update(grads, state, now)
            now = optax.apply_updates(now, updates)
        return now, {leaf.dtype for leaf in jax.tree.leaves(state)}

    (plain, kept), (changed, others) = after(), after(**{argument: value})
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-6)), plain, changed)
    assert not all(jax.tree.leaves(same)) or kept != others


@pytest.mark.parametrize("tx", [ds.muon(0.1, depth=DEPTH), ds.normuon(0.1, depth=DEPTH)])
def test_state_maps_like_optaxs(tx):
    state = tx.init(tree(0))
    marked = optax.tree.map_params(tx, lambda _: "param", state, transform_non_params=lambda _: 0)
    assert {leaf for leaf in jax.tree.leaves(marked) if isinstance(leaf, str)} == {"param"}
    jax.tree.map(lambda one, two: None, state, marked)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finds_depth_by_itself_also_in_a_part_of_the_tree(name):
    ours, _, keywords = OPTIMIZERS[name]
    params = per_layer(tree(0))
    depth = ds.Depth.from_rules({r"block_\d/.*": ds.numbered()})
    found = run_unrolled(ours(**keywords), params)
    chex.assert_trees_all_equal(found, run_unrolled(ours(**keywords, depth=depth), params))
    mask = {name: name.startswith("block") for name in params}
    result = run_unrolled(optax.masked(ours(**keywords), mask), params)
    chex.assert_trees_all_close(result["block_0"], found["block_0"], rtol=1e-6)


def run_unrolled(tx, params):
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(per_layer(tree(1)), state, params)
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_and_alpha_may_be_schedules_or_injected(name):
    ours, _, keywords = OPTIMIZERS[name]
    keywords = keywords | {"depth": DEPTH}
    plain = run(ours(**keywords | {"alpha": 0.2}), tree(0))
    constant = optax.constant_schedule
    rate = keywords["learning_rate"]
    scheduled = ours(**keywords | {"learning_rate": constant(rate), "alpha": constant(0.2)})
    chex.assert_trees_all_close(run(scheduled, tree(0)), plain, rtol=1e-5, atol=1e-6)
    static = ("ns_steps",) if "muon" in name else ()
    injected = optax.inject_hyperparams(ours, static_args=static)(**keywords, alpha=0.2)
    state = injected.init(tree(0))
    assert {"learning_rate", "alpha"} <= set(state.hyperparams)
    chex.assert_trees_all_close(run(injected, tree(0)), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_and_state_keep_their_types(name, dtype):
    ours, _, keywords = OPTIMIZERS[name]
    params = tree(0, dtype)
    tx = ours(**keywords, depth=DEPTH)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(tree(1, dtype), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@pytest.mark.parametrize("mask", [True, False])
def test_decay_mask_spares_stacked_scales(mask):
    params = tree(0)
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = ds.adamw(1.0, weight_decay=0.5, mask=DEPTH.decay_mask if mask else None, depth=DEPTH)
    updates, _ = tx.update(grads, tx.init(params), params)
    decayed = {path: bool(leaf.any()) for path, leaf in paths(updates)}
    assert decayed == {
        "embed": True,
        "layers/kernel": True,
        "layers/heads": True,
        "layers/scale": not mask,
        "norm": not mask,
    }


def paths(updates):
    for keys, leaf in jax.tree_util.tree_leaves_with_path(updates):
        yield jax.tree_util.keystr(keys, simple=True, separator="/"), leaf


def test_decay_mask_and_map_keep_the_tree():
    params = {
        "stack": jnp.ones((3, 4)),
        "matrix": jnp.ones((3, 4)),
        "nothing": None,
        "masked": optax.MaskedNode(),
        "list": [jnp.ones(3)],
    }
    depth = ds.Depth.from_rules({"stack": 1})
    assert depth.decay_mask(params) == {
        "stack": False,
        "matrix": True,
        "nothing": None,
        "masked": optax.MaskedNode(),
        "list": [False],
    }
    places = depth.map(lambda path, leaf, place: (path, leaf.shape, place and place.axes), params)
    assert places["stack"] == ("stack", (3, 4), (1,))
    assert places["list"] == [("list/0", (3,), None)]


class Net(eqx.Module):
    """A model of Equinox: it can be called, and so can its parameters, and masks of them."""

    kernel: jax.Array
    bias: jax.Array
    head: eqx.nn.Linear
    activation: object

    def __init__(self):
        one, two = jax.random.split(jax.random.key(0))
        self.kernel = jax.random.normal(one, (3, 4, 4)) / 2
        self.bias = jnp.zeros((3, 4))
        self.head = eqx.nn.Linear(4, 2, key=two)
        self.activation = jnp.tanh

    def __call__(self, x):
        layers = self.kernel, self.bias
        x, _ = jax.lax.scan(lambda x, wb: (self.activation(x @ wb[0] + wb[1]), None), x, layers)
        return self.head(x)


NET, REST = eqx.partition(Net(), eqx.is_inexact_array)
OF_NET = ds.Depth.from_rules({"kernel|bias": 0})
MASK = OF_NET.decay_mask(NET)
NUMBERS = muon_dimension_numbers(OF_NET, NET)


def loss_of(params):
    inputs = jax.random.normal(jax.random.key(1), (16, 4))
    outputs = jax.vmap(eqx.combine(params, REST))(inputs)
    return jnp.square(outputs - inputs[:, :2]).mean()


class Policy(eqx.Module):
    """A function that holds arrays, or a bool."""

    least: object

    def __call__(self, params):
        return jax.tree.map(lambda leaf: leaf.ndim >= self.least, params)


@pytest.mark.parametrize(
    "make",
    [
        ds.muon,
        ds.normuon,
        functools.partial(ds.muon, weight_decay=0.1, weight_decay_mask=MASK, ns_steps=2),
        functools.partial(ds.muon, muon_weight_dimension_numbers=NUMBERS, ns_steps=2),
        functools.partial(ds.normuon, muon_weight_dimension_numbers=lambda _: NUMBERS, ns_steps=2),
        functools.partial(ds.adamw, weight_decay=0.1, mask=MASK),
        functools.partial(ds.adamw, weight_decay=0.1, mask=OF_NET.decay_mask),
        functools.partial(ds.adamw, mask=jax.tree_util.Partial(OF_NET.decay_mask)),
        functools.partial(ds.lion, mask=MASK),
        ds.sgd,
    ],
)
def test_a_tree_that_can_be_called_is_trained(make):
    assert callable(NET)
    assert callable(MASK)
    assert callable(NUMBERS)
    tx = optax.chain(ds.monitor_depth(OF_NET), make(0.02, depth=OF_NET))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = NET, tx.init(NET)
    for _ in range(5):
        params, state = step(params, state)
    assert loss_of(params) < loss_of(NET)
    assert jax.tree.structure(params) == jax.tree.structure(NET)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (MASK, MASK),
        (jax.tree.map(np.bool_, MASK), MASK),
        (OF_NET.decay_mask, MASK),
        (functools.partial(lambda params: MASK), MASK),
        (jax.tree_util.Partial(OF_NET.decay_mask), MASK),
        (
            jax.tree_util.Partial(lambda flag, params: jax.tree.map(lambda _: flag, params), True),
            True,
        ),
        (Policy(2), jax.tree.map(lambda leaf: leaf.ndim >= 2, NET)),
        (Policy(jnp.array(2)).__call__, jax.tree.map(lambda leaf: leaf.ndim >= 2, NET)),
    ],
)
def test_a_mask_that_can_be_called_is_a_tree_or_a_function(mask, expected):
    """A tree if it is one of bools; and a Partial a function, whatever it holds."""
    params = jax.tree.map(jnp.ones_like, NET)
    zeros = jax.tree.map(jnp.zeros_like, NET)
    muon = functools.partial(ds.muon, weight_decay_mask=mask, ns_steps=1)
    for optimizer in (
        functools.partial(ds.adamw, mask=mask),
        functools.partial(ds.lion, mask=mask),
        muon,
    ):
        tx = optimizer(1.0, weight_decay=0.5, depth=OF_NET)
        updates, _ = tx.update(zeros, tx.init(params), params)
        decayed = jax.tree.map(lambda leaf: bool(leaf.any()), updates)
        if optimizer is muon:  # decays matrices alone
            assert (decayed.kernel, decayed.bias) == (True, False)
        else:
            assert decayed == (jax.tree.map(lambda _: True, NET) if expected is True else expected)


@pytest.mark.parametrize(
    ("optimizer", "argument"),
    [
        (optimizer, argument)
        for optimizer in (ds.sgd, ds.adamw, ds.lion, ds.muon, ds.normuon)
        for argument in inspect.signature(optimizer).parameters
        if argument != "depth"
    ],
)
def test_a_depth_is_taken_by_its_name_alone(optimizer, argument):
    parameters = list(inspect.signature(optimizer).parameters.values())
    names = [parameter.name for parameter in parameters]
    message = (
        rf"^{argument} of {optimizer.__name__} is a Depth\. .*{optimizer.__name__}\(\.\.\., depth"
    )
    keywords = {"learning_rate": 0.1, argument: DEPTH}
    with pytest.raises(ValueError, match=message):
        optimizer(**keywords)
    if parameters[names.index(argument)].kind is not inspect.Parameter.KEYWORD_ONLY:
        before = [parameter.default for parameter in parameters[: names.index(argument)]]
        with pytest.raises(ValueError, match=message):
            optimizer(*before, DEPTH)
    with pytest.raises(ValueError, match=message):
        optax.inject_hyperparams(optimizer)(**keywords).init(tree(0))


def test_other_errors_of_arguments_are_pythons():
    for arguments, keywords in ((), {}), ((0.1,) * 9, {}), ((0.1,), {"apha": 0.1}):
        with pytest.raises(TypeError, match=r"adamw\(\)"):
            ds.adamw(*arguments, **keywords)


def test_a_mask_beside_injected_hyperparameters():
    """Which takes functions for schedules, unless it is told."""
    keywords = {"learning_rate": 0.1, "mask": DEPTH.decay_mask, "depth": DEPTH}
    keywords |= {"where": ds.projections, "weight_decay": 0.5}
    with pytest.raises(ValueError, match=r"inject_hyperparams\(ds\.adamw, static_args=\('mask'"):
        optax.inject_hyperparams(ds.adamw, static_args="where")(**keywords).init(tree(0))
    numbers = {"muon_weight_dimension_numbers": functools.partial(muon_dimension_numbers, DEPTH)}
    with pytest.raises(ValueError, match=r"inject_hyperparams takes every function for a schedule"):
        optax.inject_hyperparams(ds.muon)(0.1, depth=DEPTH, **numbers).init(tree(0))
    injected = optax.inject_hyperparams(ds.adamw, static_args=("mask", "where"))(**keywords)
    chex.assert_trees_all_close(
        run(injected, tree(0)), run(ds.adamw(**keywords), tree(0)), rtol=1e-4, atol=1e-5
    )


# Optax's own checks of its optimizers, with each of ours, over depth where there is some.

CHECKS = {}
for _name, _method in vars(common.ContribTest).items():
    _raw = getattr(_method, "__wrapped__", None)
    if _raw is not None:
        CHECKS[_raw.__name__] = _raw
RATES = {"sgd": 1e-1, "adamw": 1e-2, "lion": 1e-3, "muon": 1e-2, "normuon": 1e-2}
TARGETS = {
    # A stack of three scalars; layers 0 and 1 of a matrix; both, as two groups.
    common._setup_parabola: {"": 0},
    common._setup_rosenbrock: {"": 0},
    common._setup_matrix_parabola: {"": 0},
    common._setup_mixed_tensor_target: {"0": 0, "1": 0},
}


def check(monkeypatch, name, optimizer, **arguments):
    """Runs one of Optax's checks with an optimizer of ours among its own."""
    monkeypatch.setattr(optax.contrib, "depthsmooth", optimizer, raising=False)
    kind = arguments.pop("kind")
    ours = {"opt_kwargs": {"learning_rate": arguments.pop("rate", RATES[kind])}}
    plain = {"opt_name": "depthsmooth", "wrapper_name": None, "wrapper_kwargs": None}
    CHECKS[name](common.ContribTest(), **plain, **ours, **arguments)


def optimizer_over(kind, rules, **keywords):
    return functools.partial(getattr(ds, kind), depth=ds.Depth.from_rules(rules), **keywords)


def test_these_are_all_of_optaxs_checks():
    assert set(CHECKS) == {
        "test_gradient_accumulation",
        "test_optimizers",
        "test_optimizers_accept_extra_args",
        "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such",
        "test_optimizers_can_be_wrapped_in_inject_hyperparams",
        "test_preserve_dtype",
        "test_state_shape_dtype_shard_stability",
    }


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("target", TARGETS)
def test_optimizers_converge(monkeypatch, kind, target):
    keywords = {} if kind == "sgd" else {"weight_decay": 0.0}
    # A rate of plain descent that suits the parabola diverges on Rosenbrock's valley.
    steep = target is common._setup_rosenbrock and kind == "sgd"
    rate = 1e-3 if steep else RATES[kind]
    optimizer = optimizer_over(kind, TARGETS[target], **keywords)
    arguments = {"kind": kind, "rate": rate, "target": target, "dtype": "float32"}
    check(monkeypatch, "test_optimizers", optimizer, **arguments)


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("wrap", [True, False])
def test_accepts_extra_args(monkeypatch, kind, wrap):
    optimizer = optimizer_over(kind, {"": 0})
    check(monkeypatch, "test_optimizers_accept_extra_args", optimizer, kind=kind, wrap=wrap)


@pytest.mark.parametrize("kind", RATES)
def test_can_be_wrapped_in_inject_hyperparams(monkeypatch, kind):
    optimizer = optimizer_over(kind, {"1": 1})
    name = "test_optimizers_can_be_wrapped_in_inject_hyperparams"
    check(monkeypatch, name, optimizer, kind=kind)


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["test_preserve_dtype", "test_gradient_accumulation"])
def test_preserves_dtype_and_accumulates(monkeypatch, kind, dtype, name):
    check(monkeypatch, name, optimizer_over(kind, {"": 0}), kind=kind, dtype=dtype)


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_state_is_stable(monkeypatch, kind, dtype):
    name = "test_state_shape_dtype_shard_stability"
    optimizer = optimizer_over(kind, {"": 0})
    check(monkeypatch, name, optimizer, kind=kind, dtype=jnp.dtype(dtype))


@pytest.mark.parametrize("kind", RATES)
def test_accepts_a_learning_rate_schedule_as_annotated(monkeypatch, kind):
    name = "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such"
    annotation = inspect.signature(getattr(ds, kind)).parameters["learning_rate"].annotation
    assert annotation is optax.ScalarOrSchedule
    check(monkeypatch, name, optimizer_over(kind, {"": 0}), kind=kind)
