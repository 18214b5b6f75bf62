"""Plain JAX: a transformer over bytes, its blocks in a hand-written ``jax.lax.scan``."""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthsmooth as ds

LAYERS, WIDTH, HEADS, CONTEXT = 6, 32, 2, 32


def init(key):
    """Embedding, positions and blocks; each leaf of the blocks has all layers, along axis 0."""
    keys = iter(jax.random.split(key, 6))

    def normal(*shape):
        return jax.random.normal(next(keys), shape) / shape[-2] ** 0.5

    blocks = {
        "qkv": normal(LAYERS, WIDTH, 3 * WIDTH),
        "out": normal(LAYERS, WIDTH, WIDTH) / LAYERS,
        "mlp_in": normal(LAYERS, WIDTH, 4 * WIDTH),
        "mlp_out": normal(LAYERS, 4 * WIDTH, WIDTH) / LAYERS,
        "scales": jnp.ones((LAYERS, 2, WIDTH)),
    }
    return {"embed": normal(256, WIDTH), "positions": normal(CONTEXT, WIDTH), "blocks": blocks}


def block(x, params):
    """Causal attention, then an MLP: the body of the scan."""
    batch, context, width = x.shape
    h = jax.nn.standardize(x) * params["scales"][0]
    heads = (h @ params["qkv"]).reshape(batch, context, 3, HEADS, width // HEADS)
    q, k, v = jnp.moveaxis(heads, 2, 0)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(x.shape) @ params["out"]
    h = jax.nn.standardize(x) * params["scales"][1]
    return x + jax.nn.gelu(h @ params["mlp_in"]) @ params["mlp_out"], None


def loss_fn(params, batch):
    """Mean cross-entropy of the next byte; the embedding is the head, too."""
    x = params["embed"][batch[:, :-1]] + params["positions"]
    x, _ = jax.lax.scan(block, x, params["blocks"])
    logits = jax.nn.standardize(x) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--alpha", type=float, default=0.1, help="0 smooths nothing")
    args = parser.parse_args()

    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - CONTEXT, size=(args.steps, 8, 1))
    batches = text[starts + np.arange(CONTEXT + 1)].astype("int32")

    params = jax.jit(init)(jax.random.key(0))
    print(depth := ds.trace_depth(loss_fn, params, batches[0]))
    tx = optax.chain(
        optax.scale_by_adam(),
        ds.smooth_over_depth(args.alpha, depth=depth),
        optax.scale_by_learning_rate(3e-3),
    )
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
