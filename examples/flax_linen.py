"""Flax linen: a transformer over bytes, its blocks in ``nn.scan``, trained by a ``TrainState``."""

import argparse
import pathlib

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState

import depthsmooth as ds


class Block(nn.Module):
    """Causal attention, then an MLP."""

    @nn.compact
    def __call__(self, x, mask):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden), None


class Transformer(nn.Module):
    """Tokens (batch, context) to logits (batch, context, 256)."""

    layers: int = 6
    width: int = 32

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, self.width)(tokens)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        x, _ = blocks(name="blocks")(x, nn.make_causal_mask(tokens))
        return nn.Dense(256)(nn.LayerNorm()(x))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.1, help="0 smooths nothing")
    args = parser.parse_args()

    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - 32, size=(args.steps, 8, 1))
    batches = text[starts + np.arange(33)].astype("int32")

    model = Transformer()
    params = jax.jit(model.init)(jax.random.key(0), batches[0, :, :-1])["params"]

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    print(depth := ds.trace_depth(loss_fn, params, batches[0]))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        ds.smooth_over_depth(args.alpha, depth=depth),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(3e-3),
    )
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), loss

    for step, batch in enumerate(batches):
        state, loss = train_step(state, batch)
        if step % 10 == 0:
            print(f"step {step:4}  loss {loss:.6f}")


if __name__ == "__main__":
    main()
