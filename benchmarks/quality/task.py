"""What is trained: a task draws its parameters, its batches and its examination from keys."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality.arms import Base
from depthsmooth import Depth

EVALUATIONS = 10
"""How often a run is examined; it divides every number of steps."""
TUNING = 100
"""Seeds from this on choose what others test, and are examined in other data."""


def halves(values: np.ndarray) -> jax.Array:
    """The even and the odd ones, of shape (2, half as many, …): what ``part`` is of.

    Example:
      >>> halves(np.arange(5)).tolist()
      [[0, 2], [1, 3]]
    """
    count = len(values) // 2
    return jnp.stack([values[: 2 * count : 2], values[1 : 2 * count : 2]])


class Task(abc.ABC):
    """A model and what it learns.

    Attributes:
      rates: the learning rate of each base optimizer, which arms multiply.
      decay: of weights, decoupled, for all base optimizers but SGD.
      data: what tells the data from other data; "" for data that keys make.
      layers: of the model.
      steps: of training.
      depth: where the layers are.
    """

    rates: ClassVar[Mapping[Base, float]]
    decay: ClassVar[float] = 0.01
    data: str = ""
    depth: Depth

    def __init__(self, layers: int, steps: int) -> None:
        if steps % EVALUATIONS:
            raise ValueError(f"steps is {steps}, but has to be a multiple of {EVALUATIONS}.")
        self.layers = layers
        self.steps = steps

    @abc.abstractmethod
    def init(self, key: jax.Array) -> optax.Params:
        """Parameters to start from."""

    @abc.abstractmethod
    def loss(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """The training loss, a scalar, of the batch that the key draws."""

    @abc.abstractmethod
    def evaluate(
        self, params: optax.Params, key: jax.Array, part: jax.Array
    ) -> dict[str, jax.Array]:
        """Scalars of data that training does not see; arms are compared by ``loss``.

        Args:
          params: the parameters.
          key: draws what is examined.
          part: of the data, 0 or 1: what has chosen an arm must not test it.
        """

    @abc.abstractmethod
    def states(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Hidden states of such data, of shape (layers + 1, ..., features)."""

    def before(self) -> optax.GradientTransformation:
        """What comes before the base optimizer."""
        return optax.identity()

    def schedule(self, count: jax.Array) -> jax.Array:
        """The share of the learning rate at a step: warm-up, then a cosine to 0."""
        warmup = max(1, self.steps // 10)
        return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.steps)(count)
