"""Metrics of the updates while training: kept in the optimizer's state, read from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.depth.layout import Depth, Where
from depthsmooth.depth.paths import leaves_of
from depthsmooth.mesh import AxisName
from depthsmooth.metrics.updates import By, DepthMetrics, check_measure, depth_metrics

MEASURED = "depth_metrics"
"""The field of a state that holds what was measured."""


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
    depth: Depth,
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
      >>> params = {"layers": jnp.array([1.0, 1.0, -1.0])}
      >>> tx = optax.chain(monitor_depth(Depth.from_rules({"layers": 0})), optax.scale(-0.1))
      >>> updates, state = tx.update(params, tx.init(params))
      >>> read_metrics(state)["layers"].cosines.tolist()
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

    def init_fn(params: optax.Params) -> MonitorDepthState:
        count = jnp.zeros([], jnp.int32)
        if not any(leaves_of(params)):
            # optax.tree.map_params asks what the state of no parameters begins with.
            return MonitorDepthState(count, jnp.zeros([]))  # type: ignore[arg-type]
        shapes = jax.eval_shape(measured, params)
        return MonitorDepthState(
            count, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        )

    def update_fn(
        updates: optax.Updates,
        state: MonitorDepthState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, MonitorDepthState]:
        del params, extra_args
        count, before = state

        def measure() -> dict[str, DepthMetrics]:
            cast = jax.tree.map(lambda new, old: new.astype(old.dtype), measured(updates), before)
            metrics: dict[str, DepthMetrics] = cast
            return metrics

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
      >>> params = {"layers": jnp.ones((3, 4))}
      >>> tx = optax.masked(monitor_depth(Depth.from_rules({"layers": 0})), {"layers": True})
      >>> _, state = tx.update(params, tx.init(params))
      >>> read_metrics(state)["layers"].norms.tolist()
      [2.0, 2.0, 2.0]
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        leaves[keys[:-1] if keys[-1:] == ("value",) else keys] = leaf  # of an nnx.Variable
    fields: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for keys, leaf in leaves.items():
        if keys[-3:-2] == (MEASURED,) and keys[-1] in DepthMetrics._fields:
            count = leaves[(*keys[:-3], "count")]
            # Of several optimizers under vmap each has a count.
            never = jnp.expand_dims(count == 0, range(count.ndim, leaf.ndim))
            fields.setdefault(keys[:-1], {})[keys[-1]] = jnp.where(never, jnp.nan, leaf)
    if not fields:
        raise ValueError(
            "There is no monitor in this state: put monitor_depth(depth) into the chain that the "
            "optimizer is made of, and give its opt_state."
        )
    metrics: dict[str, DepthMetrics] = {}
    for (*_, name), values in fields.items():
        if name in metrics:
            raise ValueError(
                f"Two monitors measure {name!r}. Give each a name: monitor_depth(depth, name=...)."
            )
        metrics[name] = DepthMetrics(**values)
    return metrics


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
      >>> metrics = depth_metrics({"layers": jnp.ones((3, 4))}, Depth.from_rules({"layers": 0}))
      >>> {name: float(value) for name, value in as_scalars(metrics).items()}
      {'layers/roughness': 0.0, 'layers/adjacent_cosine': 1.0, 'layers/mean_norm': 2.0}
      >>> list(as_scalars(metrics, layers=True))[3:]
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
