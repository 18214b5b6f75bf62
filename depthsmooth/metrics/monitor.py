"""Metrics of the updates while training: kept in the optimizer's state, read from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.depth.layout import Layout, Where
from depthsmooth.depth.paths import leaves_of
from depthsmooth.mesh import AxisName
from depthsmooth.metrics.measured import By, check_measure
from depthsmooth.metrics.signal import (
    SignalSums,
    from_sums,
    no_sums,
    products_of_halves,
    with_halves,
)
from depthsmooth.metrics.updates import DepthMetrics, depth_metrics

T = TypeVar("T")


class MonitorDepthState(NamedTuple):
    """State of :func:`monitor_depth`.

    Attributes:
      count: number of updates made, an int32 scalar.
      depth_metrics: what was measured last, by name; zeros before the first update, for
        which :func:`~depthsmooth.read_metrics` gives NaN.
    """

    count: jax.Array  # type: ignore[assignment] # every tuple has a count()
    depth_metrics: dict[str, DepthMetrics]


def monitor_depth(
    depth: Layout,
    every: int | jax.Array = 1,
    *,
    name: str = "",
    by: By = "group",
    full: bool = False,
    signal: bool = False,
    where: Where | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures updates that pass through it, and changes nothing.

    What :func:`~depthsmooth.depth_metrics` measures is kept in the optimizer's state, where
    :func:`read_metrics` finds it. One before smoothing and one after show what smoothing does::

        optax.chain(
            optax.scale_by_adam(),
            ds.monitor_depth(depth, every=10, name="before"),
            ds.smooth_over_depth(0.1, depth=depth),
            ds.monitor_depth(depth, every=10, name="after"),
            optax.scale_by_learning_rate(3e-4),
        )

    Args:
      depth: where the layers are.
      every: updates from one measurement to the next, beginning with the first update. In between
        nothing is computed.
      name: what the names of groups are preceded by, which tells several monitors apart.
      by: as in :func:`~depthsmooth.depth_metrics`, like the others: what is measured.
      full: whether every layer is compared with every other.
      signal: whether to tell signal and noise apart, as :func:`~depthsmooth.depth_signal` does, by
        the two halves of each batch. The monitor comes first in a chain, which gets the mean of
        the two gradients, and ``update`` gets one of them: ``tx.update(gradients, state, params,
        half_gradients=first)``. What is told is a mean that forgets: of about the last 100
        measurements. It is wrong behind what changes gradients, such as clipping, and in
        ``optax.MultiSteps``, which gives the mean of several batches.
      where: which of the leaves that ``depth`` places count.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      A transformation with the state :class:`MonitorDepthState`.

    Raises:
      ValueError: if an argument is none of these; on ``init`` and ``update``, if a leaf does not
        fit its place.

    Example:
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.array([1.0, 1.0, -1.0])}
      >>> depth = ds.Depth.from_rules({"layers": 0})
      >>> tx = optax.chain(ds.monitor_depth(depth), optax.scale(-0.1))
      >>> updates, state = tx.update(params, tx.init(params))
      >>> ds.read_metrics(state)["layers"].cosines.tolist()
      [1.0, -1.0]
    """
    is_number = isinstance(every, int | np.integer) and not isinstance(every, bool)
    if not (is_number and every >= 1) and not isinstance(every, jax.Array):
        raise ValueError(f"every is {every!r}, but has to be a whole number of updates, 1 or more.")
    if not isinstance(name, str):
        raise ValueError(f"name is {name!r}, but has to be a string.")
    check_measure(depth, by)

    of_what: _OfWhat = {"by": by, "where": where, "axis_name": axis_name}

    def named(values: Mapping[str, T]) -> dict[str, T]:
        return {f"{name}/{key}" if name else key: value for key, value in values.items()}

    def measured(updates: optax.Updates) -> dict[str, DepthMetrics]:
        return named(depth_metrics(updates, depth, full=full, **of_what))

    def first(params: optax.Params) -> dict[str, DepthMetrics]:
        """Metrics of the structure that is kept."""
        whole, _ = products_of_halves(params, params, depth, **of_what) if signal else ({}, {})
        sums = {key: no_sums(products) for key, products in named(whole).items()}
        return _with(measured(params), sums)

    def summed(
        updates: optax.Updates, half: optax.Updates, state: MonitorDepthState
    ) -> dict[str, SignalSums]:
        whole, apart = map(named, products_of_halves(updates, half, depth, **of_what))
        return {
            key: with_halves(sums, state.count // every, whole[key], apart[key])
            for key, sums in _sums_of(state.depth_metrics).items()
        }

    # Not optax.snapshot, which takes types from the updates and fails under optax.tree.map_params;
    # nor optax.monitor, whose state is empty before the first update. Checkpoints would not fit.
    def init_fn(params: optax.Params) -> MonitorDepthState:
        metrics = optax.tree.zeros_like(jax.eval_shape(first, params))
        if not any(leaves_of(params)):
            metrics = jnp.zeros([])  # for optax.tree.map_params, which passes a tree of no leaves
        return MonitorDepthState(jnp.zeros([], jnp.int32), metrics)

    def update_fn(
        updates: optax.Updates,
        state: MonitorDepthState,
        params: optax.Params | None = None,
        *,
        half_gradients: optax.Updates | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, MonitorDepthState]:
        del params, extra_args
        count, before = state
        if signal and half_gradients is None:
            raise ValueError(
                "monitor_depth(signal=True) tells signal from noise by the two halves of a batch: "
                "give the gradient of one of them, tx.update(gradients, state, params, "
                "half_gradients=first), where gradients are the mean of both."
            )

        def measure() -> optax.OptState:
            sums = summed(updates, half_gradients, state) if signal else {}
            return optax.tree.cast_like(_with(measured(updates), sums), before)

        metrics = (
            measure()
            if is_number and every == 1
            else jax.lax.cond(count % every == 0, measure, lambda: before)
        )
        return updates, MonitorDepthState(optax.safe_increment(count), metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _OfWhat(TypedDict):
    """What is measured."""

    by: By
    where: Where | None
    axis_name: AxisName | None


def _with(
    metrics: Mapping[str, DepthMetrics], sums: Mapping[str, SignalSums]
) -> dict[str, DepthMetrics]:
    """Metrics as they are kept: sums are in the place of the signal that these will tell."""
    return {key: each._replace(signal=cast(Any, sums.get(key))) for key, each in metrics.items()}


def _sums_of(metrics: Mapping[str, DepthMetrics]) -> dict[str, SignalSums]:
    return {key: cast(SignalSums, each.signal) for key, each in metrics.items()}


def read_metrics(opt_state: optax.OptState) -> dict[str, DepthMetrics]:
    """What every :func:`monitor_depth` of an optimizer measured last.

    Args:
      opt_state: the state of an optimizer, however a monitor is nested in it (``optax.chain``,
        ``masked``, ``partition``, ``MultiSteps``, ``inject_hyperparams``), or what holds one: a
        ``TrainState``, an ``nnx.Optimizer``, or its ``nnx.state``; also as plain dictionaries, as
        a checkpoint may give it back.

    Returns:
      From the name of each group, or tensor, to its metrics; NaN before the first update. May be
      called in the jitted step or outside.

    Raises:
      ValueError: if there is no monitor, or two measure under the same name.

    Example:
      >>> import depthsmooth as ds
      >>> params, depth = {"layers": jnp.ones((3, 4))}, ds.Depth.from_rules({"layers": 0})
      >>> tx = optax.masked(ds.monitor_depth(depth), {"layers": True})
      >>> _, state = tx.update(params, tx.init(params))
      >>> ds.read_metrics(state)["layers"].norms.tolist()
      [2.0, 2.0, 2.0]
    """
    find = optax.tree.get_all_with_path
    counts = {path[:-1]: count for path, count in find(opt_state, "count")}
    metrics: dict[str, DepthMetrics] = {}
    for path, groups in find(opt_state, "depth_metrics"):
        if path[:-1] not in counts or not find(groups, "roughness"):
            continue  # the user's own
        if twice := metrics.keys() & groups.keys():
            raise ValueError(
                f"Two monitors measure {min(twice)!r}. Give each a name: monitor_depth(depth, "
                "name=...)."
            )
        metrics |= {key: _known(values, counts[path[:-1]]) for key, values in groups.items()}
    if not metrics:
        raise ValueError(
            "There is no monitor in this state: put monitor_depth(depth) into the chain that the "
            "optimizer is made of, and give its opt_state."
        )
    return metrics


def _known(measured: optax.OptState, count: jax.Array) -> DepthMetrics:
    """The metrics of a NamedTuple or a dictionary; NaN before the first update."""
    never = count == 0  # under vmap, one for each optimizer

    def known(value: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(never, range(never.ndim, value.ndim)), jnp.nan, value)

    kept = {field: optax.tree.get(measured, field) for field in DepthMetrics._fields}
    sums = kept.pop("signal")
    numbers: dict[str, Any] = {key: known(each) for key, each in kept.items() if each is not None}
    metrics = DepthMetrics(**numbers)
    if sums is None:
        return metrics
    tell = from_sums
    for _ in range(never.ndim):
        tell = jax.vmap(tell)
    arrays = (jnp.asarray(optax.tree.get(sums, field)) for field in SignalSums._fields)
    return metrics._replace(signal=jax.tree.map(known, tell(SignalSums(*arrays))))


def as_scalars(
    metrics: Mapping[str, DepthMetrics], *, layers: bool = False
) -> dict[str, jax.Array]:
    """Metrics as flat scalars, for a logger such as TensorBoard, Weights & Biases or clu.

    Args:
      metrics: from :func:`depth_metrics` or :func:`read_metrics`.
      layers: whether to give each layer's norm, and each pair's cosine, besides the scalars.

    Returns:
      From names like ``blocks/roughness``, or ``blocks/norms/07``, to scalars; ``blocks/share``,
      ``blocks/signal_cosine`` and ``blocks/noise_cosine`` of a monitor with ``signal=True``.

    Example:
      >>> import depthsmooth as ds
      >>> depth = ds.Depth.from_rules({"layers": 0})
      >>> metrics = ds.depth_metrics({"layers": jnp.ones((3, 4))}, depth)
      >>> {name: float(value) for name, value in ds.as_scalars(metrics).items()}
      {'layers/roughness': 0.0, 'layers/adjacent_cosine': 1.0, 'layers/mean_norm': 2.0}
      >>> list(ds.as_scalars(metrics, layers=True))[3:]
      ['layers/cosines/0', 'layers/cosines/1', 'layers/norms/0', 'layers/norms/1', 'layers/norms/2']
    """
    scalars = {}
    for name, measured in metrics.items():
        for field in ("roughness", "adjacent_cosine", "mean_norm"):
            scalars[f"{name}/{field}"] = getattr(measured, field)
        for field in ("share", "signal_cosine", "noise_cosine") if measured.signal else ():
            scalars[f"{name}/{field}"] = getattr(measured.signal, field).value
        for field in ("cosines", "norms") if layers else ():
            values = getattr(measured, field)
            width = len(str(len(measured.norms) - 1))
            scalars |= {f"{name}/{field}/{k:0{width}}": value for k, value in enumerate(values)}
    return scalars
