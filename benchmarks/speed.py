"""How long smoothing takes on the device that is here, against the same work without it.

``python -m benchmarks.speed`` times, in turn and in one run:

- stencil: the transformation alone, against an elementwise scale of the same array, which reads
  and writes as much;
- optimizer: AdamW's step on a transformer's parameters, smoothed or not;
- training: the whole step of a transformer of layers stacked by ``nn.scan``, with as many tokens
  for each parameter as nanochat has (524,288 for 1.38 billion).

It prints medians and quartiles of the ratios within pairs, the time to compile and the temporary
memory of either, and writes ``results/speed.json`` and ``results/speed.png``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import rich.console
import rich.table
import tqdm

import depthsmooth as ds
from benchmarks import results
from depthsmooth.demo.model import Transformer

TOKENS_PER_PARAMETER = 524_288 / 1.38e9
CONTEXT = 64
STENCIL = [(layers, width) for layers in (2, 8, 24, 128) for width in (64, 256, 1024)]
OPTIMIZER = [(2, 1024), (8, 256), (8, 512), (24, 128), (24, 256), (128, 64), (128, 128)]
TRAINING = [(2, 256), (8, 128), (24, 64), (24, 128), (128, 64)]
COLOURS = {64: "#56B4E9", 128: "#0072B2", 256: "#009E73", 512: "#E69F00", 1024: "#D55E00"}

Step = Callable[[], object]
Row = dict[str, Any]


def pairs(plain: Step, smoothed: Step, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, one after the other; every other round the other way round."""

    def seconds(step: Step) -> float:
        start = time.perf_counter()
        jax.block_until_ready(step())
        return time.perf_counter() - start

    seconds(plain), seconds(smoothed)
    times: tuple[list[float], list[float]] = [], []
    for turn in range(rounds):
        for k in (0, 1) if turn % 2 else (1, 0):
            times[k].append(seconds((plain, smoothed)[k]))
    return times


def compiled(fn: Callable[..., Any], *args: Any, donate: Sequence[int] = ()) -> tuple[Any, float]:
    """The program, and how long it took to compile."""
    start = time.perf_counter()
    program = jax.jit(fn, donate_argnums=donate).lower(*args).compile()
    return program, time.perf_counter() - start


