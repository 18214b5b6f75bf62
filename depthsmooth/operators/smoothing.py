"""Operators that smooth or sharpen over depth. A gain is what each frequency is multiplied by."""

from __future__ import annotations

import math
from typing import Literal

import jax
import numpy as np
import optax

from depthsmooth.operators.numbers import Number, module_of, product, rows_of
from depthsmooth.operators.stencil import Operator, Stencil, exists, stencil_of

_HALVED = math.log(2)


def window(alpha: optax.ScalarOrSchedule) -> Operator:
    r"""Window Smoothing: every layer takes a share of its two neighbours.

    .. math::
        \tilde u_\ell = (1 - \alpha)\, u_\ell
            + \tfrac{\alpha}{2} (u_{\ell-1} + u_{\ell+1})

    and at the ends :math:`\tilde u_1 = (1 - \tfrac{\alpha}{2})\, u_1 +
    \tfrac{\alpha}{2} u_2`, likewise for the last layer. The matrix is symmetric,
    tridiagonal and doubly stochastic: the mean over depth and every update that
    is constant over depth are kept. The gain is :math:`1 - \alpha (1 - \cos\omega)`,
    for the components :math:`\omega = \pi j / L` of the DCT exactly.

    Args:
      alpha: the share :math:`\alpha` taken from the neighbours, in [0, 1): a
        number, an Optax schedule, or a traced scalar. Numbers are checked.

    Returns:
      The operator. With one layer, and with a plain ``alpha`` of 0, it is the
      identity.

    Raises:
      ValueError: if ``alpha`` is a number outside [0, 1), or no scalar.

    Example:
      >>> window(0.5)(4, 0).weights
      array([[0.  , 0.25, 0.25, 0.25],
             [0.75, 0.5 , 0.5 , 0.75],
             [0.25, 0.25, 0.25, 0.  ]])

    References:
      Meng, Sugolov, Papyan, `Gradient Smoothing
      <https://arxiv.org/abs/2606.30813>`_, 2026 (Window Smoothing).
    """
    return _three_taps(alpha, 1.0)


def sharpen(alpha: optax.ScalarOrSchedule) -> Operator:
    r"""Takes a share of the two neighbours away from every layer: a high-pass.

    .. math::
        \tilde u_\ell = (1 - \alpha)\, u_\ell
            - \tfrac{\alpha}{2} (u_{\ell-1} + u_{\ell+1})

    and at the ends :math:`\tilde u_1 = (1 - \tfrac{\alpha}{2})\, u_1 -
    \tfrac{\alpha}{2} u_2`. It is the window of the updates with alternating signs.
    The gain is :math:`1 - \alpha (1 + \cos\omega)`: what is constant over depth is
    multiplied by :math:`1 - 2 \alpha`, away from the ends.

    Args:
      alpha: the share :math:`\alpha`, in [0, 1).

    Returns:
      The operator. With one layer, and with a plain ``alpha`` of 0, it is the
      identity.

    Raises:
      ValueError: if ``alpha`` is a number outside [0, 1), or no scalar.

    Example:
      >>> sharpen(0.5)(3, 0).weights
      array([[ 0.  , -0.25, -0.25],
             [ 0.75,  0.5 ,  0.75],
             [-0.25, -0.25,  0.  ]])

    References:
      The authors' research code calls it ``laplacian``:
      https://github.com/sugolov/uvit-smooth, ``libs/filters.py``.
    """
    return _three_taps(alpha, -1.0)


def exponential(
    self_weight: optax.ScalarOrSchedule,
    radius: int = 1,
    rate: optax.ScalarOrSchedule = _HALVED,
    direction: Literal["both", "left", "right"] = "both",
) -> Operator:
    r"""A weighted mean of the neighbours, decaying with distance, and the layer itself.

    .. math::
        \tilde u_\ell = \gamma u_\ell + (1 - \gamma)
            \frac{\sum_d e^{-a |d|} u_{\ell+d}}{\sum_d e^{-a |d|}}

    where d runs over the neighbours within the radius that exist. A layer that has none is
    multiplied by :math:`\gamma`. The gain is :math:`\gamma + (1 - \gamma) \sum_d e^{-a|d|}
    \cos \omega d / \sum_d e^{-a|d|}` for both directions.

    Args:
      self_weight: the weight :math:`\gamma` of the layer itself, in [0, 1].
      radius: how many layers away the farthest neighbour is, at least 1; static.
      rate: the decay a for each layer of distance, not negative: log 2 halves the weight,
        0 weighs all alike.
      direction: ``"left"`` for earlier layers alone, ``"right"`` for later ones.

    Returns:
      The operator. Its rows sum up to 1 where a layer has neighbours.

    Raises:
      ValueError: if a number is out of its range, or the direction is none.

    Example:
      >>> exponential(0.5, radius=2)(3, 0).weights.round(3)
      array([[0.   , 0.   , 0.167],
             [0.   , 0.25 , 0.333],
             [0.5  , 0.5  , 0.5  ],
             [0.333, 0.25 , 0.   ],
             [0.167, 0.   , 0.   ]])

    References:
      The authors' older code, whose in-place forms feed smoothed layers into the next,
      as this one does not: https://github.com/sugolov/deit_fork, ``gradient_smooth.py``,
      ``compute_neighbor_averaged_gradients``.
    """
    distances = {
        "both": [d for d in range(-_radius(radius), radius + 1) if d],
        "left": list(range(-_radius(radius), 0)),
        "right": list(range(1, _radius(radius) + 1)),
    }
    if direction not in list(distances):
        raise ValueError(f"direction is {direction!r}, but has to be 'both', 'left' or 'right'.")
    gamma = Number("self_weight", self_weight, 0, 1)
    decay = Number("rate", rate, 0)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        own, a = gamma(count), decay(count)
        numeric = module_of(own, a)
        near = [d for d in distances[direction] if abs(d) < layers]
        there = exists(tuple(near), layers)
        # The nearest neighbour that exists is beside the layer: its share is 1 at any rate.
        shares = numeric.exp(-a * (np.abs(near) - 1.0)[:, None]) * there
        total = shares.sum(0)
        rows = (1 - own) * shares / numeric.where(total > 0, total, 1)
        weights = dict(zip(near, rows, strict=True)) | {0: numeric.full(layers, own)}
        offsets = tuple(sorted(weights))
        return Stencil(offsets, rows_of([weights[offset] for offset in offsets]))

    return operator


