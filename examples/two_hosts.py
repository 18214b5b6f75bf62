"""Two hosts: one program in each, layers and batches split over both; here, on one machine."""

import argparse
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthsmooth as ds

LAYERS, WIDTH, CONTEXT = 8, 64, 8


def init(key):
    """Embedding, head and layers; each leaf of the layers has all of them, along axis 0."""
    embed, up, down = jax.random.split(key, 3)
    layers = {
        "up": jax.random.normal(up, (LAYERS, WIDTH, 2 * WIDTH)) / WIDTH**0.5,
        "down": jax.random.normal(down, (LAYERS, 2 * WIDTH, WIDTH)) / WIDTH,
    }
    embed = jax.random.normal(embed, (256, WIDTH // CONTEXT))
    return {"embed": embed, "layers": layers, "head": jnp.zeros((WIDTH, 256))}


def loss_fn(params, batch):
    """Mean cross-entropy of the last byte of each window."""

    def layer(x, params):
        return x + jax.nn.gelu(jax.nn.standardize(x) @ params["up"]) @ params["down"], None

    x = params["embed"][batch[:, :-1]].reshape(len(batch), WIDTH)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = x @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()


def train(args):
    """What each host does."""
    jax.distributed.initialize(args.coordinator, num_processes=2, process_id=args.process)
    mesh = jax.make_mesh(
        (jax.device_count(),), ("hosts",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("hosts"), jax.P()))

    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
    rng = np.random.default_rng(args.process)  # each host has batches of its own
    starts = rng.integers(len(text) - CONTEXT, size=(args.steps, 32, 1))
    batches = text[starts + np.arange(CONTEXT + 1)].astype("int32")

    shardings = {"embed": whole, "layers": {"up": split, "down": split}, "head": whole}
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    depth = ds.trace_depth(loss_fn, params, batches[0])
    if args.process == 0:
        print(depth)
    tx = ds.adamw(3e-3, alpha=args.alpha, depth=depth)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return jax.lax.with_sharding_constraint(params, shardings), opt_state, loss

    for step, batch in enumerate(batches):
        batch = jax.make_array_from_process_local_data(split, batch)
        params, opt_state, loss = train_step(params, opt_state, batch)
        if step % 10 == 0 and args.process == 0:
            print(f"step {step:4}  loss {loss:.6f}")


def start_both():
    """Both hosts on this machine, each a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process"]
    cpu = os.environ | {"JAX_PLATFORMS": "cpu"}  # both cannot have the same accelerators
    hosts = [subprocess.Popen([*command, process], env=cpu) for process in ("0", "1")]
    statuses = [host.wait() for host in hosts]
    sys.exit(any(statuses))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.1, help="0 smooths nothing")
    parser.add_argument("--process", type=int, help="0 or 1, if hosts are started one by one")
    parser.add_argument("--coordinator", help="then, the first one's address:port")
    args = parser.parse_args()
    if args.process is None:
        start_both()
    else:
        train(args)


if __name__ == "__main__":
    main()
