"""Trains a deep model on one process or several, its layers split over all of their devices.

``python -m tests.two_hosts DIRECTORY --process 0 --processes 2 --port 12345`` is one of two.
Losses and final weights are left in the directory, by process.
"""

import argparse
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthsmooth as ds

LAYERS, WIDTH = 8, 16


def loss(params, batch):
    """Of residual layers."""

    def layer(x, params):
        return x + jnp.tanh(x @ params["kernel"] + params["bias"]) / LAYERS, None

    x, _ = jax.lax.scan(layer, batch, params["layers"])
    return ((x @ params["head"] - batch) ** 2).mean()


def parameters():
    """The same everywhere."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype("float32") / WIDTH**0.5

    layers = {"kernel": normal(LAYERS, WIDTH, WIDTH), "bias": normal(LAYERS, WIDTH)}
    return {"layers": layers, "head": normal(WIDTH, WIDTH)}


def main() -> None:
    """Trains, as one of the processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if args.processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{args.port}",
            args.processes,
            args.process,
            heartbeat_timeout_seconds=10,
            shutdown_timeout_seconds=10,
        )
    mesh = jax.make_mesh(
        (jax.device_count(),), ("stage",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    split, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("stage"), jax.P()))
    whole = parameters()
    shardings = {"layers": dict.fromkeys(whole["layers"], split), "head": everywhere}
    params = jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index, leaf=leaf: leaf[index]
        ),
        whole,
        shardings,
    )
    batch = np.random.default_rng(1).normal(size=(4, WIDTH)).astype("float32")
    depth = ds.trace_depth(loss, params, batch)
    assert {place.shards for place in depth.values()} == {jax.device_count()}
    tx = ds.adamw(1e-2, alpha=0.3, depth=depth, variant="norm_preserving")
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return jax.lax.with_sharding_constraint(params, shardings), state, value

    losses = []
    for k in range(args.steps):
        params, state, value = step(params, state)
        losses.append(float(value))
        print("step", k, losses[-1], flush=True)
    gathered = jax.jit(lambda tree: tree, out_shardings=everywhere)(params)
    arrays = {f"params{k}": np.asarray(leaf) for k, leaf in enumerate(jax.tree.leaves(gathered))}
    scratch = args.directory / f"{args.process}.part.npz"
    np.savez(scratch, losses=losses, **arrays)
    os.replace(scratch, args.directory / f"{args.process}.npz")


if __name__ == "__main__":
    main()
