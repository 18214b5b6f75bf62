"""How long ``monitor_depth`` takes in a step of the demo, on the device that is here.

``python -m benchmarks.monitor_time`` times ten training steps of the demo, smoothed, without and
with a monitor, in turn: one that measures in every step, every tenth, and every tenth all layers
with all others. It also times a measurement by itself, against ten steps, whose ratio noise hides
less. It prints medians and quartiles of the ratios within pairs, and writes
``results/monitor_time.json``.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import optax
import tqdm

import depthsmooth as ds
from benchmarks import results
from benchmarks.speed import Row, Step, compiled, pairs, summary
from depthsmooth.demo import __main__ as demo
from depthsmooth.demo import text
from depthsmooth.demo.training import Arm, Config, Experiment

STEPS = 10
MONITORS = {
    "every step": {"every": 1},
    "every 10 steps": {"every": 10},
    "every 10 steps, full": {"every": 10, "full": True},
}


def experiment() -> Experiment:
    """The demo, as it is without options."""
    given = demo.parser().parse_args([])
    corpus = text.load(None, given.context, given.out)
    sizes = given.layers, given.width, given.steps, given.batch, given.context
    return Experiment(Config(*sizes, given.learning_rate, corpus.digest), corpus)


def steps(demo: Experiment, tx: optax.GradientTransformation) -> tuple[Step, tuple[Any, float]]:
    """Ten steps that go on from the last, and what one is compiled to."""
    params = demo.init(0)
    held = [(params, tx.init(params))]
    batches = demo.text.batches(STEPS, demo.config.batch, demo.config.context, 0)

    def step(params: Any, state: Any, windows: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(demo.loss)(params, windows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    program = compiled(step, *held[0], batches[0], donate=(0, 1))

    def ten() -> object:
        for windows in batches:
            held[0] = program[0](*held[0], windows)
        return held[0]

    return ten, program


def measure(rounds: int) -> list[Row]:
    """A row for each monitor."""
    demo = experiment()
    plain = demo.optimizer(Arm(0.2))
    rows = []
    for name, keywords in tqdm.tqdm(MONITORS.items(), unit="case", leave=False):
        monitored = optax.chain(ds.monitor_depth(demo.depth, **keywords), plain)
        (one, first), (other, second) = steps(demo, plain), steps(demo, monitored)
        rows.append({"monitor": name, **summary(pairs(one, other, rounds), [first, second])})
    updates = demo.init(1)
    for name, full in {"one measurement": False, "one measurement, full": True}.items():
        one, first = steps(demo, plain)
        measured = functools.partial(ds.depth_metrics, depth=demo.depth, full=full)
        second = compiled(measured, updates)
        other = functools.partial(second[0], updates)
        rows.append({"monitor": name, **summary(pairs(one, other, rounds), [first, second])})
    return rows


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="pairs of ten steps")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds is {arguments.rounds}, but quartiles need 2 pairs at least")
    rows = measure(arguments.rounds)
    for row in rows:
        low, high = row["quartiles"]
        print(f"{row['monitor']:22} {row['ratio']:.4f} [{low:.4f}, {high:.4f}]")
    results.write("monitor_time", {"rounds": arguments.rounds, "rows": rows})
    print("on", results.device())


if __name__ == "__main__":
    main()
