"""One run: a seed, an arm and a learning rate; compiled once for each kind of arm."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import depthsmooth as ds
from benchmarks.quality.arms import Arm, Base, preconditioner
from benchmarks.quality.task import EVALUATIONS, TUNING, Task

MICRO_BATCHES = 8
"""Whose gradients are compared."""

Curves = dict[str, jax.Array]


def train(
    task: Task, arm: Arm, rate: float, seed: int, *, observed: bool = False
) -> tuple[dict[str, np.ndarray], float]:
    """Trains, and gives what was measured in each tenth of the steps.

    Args:
      task: what is trained.
      arm: how.
      rate: what the task's learning rate is multiplied by.
      seed: of parameters, batches and examination, the same for all arms.
      observed: whether updates, hidden states and the noise of gradients are measured too.

    Returns:
      Arrays of shape ``(EVALUATIONS,)``, ``train_loss`` (the mean since the last) and what
      the task examines; and the seconds that it took, without compilation.
    """
    program = _program(task, arm.kind, observed)
    [layers] = task.depth.groups.values()
    matrix = arm.matrix(layers, seed)
    numbers = np.int32(seed), np.float32(arm.alpha), matrix, np.float32(rate), np.float32(arm.own)
    began = time.perf_counter()
    curves = jax.device_get(program(*numbers))
    return curves, time.perf_counter() - began


@functools.lru_cache(2)
def _program(task: Task, kind: Arm, observed: bool) -> Callable[..., Curves]:
    [layers] = task.depth.groups.values()
    number = jax.ShapeDtypeStruct((), np.float32)
    matrix = jax.ShapeDtypeStruct((layers, layers), np.float32)
    seed = jax.ShapeDtypeStruct((), np.int32)
    run = jax.jit(program(task, kind, observed))
    compiled: Callable[..., Curves] = run.lower(seed, number, matrix, number, number).compile()
    return compiled


def program(task: Task, kind: Arm, observed: bool = False) -> Callable[..., Curves]:
    """A function of the seed, of alpha, of the operator's matrix, and of the two rates."""

    def run(
        seed: jax.Array, alpha: jax.Array, matrix: jax.Array, rate: jax.Array, own: jax.Array
    ) -> Curves:
        start, batches, examination = jax.random.split(jax.random.key(seed), 3)
        part = (seed >= TUNING).astype(int)
        mixing = kind.mixing(task.depth, alpha, matrix)
        scaling = kind.scaling(task.depth, own)
        tx = optimizer(task, kind.base, rate, mixing, scaling, observed)

        def step(carry: Any, count: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            key = jax.random.fold_in(batches, count)
            loss, gradients = jax.value_and_grad(task.loss)(params, key)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        def stretch(carry: Any, counts: jax.Array) -> tuple[Any, Curves]:
            carry, losses = jax.lax.scan(step, carry, counts)
            params, state = carry
            measured = {**task.evaluate(params, examination, part), "train_loss": losses.mean()}
            if observed:
                measured |= _observed(task, params, state, examination)
            return carry, measured

        params = task.init(start)
        counts = np.arange(task.steps).reshape(EVALUATIONS, -1)
        _, curves = jax.lax.scan(stretch, (params, tx.init(params)), counts)
        return curves

    return run


def optimizer(
    task: Task,
    base: Base,
    rate: jax.typing.ArrayLike,
    mixing: optax.GradientTransformation | None = None,
    scaling: optax.GradientTransformation | None = None,
    observed: bool = False,
) -> optax.GradientTransformation:
    """A base optimizer at a rate, with what an arm puts behind it."""

    def monitor(name: str) -> optax.GradientTransformation:
        every = task.steps // EVALUATIONS
        return ds.monitor_depth(task.depth, every, name=name) if observed else optax.identity()

    return optax.chain(
        task.before(),
        preconditioner(base, task.depth),
        monitor("before"),
        mixing or optax.identity(),
        monitor("after"),
        scaling or optax.identity(),
        optax.add_decayed_weights(0.0 if base == "sgd" else task.decay),
        optax.scale_by_learning_rate(lambda count: rate * task.rates[base] * task.schedule(count)),
    )


def _observed(task: Task, params: Any, state: Any, key: jax.Array) -> Curves:
    """Of the first update since the last, of micro-batches' gradients, and of hidden states."""
    scalars = ds.as_scalars(ds.read_metrics(state))
    keys = jax.random.split(key, MICRO_BATCHES)
    gradients = jax.lax.map(functools.partial(jax.grad(task.loss), params), keys)
    [noise] = ds.gradient_noise_over_depth(gradients, task.depth).values()
    states = task.states(params, key)
    return {
        **{f"{name.split('/')[-1]}_{name.split('/')[0]}": one for name, one in scalars.items()},
        "gradient_variance": noise.variance.sum(),
        "gradient_noise_scale": noise.variance.sum() / noise.squared_norm.sum(),
        "line_shape_score": ds.line_shape_score(states).mean(),
        "residual_alignment": ds.residual_alignment(states).mean(),
    }
