"""How long AdamW's step takes with smoothing, against the same chain with a stencil by hand.

``python -m benchmarks.step_time`` runs steps of AdamW on the device that is there, with new
parameters, for stacks of 24 layers: unsmoothed, with the window written by hand, and with each
variant. It prints medians of ratios within rounds, over the unsmoothed step.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import depthsmooth as ds
from benchmarks import results
from benchmarks.compile_time import ALPHA, stack_by_hand

LAYERS, LEAVES, WIDTH, ROUNDS = 24, 6, 512, 25
VARIANTS = ("standard", "norm_preserving", "directional")

Step = Callable[..., Any]


def optimizers() -> dict[str, optax.GradientTransformation]:
    """AdamW with nothing, with the stencil by hand, and with each variant, in the same place."""
    depth = ds.Depth.from_rules({"w.*": 0})
    middles = {
        "unsmoothed": optax.identity(),
        "by hand": optax.stateless(lambda updates, _: jax.tree.map(stack_by_hand, updates)),
        **{name: ds.smooth_over_depth(ALPHA, depth=depth, variant=name) for name in VARIANTS},
    }
    return {
        name: optax.chain(
            optax.scale_by_adam(),
            middle,
            optax.add_decayed_weights(1e-4),
            optax.scale_by_learning_rate(3e-4),
        )
        for name, middle in middles.items()
    }


def step_of(tx: optax.GradientTransformation) -> Step:
    """A step that gives new parameters, in the memory of the old ones."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def measure(width: int, rounds: int) -> dict[str, float]:
    """For each optimizer the median of its time over that of the unsmoothed one."""
    keys = jax.random.split(jax.random.key(0), LEAVES)
    params = {f"w{k}": jax.random.normal(key, (LAYERS, width, width)) for k, key in enumerate(keys)}
    grads = jax.tree.map(jnp.sin, params)
    chains = optimizers()
    steps = {name: step_of(tx) for name, tx in chains.items()}
    held = {name: (jax.tree.map(jnp.copy, params), tx.init(params)) for name, tx in chains.items()}
    taken: list[dict[str, float]] = []
    draw = random.Random(0)
    for _ in range(rounds + 2):  # the first two compile, and fill caches
        times = {}
        for name in draw.sample(list(steps), len(steps)):  # else one always follows the same other
            start = time.perf_counter()
            held[name] = jax.block_until_ready(steps[name](*held[name], grads))
            times[name] = time.perf_counter() - start
        taken.append(times)
    return {
        name: round(statistics.median(r[name] / r["unsmoothed"] for r in taken[2:]), 2)
        for name in chains
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    ratios = measure(WIDTH, rounds)
    unit = "the time of AdamW's step without smoothing"
    results.write("step_time", {"unit": unit, "ratios": ratios, "rounds": rounds})
    for name, ratio in ratios.items():
        print(f"{name:18}{ratio:6.2f}")


if __name__ == "__main__":
    main()
