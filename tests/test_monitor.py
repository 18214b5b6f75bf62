"""monitor_depth: passes updates through, measures when it should, and is found wherever it is."""

import functools
import pathlib
import re

import chex
import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import depthsmooth as ds

DEPTH = ds.Depth.from_rules({"layers/.*": 0})


def tree(seed=0, layers=6):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (layers, 4, 3), "bias": (layers, 3)}
    leaves = {
        name: jnp.asarray(rng.normal(size=shape), "float32") for name, shape in shapes.items()
    }
    return {"layers": leaves, "head": jnp.ones(2)}


def measured(updates, **keywords):
    return ds.depth_metrics(updates, DEPTH, **keywords)


def assert_read(state, expected):
    chex.assert_trees_all_close(ds.read_metrics(state), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"by": "tensor"}, {"full": True}, {"where": ds.projections, "by": "tensor"}],
    ids=["plain", "by tensor", "full", "where"],
)
def test_keeps_what_depth_metrics_measures(keywords):
    tx = ds.monitor_depth(DEPTH, **keywords)
    state = tx.init(tree())
    updates, state = jax.jit(tx.update)(tree(1), state)
    chex.assert_trees_all_equal(updates, tree(1))
    assert_read(state, measured(tree(1), **keywords))


def test_passes_the_very_same_updates_through():
    tx = ds.monitor_depth(DEPTH, every=2)
    before = tree()
    after, _ = tx.update(before, tx.init(before), None, value=1.0)
    assert all(map(lambda one, other: one is other, *map(jax.tree.leaves, (before, after))))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_measures_every_so_often_from_the_first_update_on(every):
    tx = ds.monitor_depth(DEPTH, every)
    state = tx.init(tree())
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for step in range(7):
        _, state = update(tree(step), state)
        assert_read(state, measured(tree(step - step % every)))


def test_in_between_nothing_is_computed():
    tx = ds.monitor_depth(DEPTH, every=3, full=True)
    state = tx.init(tree())
    outer = jax.make_jaxpr(tx.update)(tree(), state).eqns
    [cond] = [eqn for eqn in outer if eqn.primitive.name == "cond"]
    assert {eqn.primitive.name for eqn in outer if eqn is not cond} <= {
        "rem",
        "eq",
        "lt",
        "ne",
        "add",
        "and",
        "select_n",
        "convert_element_type",
        "jit",
        "pjit",
    }
    sizes = sorted(len(str(branch)) for branch in cond.params["branches"])
    assert sizes[0] < 1000 < sizes[1]
    every_step = jax.make_jaxpr(ds.monitor_depth(DEPTH, full=True).update)(tree(), state)
    assert "cond" not in {eqn.primitive.name for eqn in every_step.eqns}


def test_before_the_first_update_nothing_is_known():
    state = ds.monitor_depth(DEPTH, full=True).init(tree())
    chex.assert_tree_all_finite(state)  # whoever looks for NaN finds none
    [metrics] = ds.read_metrics(state).values()
    assert metrics.signal is None
    assert all(np.isnan(each).all() for each in metrics[:-1])
    assert metrics.similarity.shape == (6, 6)


def test_the_state_is_laid_out_as_in_the_checkpoints_there_are():
    state = ds.monitor_depth(DEPTH, full=True).init(tree())
    fields = "roughness", "adjacent_cosine", "mean_norm", "cosines", "norms"
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)] == [
        ".count",
        *(f".depth_metrics['layers/.*'].{field}" for field in (*fields, "similarity", "spectrum")),
    ]


@pytest.mark.parametrize("depth", [DEPTH, DEPTH.resolve(tree())], ids=["rules", "resolved"])
def test_where_all_is_masked_there_is_nothing_to_measure(depth):
    tx = optax.masked(ds.monitor_depth(depth), jax.tree.map(lambda _: False, tree()))
    state = tx.init(tree())
    _, after = tx.update(tree(), state)
    assert after.inner_state.depth_metrics == {}
    chex.assert_trees_all_equal_structs(state, after)


