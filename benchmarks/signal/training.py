"""Signal, noise and curvature over depth at some times of a task's training."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthsmooth as ds
from benchmarks.quality.arms import Base, preconditioner
from benchmarks.quality.plan import ALPHAS
from benchmarks.quality.task import Task
from benchmarks.quality.training import optimizer

TENTHS = (0, 1, 3, 6, 10)
"""When it is measured: after so many tenths of the steps."""
MICRO_BATCHES, CURVED, DIRECTIONS = 64, 8, 4
"""Whose gradients are compared; whose curvature is measured; and along whose updates."""
PROBE = 0.5
"""The α whose change of an update is measured: that of any other is a multiple of it."""


def measure(task: Task, base: Base, rate: float, seed: int) -> list[dict[str, Any]]:
    """Trains as the benchmark does, and measures at each of ``TENTHS``.

    Returns:
      For each time ``tensors``, from names to the sums that cosines are made of (see
      :func:`sums_of`); ``predicted``, for each of ``ALPHAS``; and ``curved``, five products.
    """
    start, batches, examination = jax.random.split(jax.random.key(seed), 3)
    begin, stretch, examined = _programs(task, base, rate)
    params, state, own = begin(start)
    told = []
    for tenth in range(TENTHS[-1] + 1):
        if tenth in TENTHS:
            found = jax.device_get(examined(params, own, jax.random.fold_in(examination, tenth)))
            told.append({"tenth": tenth, **_as_numbers(*found)})
        if tenth < TENTHS[-1]:
            params, state, own = stretch(params, state, own, batches, np.int32(tenth))
    return told


@functools.lru_cache(1)
def _programs(task: Task, base: Base, rate: float) -> tuple[Any, Any, Any]:
    """The start, a tenth of the training, and the measurement after it: the same for all seeds."""
    steps = task.steps // TENTHS[-1]
    tx = optimizer(task, base, rate)
    # Beside the optimizer goes its preconditioner alone, whose updates are measured.
    directions = preconditioner(base, task.depth)

    def begin(key: jax.Array) -> Any:
        params = task.init(key)
        return params, tx.init(params), directions.init(params)

    def step(carry: Any, count: jax.Array, batches: jax.Array) -> tuple[Any, None]:
        params, state, own = carry
        gradients = jax.grad(task.loss)(params, jax.random.fold_in(batches, count))
        _, own = directions.update(gradients, own, params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state, own), None

    def stretch(params: Any, state: Any, own: Any, batches: jax.Array, tenth: jax.Array) -> Any:
        counts = tenth * steps + jnp.arange(steps)
        one = functools.partial(step, batches=batches)
        return jax.lax.scan(one, (params, state, own), counts)[0]

    def examined(params: Any, own: Any, key: jax.Array) -> Any:
        keys = jax.random.split(key, MICRO_BATCHES)
        gradients = jax.lax.map(functools.partial(jax.grad(task.loss), params), keys)
        tensors = ds.depth_signal(gradients, task.depth, by="tensor")
        [whole] = ds.depth_signal(gradients, task.depth).values()
        return tensors, whole, _curvature(task, directions, params, own, gradients, keys)

    return jax.jit(begin), jax.jit(stretch), jax.jit(examined)


def _curvature(
    task: Task,
    directions: optax.GradientTransformation,
    params: Any,
    own: Any,
    gradients: Any,
    keys: jax.Array,
) -> jax.Array:
    """Means over directions u, changed by d: ⟨μ,u⟩, ⟨μ,d⟩, ⟨u,Hu⟩, ⟨d,Hu⟩ and ⟨d,Hd⟩."""
    total = jax.tree.map(lambda leaf: leaf.sum(0), gradients)
    smooth = ds.smooth_over_depth(PROBE, depth=task.depth)

    def loss(params: Any) -> jax.Array:
        return jax.lax.map(functools.partial(task.loss, params), keys[-CURVED:]).mean()

    def along(direction: Any) -> Any:
        return jax.jvp(jax.grad(loss), (params,), (direction,))[1]

    def of_one(gradient: Any) -> jax.Array:
        others = jax.tree.map(lambda t, g: (t - g) / (MICRO_BATCHES - 1), total, gradient)
        update, _ = directions.update(gradient, own, params)
        update = task.depth.map(
            lambda path, leaf, place: jnp.zeros_like(leaf) if place is None else leaf, update
        )
        smoothed, _ = smooth.update(update, smooth.init(update))
        change = jax.tree.map(jnp.subtract, smoothed, update)
        curved, bent = along(update), along(change)
        pairs = (others, update), (others, change), (update, curved), (change, curved)
        return jnp.stack([optax.tree.vdot(*pair) for pair in (*pairs, (change, bent))])

    some = jax.tree.map(lambda leaf: leaf[:DIRECTIONS], gradients)
    return jax.lax.map(of_one, some).mean(0)


def _as_numbers(
    tensors: dict[str, ds.DepthSignal], whole: ds.DepthSignal, curved: np.ndarray
) -> dict[str, Any]:
    def rounded(values: Any) -> list[float]:
        return [float(f"{value:.5g}") for value in values]

    predicted = [predicted_efficiency(whole.signal, whole.noise, alpha) for alpha in ALPHAS]
    return {
        "tensors": {name: rounded(sums_of(each)) for name, each in tensors.items()},
        "predicted": rounded(predicted),
        "curved": rounded(curved),
    }


def sums_of(signal: ds.DepthSignal) -> list[float]:
    """What cosines and shares are made of, so that those of several tensors can be pooled.

    The sum of neighbours' products and that of their norms' products, of the signal and then of the
    noise; and both traces.
    """
    sums = []
    for products in (signal.signal, signal.noise):
        sizes = np.sqrt(np.diagonal(products).clip(0))
        sums += [np.trace(products, 1), (sizes[1:] * sizes[:-1]).sum()]
    return [float(each) for each in (*sums, np.trace(signal.signal), np.trace(signal.noise))]


def predicted_efficiency(signal: np.ndarray, noise: np.ndarray, alpha: float) -> float:
    r"""What the window would gain with equal curvature in all directions, and the best rate.

    With the window A: :math:`\frac{(\mathrm{tr} A S)^2}{\mathrm{tr} A (S + E) A^T}
    \frac{\mathrm{tr}(S + E)}{(\mathrm{tr} S)^2}`, from 1: it changes nothing.

    Example:
      >>> round(predicted_efficiency(np.ones((2, 2)), 9 * np.eye(2), 0.5), 3)
      1.429
    """
    window = np.asarray(ds.operator_matrix(ds.window(alpha), len(signal)))
    both = signal + noise
    gained = np.trace(window @ signal) ** 2 / np.trace(window @ both @ window.T)
    return float(gained * np.trace(both) / np.trace(signal) ** 2)


def curved_efficiency(products: np.ndarray, alpha: float) -> float:
    """The same with measured curvature: from the five products of :func:`measure`.

    Example:
      >>> curved_efficiency(np.array([1.0, 0.0, 1.0, 0.0, 0.0]), 0.5)
      1.0
    """
    slope, changed, own, mixed, bent = products
    share = alpha / PROBE
    numerator = (slope + share * changed) ** 2 / slope**2
    return float(numerator * own / (own + 2 * share * mixed + share**2 * bent))
