"""Metrics of the updates while training: kept in the optimizer's state, read from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.depth.layout import Layout, Where
from depthsmooth.depth.paths import leaves_of
from depthsmooth.mesh import AxisName
from depthsmooth.metrics.updates import By, DepthMetrics, check_measure, depth_metrics


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

    def measured(updates: optax.Updates) -> dict[str, DepthMetrics]:
        metrics = depth_metrics(updates, depth, by=by, full=full, where=where, axis_name=axis_name)
        return {f"{name}/{key}" if name else key: value for key, value in metrics.items()}

    # Not optax.snapshot, which takes types from the updates and fails under optax.tree.map_params;
    # nor optax.monitor, whose state is empty before the first update. Checkpoints would not fit.
    def init_fn(params: optax.Params) -> MonitorDepthState:
        metrics = optax.tree.zeros_like(jax.eval_shape(measured, params))
        if not any(leaves_of(params)):
            metrics = jnp.zeros([])  # for optax.tree.map_params, which passes a tree of no leaves
        return MonitorDepthState(jnp.zeros([], jnp.int32), metrics)

    def update_fn(
        updates: optax.Updates,
        state: MonitorDepthState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, MonitorDepthState]:
        del params, extra_args
        count, before = state

        def measure() -> optax.OptState:
            return optax.tree.cast_like(measured(updates), before)

        metrics = (
            measure()
            if is_number and every == 1
            else jax.lax.cond(count % every == 0, measure, lambda: before)
        )
        return updates, MonitorDepthState(optax.safe_increment(count), metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    return DepthMetrics(
        **{
            field: jnp.where(jnp.expand_dims(never, range(never.ndim, value.ndim)), jnp.nan, value)
            for field in DepthMetrics._fields
            if (value := optax.tree.get(measured, field)) is not None
        }
    )


def as_scalars(
    metrics: Mapping[str, DepthMetrics], *, layers: bool = False
) -> dict[str, jax.Array]:
    """Metrics as flat scalars, for a logger such as TensorBoard, Weights & Biases or clu.

    Args:
      metrics: from :func:`depth_metrics` or :func:`read_metrics`.
      layers: whether to give each layer's norm, and each pair's cosine, besides the scalars.

    Returns:
      From names like ``blocks/roughness``, or ``blocks/norms/07``, to scalars.

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
        for field in ("cosines", "norms") if layers else ():
            values = getattr(measured, field)
            width = len(str(len(measured.norms) - 1))
            scalars |= {f"{name}/{field}/{k:0{width}}": value for k, value in enumerate(values)}
    return scalars
