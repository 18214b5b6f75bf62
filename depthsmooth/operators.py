"""What is applied over depth: each operator gives the stencil for L layers at a step.

Every number may be a float, an Optax schedule, or a traced scalar. A gain is the factor by
which a component of frequency ω over depth is multiplied, away from the ends of a stack.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.stencil import Stencil, exists, matrix_of, stencil_of

Operator = Callable[[int, jax.typing.ArrayLike], Stencil]
"""``operator(layers, count)`` is the :class:`Stencil` for that many layers at step ``count``."""

Array = np.ndarray | jax.Array

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
    gamma = _Number("self_weight", self_weight, 0, 1)
    decay = _Number("rate", rate, 0)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        own, a = gamma(count), decay(count)
        numeric = _module(own, a)
        near = [d for d in distances[direction] if abs(d) < layers]
        there = exists(tuple(near), layers)
        # The nearest neighbour that exists is beside the layer: its share is 1 at any rate.
        shares = numeric.exp(-a * (np.abs(near) - 1.0)[:, None]) * there
        total = shares.sum(0)
        rows = (1 - own) * shares / numeric.where(total > 0, total, 1)
        weights = dict(zip(near, rows, strict=True)) | {0: numeric.full(layers, own)}
        offsets = tuple(sorted(weights))
        return Stencil(offsets, _rows([weights[offset] for offset in offsets]))

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
      >>> operator_matrix(ema(0.5), 3)
      array([[1.  , 0.  , 0.  ],
             [0.5 , 0.5 , 0.  ],
             [0.25, 0.25, 0.5 ]])

    References:
      The authors' research code: https://github.com/sugolov/uvit-smooth,
      ``libs/filters.py``, ``ema``.
    """
    kept = _Number("rho", rho, 0, 1, below=True)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        share = kept(count)
        age = np.arange(layers)[:, None] - np.arange(layers)
        fresh = _module(share).where(np.arange(layers) == 0, 1.0, 1 - share)
        matrix = share ** np.maximum(age, 0) * fresh * (age >= 0)
        return stencil_of(matrix[::-1, ::-1] if reverse else matrix)

    return operator


def from_kernel(
    taps: Sequence[optax.ScalarOrSchedule],
    boundary: Literal["reflect", "renormalize", "zero"] = "reflect",
) -> Operator:
    r"""A convolution over depth.

    .. math::
        \tilde u_\ell = \sum_{d=-r}^{r} \mathrm{taps}[d + r]\; u_{\ell + d}

    The gain is :math:`|\sum_d \mathrm{taps}[d + r]\, e^{i \omega d}|`, divided by the sum of the
    taps for ``"renormalize"``.

    Args:
      taps: 2r + 1 weights, from the earliest neighbour to the latest.
      boundary: what is beyond the ends. ``"reflect"``: the layers from the end on, the
        last one first, so that symmetric taps with sum 1 keep the mean over depth, as the
        window does; ``"renormalize"``: nothing, and the other taps are divided by their
        sum; ``"zero"``: updates of 0.

    Returns:
      The operator.

    Raises:
      ValueError: if there is an even number of taps, one is no scalar, the boundary is none of
        these, or the taps that a layer has are known to have the sum 0, for ``"renormalize"``.

    Example:
      >>> alpha = 0.5
      >>> operator_matrix(from_kernel([alpha / 2, 1 - alpha, alpha / 2]), 3)
      array([[0.75, 0.25, 0.  ],
             [0.25, 0.5 , 0.25],
             [0.  , 0.25, 0.75]])
      >>> binomial = from_kernel([1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16])
      >>> gaussian = from_kernel(np.exp(-np.arange(-3, 4) ** 2 / 2) / 2.5066, "renormalize")
    """
    if len(taps) % 2 == 0:
        raise ValueError(
            f"There are {len(taps)} taps, but an odd number is needed: the one in the middle is "
            "the weight of the layer itself."
        )
    if boundary not in ("reflect", "renormalize", "zero"):
        raise ValueError(
            f"boundary is {boundary!r}, but has to be 'reflect', 'renormalize' or 'zero'."
        )
    numbers = [_Number(f"tap {k}", tap) for k, tap in enumerate(taps)]
    radius = len(taps) // 2

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        values = [number(count) for number in numbers]
        numeric = _module(*values)
        offsets = tuple(range(-radius, radius + 1))
        neighbour = np.arange(layers) + np.asarray(offsets)[:, None]
        there = exists(offsets, layers)
        folded = neighbour % (2 * layers)
        reflected = np.minimum(folded, 2 * layers - 1 - folded)
        nowhere = 2 * (layers + radius)
        found = reflected if boundary == "reflect" else np.where(there, neighbour, nowhere)
        # reads[k, m, i]: whether layer i reads, with tap k, the layer at offset m.
        reads = found[:, None] - np.arange(layers) == np.asarray(offsets)[:, None]
        rows = (numeric.asarray(values)[:, None, None] * reads).sum(0)
        if boundary == "renormalize":
            sums = rows.sum(0)
            if isinstance(sums, np.ndarray) and not sums.all():
                raise ValueError(
                    f"The taps of layer {np.argmin(np.abs(sums))} of {layers} have the sum 0, by "
                    "which boundary='renormalize' divides. Use 'reflect' or 'zero'."
                )
            rows = rows / sums
        return Stencil(offsets, _rows(rows))

    return operator


