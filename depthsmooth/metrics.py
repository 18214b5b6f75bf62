"""How alike the updates of neighbouring layers are."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import optax

from depthsmooth.blocks import Tensor, inner, norms, ratio
from depthsmooth.finding import depth_of
from depthsmooth.layout import Depth, Where
from depthsmooth.mesh import AxisName
from depthsmooth.places import leaves_of
from depthsmooth.stencil import Stencil, apply, exists, join
from depthsmooth.track import Track


class DepthMetrics(NamedTuple):
    """How a group's updates differ from layer to layer: scalars.

    Attributes:
      roughness: from 0, for what is constant over depth, to 4.
      adjacent_cosine: the mean cosine between neighbours, from -1 to 1.
      mean_norm: the mean norm of a layer.
    """

    roughness: jax.Array
    adjacent_cosine: jax.Array
    mean_norm: jax.Array


def depth_metrics(
    updates: optax.Updates,
    depth: Depth,
    *,
    where: Where | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, DepthMetrics]:
    r"""How alike the updates of neighbouring layers are, for each depth group.

    With :math:`u_\ell` the vector of all tensors of layer :math:`\ell`,

    .. math::
        \text{roughness} = \frac{\sum_\ell \|u_{\ell+1} - u_\ell\|^2}{\sum_\ell \|u_\ell\|^2},
        \qquad \text{adjacent cosine} = \frac{1}{L-1} \sum_\ell
            \frac{\langle u_{\ell+1}, u_\ell \rangle}{\|u_{\ell+1}\| \|u_\ell\|}

    The cosine with a layer whose update is 0 counts as 0.

    Args:
      updates: updates, gradients or parameters.
      depth: where the layers are.
      where: which of the leaves that ``depth`` places count.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over. Every device
        gets the metrics of all.

    Returns:
      From the name of each group to its metrics, in float32 at least.

    Raises:
      ValueError: if ``depth`` is none, or a leaf does not fit its place.

    Example:
      >>> import jax.numpy as jnp
      >>> depth = Depth.from_rules({"layers": 0})
      >>> metrics = depth_metrics({"layers": jnp.array([1.0, 1.0, -1.0])}, depth)["layers"]
      >>> [round(float(value), 3) for value in metrics]
      [1.333, 0.0, 1.0]

    References:
      The replication's ``_block_update_metrics``:
      https://github.com/supergitty520/fe-e-transformer-research.
    """
    if not isinstance(depth, Depth):
        raise ValueError(
            f"depth is a {type(depth).__name__}, but has to be a Depth: the updates come first."
        )
    places = depth_of(updates, depth)
    places = places if where is None else places.select(where, updates)
    leaves = dict(leaves_of(updates)[0])
    groups: dict[str, list[Track]] = {}
    for track in places.tracks:
        groups.setdefault(track.group, []).append(track)
    metrics = {}
    for group, tracks in groups.items():
        block = [track.tensor(leaves, axis_name) for track in tracks]
        steps = [_along(-1, tensor, track) for tensor, track in zip(block, tracks, strict=True)]
        nexts = [_along(0, tensor, track) for tensor, track in zip(block, tracks, strict=True)]
        present = [{k for place in track.places for k in place.layers} for track in tracks]
        pairs = set.union(*({k for k in layers if k + 1 in layers} for layers in present))
        size, cosines = norms(block), ratio(inner(block, nexts), norms(block) * norms(nexts))
        metrics[group] = DepthMetrics(
            roughness=ratio(inner(steps, steps).sum(), inner(block, block).sum()),
            adjacent_cosine=cosines.sum() / max(len(pairs), 1),
            mean_norm=size.sum() / len(set.union(*present)),
        )
    return metrics


def _along(own: float, tensor: Tensor, track: Track) -> Tensor:
    """The next layer, plus ``own`` times the layer itself; 0 for the last of a run."""
    runs = []
    for run in track.runs:
        there = exists((1,), run).astype(float)
        runs.append(Stencil((0, 1), np.concatenate([own * there, there])))
    return tensor.of(
        apply(
            join(runs),
            tensor.arrays,
            tensor.axes,
            track.layers,
            shards=tensor.shards,
            axis_name=tensor.axis_name,
            wide=True,
        )
    )
