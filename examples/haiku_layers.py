"""Haiku: a transformer over bytes, its blocks in ``hk.experimental.layer_stack``."""

import argparse
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthsmooth as ds

LAYERS, WIDTH = 6, 32


def block(x):
    """Causal attention, then an MLP."""
    init = hk.initializers.VarianceScaling(1 / LAYERS)
    mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1])))
    h = hk.LayerNorm(-1, True, True)(x)
    x = x + hk.MultiHeadAttention(2, WIDTH // 2, w_init=init)(h, h, h, mask)
    h = hk.LayerNorm(-1, True, True)(x)
    return x + hk.nets.MLP([4 * WIDTH, WIDTH], w_init=init, activation=jax.nn.gelu)(h)


def forward(tokens):
    """Tokens (batch, context) to logits (batch, context, 256)."""
    shape = (tokens.shape[1], WIDTH)
    x = hk.Embed(256, WIDTH)(tokens)
    x += hk.get_parameter("positions", shape, init=hk.initializers.TruncatedNormal(0.02))
    x = hk.experimental.layer_stack(LAYERS, name="blocks")(block)(x)
    return hk.Linear(256)(hk.LayerNorm(-1, True, True)(x))


model = hk.without_apply_rng(hk.transform(forward))


def loss_fn(params, batch):
    """Mean cross-entropy of the next byte."""
    logits = model.apply(params, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.1, help="0 smooths nothing")
    args = parser.parse_args()

    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - 32, size=(args.steps, 8, 1))
    batches = text[starts + np.arange(33)].astype("int32")

    params = jax.jit(model.init)(jax.random.key(0), batches[0, :, :-1])
    print(depth := ds.trace_depth(loss_fn, params, batches[0]))
    tx = ds.adamw(3e-3, weight_decay=0.01, alpha=args.alpha, depth=depth)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for step, batch in enumerate(batches):
        params, opt_state, loss = train_step(params, opt_state, batch)
        if step % 10 == 0:
            print(f"step {step:4}  loss {loss:.6f}")


if __name__ == "__main__":
    main()
