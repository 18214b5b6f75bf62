"""Which way of training several seeds is the fastest on the cores that are here.

``python -m benchmarks.seeds_time`` trains four seeds of ``reversal`` one after the other on all
cores, all at once by ``jax.vmap``, and in processes with one core each, as ``benchmarks.quality``
does, in turn. It prints the medians of the times over that of the first, without compilation, and
writes ``results/seeds_time.json``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import tqdm

from benchmarks import results
from benchmarks.quality import workers
from benchmarks.quality.arms import Arm
from benchmarks.quality.plan import Source
from benchmarks.quality.reversal import Reversal
from benchmarks.quality.runs import Run
from benchmarks.quality.training import program

SEEDS = 4
ARM = Arm("adamw", alpha=0.2)


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in each round."""
    task = Reversal()
    train = program(task, ARM.kind)
    [layers] = task.depth.groups.values()
    numbers = np.float32(ARM.alpha), ARM.matrix(layers, 0), np.float32(1)
    one, all_at_once = jax.jit(train), jax.jit(jax.vmap(train, (0, None, None, None)))
    seeds = np.arange(SEEDS, dtype=np.int32)
    runs = [Run(task.layers, task.steps, ARM, 1.0, int(seed)) for seed in seeds]
    with workers.pool(os.cpu_count() or 1) as pool:
        ways: dict[str, Callable[[], object]] = {
            "one after the other": lambda: [jax.block_until_ready(one(s, *numbers)) for s in seeds],
            "vmap": lambda: jax.block_until_ready(all_at_once(seeds, *numbers)),
            "processes": lambda: list(pool.map(workers.line, [Source("reversal")] * SEEDS, runs)),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in tqdm.trange(rounds + 1, unit="round", leave=False):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                taken[name].append(time.perf_counter() - began)
    return {name: seconds[1:] for name, seconds in taken.items()}  # the first compiles


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    taken = measure(parser.parse_args().rounds)
    first = next(iter(taken.values()))
    rows = []
    for name, seconds in taken.items():
        ratio = statistics.median(np.divide(seconds, first).tolist())
        rows.append({"way": name, "seconds": round(statistics.median(seconds), 3), "ratio": ratio})
        print(f"{name:20} {rows[-1]['seconds']:6.2f} s  {ratio:.3f}")
    results.write("seeds_time", {"seeds": SEEDS, "rows": rows})


if __name__ == "__main__":
    main()