def from_matrix(matrix: jax.typing.ArrayLike | Callable[[jax.typing.ArrayLike], Array]) -> Operator:
    r"""Any linear operator over depth: :math:`\tilde u_i = \sum_j S_{ij} u_j`.

    Args:
      matrix: S, of shape ``(L, L)``, or a schedule that gives one. The groups that it is
        applied to need L layers.

    Returns:
      The operator.

    Raises:
      ValueError: if the matrix is not square; when applied, if it is not of L layers.

    Example:
      >>> operator_matrix(from_matrix([[0.5, 0.5], [0.5, 0.5]]), 2)
      array([[0.5, 0.5],
             [0.5, 0.5]])
    """
    if not callable(matrix):
        _square(matrix)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        square = _square(matrix(count) if callable(matrix) else matrix)
        if len(square) != layers:
            raise ValueError(
                f"The matrix is of shape {square.shape}, but there are {layers} layers to mix: "
                "groups of other numbers of layers, and runs between cuts or masked layers, need "
                "matrices of their own."
            )
        return stencil_of(square)

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
      >>> operator_matrix(diffusion(0.25), 3).round(3)
      array([[0.801, 0.176, 0.023],
             [0.176, 0.648, 0.176],
             [0.023, 0.176, 0.801]])

    References:
      Strang, `The Discrete Cosine Transform
      <https://doi.org/10.1137/S0036144598336745>`_, 1999 (its waves are eigenvectors of
      the Laplacian of a path).
    """
    lasting = _Number("time", time, 0)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        t = lasting(count)
        frequency = np.pi * np.arange(layers) / layers
        waves = np.cos(frequency * (np.arange(layers)[:, None] + 0.5))
        waves = waves / np.linalg.norm(waves, axis=0)
        gains = _module(t).exp(-2 * t * (1 - np.cos(frequency)))
        return stencil_of(_product(waves * gains, waves.T))

    return operator


def compose(one: Operator, two: Operator) -> Operator:
    r"""One operator after another: :math:`S = S_1 S_2`, the second is applied first.

    Args:
      one: the operator that is applied last.
      two: the operator that is applied first.

    Returns:
      The operator, as one stencil: its gain is the product of the two.

    Raises:
      ValueError: if one of them is no operator.

    Example:
      >>> compose(window(0.5), window(0.5))(4, 0).offsets
      (-2, -1, 0, 1, 2)
    """
    for each in (one, two):
        check_operator(each)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        stencils = [each(layers, count) for each in (one, two)]
        left, right = map(matrix_of, stencils)
        radius = sum(max(map(abs, stencil.offsets), default=0) for stencil in stencils)
        return stencil_of(_product(left, right), radius)

    return operator


def mean(weight: optax.ScalarOrSchedule) -> Operator:
    r"""A control: every layer takes a share of the mean over depth, near or far alike.

    .. math::
        \tilde u_\ell = (1 - w)\, u_\ell + \tfrac{w}{L} \textstyle\sum_k u_k

    If it does as well as smoothing, that neighbours are alike is not what helps.

    Args:
      weight: w, in [0, 1].

    Returns:
      The operator.

    Raises:
      ValueError: if ``weight`` is a number outside [0, 1], or no scalar.

    Example:
      >>> operator_matrix(mean(0.5), 2)
      array([[0.75, 0.25],
             [0.25, 0.75]])
    """
    share = _Number("weight", weight, 0, 1)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        w = share(count)
        return stencil_of((1 - w) * np.eye(layers) + w * np.full((layers, layers), 1 / layers))

    return operator


def shuffled(operator: Operator, seed: int) -> Operator:
    r"""A control: the same mixing over layers in a random order.

    .. math::
        S' = P^\top S P

    with P a permutation that the seed and the number of layers determine. Every layer has the
    weights of some layer under S. No two layers that are beside each other are so in the random
    order, from 4 layers on; with fewer there is no such order, and this is no control.

    Args:
      operator: S.
      seed: of the permutation, a whole number.

    Returns:
      The operator.

    Raises:
      ValueError: if the operator is none, or the seed no whole number.

    Example:
      >>> operator_matrix(shuffled(window(0.5), seed=1), 4)
      array([[0.5 , 0.  , 0.25, 0.25],
             [0.  , 0.75, 0.  , 0.25],
             [0.25, 0.  , 0.75, 0.  ],
             [0.25, 0.25, 0.  , 0.5 ]])
    """
    check_operator(operator)
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed is {seed!r}, but has to be a whole number.")

    def of_order(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        rng = np.random.default_rng((seed, layers))
        place = rng.permutation(layers)
        while layers > 3 and (np.abs(np.diff(place)) == 1).any():
            place = rng.permutation(layers)
        order = np.argsort(place)
        return stencil_of(matrix_of(operator(layers, count))[np.ix_(order, order)])

    return of_order


def operator_matrix(
    operator: Operator, layers: int, count: jax.typing.ArrayLike = 0
) -> np.ndarray | jax.Array:
    """The matrix S of an operator, for anyone to look at.

    Args:
      operator: the operator.
      layers: the number of layers L.
      count: the step, for schedules.

    Returns:
      S, of shape ``(L, L)``.

    Raises:
      ValueError: if the operator is none.

    Example:
      >>> operator_matrix(window(0.2), 3)
      array([[0.9, 0.1, 0. ],
             [0.1, 0.8, 0.1],
             [0. , 0.1, 0.9]])
    """
    check_operator(operator)
    return matrix_of(operator(layers, count))


def _three_taps(alpha: optax.ScalarOrSchedule, sign: float) -> Operator:
    """The window, or with the sign -1 what sharpens."""
    shares = _Number("alpha", alpha, 0, 1, below=True)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        share = shares(count) if layers > 1 else 0.0
        numeric = _module(share)
        # Pieces of one value, unlike a mask, are scalars to a compiler that looks at one layer.
        none = numeric.zeros(min(layers, 1))
        some = numeric.full(max(layers - 1, 0), sign * share / 2)
        end = numeric.full(min(layers, 1), 1 - share / 2)
        inner = numeric.full(max(layers - 2, 0), 1 - share)
        rows = [[none, some], [end, inner, end] if layers > 1 else [end], [some, none]]
        return Stencil((-1, 0, 1), _rows([numeric.concatenate(row) for row in rows]))

    return operator


class _Number:
    """A number of an operator: checked now if it is one, and at each step if it is a schedule."""

    def __init__(
        self,
        name: str,
        value: optax.ScalarOrSchedule,
        low: float = -np.inf,
        high: float = np.inf,
        *,
        below: bool = False,
    ) -> None:
        self._name, self._value = name, value
        self._low, self._high, self._below = low, high, below
        if not callable(value):
            self._checked(value)
        elif _makes_operators(value) or not _takes(value, 0):
            raise ValueError(
                f"{name} is {_name(value)}, which is no schedule: those are called with the step "
                "alone. An operator goes to augment_over_depth(operator, ...)."
            )

    def __call__(self, count: jax.typing.ArrayLike) -> float | jax.Array:
        return self._checked(self._value(count) if callable(self._value) else self._value)

    def _checked(self, value: object) -> float | jax.Array:
        """A float within its range if it is known, else the widest traced float.

        A traced number may come as narrow as the parameters are: too narrow for 1 - alpha.
        """
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        if isinstance(value, int | float | np.floating | np.integer):
            is_strict = self._below or self._high == np.inf
            is_below = value < self._high if is_strict else value <= self._high
            if self._low <= value and is_below and math.isfinite(value):
                return float(value)
            low = f"{self._low:g} {'<=' if self._low > -np.inf else '<'}"
            high = f"{'<' if is_strict else '<='} {self._high:g}"
            raise ValueError(
                f"{self._name} is {value}, but has to be in {low} {self._name} {high}."
            )
        if isinstance(value, jax.Array) and value.ndim == 0 and not jnp.iscomplexobj(value):
            return jnp.asarray(value, float)
        raise ValueError(
            f"{self._name} is {value!r}, but it has to be a number, a schedule that gives one, or "
            "a scalar array."
        )


def _module(*values: object) -> types.ModuleType:
    """NumPy if all the values are known, else its like in JAX."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _rows(rows: Sequence[Array]) -> Array | list[Array]:
    """The rows of a stencil: one array if they are known."""
    return list(rows) if _module(*rows) is jnp else np.stack(rows)


