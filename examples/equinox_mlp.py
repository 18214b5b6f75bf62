"""Equinox: a residual MLP over bytes, its blocks created by ``eqx.filter_vmap``, run in a scan."""

import argparse
import pathlib

import equinox as eqx
import jax
import numpy as np
import optax

import depthsmooth as ds

CONTEXT = 8


class Block(eqx.Module):
    """A hidden layer, added to the stream."""

    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, width, key):
        self.norm = eqx.nn.LayerNorm(width)
        self.mlp = eqx.nn.MLP(width, width, 2 * width, depth=1, activation=jax.nn.gelu, key=key)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class Model(eqx.Module):
    """Eight bytes to the logits of the next."""

    embed: eqx.nn.Embedding
    blocks: Block
    head: eqx.nn.Linear

    def __init__(self, layers, width, key):
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(256, width // CONTEXT, key=embed_key)
        keys = jax.random.split(blocks_key, layers)
        self.blocks = eqx.filter_vmap(lambda key: Block(width, key))(keys)
        self.head = eqx.nn.Linear(width, 256, key=head_key)

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def body(x, arrays):
            return eqx.combine(arrays, static)(x), None

        x, _ = jax.lax.scan(body, jax.vmap(self.embed)(tokens).ravel(), arrays)
        return self.head(x)


def loss_fn(model, batch):
    """Mean cross-entropy of the last byte of each window."""
    logits = jax.vmap(model)(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.1, help="0 smooths nothing")
    args = parser.parse_args()

    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - CONTEXT, size=(args.steps, 64, 1))
    batches = text[starts + np.arange(CONTEXT + 1)].astype("int32")

    model = Model(layers=8, width=64, key=jax.random.key(0))
    print(depth := ds.trace_depth(loss_fn, model, batches[0]))
    tx = optax.chain(
        optax.scale_by_adam(),
        ds.smooth_over_depth(args.alpha, depth=depth),
        optax.scale_by_learning_rate(3e-3),
    )
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(model, opt_state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        updates, opt_state = tx.update(grads, opt_state, model)
        return eqx.apply_updates(model, updates), opt_state, loss

    for step, batch in enumerate(batches):
        model, opt_state, loss = train_step(model, opt_state, batch)
        if step % 10 == 0:
            print(f"step {step:4}  loss {loss:.6f}")


if __name__ == "__main__":
    main()
