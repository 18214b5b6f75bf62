"""What Optax makes of a stack of layers, and what ``ds.per_layer`` makes of it.

``python -m benchmarks.per_layer`` compares updates on a stack of 4 layers with those on the same
model unrolled, after 3 steps: plain, and by ``per_layer``. And it compares, for a stack of 48
layers, compile times and memory of the state with and without ``per_layer``. ``--eformer`` compares
the updates of that package's optimizers alone, which Optax does not have.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import depthsmooth as ds
from benchmarks import results

LAYERS, DEEP, STEPS, ROUNDS, RATE = 4, 48, 3, 5, 0.1
RULES = ds.Depth.from_rules({"layers/.*": 0})
TENSORS = {"up": (16, 64), "down": (64, 16), "scale": (16,), "bias": (64,)}

TRANSFORMATIONS: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "muon": lambda: optax.contrib.muon(RATE),
    "galore": lambda: optax.contrib.galore(RATE, rank=4),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
    "novograd": lambda: optax.novograd(RATE),
    "sm3": lambda: optax.sm3(RATE),
    "lars": lambda: optax.lars(RATE),
    "fromage": lambda: optax.fromage(RATE),
    "scale_by_trust_ratio": lambda: optax.scale_by_trust_ratio(),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.3),
    "centralize": lambda: optax.centralize(),
    "lamb": lambda: optax.lamb(RATE),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=8),
    "adamw": lambda: optax.adamw(RATE),
    "lion": lambda: optax.lion(RATE),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
}


def of_eformer(name: str) -> optax.GradientTransformation:
    """An optimizer of eformer: ``python -m pip install eformer``."""
    from eformer.optimizers import OptimizerFactory, SchedulerConfig, WhiteKronConfig

    config = WhiteKronConfig(dtype=jnp.float32)
    return OptimizerFactory.create(name, SchedulerConfig(learning_rate=RATE), config)[0]


OF_EFORMER: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    name: functools.partial(of_eformer, name) for name in ("quad", "skew")
}
COMPILED = ("adamw", "lamb", "adafactor", "muon", "novograd")

Tree = Any


def drawn(seed: int, layers: int) -> Tree:
    """Layers of several sizes of numbers, stacked, and a head."""
    rng = np.random.default_rng(seed)
    sizes = 1.0 + np.arange(layers)
    stacks = {
        name: rng.normal(size=(layers, *shape)) * sizes.reshape(-1, *[1] * len(shape))
        for name, shape in TENSORS.items()
    }
    tree = {"layers": stacks, "head": rng.normal(size=(16, 4))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), tree)


def unrolled(tree: Tree) -> Tree:
    """The same with leaves of their own for each layer."""
    layers = {f"layer_{i}": {n: s[i] for n, s in tree["layers"].items()} for i in range(LAYERS)}
    return layers | {"head": tree["head"]}


def updates_of(tx: optax.GradientTransformation, trees: list[Tree]) -> Tree:
    """The last of a few updates of the first tree by the others, which are gradients."""
    params, *grads = trees
    state, step = tx.init(params), jax.jit(tx.update)
    for of_step in grads:
        updates, state = step(of_step, state, params)
        params = jax.tree.map(lambda p, u: p + 0.01 * u, params, updates)
    return updates


def difference(one: Tree, other: Tree) -> float:
    """The norm of the difference over that of the other, of the layers alone."""
    layers = [{name: tree[name] for name in tree if name != "head"} for tree in (one, other)]
    apart = jax.tree.map(jnp.subtract, *layers)
    return float(optax.tree.norm(apart) / optax.tree.norm(layers[1]))


def differences(
    of: Mapping[str, Callable[[], optax.GradientTransformation]],
) -> dict[str, dict[str, float]]:
    """For each transformation, how far updates on the stack are from those unrolled."""
    trees = [drawn(seed, LAYERS) for seed in range(STEPS + 1)]
    told = {}
    for name, make in of.items():
        theirs = updates_of(make(), list(map(unrolled, trees)))
        plain = unrolled(updates_of(make(), trees))
        ours = unrolled(updates_of(ds.per_layer(make(), depth=RULES), trees))
        told[name] = {"plain": difference(plain, theirs), "per_layer": difference(ours, theirs)}
    return told


def cost(tx: optax.GradientTransformation, params: Tree) -> tuple[float, int]:
    """Seconds to trace, lower and compile an update, and the numbers in the state."""
    state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return time.perf_counter() - start, sum(leaf.size for leaf in jax.tree.leaves(state))


def costs(layers: int, rounds: int) -> dict[str, dict[str, float]]:
    """For each transformation medians of ratios of compile times, and that of states."""
    params = jax.eval_shape(lambda: drawn(0, layers))
    told = {}
    for name in tqdm.tqdm(COMPILED, leave=False):
        plain = TRANSFORMATIONS[name]()
        ours = ds.per_layer(TRANSFORMATIONS[name](), depth=RULES)
        taken = [(cost(ours, params), cost(plain, params)) for _ in range(rounds)]
        told[name] = {
            "compile": round(statistics.median(a[0] / b[0] for a, b in taken), 2),
            "state": round(taken[0][0][1] / taken[0][1][1], 4),
        }
    return told


def markdown(told: Mapping[str, Mapping[str, float]]) -> str:
    """The differences as a table, as docs/per_layer.md has it."""
    rows = [
        f"| `{name}` | {of['plain']:.1g} | {of['per_layer']:.0e} |" for name, of in told.items()
    ]
    head = "| | plain Optax on the stack | `ds.per_layer` |"
    return "\n".join([head, "|---|---:|---:|", *rows])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--eformer", action="store_true", help="compare its optimizers alone")
    args = parser.parse_args()
    if args.eformer:
        told = differences(OF_EFORMER)
        version = importlib.metadata.version("eformer")
        results.write("per_layer_eformer", {"differences": told, "eformer": version})
        print(markdown(told))
        return
    told = differences(TRANSFORMATIONS)
    measured = {"differences": told, "costs": costs(DEEP, args.rounds), "rounds": args.rounds}
    results.write("per_layer", measured)
    print(markdown(told))
    for name, of in measured["costs"].items():
        print(f"{name:12} compile {of['compile']:5.2f}  state {of['state']:6.3f}")


if __name__ == "__main__":
    main()
