"""Handwritten digits to be told apart by a deep residual MLP without normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.quality.arms import Base
from benchmarks.quality.digits import Digits
from benchmarks.quality.model import dense

WIDTH = 32


class Mlp(Digits):
    """The digits again, by a model whose layers want a smaller rate than the rest."""

    rates: ClassVar[Mapping[Base, float]] = {"sgd": 0.01, "adamw": 2e-3, "muon": 4e-3}

    def __init__(self, layers: int = 24, steps: int = 300) -> None:
        super().__init__(layers, steps)

    def _model(self) -> nn.Module:
        return ResidualMlp(self.images.classes, self.layers)


class Layer(nn.Module):
    """Adds what two linear layers make of the stream to it."""

    @nn.compact
    def __call__(self, x: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps the stream (batch, width) to itself, twice: ``nn.scan`` keeps the second."""
        x = x + factor * dense(WIDTH, WIDTH, "out")(nn.gelu(dense(WIDTH, WIDTH, "in")(x)))
        return x, x


class ResidualMlp(nn.Module):
    """Images (batch, side, side, channels) to logits (batch, classes)."""

    classes: int
    layers: int
    branch: float = 1.0

    @nn.compact
    def __call__(
        self, images: jax.Array, kept: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Gives logits, and the hidden states (layers + 1, batch, width).

        What each layer adds is multiplied by ``branch``, and by its number in ``kept``.
        """
        factors = self.branch * (jnp.ones(self.layers) if kept is None else kept)
        pixels = images.reshape(len(images), -1)
        first = dense(WIDTH, pixels.shape[1], "embed")(pixels)
        blocks = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        last, states = blocks(name="blocks")(first, factors)
        head = dense(self.classes, WIDTH, "head")
        return head(last), jnp.concatenate([first[None], states])