@pytest.mark.parametrize("every", [0, np.int64(0), -1, 1.0, True, None, "10"])
def test_refuses_what_is_no_number_of_updates(every):
    with pytest.raises(ValueError, match=f"every is {re.escape(repr(every))}, but .* 1 or more"):
        ds.monitor_depth(DEPTH, every=every)


def nested(monitor):
    """A monitor in whatever Optax and Flax have that holds others, and what it sees."""
    masked = {"layers": {"kernel": True, "bias": False}, "head": False}
    labels = {"layers": {"kernel": "deep", "bias": "rest"}, "head": "rest"}
    return {
        "chain": (optax.chain(optax.scale(2.0), optax.chain(monitor, optax.scale(-1.0))), 2.0),
        "masked": (optax.masked(monitor, masked), None),
        "partition": (
            optax.partition({"deep": optax.chain(monitor), "rest": optax.sgd(1.0)}, labels),
            None,
        ),
        "MultiSteps": (optax.MultiSteps(optax.chain(monitor, optax.sgd(1.0)), 1), 1.0),
        "inject_hyperparams": (
            optax.inject_hyperparams(lambda rate: optax.chain(optax.scale(rate), monitor))(
                rate=2.0
            ),
            2.0,
        ),
        "apply_if_finite": (optax.apply_if_finite(optax.chain(monitor), 3), 1.0),
        "named_chain": (optax.named_chain(("scale", optax.scale(2.0)), ("monitor", monitor)), 2.0),
        "lookahead": (optax.chain(monitor, ds.smooth_over_depth(0.3, depth=DEPTH)), 1.0),
    }


@pytest.mark.parametrize("name", nested(optax.identity()))
@pytest.mark.parametrize("every", [1, 2])
def test_is_found_wherever_it_is(name, every):
    tx, scale = nested(ds.monitor_depth(DEPTH, every))[name]
    state = tx.init(tree())
    _, state = jax.jit(tx.update)(tree(1), state, tree())
    seen = tree(1)
    if scale is None:
        seen["layers"]["bias"] = optax.MaskedNode()
    else:
        seen = jax.tree.map(lambda leaf: scale * leaf, seen)
    expected = measured(seen)
    assert_read(state, expected)
    assert_read({"step": 3, "opt_state": state}, expected)
    # As plain dictionaries, and through a file.
    plain = flax.serialization.to_state_dict(state)
    assert_read(plain, expected)
    if name != "named_chain":  # whose state is of a type that Flax does not write
        back = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
        assert_read(back, expected)


def test_multi_steps_measure_what_is_accumulated():
    tx = optax.MultiSteps(optax.chain(ds.monitor_depth(DEPTH), optax.sgd(1.0)), 2)
    state = tx.init(tree())
    _, state = tx.update(tree(1), state, tree())
    assert np.isnan(ds.read_metrics(state)["layers/.*"].roughness)
    _, state = tx.update(tree(2), state, tree())
    mean = jax.tree.map(lambda one, other: (one + other) / 2, tree(1), tree(2))
    assert_read(state, measured(mean))


def test_train_state():
    tx = optax.chain(optax.scale_by_adam(), ds.monitor_depth(DEPTH), optax.scale(-0.1))
    state = flax.training.train_state.TrainState.create(apply_fn=None, params=tree(), tx=tx)
    state = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))(state, tree(1))
    adam = optax.scale_by_adam()
    expected = measured(adam.update(tree(1), adam.init(tree()))[0])
    assert_read(state, expected)
    assert_read(state.opt_state, expected)


class Model(nnx.Module):
    """Layers made by vmap, applied by scan."""

    def __init__(self, rngs):
        @nnx.vmap(in_axes=0)
        def make(key):
            return nnx.Linear(3, 3, rngs=nnx.Rngs(key))

        self.layers = make(jax.random.split(rngs.params(), 4))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: (x + layer(x), None), in_axes=(nnx.Carry, 0))(
            x, self.layers
        )[0]


