"""How long a jitted update takes to trace, lower and compile, against the same chain unsmoothed.

``python -m benchmarks.compile_time`` prints medians of ratios within rounds, for 1,000 stacked
leaves and for 96 layers of 12 leaves each. The bare stencil is the least that a window over depth
can be, written by hand for one stack: the compiler makes one kernel more of it for every leaf.
"""

import itertools
import statistics
import time

import jax
import optax

import depthsmooth as ds
from benchmarks import results

ROUNDS = 5
STAGES = ("trace", "lower", "compile", "all")

Tree = dict[str, dict[str, jax.ShapeDtypeStruct]]


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    """A leaf of which only the shape is known."""
    return jax.ShapeDtypeStruct(shape, "float32")


TREES: dict[str, tuple[Tree, ds.Depth]] = {
    "1,000 stacked leaves": (
        {"layers": {f"w_{i}": leaf(24, 64, 64) for i in range(1000)}},
        ds.Depth.from_rules({"layers/.*": 0}),
    ),
    "96 layers of 12 leaves": (
        {f"block_{i}": {f"w_{j}": leaf(64, 64) for j in range(12)} for i in range(96)},
        ds.Depth.from_rules({"block_.*": ds.numbered()}),
    ),
}


@jax.jit
def bare(update: jax.Array) -> jax.Array:
    """The window at alpha = 0.1 over axis 0, but for its ends."""

    def shifted(offset: int) -> jax.Array:
        return jax.lax.pad(update, 0.0, [(offset, -offset, 0), (0, 0, 0), (0, 0, 0)])

    return 0.9 * update + 0.05 * shifted(-1) + 0.05 * shifted(1)


def arms(depth: ds.Depth, stacked: bool) -> dict[str, list[optax.GradientTransformation]]:
    """What stands between Adam and the weight decay."""
    schedule = optax.linear_schedule(0.1, 0.2, 100)
    by_hand = optax.stateless(lambda updates, _: jax.tree.map(bare, updates))
    return {
        "unsmoothed": [],
        "alpha a number": [ds.smooth_over_depth(0.1, depth=depth)],
        "alpha a schedule": [ds.smooth_over_depth(schedule, depth=depth)],
        **({"bare stencil": [by_hand]} if stacked else {}),
    }


def seconds(middle: list[optax.GradientTransformation], params: Tree) -> list[float]:
    """How long each stage takes from nothing, and all together."""
    tx = optax.chain(
        optax.scale_by_adam(),
        *middle,
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(3e-4),
    )
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


def measure(params: Tree, depth: ds.Depth) -> dict[str, dict[str, float]]:
    """For each arm the medians of each stage's time, over that of the whole unsmoothed chain."""
    compared = arms(depth, stacked="layers" in params)
    rounds = [{name: seconds(arm, params) for name, arm in compared.items()} for _ in range(ROUNDS)]
    return {
        name: {
            stage: round(statistics.median(r[name][k] / r["unsmoothed"][-1] for r in rounds), 2)
            for k, stage in enumerate(STAGES)
        }
        for name in compared
    }


def main() -> None:
    """Measures, prints and writes."""
    ratios = {name: measure(*tree) for name, tree in TREES.items()}
    result = {
        "unit": "the time of the whole unsmoothed chain: trace, lower and compile",
        "ratios": ratios,
        "rounds": ROUNDS,
    }
    results.write("compile_time", result)
    for tree, of_arms in ratios.items():
        print(f"{tree:24}" + "".join(f"{stage:>9}" for stage in STAGES))
        for name, of_stages in of_arms.items():
            print(f"  {name:22}" + "".join(f"{of_stages[stage]:9.2f}" for stage in STAGES))


if __name__ == "__main__":
    main()
