"""Numbers of operators: floats, Optax schedules or traced scalars, checked where they are known."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.operators.stencil import Array


class Number:
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
        elif makes_operators(value) or not takes(value, 0):
            raise ValueError(
                f"{name} is {name_of(value)}, which is no schedule: those are called with the step "
                "alone. An operator goes to augment_over_depth(operator, ...)."
            )

    def __call__(self, count: jax.typing.ArrayLike) -> float | jax.Array:
        """The number at a step."""
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


def module_of(*values: object) -> types.ModuleType:
    """NumPy if all the values are known, else its like in JAX."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def rows_of(rows: Sequence[Array]) -> Array | list[Array]:
    """The rows of a stencil: one array if they are known."""
    return list(rows) if module_of(*rows) is jnp else np.stack(rows)


def product(left: Array, right: Array) -> Array:
    """The matrix product, in full precision on devices whose default is less."""
    if module_of(left, right) is np:
        return left @ right
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def name_of(value: object) -> str:
    """A function's name, without its address; what else it is."""
    return str(getattr(value, "__qualname__", None) or repr(value)).replace(".<locals>", "")


def takes(function: object, *arguments: object) -> bool:
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


def makes_operators(function: object) -> bool:
    """Whether it is a function like ``window`` itself, which somebody forgot to call."""
    wing, _, _ = __name__.rpartition(".")
    is_ours = str(getattr(function, "__module__", "")).startswith(f"{wing}.")
    # What they make is a function within one, or has no name.
    return is_ours and "<locals>" not in getattr(function, "__qualname__", "<locals>")
