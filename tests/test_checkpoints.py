"""What docs/checkpoints.md promises: no bit of a run depends on where it was interrupted."""

import random
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import depthsmooth as ds
from tests import resumed
from tests.children import environment

[MSGPACK, MIGRATION, SET_COUNT] = resumed.OTHERS


def plain(depth):
    return optax.adamw(1e-2)


def monitored(depth):
    return optax.chain(
        optax.scale_by_adam(),
        ds.monitor_depth(depth, every=2, full=True),
        ds.smooth_over_depth(0.2, depth=depth),
        optax.scale(-1e-2),
    )


def traced(depth):
    alpha = optax.linear_schedule(0.0, 0.5, resumed.STEPS)
    inject = optax.inject_hyperparams(ds.adamw, static_args=("where", "mask"))
    return inject(1e-2, alpha=alpha, depth=depth)


def accumulated(depth):
    return optax.MultiSteps(resumed.smoothed(depth), 2)


def trained(state, train_step, batches):
    for batch in batches:
        state = train_step(state, batch)
    return state


def run(code, **names):
    exec(code, names)
    return names


@pytest.mark.parametrize("optimizer", [resumed.smoothed, monitored, traced, accumulated])
def test_a_restored_state_goes_on_bit_for_bit(optimizer, tmp_path):
    state, train_step, batches = resumed.start(optimizer)
    seventh = trained(state, train_step, batches[:7])
    twelfth = trained(seventh, train_step, batches[7:12])

    steps = []

    def told(state, batch):
        steps.append(int(state["step"]))
        return train_step(state, batch)

    resumed.train(tmp_path, state, train_step, batches[:7])
    chex.assert_trees_all_equal(resumed.train(tmp_path, state, told, batches[:12]), twelfth)
    assert steps == [6, 7, 8, 9, 10, 11]

    restored = run(MSGPACK, state=seventh, fresh=state)["state"]
    chex.assert_trees_all_equal(trained(restored, train_step, batches[7:12]), twelfth)


def test_the_counter_is_in_the_checkpoint():
    """Without it the schedule of α would begin again, and the run would differ."""
    state, train_step, batches = resumed.start()
    seventh = trained(state, train_step, batches[:7])
    adam, smoothing, *rest = seventh["opt_state"]
    assert smoothing == ds.SmoothOverDepthState(count=7)
    begun_again = seventh | {"opt_state": (adam, state["opt_state"][1], *rest)}
    kernels = [
        trained(begin, train_step, batches[7:12])["params"]["layers"]
        for begin in (seventh, begun_again)
    ]
    assert not np.array_equal(*kernels)


def test_what_does_not_fit_is_not_carried_over():
    """Muon of Optax and ours have as many arrays, of other leaves."""
    params = {"kernel": jnp.ones((4, 3, 3)), "scale": jnp.ones((4, 3))}
    old = optax.contrib.muon(0.02).init(params)
    new = ds.muon(0.02, depth=ds.Depth.from_rules({".*": 0})).init(params)
    assert len(jax.tree.leaves(old)) == len(jax.tree.leaves(new)) - 1
    message = (
        r"mu/kernel \(4, 3, 3\) float32 of the old state does not fit .*scale \(4, 3\) float32"
    )
    with pytest.raises(ValueError, match=message):
        ds.carry_over(old, new)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_and_resumed_is_the_uninterrupted_one(kills, tmp_path):
    # Of its own, for the killed may leave half of a program.
    compiled = environment(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"))

    def started(directory):
        directory.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "tests.resumed", str(directory)],
            cwd=resumed.DOCS.parents[1],
            env=compiled,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ended(directory):
        with started(directory) as process:
            first = int(process.stdout.readline())
            process.communicate()
        assert process.returncode == 0
        return first, dict(np.load(directory / "final.npz"))

    moments = random.Random(0)
    begun = []
    for _ in range(kills):
        with started(tmp_path / "killed") as process:
            begun.append(int(process.stdout.readline()))
            for _ in range(moments.randrange(12)):
                process.stdout.readline()
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    last, killed = ended(tmp_path / "killed")
    assert [*begun, last] == sorted([*begun, last])
    assert last > kills
    first, whole = ended(tmp_path / "whole")
    assert first == 0
    chex.assert_trees_all_equal(killed, whole)


@pytest.mark.parametrize("optimizers", [(plain, resumed.smoothed), (resumed.smoothed, plain)])
def test_a_checkpoint_of_another_chain_is_refused(optimizers, tmp_path):
    (saved, *_), (fresh, *_) = map(resumed.start, optimizers)
    with pytest.raises(ValueError, match="do not match"):
        serialization.from_bytes(fresh, serialization.to_bytes(saved))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", saved)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="do not match"):
            checkpointer.restore(tmp_path / "saved", fresh)


DEPTH = ds.Depth.from_rules({"layers": 0})
PARAMS = {"layers": jnp.ones((5, 3)), "head": jnp.ones(3)}
WITHIN = {
    "nothing": lambda tx: tx,
    "MultiSteps": lambda tx: optax.MultiSteps(optax.chain(optax.clip(1.0), tx), 2),
    "masked": lambda tx: optax.masked(tx, {"layers": True, "head": False}),
    "partition": lambda tx: optax.partition(
        {"deep": tx, "rest": optax.adam(1e-3)}, {"layers": "deep", "head": "rest"}
    ),
}


def carry_over(opt_state, tx):
    return ds.carry_over(opt_state, tx.init(PARAMS))


