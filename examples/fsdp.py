"""FSDP: parameters, moments and batches split over a mesh of eight devices, by ``jax.jit``."""

import os

# Eight devices on any machine: leave this out where there are eight accelerators.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import argparse
import pathlib

import flax.linen as nn
import jax
import numpy as np
import optax

import depthsmooth as ds

CONTEXT = 8


class Block(nn.Module):
    """A hidden layer, added to the stream."""

    @nn.compact
    def __call__(self, x, _):
        hidden = nn.gelu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden), None


class Model(nn.Module):
    """Eight bytes to the logits of the next."""

    layers: int = 6
    width: int = 64

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, self.width // CONTEXT)(tokens).reshape(len(tokens), self.width)
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(256)(x)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.1, help="0 smooths nothing")
    args = parser.parse_args()

    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - CONTEXT, size=(args.steps, 64, 1))
    batches = text[starts + np.arange(CONTEXT + 1)].astype("int32")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = jax.NamedSharding(mesh, jax.P("data"))

    def over_features(leaf):
        return jax.NamedSharding(mesh, jax.P(*[None] * (leaf.ndim - 1), "data"))

    model = Model()

    def init(key):
        return model.init(key, batches[0, :, :-1])

    def loss_fn(params, batch):
        logits = model.apply(params, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()

    shardings = jax.tree.map(over_features, jax.eval_shape(init, jax.random.key(0)))
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    print(depth := ds.trace_depth(loss_fn, params, batches[0]))
    tx = ds.adamw(3e-3, alpha=args.alpha, depth=depth)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return jax.lax.with_sharding_constraint(params, shardings), opt_state, loss

    for step, batch in enumerate(batches):
        params, opt_state, loss = train_step(params, opt_state, jax.device_put(batch, over_batch))
        if step % 10 == 0:
            print(f"step {step:4}  loss {loss:.6f}")


if __name__ == "__main__":
    main()