def test_nnx_optimizer():
    model = Model(nnx.Rngs(0))
    depth = ds.Depth.from_rules({"layers/.*": 0})
    tx = optax.chain(ds.monitor_depth(depth), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: (model(jnp.ones((2, 3))) ** 2).sum())(model)
        optimizer.update(model, grads)
        return grads, ds.read_metrics(optimizer.opt_state)

    grads, inside = step(model, optimizer)
    expected = ds.depth_metrics(grads, depth)
    chex.assert_trees_all_close(inside, expected, rtol=1e-6)
    for holder in (optimizer, optimizer.opt_state, nnx.state(optimizer)):
        assert_read(holder, expected)
    assert_read(nnx.to_pure_dict(nnx.state(optimizer)), expected)


def test_before_and_after():
    tx = optax.chain(
        ds.monitor_depth(DEPTH, name="before"),
        ds.smooth_over_depth(0.3, depth=DEPTH),
        ds.monitor_depth(DEPTH, name="after"),
    )
    updates, state = tx.update(tree(1), tx.init(tree()))
    metrics = ds.read_metrics(state)
    assert list(metrics) == ["before/layers/.*", "after/layers/.*"]
    chex.assert_trees_all_close(
        metrics["after/layers/.*"], measured(updates)["layers/.*"], rtol=1e-6
    )
    assert metrics["after/layers/.*"].roughness < metrics["before/layers/.*"].roughness


def test_what_a_user_keeps_beside_it_is_no_monitor():
    state = ds.monitor_depth(DEPTH).init(tree())
    metrics = ds.read_metrics(state)
    loss = {"count": 3, "depth_metrics": {"loss": 1.0}}
    for beside in ({"depth_metrics": metrics}, {"depth_metrics": 1.0, "count": 3}, loss):
        chex.assert_trees_all_equal(ds.read_metrics({"state": state, **beside}), metrics)


