"""What layers do to hidden states: how straight their paths are, and how aligned."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from depthsmooth.arrays.layers import upcast
from depthsmooth.arrays.norms import ratio


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
    path = upcast(jnp.asarray(states))
    if path.ndim < 2 or len(path) <= layers:
        raise ValueError(
            f"The states are of shape {path.shape}, but have to be of (L + 1, ..., features), "
            f"from before the first layer to after the last, of at least {layers} layers."
        )
    steps = path[1:] - path[:-1]
    return ratio(steps, jnp.linalg.norm(steps, axis=-1, keepdims=True))
