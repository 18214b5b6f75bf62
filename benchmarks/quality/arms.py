"""What is compared: base optimizers, smoothing and its controls, each an arm with a name."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthsmooth as ds
from depthsmooth.transform import Variant

Base = Literal["sgd", "adamw", "muon"]
Scope = Literal["full", "proj"]
Control = Literal["", "shrunk", "shuffled", "mean"]


@dataclasses.dataclass(frozen=True, order=True)
class Arm:
    """One way to train.

    Attributes:
      base: the base optimizer.
      variant: what becomes of norms.
      scope: ``"full"``: all tensors of a block; ``"proj"``: linear layers alone.
      alpha: the share that is taken from other layers; 0 for the base optimizer alone.
      control: what stands in the place of smoothing: ``"shrunk"``, the norm that smoothing would
        have left, and no mixing; ``"shuffled"``, mixing over layers in a random order;
        ``"mean"``, the share of alpha is taken from the mean over all layers.
      own: what the layers' learning rate is multiplied by, and that of the rest is not.
    """

    base: Base
    variant: Variant = "standard"
    scope: Scope = "full"
    alpha: float = 0.0
    control: Control = ""
    own: float = 1.0

    def __str__(self) -> str:
        parts = [self.variant, self.scope, f"{self.alpha:g}", self.control] if self.alpha else []
        return "/".join(filter(None, [self.base, *parts])) + f"@{self.own:g}" * (self.own != 1)

    @classmethod
    def named(cls, name: str) -> Arm:
        """The arm of a name.

        Raises:
          ValueError: if there is none.

        Example:
          >>> Arm.named("adamw/standard/proj/0.2/shuffled@0.5").alpha
          0.2
        """
        path, _, own = name.partition("@")
        base, variant, scope, alpha, control = [*path.split("/"), *[""] * 5][:5]
        try:
            numbers = float(alpha or 0), float(own or 1)
            arm = cls(base, variant or "standard", scope or "full", numbers[0], control, numbers[1])
        except ValueError:
            arm = None
        if arm is None or str(arm) != name or not _known(arm):
            raise ValueError(
                f"--arm {name} names no arm: give a base optimizer, as in adamw, or with what is "
                "added to it, as in adamw/standard/proj/0.2 or adamw/standard/proj/0.2/shuffled; "
                "@0.5 at the end halves the layers' learning rate alone."
            )
        return arm

    @property
    def kind(self) -> Arm:
        """Arms of one kind differ in numbers alone, and share a compiled program."""
        control = self.control.replace("mean", "shuffled")  # both are a matrix
        own = 1.0 if self.own == 1 else 0.0  # both stand for all numbers of their kind
        return dataclasses.replace(self, alpha=float(self.alpha > 0), control=control, own=own)

    @property
    def plain(self) -> Arm:
        """Its base optimizer alone."""
        return Arm(self.base)

    @property
    def controls(self) -> tuple[Arm, ...]:
        """All its controls. Variants that keep norms have none for the smaller step."""
        kinds: list[Control] = ["shuffled", "mean"]
        if self.variant == "standard":
            kinds.insert(0, "shrunk")
        return tuple(map(self.controlled, kinds))

    def controlled(self, control: Control) -> Arm:
        """Its control, with the same numbers."""
        return dataclasses.replace(self, control=control)

    def scaled(self, own: float) -> Arm:
        """The same with another rate of the layers."""
        return dataclasses.replace(self, own=own)

    def matrix(self, layers: int, seed: int) -> np.ndarray:
        """The operator of a control that mixes: each seed has a random order of its own."""
        operator = ds.shuffled(ds.window(self.alpha), seed)
        if self.control == "mean":
            operator = ds.mean(self.alpha)
        return np.asarray(ds.operator_matrix(operator, layers), np.float32)

    def mixing(
        self, depth: ds.Depth, alpha: jax.Array, matrix: jax.Array
    ) -> optax.GradientTransformation:
        """What comes between the base optimizer and the learning rate, for all of its kind."""
        where = ds.projections if self.scope == "proj" else None
        if not self.alpha:
            return optax.identity()
        if self.control == "shrunk":
            return ds.shrink_over_depth(ds.window(alpha), depth=depth, where=where)
        operator = ds.from_matrix(matrix) if self.control else ds.window(alpha)
        return ds.augment_over_depth(operator, depth=depth, where=where, variant=self.variant)

    def scaling(self, depth: ds.Depth, own: jax.Array) -> optax.GradientTransformation:
        """What gives the layers a learning rate of their own, for all of its kind."""
        if self.own == 1:
            return optax.identity()
        factors = ds.diagonal(lambda layers, _: jnp.full(layers, own))
        return ds.augment_over_depth(factors, depth=depth)


def preconditioner(base: Base, depth: ds.Depth) -> optax.GradientTransformation:
    """The base optimizer, without learning rate and weight decay."""
    if base == "sgd":
        return optax.trace(0.9)
    if base == "adamw":
        return optax.scale_by_adam()
    numbers = functools.partial(ds.muon_dimension_numbers, depth)
    return optax.contrib.muon(-1.0, muon_weight_dimension_numbers=numbers, consistent_rms=0.2)


def _known(arm: Arm) -> bool:
    choices = (arm.base, Base), (arm.variant, Variant), (arm.scope, Scope), (arm.control, Control)
    numbers = 0 <= arm.alpha < 1 and arm.own > 0
    return numbers and all(value in get_args(each) for value, each in choices)
