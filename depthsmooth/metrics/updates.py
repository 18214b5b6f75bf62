"""How alike the updates of neighbouring layers are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.arrays.binding import layers_of
from depthsmooth.arrays.gram import gram
from depthsmooth.arrays.halos import exchange
from depthsmooth.arrays.layers import Tensor
from depthsmooth.arrays.norms import inner, norms, ratio
from depthsmooth.arrays.shifts import apply
from depthsmooth.depth.layout import Depth, Layout, Where
from depthsmooth.depth.leaves import Track
from depthsmooth.depth.paths import leaves_of
from depthsmooth.mesh import AxisName, with_automatic_axes
from depthsmooth.metrics.measured import By, check_measure, of_all, places_of, tracks_of
from depthsmooth.metrics.signal import DepthSignal
from depthsmooth.operators.stencil import Stencil, exists, join


class DepthMetrics(NamedTuple):
    r"""How the updates of L layers differ from layer to layer.

    With :math:`u_\ell` the update of layer :math:`\ell`, a vector:

    Attributes:
      roughness: :math:`\sum_\ell \|u_{\ell+1} - u_\ell\|^2 / \sum_\ell \|u_\ell\|^2`: from 0, for
        what is the same in all layers, to 4; about 2 for updates that have nothing in common.
      adjacent_cosine: the mean of ``cosines``, from -1 to 1.
      mean_norm: the mean of ``norms``.
      cosines: :math:`\langle u_\ell, u_{\ell+1} \rangle / \|u_\ell\| \|u_{\ell+1}\|`, from -1 to 1,
        of shape ``(L - 1,)``.
      norms: :math:`\|u_\ell\|`, of shape ``(L,)``.
      similarity: the cosine of every layer with every other, of shape ``(L, L)``.
      spectrum: the power at each frequency over depth,
        :math:`p_k = \|\sum_\ell c_{k\ell} u_\ell\|^2` with the orthonormal cosines of the DCT-II,
        of shape ``(L,)``: first what is the same in all layers, last what alternates from one to
        the next. Its sum is :math:`\sum_\ell \|u_\ell\|^2`, and powers below about 1e-6 of that
        are rounding in float32. :func:`~depthsmooth.window` multiplies :math:`p_k` by the square
        of :math:`1 - \alpha + \alpha \cos(\pi k / L)`.
      signal: of gradients that :func:`~depthsmooth.monitor_depth` has seen in halves, what they
        share apart from noise.
    """

    roughness: jax.Array
    adjacent_cosine: jax.Array
    mean_norm: jax.Array
    cosines: jax.Array
    norms: jax.Array
    similarity: jax.Array | None = None
    spectrum: jax.Array | None = None
    signal: DepthSignal | None = None


def depth_metrics(
    updates: optax.Updates,
    depth: Layout,
    *,
    by: By = "group",
    full: bool = False,
    where: Where | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, DepthMetrics]:
    r"""How alike the updates of neighbouring layers are.

    Layers are vectors: of all the tensors of a block, or of one. Where layers are split over
    devices these send each other one layer and some norms. Layers that are masked count as 0 in
    arrays, and not at all in means; so do pairs of layers with one of them. The cosine with a
    layer whose update is 0 is taken to be 0.

    Args:
      updates: updates, gradients or parameters.
      depth: where the layers are.
      by: ``"group"`` or ``"tensor"``.
      full: whether every layer is also compared with every other, for ``similarity`` and
        ``spectrum``: a product of matrices for each tensor. Where layers are split over devices
        half of them pass each.
      where: which of the leaves that ``depth`` places count.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over. Every device
        gets the metrics of all.

    Returns:
      From the name of each group, or tensor, to its :class:`DepthMetrics`, in float32 at least.

    Raises:
      ValueError: if ``depth`` is none, or a leaf does not fit its place.

    Example:
      >>> depth = Depth.from_rules({"layers": 0})
      >>> metrics = depth_metrics({"layers": jnp.array([1.0, 1.0, -1.0])}, depth)["layers"]
      >>> round(float(metrics.roughness), 3), metrics.cosines.tolist(), metrics.norms.tolist()
      (1.333, [1.0, -1.0], [1.0, 1.0, 1.0])

    References:
      Roughness, mean cosine and mean norm are those of the replication's
      ``_block_update_metrics``: https://github.com/supergitty520/fe-e-transformer-research.
    """
    check_measure(depth, by)
    places = places_of(updates, depth, where)
    leaves = {path: leaf for path, leaf in leaves_of(updates)[0] if path in places}
    measured = functools.partial(_metrics_of, places=places, by=by, full=full, axis_name=axis_name)
    metrics: dict[str, DepthMetrics] = with_automatic_axes(measured, leaves)
    return metrics


@functools.partial(jax.jit, static_argnames=("places", "by", "full", "axis_name"))
def _metrics_of(
    leaves: Mapping[str, jax.Array],
    places: Depth,
    by: By,
    full: bool,
    axis_name: AxisName | None,
) -> dict[str, DepthMetrics]:
    metrics = {}
    for name, tracks in tracks_of(places, by).items():
        block = [layers_of(track, leaves, axis_name) for track in tracks]
        nexts, steps = zip(*map(_neighbours, block, tracks), strict=True)
        layers = places.groups[tracks[0].group]
        present = [set(track.present) for track in tracks]
        pairs = set.union(*({k for k in held if k + 1 in held} for held in present))
        sizes = of_all(norms(block), layers)
        cosines = ratio(of_all(inner(block, nexts), layers)[:-1], sizes[:-1] * sizes[1:])
        metrics[name] = DepthMetrics(
            roughness=ratio(inner(steps, steps).sum(), inner(block, block).sum()),
            adjacent_cosine=cosines.sum() / max(len(pairs), 1),
            mean_norm=sizes.sum() / len(set.union(*present)),
            cosines=cosines,
            norms=sizes,
        )
        if full:
            products = gram(block, layers)
            metrics[name] = metrics[name]._replace(
                similarity=ratio(products, sizes[:, None] * sizes), spectrum=spectrum(products)
            )
    return metrics


def _neighbours(tensor: Tensor, track: Track) -> tuple[Tensor, Tensor]:
    """For each layer the next, and how it differs from that; 0 for the last of a run."""
    there = [exists((1,), run).astype(float) for run in track.spans()]
    nexts, steps = (
        join([Stencil((0, 1), np.concatenate([own * last, last])) for last in there])
        for own in (0, -1)
    )
    halos = exchange(nexts, tensor)
    return apply(nexts, tensor, halos), apply(steps, tensor, halos)


def spectrum(products: jax.Array) -> jax.Array:
    r"""The power at each frequency over depth: :math:`p_k = \|\sum_\ell c_{k\ell} u_\ell\|^2`.

    From :math:`\langle u_i, u_j \rangle`, of shape ``(L, L)``, with the orthonormal cosines of the
    DCT-II, :math:`c_{k\ell} = \sqrt{(2 - \delta_{k0})/L} \cos(\pi k (\ell + 1/2) / L)`.

    Example:
      >>> spectrum(jnp.ones((4, 4))).round(6).tolist()
      [4.0, 0.0, 0.0, 0.0]
    """
    layers = len(products)
    frequencies = np.arange(layers)[:, None]
    cosines = np.cos(np.pi * frequencies * (np.arange(layers) + 0.5) / layers)
    cosines *= np.where(frequencies, np.sqrt(2 / layers), np.sqrt(1 / layers))
    waves = jnp.asarray(cosines, products.dtype)
    powers = jnp.einsum("ki,ij,kj->k", waves, products, waves, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(powers, 0)