def ema(rho: optax.ScalarOrSchedule, reverse: bool = False) -> Operator:
    r"""An exponential moving average over depth, from the first layer on.

    .. math::
        \tilde u_1 = u_1, \qquad
        \tilde u_\ell = \rho\, \tilde u_{\ell-1} + (1 - \rho)\, u_\ell

    The matrix is lower triangular, its rows sum up to 1. The gain is
    :math:`|1 - \rho| / |1 - \rho e^{-i\omega}|`, with a lag.

    Args:
      rho: how much of the average of the layers before is kept, in [0, 1).
      reverse: whether to run from the last layer to the first.

    Returns:
      The operator.

    Raises:
      ValueError: if ``rho`` is a number outside [0, 1), or no scalar.

    Example:
      >>> import depthsmooth as ds
      >>> ds.operator_matrix(ds.ema(0.5), 3)
      array([[1.  , 0.  , 0.  ],
             [0.5 , 0.5 , 0.  ],
             [0.25, 0.25, 0.5 ]])

    References:
      The authors' research code: https://github.com/sugolov/uvit-smooth,
      ``libs/filters.py``, ``ema``.
    """
    kept = Number("rho", rho, 0, 1, below=True)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        share = kept(count)
        age = np.arange(layers)[:, None] - np.arange(layers)
        fresh = module_of(share).where(np.arange(layers) == 0, 1.0, 1 - share)
        matrix = share ** np.maximum(age, 0) * fresh * (age >= 0)
        return stencil_of(matrix[::-1, ::-1] if reverse else matrix)

    return operator


def diffusion(time: optax.ScalarOrSchedule) -> Operator:
    r"""Diffusion over depth for some time: the limit of many windows of small alpha.

    .. math::
        S = \exp(-t \Delta), \qquad
        (\Delta u)_\ell = 2 u_\ell - u_{\ell-1} - u_{\ell+1}

    with :math:`\Delta` the Laplacian of the path of L layers, whose ends have one
    neighbour. n windows of :math:`\alpha` come near it with :math:`t = n \alpha / 2`. The
    matrix is symmetric and doubly stochastic, the gain
    :math:`\exp(-2 t (1 - \cos\omega))`, for the components of the DCT exactly.

    Args:
      time: t, in units of layers squared, not negative.

    Returns:
      The operator.

    Raises:
      ValueError: if ``time`` is a negative number, or no scalar.

    Example:
      >>> import depthsmooth as ds
      >>> ds.operator_matrix(ds.diffusion(0.25), 3).round(3)
      array([[0.801, 0.176, 0.023],
             [0.176, 0.648, 0.176],
             [0.023, 0.176, 0.801]])

    References:
      Strang, `The Discrete Cosine Transform
      <https://doi.org/10.1137/S0036144598336745>`_, 1999 (its waves are eigenvectors of
      the Laplacian of a path).
    """
    lasting = Number("time", time, 0)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        t = lasting(count)
        frequency = np.pi * np.arange(layers) / layers
        waves = np.cos(frequency * (np.arange(layers)[:, None] + 0.5))
        waves = waves / np.linalg.norm(waves, axis=0)
        gains = module_of(t).exp(-2 * t * (1 - np.cos(frequency)))
        return stencil_of(product(waves * gains, waves.T))

    return operator


def _three_taps(alpha: optax.ScalarOrSchedule, sign: float) -> Operator:
    """The window, or with the sign -1 what sharpens."""
    shares = Number("alpha", alpha, 0, 1, below=True)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        share = shares(count) if layers > 1 else 0.0
        numeric = module_of(share)
        # Pieces of one value, unlike a mask, are scalars to a compiler that looks at one layer.
        none = numeric.zeros(min(layers, 1))
        some = numeric.full(max(layers - 1, 0), sign * share / 2)
        end = numeric.full(min(layers, 1), 1 - share / 2)
        inner = numeric.full(max(layers - 2, 0), 1 - share)
        rows = [[none, some], [end, inner, end] if layers > 1 else [end], [some, none]]
        return Stencil((-1, 0, 1), rows_of([numeric.concatenate(row) for row in rows]))

    return operator


def _radius(radius: object) -> int:
    if isinstance(radius, int | np.integer) and radius >= 1:
        return int(radius)
    raise ValueError(f"radius is {radius!r}, but has to be an integer of at least 1: in layers.")
