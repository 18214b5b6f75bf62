"""The deep MLP from equal layers, with noise that each layer draws for itself."""

from __future__ import annotations

from typing import Literal

import jax
import optax

from benchmarks.quality.mlp import Mlp, ResidualMlp
from benchmarks.quality.model import alike

Noise = Literal["dropped", "private"]
DROPPED = 0.5
"""The share of the layers that a step leaves out."""
DEVIATION = 0.02
"""Of the noise that is added to each number of a layer's gradient."""


class Aligned(Mlp):
    """Signals of neighbours are alike, and their noise is not.

    Attributes:
      noise: ``"dropped"``: each layer is left out of half of the batches, and doubled in the others
        (stochastic depth); ``"private"``: normal noise is added to the layers' gradients.
    """

    def __init__(self, noise: Noise, layers: int = 24, steps: int = 300) -> None:
        self.noise = noise
        super().__init__(layers, steps)

    def _model(self) -> ResidualMlp:
        return ResidualMlp(self.images.classes, self.layers, branch=1 / self.layers)

    def init(self, key: jax.Array) -> optax.Params:
        """Draws the first layer, and makes all others like it."""
        params = super().init(key)["params"]
        return {"params": params | {"blocks": alike(params["blocks"])}}

    def loss(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """That of a batch, with noise."""
        batch, draw = jax.random.split(key)
        if self.noise == "dropped":
            kept = jax.random.bernoulli(draw, 1 - DROPPED, (self.layers,)) / (1 - DROPPED)
            return self._loss(params, batch, kept)
        blocks = params["params"]["blocks"]
        noise = optax.tree.random_like(draw, blocks, jax.random.normal)
        added = DEVIATION * optax.tree.vdot(noise, blocks)  # the noise is its gradient
        return self._loss(params, batch) + added - jax.lax.stop_gradient(added)
