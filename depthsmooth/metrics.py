"""How alike neighbouring layers are: in their updates, in what they do to data, in their noise."""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.blocks import Tensor, inner, norms, ratio
from depthsmooth.gram import gram, spectrum
from depthsmooth.layers import widened
from depthsmooth.layout import Depth, Where
from depthsmooth.mesh import AxisName, with_automatic_axes
from depthsmooth.places import leaves_of, shape_of, shown
from depthsmooth.stencil import Stencil, apply, exchange, exists, join
from depthsmooth.track import Track
from depthsmooth.transform import depth_in

By = Literal["group", "tensor"]
"""What is measured: the blocks of each group, or each of their tensors by itself."""


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
    """

    roughness: jax.Array
    adjacent_cosine: jax.Array
    mean_norm: jax.Array
    cosines: jax.Array
    norms: jax.Array
    similarity: jax.Array | None = None
    spectrum: jax.Array | None = None


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


def depth_metrics(
    updates: optax.Updates,
    depth: Depth,
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
    places = _places(updates, depth, where)
    leaves = {path: leaf for path, leaf in leaves_of(updates)[0] if path in places}
    measured = functools.partial(_metrics_of, places=places, by=by, full=full, axis_name=axis_name)
    metrics: dict[str, DepthMetrics] = with_automatic_axes(measured, leaves)
    return metrics


def gradient_noise_over_depth(
    gradients: optax.Updates,
    depth: Depth,
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
      >>> gradients = {"layers": jnp.array([[1.0, 2.0], [3.0, 2.0]])}
      >>> noise = gradient_noise_over_depth(gradients, Depth.from_rules({"layers": 0}))["layers"]
      >>> noise.variance.tolist(), noise.squared_norm.tolist(), noise.noise_scale.tolist()
      ([2.0, 0.0], [4.0, 4.0], [0.5, 0.0])

    References:
      The ratio is the simple noise scale of McCandlish, Kaplan, Amodei, `An Empirical Model of
      Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018 (equation 2.9), of each
      layer, in micro-batches.
    """
    check_measure(depth, by)
    shapes = {path: shape_of(leaf) for path, leaf in leaves_of(gradients)[0]}
    most = max((shape[0] for shape in shapes.values() if shape), default=0)
    for path, shape in shapes.items():
        count, *_ = (*shape, 0)
        if count < 2 or count != most:
            raise ValueError(
                f"{shown(path, shape)} has the gradients of {count} micro-batches on its first "
                "axis, but leaves have to have those of the same number, two or more, as "
                "jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches) gives."
            )
    measured = functools.partial(_noise_of, depth=depth, by=by, where=where, axis_name=axis_name)
    noise: dict[str, GradientNoise] = with_automatic_axes(measured, gradients)
    return noise


def line_shape_score(states: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike]) -> jax.Array:
    r"""How far from straight the paths of hidden states through the layers are.

    .. math::
        \text{score} = L \Big/ \Big\| \sum_{\ell=1}^{L}
            \frac{x_\ell - x_{\ell-1}}{\|x_\ell - x_{\ell-1}\|} \Big\|

    Args:
      states: hidden states before the first layer and after each, of shape
        ``(L + 1, ..., features)``.

    Returns:
      Array of shape ``(...)``, from 1, for states that lie on a line in their order. A layer that
      changes nothing counts as a step of no direction; where the directions cancel, inf.

    Raises:
      ValueError: if there are no two states, or they have no axis for features.

    Example:
      >>> round(float(line_shape_score([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])), 4)
      1.4142

    References:
      Gai, Zhang, `Deep Residual Networks Learn the Geodesic Curve in the
      Wasserstein Space <https://arxiv.org/abs/2102.09235>`_, 2021. Aubry, Meng, Sugolov, Papyan,
      `Transformer Block Coupling and its Correlation with Generalization in LLMs
      <https://arxiv.org/abs/2407.07810>`_, 2025.
    """
    directions = _directions(states, 1)
    score: jax.Array = len(directions) / jnp.linalg.norm(directions.sum(0), axis=-1)
    return score


def residual_alignment(states: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike]) -> jax.Array:
    r"""The cosine between what a layer adds to hidden states and what the next one adds.

    .. math::
        a_\ell = \frac{\langle r_\ell, r_{\ell+1} \rangle}{\|r_\ell\| \|r_{\ell+1}\|},
        \qquad r_\ell = x_\ell - x_{\ell-1}

    Args:
      states: hidden states before the first layer and after each, of shape
        ``(L + 1, ..., features)``.

    Returns:
      Array of shape ``(L - 1, ...)``, from -1 to 1; 0 where a layer changes nothing.

    Raises:
      ValueError: if there are no three states, or they have no axis for features.

    Example:
      >>> residual_alignment([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0], [3.0, 8.0]]).tolist()
      [0.0, 1.0]

    References:
      Li, Papyan, `Residual Alignment: Uncovering the Mechanisms of Residual Networks
      <https://arxiv.org/abs/2401.09018>`_, 2023.
    """
    directions = _directions(states, 2)
    return (directions[1:] * directions[:-1]).sum(-1)


