"""What is applied over depth: each operator gives the stencil for L layers at a step."""

import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.stencil import Stencil

Operator = Callable[[int, jax.typing.ArrayLike], Stencil]
"""``operator(layers, count)`` is the :class:`Stencil` for that many layers at step ``count``."""


def window(alpha: optax.ScalarOrSchedule) -> Operator:
    r"""Window Smoothing: every layer takes a share of its two neighbours.

    .. math::
        \tilde u_\ell = (1 - \alpha)\, u_\ell
            + \tfrac{\alpha}{2} (u_{\ell-1} + u_{\ell+1})

    and at the ends :math:`\tilde u_1 = (1 - \tfrac{\alpha}{2})\, u_1 +
    \tfrac{\alpha}{2} u_2`, likewise for the last layer. The matrix is symmetric,
    tridiagonal and doubly stochastic: the mean over depth and every update that
    is constant over depth are kept. A component of frequency :math:`\omega` over
    depth (:math:`\omega = \pi j / L` of the DCT) is multiplied by
    :math:`1 - \alpha (1 - \cos\omega)`.

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
    if not callable(alpha):
        _share(alpha)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        share = _share(alpha(count) if callable(alpha) else alpha) if layers > 1 else 0.0
        numeric: types.ModuleType = np if isinstance(share, float) else jnp
        # Pieces of one value, unlike a mask, are scalars to a compiler that looks at one layer.
        none, some = numeric.zeros(min(layers, 1)), numeric.full(max(layers - 1, 0), share / 2)
        end = numeric.full(min(layers, 1), 1 - share / 2)
        inner = numeric.full(max(layers - 2, 0), 1 - share)
        rows = [[none, some], [end, inner, end] if layers > 1 else [end], [some, none]]
        weights = [numeric.concatenate(row) for row in rows]
        return Stencil((-1, 0, 1), np.stack(weights) if numeric is np else weights)

    return operator


def _share(alpha: object) -> float | jax.Array:
    """Alpha as a float within its range if it is known, else as the widest traced float.

    A traced alpha may come as narrow as the parameters are: too narrow for 1 - alpha.
    """
    if isinstance(alpha, int | float | np.floating | np.integer):
        if 0 <= alpha < 1:
            return float(alpha)
        raise ValueError(
            f"alpha is {alpha}, but Window Smoothing needs 0 <= alpha < 1: it is the share "
            "a layer's update takes from its two neighbours; the paper uses 0.1 and 0.2."
        )
    if isinstance(alpha, jax.Array | np.ndarray) and alpha.ndim == 0:
        return jnp.asarray(alpha, float)
    raise ValueError(
        f"alpha is {alpha!r}, but it has to be a number, a schedule that gives one, or a scalar "
        "array."
    )
