"""Flax NNX: a transformer over bytes, its blocks made by ``nnx.vmap`` and run by ``nnx.scan``."""

import argparse
import pathlib

import jax
import numpy as np
import optax
from flax import nnx

import depthsmooth as ds


class Block(nnx.Module):
    """Causal attention, then an MLP."""

    def __init__(self, width, rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """Tokens (batch, context) to logits (batch, context, 256)."""

    def __init__(self, layers, width, context, rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create_block(rngs):
            return Block(width, rngs)

        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (context, width)))
        self.blocks = create_block(rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x)

        x = self.embed(tokens) + self.positions
        return self.head(self.norm(forward(x, self.blocks)))


def loss_fn(model, batch):
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.1, help="0 smooths nothing")
    args = parser.parse_args()

    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - 32, size=(args.steps, 8, 1))
    batches = text[starts + np.arange(33)].astype("int32")

    model = Transformer(layers=6, width=32, context=32, rngs=nnx.Rngs(0))
    print(depth := ds.trace_depth(loss_fn, model, batches[0]))
    tx = ds.adamw(3e-3, weight_decay=0.01, alpha=args.alpha, depth=depth)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    for step, batch in enumerate(batches):
        loss = train_step(model, optimizer, batch)
        if step % 10 == 0:
            print(f"step {step:4}  loss {loss:.6f}")


if __name__ == "__main__":
    main()
