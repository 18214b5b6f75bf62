"""What gradients of neighbouring layers share: their signal, apart from their noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from depthsmooth.arrays.binding import layers_of
from depthsmooth.arrays.gram import gram
from depthsmooth.arrays.layers import upcast
from depthsmooth.arrays.norms import ratio
from depthsmooth.depth.layout import Depth, Layout, Where
from depthsmooth.depth.paths import leaves_of, shown
from depthsmooth.mesh import AxisName, with_automatic_axes
from depthsmooth.metrics.measured import By, check_measure, places_of, tracks_of
from depthsmooth.metrics.noise import check_micro_batches

GROUPS, DECAY = 8, 0.99
"""Of a stream: the parts that a jackknife leaves out in turn, and how fast measurements fade."""


class Estimate(NamedTuple):
    """A number that is known from samples.

    Attributes:
      value: the estimate.
      low: the lower end of its 95 % interval, by the jackknife.
      high: the upper end.
    """

    value: jax.Array
    low: jax.Array
    high: jax.Array


class DepthSignal(NamedTuple):
    r"""What the gradients of L layers share, and what their noise does.

    The gradient of layer :math:`\ell` on a micro-batch is :math:`g_\ell = \mu_\ell +
    \varepsilon_\ell`: what it is on average, the signal, and the noise of this micro-batch.

    Attributes:
      signal: :math:`S_{\ell m} = \langle \mu_\ell, \mu_m \rangle`, of shape ``(L, L)``, without
        bias: what is small may come out below 0.
      noise: :math:`E_{\ell m} = \mathbb{E} \langle \varepsilon_\ell, \varepsilon_m \rangle`, of
        shape ``(L, L)``, without bias.
      share: :math:`\mathrm{tr} S / \mathrm{tr}(S + E)`: the signal's share of the squared norm of
        the gradient on one micro-batch.
      signal_cosine: :math:`\sum_\ell S_{\ell,\ell+1} / \sum_\ell \sqrt{S_{\ell\ell}
        S_{\ell+1,\ell+1}}`: the mean cosine of neighbours' signals, where pairs count by their
        norms. 0 where no signal is seen.
      noise_cosine: the same of the noise.
    """

    signal: jax.Array
    noise: jax.Array
    share: Estimate
    signal_cosine: Estimate
    noise_cosine: Estimate


def depth_signal(
    gradients: optax.Updates,
    depth: Layout,
    *,
    by: By = "group",
    where: Where | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, DepthSignal]:
    r"""What the gradients of neighbouring layers share, apart from the noise of micro-batches.

    The gradients :math:`g_{k\ell}` of K micro-batches have a mean :math:`\bar g_\ell`. With
    :math:`D_{\ell m} = \frac{1}{K-1} \sum_k \langle g_{k\ell} - \bar g_\ell, g_{km} - \bar g_m
    \rangle`,

    .. math::
        E = D, \qquad S_{\ell m} = \langle \bar g_\ell, \bar g_m \rangle - D_{\ell m} / K.

    This tells whether neighbours share anything. It does not tell whether smoothing helps: see
    RESULTS.md.

    Args:
      gradients: of K micro-batches at the same parameters: each leaf has an axis of size K before
        those that it has in one gradient, as ``jax.vmap(jax.grad(loss), in_axes=(None, 0))(params,
        batches)`` gives.
      depth: where the layers are in one gradient.
      by: ``"group"``, or ``"tensor"`` for each tensor of a block by itself: biases may share what
        kernels do not.
      where: which of the leaves that ``depth`` places count.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      From the name of each group, or tensor, to its :class:`DepthSignal`, in float32 at least.

    Raises:
      ValueError: if there are fewer than three micro-batches, leaves disagree in how many, or one
        does not fit its place.

    Example:
      >>> import depthsmooth as ds
      >>> signal = jnp.array([[4.0, 0.0], [4.0, 0.0]])  # the same in both layers
      >>> noise = jax.random.normal(jax.random.key(0), (32, 2, 2))  # of its own in each layer
      >>> told = ds.depth_signal({"w": signal + noise}, ds.Depth.from_rules({"w": 0}))["w"]
      >>> [round(float(x.value), 1) for x in (told.share, told.signal_cosine, told.noise_cosine)]
      [0.9, 1.0, 0.1]

    References:
      Intervals: Miller, The Jackknife: A Review, Biometrika 61, 1974; deleted are micro-batches.
    """
    check_measure(depth, by)
    check_micro_batches(gradients, at_least=3)
    measured = functools.partial(_signals_of, depth=depth, by=by, where=where, axis_name=axis_name)
    signals: dict[str, DepthSignal] = with_automatic_axes(measured, gradients)
    return signals


@functools.partial(jax.jit, static_argnames=("depth", "by", "where", "axis_name"))
def _signals_of(
    gradients: optax.Updates,
    depth: Layout,
    by: By,
    where: Where | None,
    axis_name: AxisName | None,
) -> dict[str, DepthSignal]:
    places = places_of(jax.tree.map(lambda leaf: leaf[0], gradients), depth, where)
    leaves = {path: upcast(leaf) for path, leaf in leaves_of(gradients)[0] if path in places}
    if not leaves:
        return {}
    products = products_of(places, by, axis_name)
    mean = {path: leaf.mean(0) for path, leaf in leaves.items()}
    count = len(next(iter(leaves.values())))

    def of_one(gradient: Mapping[str, jax.Array]) -> tuple[Products, Products]:
        """The products of what a micro-batch is off by, and of the mean of all others."""
        apart = jax.tree.map(jnp.subtract, gradient, mean)
        others = jax.tree.map(lambda m, a: m - a / (count - 1), mean, apart)
        return products(apart), products(others)

    apart, others = jax.lax.map(of_one, leaves)
    return {
        name: _from_micro_batches(whole, apart[name], others[name])
        for name, whole in products(mean).items()
    }


Products = dict[str, jax.Array]
"""The inner products of all layers, of shape ``(..., L, L)``, by the name of what is measured."""


def products_of(
    places: Depth, by: By, axis_name: AxisName | None
) -> Callable[[Mapping[str, jax.Array]], Products]:
    """A function from leaves by path to the products of their layers."""

    def products(leaves: Mapping[str, jax.Array]) -> Products:
        found = {}
        for name, tracks in tracks_of(places, by).items():
            block = [layers_of(track, leaves, axis_name) for track in tracks]
            found[name] = gram(block, places.groups[tracks[0].group])
        return found

    return products


def _from_micro_batches(mean: jax.Array, apart: jax.Array, others: jax.Array) -> DepthSignal:
    """The signal from products of the mean, of K deviations from it, and of means of K - 1."""
    count = len(apart)
    total = apart.sum(0)
    # Without micro-batch k, deviations are from another mean, which is off by a K-1-th of its own.
    without = (total - apart * (count / (count - 1))) / (count - 2)
    noises = jnp.concatenate([total[None] / (count - 1), without])
    sizes = jnp.array([count, *[count - 1] * count], noises.dtype)[:, None, None]
    signals = jnp.concatenate([mean[None], others]) - noises / sizes
    return _with_intervals(signals, noises)


def products_of_halves(
    updates: optax.Updates,
    half: optax.Updates,
    depth: Layout,
    *,
    by: By = "group",
    where: Where | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Products, Products]:
    """The products of a gradient, and of how far that of half of the batch is from it."""
    places = places_of(updates, depth, where)
    whole, part = (
        {path: upcast(leaf) for path, leaf in leaves_of(tree)[0] if path in places}
        for tree in (updates, half)
    )
    for path, leaf in whole.items():
        if path not in part or part[path].shape != leaf.shape:
            raise ValueError(
                f"half_gradients is not like {shown(path, leaf.shape)}: give the gradient of one "
                "half of the batch, whose mean with that of the other half comes through the chain."
            )

    @functools.partial(jax.jit, inline=True)
    def products(halves: tuple[Mapping[str, jax.Array], ...]) -> tuple[Products, Products]:
        whole, part = halves
        of_layers = products_of(places, by, axis_name)
        return of_layers(whole), of_layers(jax.tree.map(jnp.subtract, part, whole))

    found: tuple[Products, Products] = with_automatic_axes(products, (whole, part))
    return found


class SignalSums(NamedTuple):
    """The running sums of a stream of halves, in groups that a jackknife leaves out in turn.

    Attributes:
      products: of signal and noise, of shape ``(groups, 2, L, L)``.
      weights: how many measurements each group holds, of shape ``(groups,)``.
    """

    products: jax.Array
    weights: jax.Array


def no_sums(products: jax.Array) -> SignalSums:
    """The sums before the first measurement, for layers with products of shape ``(L, L)``."""
    shape = GROUPS, 2, *products.shape
    return SignalSums(jnp.zeros(shape, products.dtype), jnp.zeros(GROUPS, products.dtype))


def with_halves(
    sums: SignalSums, count: jax.Array, whole: jax.Array, apart: jax.Array
) -> SignalSums:
    r"""The sums with one more measurement, from the two halves of one step.

    Args:
      sums: what was measured before.
      count: how many measurements were made before.
      whole: the products of the gradient of the whole batch, :math:`g = (g_1 + g_2)/2`.
      apart: those of :math:`g_1 - g`. The signal is ``whole - apart``, and the noise of half a
        batch ``2 * apart``, both without bias.
    """
    own = jax.nn.one_hot(count % GROUPS, GROUPS, dtype=whole.dtype)
    measured = jnp.stack([whole - apart, 2 * apart])
    return SignalSums(
        DECAY * sums.products + own[:, None, None, None] * measured, DECAY * sums.weights + own
    )


def from_sums(sums: SignalSums) -> DepthSignal:
    """What a stream of halves tells."""

    def all_and_all_but_one(values: jax.Array) -> jax.Array:
        total = values.sum(0, keepdims=True)
        return jnp.concatenate([total, total - values])

    products, weights = all_and_all_but_one(sums.products), all_and_all_but_one(sums.weights)
    means = ratio(products, weights[:, None, None, None])
    return _with_intervals(means[:, 0], means[:, 1])


def _with_intervals(signals: jax.Array, noises: jax.Array) -> DepthSignal:
    """From the Gram matrices of all samples, and of all but one in turn: (1 + replicates, L, L)."""
    traces = jnp.trace(signals, axis1=1, axis2=2), jnp.trace(noises, axis1=1, axis2=2)
    return DepthSignal(
        signal=signals[0],
        noise=noises[0],
        share=_jackknife(ratio(traces[0], traces[0] + traces[1])),
        signal_cosine=_jackknife(_neighbours(signals)),
        noise_cosine=_jackknife(_neighbours(noises)),
    )


def _neighbours(products: jax.Array) -> jax.Array:
    """The mean cosine of neighbours, of each matrix of (..., L, L)."""
    squares = jnp.diagonal(products, axis1=-2, axis2=-1)
    sizes = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    pairs = jnp.diagonal(products, 1, -2, -1)
    return ratio(pairs.sum(-1), (sizes[..., 1:] * sizes[..., :-1]).sum(-1))


def _jackknife(values: jax.Array) -> Estimate:
    """The first value, with an interval from the others, each of which leaves one sample out."""
    value, replicates = values[0], values[1:]
    count = len(replicates)
    spread = jnp.sqrt((count - 1) * jnp.var(replicates))
    half = _student(count - 1) * spread
    return Estimate(value, value - half, value + half)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 1 % from 3 degrees of freedom on, to 3 % of 2.

    References:
      Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = 1.959964  # that of the normal distribution
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