def _product(left: Array, right: Array) -> Array:
    """The matrix product, in full precision on devices whose default is less."""
    if _module(left, right) is np:
        return left @ right
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def check_operator(operator: object) -> None:
    """Raises unless it could be an operator."""
    if _makes_operators(operator) or not _takes(operator, 2, 0):
        raise ValueError(
            f"{_name(operator)} is no operator: those are what functions like window(0.1) and "
            "ema(0.5) give when they are called, or are called as operator(layers, count). "
            "compose(one, two) makes one of two."
        )


def _makes_operators(function: object) -> bool:
    """Whether it is one of these functions itself, which somebody forgot to call."""
    path = f"{__name__}.{getattr(function, '__qualname__', '')}"
    return getattr(function, "__module__", "") == __name__ and "<locals>" not in path


def _name(value: object) -> str:
    """A function's name, without its address; what else it is."""
    return str(getattr(value, "__qualname__", None) or repr(value)).replace(".<locals>", "")


def _takes(function: object, *arguments: object) -> bool:
    """Whether it is a function of as many arguments, as far as can be told."""
    if not callable(function):
        return False
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions that are not written in Python have none
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _radius(radius: object) -> int:
    if isinstance(radius, int | np.integer) and radius >= 1:
        return int(radius)
    raise ValueError(f"radius is {radius!r}, but has to be an integer of at least 1: in layers.")


def _square(matrix: jax.typing.ArrayLike) -> Array:
    if np.iscomplexobj(matrix):
        raise ValueError("The matrix is complex, but weights over depth have to be real.")
    square = matrix if isinstance(matrix, jax.Array) else np.asarray(matrix, float)
    if square.ndim != 2 or square.shape[0] != square.shape[1]:
        raise ValueError(
            f"The matrix is of shape {square.shape}, but has to be square: one row and one column "
            "for each layer."
        )
    return square
