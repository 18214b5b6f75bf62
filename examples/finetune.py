"""Fine-tuning a pretrained transformer: LoRA, layer decay, frozen lower layers, and checkpoints."""

import argparse
import pathlib
import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import depthsmooth as ds

LAYERS, WIDTH, CONTEXT, BATCH = 6, 32, 32, 8
PRETRAINING, RANK, FROZEN, DECAY = 100, 4, 2, 0.8


class Block(nn.Module):
    """Causal attention, then an MLP."""

    @nn.compact
    def __call__(self, x, mask):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden), None


class Transformer(nn.Module):
    """Tokens (batch, context) to logits (batch, context, 256)."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, WIDTH, name="embed")(tokens)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=LAYERS,
        )
        x, _ = blocks(name="blocks")(x, nn.make_causal_mask(tokens))
        return nn.Dense(256, name="head")(nn.LayerNorm(name="norm")(x))


model = Transformer()


def batches_of(module, steps):
    """Windows of the source of a module: (steps, batch, context + 1)."""
    text = np.frombuffer(pathlib.Path(module.__file__).read_bytes(), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - CONTEXT, size=(steps, BATCH, 1))
    return text[starts + np.arange(CONTEXT + 1)].astype("int32")


def model_loss(params, batch):
    logits = model.apply({"params": params}, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def adapters(key):
    """One pair of matrices for each layer and each matrix of its MLP, in one stack."""

    def pair(key, inputs, outputs):
        a = jax.random.normal(key, (LAYERS, inputs, RANK)) * inputs**-0.5
        return {"a": a, "b": jnp.zeros((LAYERS, RANK, outputs))}

    up, down = jax.random.split(key)
    return {"up": pair(up, WIDTH, 4 * WIDTH), "down": pair(down, 4 * WIDTH, WIDTH)}


def loss_fn(params, batch):
    """The loss of the model with the product of each pair added to the matrix that it adapts."""
    blocks = dict(params["model"]["blocks"])
    for name, pair in params["lora"].items():
        kernel = blocks[name]["kernel"] + pair["a"] @ pair["b"]
        blocks[name] = {**blocks[name], "kernel": kernel}
    return model_loss({**params["model"], "blocks": blocks}, batch)


def steps_of(tx, loss):
    @jax.jit
    def train_step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return train_step


def pretrained():
    """What a checkpoint would give: a model that has read another text."""
    params = jax.jit(model.init)(jax.random.key(0), batches_of(argparse, 1)[0, :, :-1])["params"]
    tx = optax.adam(3e-3)
    opt_state, train_step = tx.init(params), steps_of(tx, model_loss)
    for batch in batches_of(argparse, PRETRAINING):
        params, opt_state, _ = train_step(params, opt_state, batch)
    return params


def optimizer(depth):
    """Trains adapters, norms, biases and head; lower layers less, and the lowest not at all."""

    def labels(params):
        def label(path, leaf, place):
            is_matrix = path.endswith("kernel") and place is not None
            return "frozen" if is_matrix or "embed" in path else "trained"

        return depth.map(label, params)

    trained = optax.chain(
        ds.freeze_layers(range(FROZEN), depth=depth),
        optax.scale_by_adam(),
        ds.layer_decay(DECAY, depth=depth, first=None),  # embeddings are frozen
        optax.scale_by_learning_rate(1e-2),
    )
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--directory", type=pathlib.Path, help="of checkpoints; none are kept else")
    args = parser.parse_args()

    start = {"model": pretrained(), "lora": adapters(jax.random.key(1))}
    batches = batches_of(statistics, args.steps)
    print(depth := ds.trace_depth(loss_fn, start, batches[0]))
    tx = optimizer(depth)
    train_step = steps_of(tx, loss_fn)
    state = {"params": start, "opt_state": tx.init(start)}

    options = ocp.CheckpointManagerOptions(save_interval_steps=5, max_to_keep=1)
    directory = args.directory and args.directory.absolute()
    manager = ocp.CheckpointManager(directory, options=options) if directory else None
    done = (manager.latest_step() if manager else None) or 0
    if done:
        state = manager.restore(done, args=ocp.args.StandardRestore(state))
    for step in range(done, args.steps):
        params, opt_state, loss = train_step(state["params"], state["opt_state"], batches[step])
        state = {"params": params, "opt_state": opt_state}
        if manager:
            manager.save(step + 1, args=ocp.args.StandardSave(state))
        if step % 10 == 0:
            print(f"step {step:4}  loss {loss:.6f}")
    if manager:
        manager.close()
    scales = state["params"]["model"]["blocks"]["LayerNorm_0"]["scale"]
    moved = np.abs(scales - start["model"]["blocks"]["LayerNorm_0"]["scale"]).max(1)
    print("norms moved by", moved.round(4))


if __name__ == "__main__":
    main()