def test_refuses_to_mix_up_monitors():
    tx = optax.chain(ds.monitor_depth(DEPTH), ds.monitor_depth(DEPTH))
    with pytest.raises(ValueError, match=r"Two monitors measure 'layers/\.\*'\. Give each a name"):
        ds.read_metrics(tx.init(tree()))
    with pytest.raises(ValueError, match=r"There is no monitor in this state: put monitor_depth"):
        ds.read_metrics(optax.adam(0.1).init(tree()))
    # What a user calls by the same name is none.
    with pytest.raises(ValueError, match=r"There is no monitor"):
        ds.read_metrics({"depth_metrics": {"a": {"loss": jnp.ones(())}}})


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((tree(),), {}, r"depth is a dict, but has to be a Depth, such as trace_depth"),
        ((DEPTH,), {"by": "layer"}, r"by is 'layer', but has to be 'group' or 'tensor'"),
        ((DEPTH,), {"name": 3}, r"name is 3, but has to be a string"),
    ],
)
def test_refuses_at_once(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        ds.monitor_depth(*arguments, **keywords)


def test_refuses_a_tree_that_does_not_fit():
    with pytest.raises(ValueError, match=r"layers/\.\*.* matches no leaf"):
        ds.monitor_depth(DEPTH).init({"blocks": jnp.ones(3)})


def test_scalars():
    metrics = ds.depth_metrics(tree(), DEPTH, full=True)
    scalars = ds.as_scalars(metrics)
    assert list(scalars) == [
        f"layers/.*/{name}" for name in ("roughness", "adjacent_cosine", "mean_norm")
    ]
    assert all(value.shape == () for value in scalars.values())
    assert float(scalars["layers/.*/mean_norm"]) == metrics["layers/.*"].mean_norm
    deep = ds.depth_metrics(tree(layers=12), DEPTH)
    each = ds.as_scalars(deep, layers=True)
    assert len(each) == 3 + 11 + 12
    np.testing.assert_array_equal(each["layers/.*/norms/03"], deep["layers/.*"].norms[3])
    np.testing.assert_array_equal(each["layers/.*/cosines/10"], deep["layers/.*"].cosines[10])
    assert all(value.shape == () for value in each.values())


def test_in_a_scan_over_steps_with_several_seeds():
    """As whole training runs are compiled: one state through lax.scan, under vmap."""
    tx = optax.chain(ds.monitor_depth(DEPTH, 2), optax.sgd(0.1))

    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), ds.read_metrics(state)

        (_, state), over_time = jax.lax.scan(step, (params, tx.init(params)), length=4)
        return state, over_time

    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(tree, range(3)))
    state, over_time = jax.jit(jax.vmap(train))(several)
    assert over_time["layers/.*"].cosines.shape == (3, 4, 5)
    final = ds.read_metrics(state)["layers/.*"]
    np.testing.assert_array_equal(final.norms, over_time["layers/.*"].norms[:, -1])
    for seed in range(3):
        one = measured(tree(seed))["layers/.*"]
        np.testing.assert_allclose(over_time["layers/.*"].norms[seed, 1], one.norms, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_state_keeps_its_types(dtype, every):
    """Whatever the parameters and the updates are of."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), tree())
        tx = ds.monitor_depth(DEPTH, every, full=True)
        state = tx.init(params)
        for updates in (params, tree(1)):
            _, after = tx.update(updates, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
            wide = "float64" if dtype == "float64" else "float32"
            assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {
                jnp.dtype(wide),
                jnp.dtype("int32"),
            }


def test_map_params_leaves_the_metrics_alone():
    for tx in (
        ds.monitor_depth(DEPTH),
        ds.monitor_depth(DEPTH.resolve(tree()), 2, by="tensor", full=True),
        optax.chain(optax.scale_by_adam(), ds.monitor_depth(DEPTH)),
    ):
        state = tx.init(tree())
        marked = optax.tree.map_params(tx, lambda _: "param", state)
        [before] = (each for each in jax.tree.leaves(state, is_leaf=is_monitor) if is_monitor(each))
        [after] = (each for each in jax.tree.leaves(marked, is_leaf=is_monitor) if is_monitor(each))
        chex.assert_trees_all_equal(after, before)


def is_monitor(node):
    return isinstance(node, ds.MonitorDepthState)


@pytest.mark.parametrize("mode", ["auto", "explicit", "manual"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("full", [False, True])
def test_where_devices_split_layers(mode, every, full):
    whole = tree(layers=8)
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4,), ("stage",), axis_types=(kind,))
    specs = {"layers": {"kernel": jax.P("stage"), "bias": jax.P("stage")}, "head": jax.P()}
    parts = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), whole, specs
    )
    depth = DEPTH.resolve(parts)
    axis_name = "stage" if mode == "manual" else None
    tx = ds.monitor_depth(depth, every, full=full, axis_name=axis_name)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(parts)
        update = tx.update
        if mode == "manual":
            update = jax.shard_map(
                update, mesh=mesh, in_specs=(specs, jax.P()), out_specs=(specs, jax.P())
            )
        update = jax.jit(update)
        for _ in range(2):
            updates, state = update(parts, state)
    chex.assert_trees_all_equal(jax.device_get(updates), jax.device_get(whole))
    chex.assert_trees_all_close(
        jax.device_get(ds.read_metrics(state)),
        jax.device_get(measured(whole, full=full)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_every_may_be_injected():
    make = functools.partial(ds.monitor_depth, DEPTH)
    tx = optax.inject_hyperparams(make)(every=2)
    state = tx.init(tree())
    for step in range(3):
        _, state = tx.update(tree(step), state)
        assert_read(state, measured(tree(step - step % 2)))


def test_the_page_on_metrics(capsys):
    """Its code as it stands, for layers of 64 numbers that have nothing in common."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [printed] = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    params = {"layers": jnp.zeros((12, 64))}
    names = {"ds": ds, "optax": optax, "params": params}
    names["gradients"] = {"layers": jax.random.normal(jax.random.key(1), (12, 64))}
    names["depth"] = ds.Depth.from_rules({"layers": 0})
    exec(code, names)
    assert capsys.readouterr().out == printed