@pytest.mark.parametrize("within", WITHIN)
def test_smoothing_is_added_to_a_run_and_removed(within):
    before = WITHIN[within](optax.adamw(1e-2, weight_decay=0.0))
    after = WITHIN[within](ds.adamw(1e-2, weight_decay=0.0, alpha=0.3, depth=DEPTH))
    *gradients, last = [
        {name: jax.random.normal(key, leaf.shape) for name, leaf in PARAMS.items()}
        for key in jax.random.split(jax.random.key(0), 4)
    ]
    old = before.init(PARAMS)
    for gradient in gradients:
        _, old = before.update(gradient, old, PARAMS)
    new = carry_over(old, after)
    chex.assert_trees_all_equal_structs(new, after.init(PARAMS))
    updates, old = before.update(last, old, PARAMS)
    smooth = ds.smooth_over_depth(0.3, depth=DEPTH)
    expected, _ = smooth.update(updates, smooth.init(PARAMS))
    updates, new = after.update(last, new, PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    chex.assert_trees_all_equal(carry_over(new, before), old)


def test_smoothing_is_added_to_a_checkpoint(tmp_path):
    """Orbax reads it with the old optimizer, and the new one goes on in a TrainState."""
    fresh, train_step, batches = resumed.start(plain)
    resumed.train(tmp_path, fresh, train_step, batches[:7])
    read = resumed.train(tmp_path, fresh, None, batches[:6])  # all of which is in the checkpoint
    chex.assert_trees_all_equal(read, trained(fresh, train_step, batches[:6]))
    params = read["params"]
    depth = ds.trace_depth(resumed.loss, params, batches[0])
    state = TrainState(6, None, params, plain(depth), read["opt_state"])
    tx = ds.adamw(1e-2, alpha=0.3, depth=depth)
    smoothed = state.replace(tx=tx, opt_state=ds.carry_over(state.opt_state, tx.init(params)))
    grads = jax.grad(resumed.loss)(params, batches[6])
    after, mixed = (each.apply_gradients(grads=grads) for each in (state, smoothed))
    chex.assert_trees_all_equal(mixed.opt_state[0], after.opt_state[0])
    chex.assert_trees_all_equal(mixed.params["head"], after.params["head"])
    assert (mixed.params["layers"] != after.params["layers"]).any()
    assert mixed.opt_state[1].count == 1


def test_smoothing_is_added_to_an_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.Param(PARAMS["layers"])

    model = Model()
    gradient = jax.tree.map(jnp.ones_like, nnx.state(model))
    before = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    before.update(model, gradient)
    after = nnx.Optimizer(model, ds.adamw(1e-2, depth=DEPTH), wrt=nnx.Param)
    after.opt_state = ds.carry_over(before.opt_state, after.opt_state)
    for optimizer in (before, after):
        optimizer.update(model, gradient)
    chex.assert_trees_all_equal(after.opt_state[0], before.opt_state[0])
    assert after.opt_state[1].count == 1


def test_what_differs_otherwise_is_not_carried_over():
    refused = {
        (optax.adamw, optax.lion): r"has 5 arrays and the new one 3: the old one alone has nu/head",
        (optax.lion, optax.adamw): r"has 3 arrays and the new one 5: the new one alone has nu/head",
        (optax.sgd, optax.adamw): r"the new one alone has count \(\) int32",
    }
    for (one, other), message in refused.items():
        with pytest.raises(ValueError, match=message):
            carry_over(one(1e-2).init(PARAMS), other(1e-2))
    trace = optax.trace(0.9).init(PARAMS)
    with pytest.raises(
        ValueError, match=r"trace/head \(3,\) float32 is where the new one has count"
    ):
        carry_over(trace, optax.ema(0.9, debias=False))
    halves = optax.trace(0.9, accumulator_dtype="bfloat16").init(PARAMS)
    with pytest.raises(ValueError, match=r"trace/head \(3,\) bfloat16 of the old"):
        carry_over(halves, optax.trace(0.9))


def test_the_page_goes_on_from_adam():
    old = optax.adamw(3e-4).init(PARAMS)
    new = run(MIGRATION, opt_state=old, params=PARAMS, depth=DEPTH, ds=ds)["opt_state"]
    chex.assert_trees_all_equal_structs(new, ds.adamw(3e-4, depth=DEPTH).init(PARAMS))


def test_rates_and_monitors_are_added_and_removed():
    adam = optax.scale_by_adam()
    params = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    _, old = adam.update(params, adam.init(PARAMS))
    tx = optax.chain(
        ds.monitor_depth(DEPTH, signal=True),
        ds.freeze_layers(range(2), depth=DEPTH),
        adam,
        ds.smooth_over_depth(0.1, depth=DEPTH),
        ds.layer_decay(0.8, depth=DEPTH, first=None),
        optax.scale(-1e-3),
    )
    new = carry_over(old, tx)
    fresh = tx.init(PARAMS)
    chex.assert_trees_all_equal(new[2], old)
    chex.assert_trees_all_equal((new[:2], new[3:]), (fresh[:2], fresh[3:]))
    chex.assert_trees_all_equal(carry_over(new, adam), old)


def test_a_schedule_counts_the_steps_before_smoothing_was_added():
    begin = carry_over(optax.adamw(1e-2).init(PARAMS), ds.adamw(1e-2, depth=DEPTH))
    set_to = run(SET_COUNT, opt_state=begin, step=7, optax=optax, jnp=jnp)
    adam, smoothing, *_ = set_to["opt_state"]
    assert smoothing == ds.SmoothOverDepthState(count=7)
    assert smoothing.count.dtype == begin[1].count.dtype
    assert adam.count == 7
