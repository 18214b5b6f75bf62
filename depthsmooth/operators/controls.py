"""Controls: operators that mix layers without regard to which are neighbours."""

from __future__ import annotations

import jax
import numpy as np
import optax

from depthsmooth.operators.general import check_operator, made_by
from depthsmooth.operators.numbers import Number
from depthsmooth.operators.stencil import Operator, Stencil, matrix_of, stencil_of


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
      >>> import depthsmooth as ds
      >>> ds.operator_matrix(ds.mean(0.5), 2)
      array([[0.75, 0.25],
             [0.25, 0.75]])
    """
    share = Number("weight", weight, 0, 1)

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
      >>> import depthsmooth as ds
      >>> ds.operator_matrix(ds.shuffled(ds.window(0.5), seed=1), 4)
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
        return stencil_of(matrix_of(made_by(operator, layers, count))[np.ix_(order, order)])

    return of_order
