"""Trains by the loop of docs/checkpoints.md: ``python -m tests.resumed DIRECTORY``.

It prints the number of each step that it begins, and leaves the final state in the directory.
"""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthsmooth as ds

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "checkpoints.md"
LOOP, *OTHERS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
STEPS, LAYERS, WIDTH = 200, 5, 8


def train(*args):
    """The loop of the document, with more checkpoints."""
    names = {}
    exec(LOOP.replace("save_interval_steps=100", "save_interval_steps=3"), names)
    return names["train"](*args)


def loss(params, batch):
    """Of residual layers."""

    def layer(x, kernel):
        return x + jnp.tanh(x @ kernel), None

    x, _ = jax.lax.scan(layer, batch, params["layers"])
    return ((x @ params["head"] - batch) ** 2).mean()


def smoothed(depth):
    """Needs its counter: α grows with it."""
    return ds.adamw(1e-2, alpha=optax.linear_schedule(0.0, 0.5, STEPS), depth=depth)


def start(optimizer=smoothed):
    """A fresh state, the step that trains it, and the batches."""
    rng = np.random.default_rng(0)
    shapes = {"layers": (LAYERS, WIDTH, WIDTH), "head": (WIDTH, WIDTH)}
    params = {name: jnp.asarray(rng.normal(0, 0.3, shapes[name]), "float32") for name in shapes}
    batches = rng.normal(size=(STEPS, 4, WIDTH)).astype("float32")
    tx = optimizer(ds.trace_depth(loss, params, batches[0]))

    @jax.jit
    def train_step(state, batch):
        grads = jax.grad(loss)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}

    state = {"params": params, "opt_state": tx.init(params), "step": jnp.zeros([], jnp.int32)}
    return state, train_step, batches


def main():
    """Trains to the end."""
    directory = pathlib.Path(sys.argv[1])
    state, train_step, batches = start()

    def told(state, batch):
        print(int(state["step"]), flush=True)
        return train_step(state, batch)

    state = train(directory / "checkpoints", state, told, batches)
    np.savez(directory / "final.npz", *map(np.asarray, jax.tree.leaves(state)))


if __name__ == "__main__":
    main()
