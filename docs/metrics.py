"""Draws metrics.png: what smoothing does to the updates of the demo's model, in one run.

``python docs/metrics.py`` trains it, with a monitor before smoothing and one after.
"""

import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm

import depthsmooth as ds
from depthsmooth import plot
from depthsmooth.demo import __main__ as demo
from depthsmooth.demo import text
from depthsmooth.demo.training import Config, Experiment

ALPHA, EVERY = 0.2, 10


def experiment() -> Experiment:
    """The demo, as it is without options."""
    given = demo.parser().parse_args([])
    corpus = text.load(None, given.context, given.out)
    sizes = given.layers, given.width, given.steps, given.batch, given.context
    return Experiment(Config(*sizes, given.learning_rate, corpus.digest), corpus)


def optimizer(demo: Experiment) -> optax.GradientTransformation:
    """AdamW, smoothed, and measured before and after that."""

    def monitor(name: str) -> optax.GradientTransformation:
        return ds.monitor_depth(demo.depth, EVERY, name=name, full=True)

    return optax.chain(
        demo.preconditioner,
        monitor("before"),
        ds.smooth_over_depth(ALPHA, depth=demo.depth),
        monitor("after"),
        optax.add_decayed_weights(0.1, mask=demo.depth.decay_mask),
        optax.scale_by_learning_rate(demo.config.learning_rate / 4),
    )


def train(demo: Experiment) -> dict[str, ds.DepthMetrics]:
    """What each monitor measured, of shape (times, ...)."""
    tx, config = optimizer(demo), demo.config

    @jax.jit
    def step(params, state, windows):
        gradients = jax.grad(demo.loss)(params, windows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = demo.init(0)
    state = tx.init(params)
    measured = []
    batches = demo.text.batches(config.steps, config.batch, config.context, 0)
    for count, windows in enumerate(tqdm.tqdm(batches, unit="step")):
        params, state = step(params, state, windows)
        if count % EVERY == 0:
            measured.append(ds.read_metrics(state))
    over_time = jax.tree.map(lambda *values: np.stack(values), *measured)
    by_name = {name.split("/")[0]: metrics for name, metrics in over_time.items()}
    return {name: by_name[name] for name in ("before", "after")}


def main() -> None:
    """Trains, draws and writes."""
    demo = experiment()
    metrics = train(demo)
    before, after = metrics["before"], metrics["after"]
    layers = before.norms.shape[1]
    steps = EVERY * np.arange(len(before.norms))
    figure = plt.figure(figsize=(12, 12.5), layout="constrained")
    rows = [part.subplots(1, 2) for part in figure.subfigures(3, 1)]
    plot.depth(demo.depth, ax=rows[0][0]).set_title("What is smoothed")
    plot.gain({f"window, α = {ALPHA}": ds.window(ALPHA)}, layers, ax=rows[0][1])
    rows[0][1].set_title("What smoothing makes of each frequency")
    titles = "Neighbouring layers, before smoothing", "… and after"
    for ax, title, one in zip(rows[1], titles, (before, after), strict=True):
        plot.similarity_over_time(steps, one.cosines, limit=0.4, ax=ax).set_title(title)
    plot.similarity(after.similarity.mean(0), limit=0.4, ax=rows[2][0])
    rows[2][0].set_title("All layers, after smoothing (mean)")
    powers = {name: one.spectrum.mean(0) for name, one in metrics.items()}
    plot.spectrum(powers, ax=rows[2][1]).set_title("Power of the updates (mean)")
    figure.savefig(pathlib.Path(__file__).with_name("metrics.png"), dpi=100)
    for name, one in metrics.items():
        scalars = ds.as_scalars({name: jax.tree.map(lambda values: values.mean(0), one)})
        print({key: round(float(value), 3) for key, value in scalars.items()})


if __name__ == "__main__":
    main()
