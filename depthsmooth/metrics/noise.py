"""How gradients of each layer differ between micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from depthsmooth.arrays.binding import layers_of
from depthsmooth.arrays.layers import upcast
from depthsmooth.arrays.norms import inner, ratio
from depthsmooth.depth.layout import Layout, Where
from depthsmooth.depth.leaves import shape_of
from depthsmooth.depth.paths import leaves_of, shown
from depthsmooth.mesh import AxisName, with_automatic_axes
from depthsmooth.metrics.measured import By, check_measure, of_all, places_of, tracks_of


class GradientNoise(NamedTuple):
    r"""How gradients of L layers differ between micro-batches.

    With :math:`g_{m\ell}` the gradient of layer :math:`\ell` on micro-batch m of M, and
    :math:`\bar g_\ell` their mean:

    Attributes:
      variance: :math:`\frac{1}{M-1} \sum_m \|g_{m\ell} - \bar g_\ell\|^2`, of shape ``(L,)``: the
        trace of the covariance, without bias.
      squared_norm: :math:`\|\bar g_\ell\|^2`, of shape ``(L,)``.
      noise_scale: variance divided by squared norm, of shape ``(L,)``: from 0, for gradients
        that are all the same. 0 where the mean is 0.
    """

    variance: jax.Array
    squared_norm: jax.Array
    noise_scale: jax.Array


def gradient_noise_over_depth(
    gradients: optax.Updates,
    depth: Layout,
    *,
    by: By = "group",
    where: Where | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, GradientNoise]:
    r"""How much the gradient of each layer differs between micro-batches.

    Args:
      gradients: of M micro-batches: each leaf has an axis of size M before those that it has in
        one gradient, as ``jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)`` gives.
      depth: where the layers are in one gradient.
      by: ``"group"`` or ``"tensor"``.
      where: which of the leaves that ``depth`` places count.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      From the name of each group, or tensor, to its :class:`GradientNoise`, in float32 at least.

    Raises:
      ValueError: if there are fewer than two micro-batches, leaves disagree in how many, or one
        does not fit its place.

    Example:
      >>> import depthsmooth as ds
      >>> gradients = {"layers": jnp.array([[1.0, 2.0], [3.0, 2.0]])}
      >>> noise = gradient_noise_over_depth(gradients, ds.Depth.from_rules({"layers": 0}))["layers"]
      >>> noise.variance.tolist(), noise.squared_norm.tolist(), noise.noise_scale.tolist()
      ([2.0, 0.0], [4.0, 4.0], [0.5, 0.0])

    References:
      The ratio is the simple noise scale of McCandlish, Kaplan, Amodei, `An Empirical Model of
      Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018 (equation 2.9), of each
      layer, in micro-batches.
    """
    check_measure(depth, by)
    check_micro_batches(gradients, at_least=2)
    measured = functools.partial(_noise_of, depth=depth, by=by, where=where, axis_name=axis_name)
    noise: dict[str, GradientNoise] = with_automatic_axes(measured, gradients)
    return noise


def check_micro_batches(gradients: optax.Updates, at_least: int) -> None:
    """Raises unless all leaves begin with an axis of as many micro-batches."""
    shapes = {path: shape_of(leaf) for path, leaf in leaves_of(gradients)[0]}
    most = max((shape[0] for shape in shapes.values() if shape), default=0)
    for path, shape in shapes.items():
        count, *_ = (*shape, 0)
        if count < at_least or count != most:
            raise ValueError(
                f"{shown(path, shape)} has the gradients of {count} micro-batches on its first "
                f"axis, but leaves have to have those of the same number, {at_least} or more, as "
                "jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches) gives."
            )


@functools.partial(jax.jit, static_argnames=("depth", "by", "where", "axis_name"))
def _noise_of(
    gradients: optax.Updates,
    depth: Layout,
    by: By,
    where: Where | None,
    axis_name: AxisName | None,
) -> dict[str, GradientNoise]:
    places = places_of(jax.tree.map(lambda leaf: leaf[0], gradients), depth, where)
    leaves = {path: upcast(leaf) for path, leaf in leaves_of(gradients)[0] if path in places}

    def squares_of(gradient: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        squares = {}
        for name, tracks in tracks_of(places, by).items():
            block = [layers_of(track, gradient, axis_name) for track in tracks]
            squares[name] = of_all(inner(block, block), places.groups[tracks[0].group])
        return squares

    mean = {path: leaf.mean(0) for path, leaf in leaves.items()}
    distances = jax.vmap(lambda one: squares_of(jax.tree.map(jnp.subtract, one, mean)))(leaves)
    noise = {}
    for name, square in squares_of(mean).items():
        variance = distances[name].sum(0) / (len(distances[name]) - 1)
        noise[name] = GradientNoise(variance, square, ratio(variance, square))
    return noise
