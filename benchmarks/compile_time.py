"""How long a jitted update takes to trace, lower and compile, against a stencil written by hand.

``python -m benchmarks.compile_time`` prints medians of ratios within rounds, for 1,000 stacked
leaves, for 48 blocks of 16 leaves each and for the same blocks stacked: the smoothing alone, and
AdamW with it. By hand it is the window for that very tree, in a few lines of ``jax.numpy``.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax
import tqdm

import depthsmooth as ds
from benchmarks import results

ALPHA = 0.1
ROUNDS = 5
STAGES = ("trace", "lower", "compile", "all")

Tree = dict[str, dict[str, jax.Array]]


class Model(NamedTuple):
    """A tree of shapes, where its layers are, and the window for it by hand."""

    params: Tree
    depth: ds.depth.Rules
    by_hand: Callable[[Tree], Tree]


@jax.jit
def stack_by_hand(update: jax.Array) -> jax.Array:
    """The window over axis 0."""
    others = [(0, 0, 0)] * (update.ndim - 1)

    def shifted(offset: int) -> jax.Array:
        return jax.lax.pad(update, 0.0, [(offset, -offset, 0), *others])

    own = np.full((len(update), *[1] * len(others)), 1 - ALPHA, "float32")
    own[[0, -1]] = 1 - ALPHA / 2
    return own * update + ALPHA / 2 * shifted(-1) + ALPHA / 2 * shifted(1)


def blocks_by_hand(updates: Tree) -> Tree:
    """The window over block_0, block_1 and so on."""
    last = len(updates) - 1

    def mixed(k: int, name: str) -> jax.Array:
        near = [updates[f"block_{j}"][name] for j in (k - 1, k + 1) if 0 <= j <= last]
        own = 1 - ALPHA / 2 * len(near)
        return own * updates[f"block_{k}"][name] + ALPHA / 2 * sum(near[1:], near[0])

    return {
        f"block_{k}": {name: mixed(k, name) for name in updates["block_0"]}
        for k in range(len(updates))
    }


def models(leaves: int, blocks: int) -> dict[str, Model]:
    """The trees, of that many stacked leaves and of that many blocks, unrolled and stacked."""
    matrix, vector = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((64, 64), (64,)))
    stack = jax.ShapeDtypeStruct((24, 64, 64), "float32")
    block = {f"w{j}": matrix for j in range(10)} | {f"b{j}": vector for j in range(6)}
    stacked = {
        name: jax.ShapeDtypeStruct((blocks, *leaf.shape), "float32") for name, leaf in block.items()
    }

    def of_stacks(stacks: dict[str, jax.Array]) -> Model:
        rules = ds.Depth.from_rules({"layers/.*": 0})
        return Model(
            {"layers": stacks}, rules, lambda updates: jax.tree.map(stack_by_hand, updates)
        )

    return {
        f"{leaves:,} stacked leaves": of_stacks({f"w{j}": stack for j in range(leaves)}),
        f"{blocks} blocks of 16 leaves": Model(
            {f"block_{k}": block for k in range(blocks)},
            ds.Depth.from_rules({r"block_(\d+)/.*": ds.numbered()}),
            blocks_by_hand,
        ),
        "the same, stacked": of_stacks(stacked),
    }


def arms(model: Model) -> dict[str, optax.GradientTransformation]:
    """The smoothing alone, and AdamW with it; ours beside the one by hand."""
    by_hand = optax.stateless(lambda updates, _: model.by_hand(updates))
    after = optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(3e-4)
    return {
        "smoothing by hand": by_hand,
        "smooth_over_depth": ds.smooth_over_depth(ALPHA, depth=model.depth),
        "AdamW": optax.chain(optax.scale_by_adam(), *after),
        "AdamW with it by hand": optax.chain(optax.scale_by_adam(), by_hand, *after),
        "ds.adamw": ds.adamw(3e-4, alpha=ALPHA, depth=model.depth),
    }


BESIDE = {
    "smooth_over_depth": "smoothing by hand",
    "AdamW": "AdamW with it by hand",
    "ds.adamw": "AdamW with it by hand",
}


def seconds(tx: optax.GradientTransformation, params: Tree) -> list[float]:
    """How long each stage takes from nothing, and all together."""
    state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(tx.update, donate_argnums=(0, 1)).trace(params, state, params)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return [*(b - a for a, b in itertools.pairwise(times)), times[-1] - times[0]]


def measure(
    trees: dict[str, Model], rounds: int
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, float]]:
    """Medians of ratios within rounds.

    For each tree and arm those of each stage's time to the whole time of the arm by hand. And for
    each arm that of the whole time for blocks of their own to that for blocks that are stacked.
    """
    taken: list[dict[str, dict[str, list[float]]]] = [
        {
            tree: {arm: seconds(tx, model.params) for arm, tx in arms(model).items()}
            for tree, model in trees.items()
        }
        for _ in tqdm.trange(rounds, leave=False)
    ]
    ratios = {
        tree: {
            arm: {
                stage: _median(r[tree][arm][k] / r[tree][BESIDE.get(arm, arm)][-1] for r in taken)
                for k, stage in enumerate(STAGES)
            }
            for arm in of_tree
        }
        for tree, of_tree in taken[0].items()
    }
    _, blocks, stacked = trees
    unrolled = {
        arm: _median(r[blocks][arm][-1] / r[stacked][arm][-1] for r in taken)
        for arm in taken[0][blocks]
    }
    return ratios, unrolled


def markdown(ratios: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The whole times as a table, as docs/sharding.md has it."""
    rows = [
        "| | `smooth_over_depth` alone | AdamW without it | `ds.adamw` |",
        "|---|---:|---:|---:|",
    ]
    for tree, of_arms in ratios.items():
        alone, without, ours = (
            of_arms[arm]["all"] for arm in ("smooth_over_depth", "AdamW", "ds.adamw")
        )
        rows.append(f"| {tree} | {alone:.2f} | {without:.2f} | {ours:.2f} |")
    return "\n".join(rows)


def _median(ratios: Iterable[float]) -> float:
    return round(statistics.median(ratios), 2)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    ratios, unrolled = measure(models(1000, 48), rounds)
    unit = "the whole time of the same by hand: trace, lower and compile"
    measured = {"unit": unit, "ratios": ratios, "unrolled": unrolled, "rounds": rounds}
    results.write("compile_time", measured)
    for tree, of_arms in ratios.items():
        print(f"{tree:24}" + "".join(f"{stage:>9}" for stage in STAGES))
        for name, of_stages in of_arms.items():
            print(f"  {name:22}" + "".join(f"{of_stages[stage]:9.2f}" for stage in STAGES))
    print("48 blocks of their own, over 48 that are stacked")
    for name, ratio in unrolled.items():
        print(f"  {name:22}{ratio:9.2f}")


if __name__ == "__main__":
    main()
