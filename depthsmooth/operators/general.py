"""Operators from kernels, matrices and other operators, and the matrix of any operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
import optax

from depthsmooth.operators.numbers import (
    Number,
    makes_operators,
    module_of,
    name_of,
    product,
    rows_of,
    takes,
)
from depthsmooth.operators.stencil import (
    Array,
    Operator,
    Stencil,
    exists,
    matrix_of,
    misfit_of,
    stencil_of,
)


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
    numbers = [Number(f"tap {k}", tap) for k, tap in enumerate(taps)]
    radius = len(taps) // 2

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        values = [number(count) for number in numbers]
        numeric = module_of(*values)
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
        return Stencil(offsets, rows_of(rows))

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


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """An operator that mixes nothing. A layer has its number, whatever others are there."""

    values: jax.typing.ArrayLike | Callable[..., jax.typing.ArrayLike]

    def __call__(self, layers: int, count: jax.typing.ArrayLike) -> Stencil:
        """The stencil of the numbers of so many layers."""
        given = self.values(layers, count) if callable(self.values) else self.values
        numbers = given if isinstance(given, jax.Array) else np.asarray(given)
        is_real = np.issubdtype(numbers.dtype, np.number) and not np.iscomplexobj(numbers)
        if numbers.shape != (layers,) or not is_real:
            raise ValueError(
                f"The values of diagonal are of shape {numbers.shape} and type {numbers.dtype}, "
                f"but there are {layers} layers: give a real number for each, or a function "
                "values(layers, count) that gives these."
            )
        known = isinstance(numbers, np.ndarray)
        return Stencil((0,), numbers[None].astype(float) if known else numbers[None])


def diagonal(values: jax.typing.ArrayLike | Callable[..., jax.typing.ArrayLike]) -> Operator:
    r"""A number for each layer: :math:`\tilde u_\ell = d_\ell\, u_\ell`.

    Nothing is mixed. Unlike other operators it also applies to a layer that is alone in its group,
    and to tensors that some layers lack: each layer has the number of its place in the group.

    Args:
      values: d, of shape ``(L,)``; or a function of the number of layers and of the step,
        ``values(layers, count)``, that gives these.

    Returns:
      The operator.

    Raises:
      ValueError: if the function takes other arguments; when applied, if there is not a real number
        for each layer.

    Example:
      >>> import depthsmooth as ds
      >>> ds.operator_matrix(ds.diagonal([1.0, 0.5]), 2)
      array([[1. , 0. ],
             [0. , 0.5]])
      >>> deeper_is_slower = ds.diagonal(lambda layers, count: 0.9 ** np.arange(layers))
      >>> ds.operator_matrix(deeper_is_slower, 3).diagonal().round(2).tolist()
      [1.0, 0.9, 0.81]
    """
    if callable(values) and not takes(values, 2, 0):
        raise ValueError(
            f"{name_of(values)} does not give the values of diagonal: it has to be called as "
            "values(layers, count), with the number of layers and the step."
        )
    return Diagonal(values)


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
      >>> import depthsmooth as ds
      >>> ds.compose(ds.window(0.5), ds.window(0.5))(4, 0).offsets
      (-2, -1, 0, 1, 2)
    """
    for each in (one, two):
        check_operator(each)

    def operator(layers: int, count: jax.typing.ArrayLike) -> Stencil:
        stencils = [made_by(each, layers, count) for each in (one, two)]
        left, right = map(matrix_of, stencils)
        radius = sum(max(map(abs, stencil.offsets), default=0) for stencil in stencils)
        return stencil_of(product(left, right), radius)

    return operator


def operator_matrix(operator: Operator, layers: int, count: jax.typing.ArrayLike = 0) -> Array:
    """The matrix S of an operator, for anyone to look at.

    Args:
      operator: the operator.
      layers: the number of layers L.
      count: the step, for schedules.

    Returns:
      S, of shape ``(L, L)``.

    Raises:
      ValueError: if the operator is none, or gives a wrong stencil.

    Example:
      >>> import depthsmooth as ds
      >>> ds.operator_matrix(ds.window(0.2), 3)
      array([[0.9, 0.1, 0. ],
             [0.1, 0.8, 0.1],
             [0. , 0.1, 0.9]])
    """
    check_operator(operator)
    return matrix_of(made_by(operator, layers, count))


def stencil_for(operator: Operator, layers: int, count: jax.typing.ArrayLike) -> Stencil:
    """The stencil of an operator for one run of layers. A single layer is left as it is."""
    if layers == 1 and not isinstance(operator, Diagonal):
        return Stencil((0,), np.ones((1, 1)))
    return made_by(operator, layers, count)


def made_by(operator: Operator, layers: int, count: jax.typing.ArrayLike) -> Stencil:
    """What an operator gives; raises unless that is a stencil for so many layers."""
    made = operator(layers, count)
    if not isinstance(made, Stencil):
        raise ValueError(
            f"{name_of(operator)} is no operator: for {layers} layers it gives a "
            f"{type(made).__name__}, but has to give a Stencil, as window(0.1) and "
            "from_matrix(matrix) do."
        )
    wrong = misfit_of(made, layers)
    if wrong:
        raise ValueError(f"{name_of(operator)} gives a wrong Stencil for {layers} layers: {wrong}")
    return made


def check_operator(operator: object) -> None:
    """Raises unless it could be an operator."""
    if makes_operators(operator) or not takes(operator, 2, 0):
        raise ValueError(
            f"{name_of(operator)} is no operator: those are what functions like window(0.1) and "
            "ema(0.5) give when they are called, or are called as operator(layers, count). "
            "compose(one, two) makes one of two."
        )


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