def _directions(
    states: jax.typing.ArrayLike | Sequence[jax.typing.ArrayLike], layers: int
) -> jax.Array:
    """What each layer adds, as a vector of norm 1 or 0."""
    path = widened(jnp.asarray(states))
    if path.ndim < 2 or len(path) <= layers:
        raise ValueError(
            f"The states are of shape {path.shape}, but have to be of (L + 1, ..., features), "
            f"from before the first layer to after the last, of at least {layers} layers."
        )
    steps = path[1:] - path[:-1]
    return ratio(steps, jnp.linalg.norm(steps, axis=-1, keepdims=True))


def check_measure(depth: Depth, by: By) -> None:
    """Raises unless these say what can be measured."""
    if not isinstance(depth, Depth):
        raise ValueError(
            f"depth is a {type(depth).__name__}, but has to be a Depth, such as "
            "trace_depth(loss_fn, params, batch) gives. Updates come before it."
        )
    if by not in ("group", "tensor"):
        raise ValueError(f"by is {by!r}, but has to be 'group' or 'tensor'.")


def _places(updates: optax.Updates, depth: Depth, where: Where | None) -> Depth:
    places = depth_in(updates, depth)
    return places if where is None else places.select(where, updates)


def _tracks(places: Depth, by: By) -> dict[str, list[Track]]:
    """What is measured together, by name."""
    tensors = collections.Counter(track.tensor_name for track in places.tracks)
    together: dict[str, list[Track]] = {}
    for track in places.tracks:
        name = track.group
        if by == "tensor":
            several = tensors[track.tensor_name] > 1
            name = f"{track.group}/{track.tensor_name}" if several else track.tensor_name
        together.setdefault(name, []).append(track)
    return together


@functools.partial(jax.jit, static_argnames=("places", "by", "full", "axis_name"))
def _metrics_of(
    leaves: Mapping[str, jax.Array],
    places: Depth,
    by: By,
    full: bool,
    axis_name: AxisName | None,
) -> dict[str, DepthMetrics]:
    metrics = {}
    for name, tracks in _tracks(places, by).items():
        block = [track.tensor(leaves, axis_name) for track in tracks]
        nexts, steps = zip(*map(_neighbours, block, tracks), strict=True)
        layers = places.groups[tracks[0].group]
        present = [set(track.present) for track in tracks]
        pairs = set.union(*({k for k in held if k + 1 in held} for held in present))
        sizes = _of_all(norms(block), layers)
        cosines = ratio(_of_all(inner(block, nexts), layers)[:-1], sizes[:-1] * sizes[1:])
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


@functools.partial(jax.jit, static_argnames=("depth", "by", "where", "axis_name"))
def _noise_of(
    gradients: optax.Updates,
    depth: Depth,
    by: By,
    where: Where | None,
    axis_name: AxisName | None,
) -> dict[str, GradientNoise]:
    places = _places(jax.tree.map(lambda leaf: leaf[0], gradients), depth, where)
    leaves = {path: widened(leaf) for path, leaf in leaves_of(gradients)[0] if path in places}

    def squares_of(gradient: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        squares = {}
        for name, tracks in _tracks(places, by).items():
            block = [track.tensor(gradient, axis_name) for track in tracks]
            squares[name] = _of_all(inner(block, block), places.groups[tracks[0].group])
        return squares

    mean = {path: leaf.mean(0) for path, leaf in leaves.items()}
    distances = jax.vmap(lambda one: squares_of(jax.tree.map(jnp.subtract, one, mean)))(leaves)
    noise = {}
    for name, square in squares_of(mean).items():
        variance = distances[name].sum(0) / (len(distances[name]) - 1)
        noise[name] = GradientNoise(variance, square, ratio(variance, square))
    return noise


def _of_all(values: jax.Array, layers: int) -> jax.Array:
    """Values of the first layers, and 0 for those after them."""
    return jnp.pad(values, (0, layers - len(values)))


def _neighbours(tensor: Tensor, track: Track) -> tuple[Tensor, Tensor]:
    """For each layer the next, and how it differs from that; 0 for the last of a run."""
    there = [exists((1,), run).astype(float) for run in track.runs]
    nexts, steps = (
        join([Stencil((0, 1), np.concatenate([own * last, last])) for last in there])
        for own in (0, -1)
    )
    arrays, axes, shards, axis_name = tensor.arrays, tensor.axes, tensor.shards, tensor.axis_name
    halos = exchange(nexts, arrays, axes, track.layers, shards=shards, axis_name=axis_name)

    def mixed(operator: Stencil) -> Tensor:
        return tensor.of(
            apply(
                operator,
                arrays,
                axes,
                track.layers,
                shards=shards,
                axis_name=axis_name,
                halos=halos,
                wide=True,
            )
        )

    return mixed(nexts), mixed(steps)