def summary(times: tuple[list[float], list[float]], programs: Sequence[tuple[Any, float]]) -> Row:
    """Medians, and the quartiles of the ratios of pairs."""
    ratios = [smoothed / plain for plain, smoothed in zip(*times, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ms": [round(1e3 * statistics.median(some), 3) for some in times],
        "ratio": round(median, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "compile_s": [round(seconds, 2) for _, seconds in programs],
        "temp_bytes": [program.memory_analysis().temp_size_in_bytes for program, _ in programs],
    }


def stencil(layers: int, width: int, rounds: int) -> Row:
    """The transformation alone."""
    updates = {"layers": jnp.ones((layers, width, width))}
    tx = ds.smooth_over_depth(0.1, depth=ds.Depth.from_rules({"layers": 0}))
    state = tx.init(updates)
    programs = [
        compiled(
            lambda updates, state: (jax.tree.map(lambda u: 0.9 * u, updates), state), updates, state
        ),
        compiled(tx.update, updates, state),
    ]
    repeats = max(1, 2**21 // updates["layers"].size)  # short steps are timed several at once

    def steps(program: Any) -> Step:
        return lambda: [program(updates, state)[0] for _ in range(repeats)]

    row = summary(pairs(*(steps(program) for program, _ in programs), rounds), programs)
    return row | {"ms": [round(ms / repeats, 4) for ms in row["ms"]]}


def model_of(layers: int, width: int) -> tuple[Transformer, Any, jax.Array]:
    """A transformer, its parameters, and a batch of nanochat's proportion."""
    model = Transformer(layers, width)
    tokens = jnp.zeros((1, CONTEXT), jnp.int32)
    params = model.init(jax.random.key(0), tokens)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    batch = max(1, round(count * TOKENS_PER_PARAMETER / CONTEXT))
    return model, params, jax.random.randint(jax.random.key(1), (batch, CONTEXT), 0, 256)


def optimizers(model: Transformer, params: Any, tokens: jax.Array) -> list[Any]:
    """AdamW, and AdamW smoothed."""
    depth = ds.trace_depth(model.apply, params, tokens[:1])
    return [optax.adamw(1e-4), ds.adamw(1e-4, alpha=0.1, depth=depth)]


def repeated(program: Any, params: Any, state: Any, *rest: Any) -> Step:
    """A step whose results are the arguments of the next."""
    held = [jax.tree.map(jnp.copy, (params, state))]

    def step() -> object:
        held[0] = program(*held[0], *rest)
        return held[0]

    return step


def optimizer(layers: int, width: int, rounds: int) -> Row:
    """AdamW's step, with new parameters."""
    model, params, tokens = model_of(layers, width)
    grads = jax.tree.map(jnp.ones_like, params)
    programs, steps = [], []
    for tx in optimizers(model, params, tokens):

        def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        programs.append(compiled(step, params, state, grads, donate=(0, 1)))
        steps.append(repeated(programs[-1][0], params, state, grads))
    return summary(pairs(*steps, rounds), programs)


def training(layers: int, width: int, rounds: int) -> Row:
    """The whole step: forward, backward, AdamW."""
    model, params, tokens = model_of(layers, width)
    programs, steps = [], []

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        nexts = jnp.roll(tokens, -1, axis=1)
        logits = model.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, nexts).mean()

    for tx in optimizers(model, params, tokens):

        def step(params: Any, state: Any, tokens: jax.Array, tx: Any = tx) -> tuple[Any, Any]:
            grads = jax.grad(loss)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        programs.append(compiled(step, params, state, tokens, donate=(0, 1)))
        steps.append(repeated(programs[-1][0], params, state, tokens))
    row = summary(pairs(*steps, rounds), programs)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return row | {"parameters": count, "tokens": tokens.size}


PARTS: dict[str, tuple[Callable[[int, int, int], Row], list[tuple[int, int]]]] = {
    "stencil": (stencil, STENCIL),
    "optimizer": (optimizer, OPTIMIZER),
    "training": (training, TRAINING),
}


def table(rows: list[Row]) -> rich.table.Table:
    """The rows, for a terminal."""
    columns = ("part", "layers", "width", "ms without", "with", "ratio", "quartiles")
    shown = rich.table.Table(*columns, "compile s", "temp MB", box=None)
    for row in rows:
        low, high = row["quartiles"]
        shown.add_row(
            row["part"],
            str(row["layers"]),
            str(row["width"]),
            *(f"{ms:.3f}" for ms in row["ms"]),
            f"{row['ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
            " → ".join(f"{seconds:.1f}" for seconds in row["compile_s"]),
            " → ".join(f"{size / 1e6:.1f}" for size in row["temp_bytes"]),
        )
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown


def plot(rows: list[Row], device: str) -> plt.Figure:
    """Ratios against the number of layers, a line for each width."""
    figure, axes = plt.subplots(1, len(PARTS), figsize=(12, 3.6), layout="constrained")
    titles = {
        "stencil": "smoothing, against a scale\nof the same array",
        "optimizer": "AdamW's step, smoothed,\nagainst AdamW's",
        "training": "training step, smoothed,\nagainst plain",
    }
    for ax, part in zip(axes, PARTS, strict=True):
        ax.axhline(1, color="#999999", lw=1)
        for width, colour in COLOURS.items():
            ours = [row for row in rows if (row["part"], row["width"]) == (part, width)]
            if not ours:
                continue
            ratios = np.array([row["ratio"] for row in ours])
            ends = np.array([row["quartiles"] for row in ours]).T
            ax.errorbar(
                [row["layers"] for row in ours],
                ratios,
                np.abs(ends - ratios),
                color=colour,
                marker="o",
                ms=4,
                capsize=2,
                label=f"width {width}",
            )
        ax.set_xscale("log", base=2)
        ax.set(title=titles[part], xlabel="layers", ylabel="ratio of times")
        ax.set_xticks(sorted({row["layers"] for row in rows if row["part"] == part}))
        ax.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
        if ax.containers:
            ax.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Medians and quartiles of pairs, on {device}", fontsize=9)
    return figure


def main() -> None:
    """Times, prints, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="pairs for each figure")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds is {arguments.rounds}, but quartiles need 2 pairs at least")
    cases = [(part, *size) for part, (_, sizes) in PARTS.items() for size in sizes]
    rows = []
    for part, layers, width in tqdm.tqdm(cases, unit="case", leave=False):
        row = PARTS[part][0](layers, width, arguments.rounds)
        rows.append({"part": part, "layers": layers, "width": width, **row})
    results.write("speed", {"rounds": arguments.rounds, "rows": rows})
    rich.console.Console().print(table(rows))
    print("on", results.device())
    mpl.use("Agg")
    plot(rows, results.device()).savefig(results.DIRECTORY / "speed.png", dpi=150)


if __name__ == "__main__":
    main()
