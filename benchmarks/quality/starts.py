"""Text again, from layers that begin alike or not, with gradients coupled for a while or not."""

from __future__ import annotations

import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import optax

import depthsmooth as ds
from benchmarks.quality.model import Transformer, alike
from benchmarks.quality.text import Text

Start = Literal["independent", "equal", "permuted"]
COUPLED = 0.2
"""The share of the steps in which the layers' gradients are their mean."""


class Starts(Text):
    """The model of the text, each of whose L layers adds 1/L of what it makes.

    Attributes:
      start: ``"independent"``: each layer is drawn; ``"equal"``: all are the first; ``"permuted"``:
        as equal ones, but each layer has an order of its own of hidden units and of heads. That
        changes neither what a layer does nor how it would train by itself.
      coupled: whether gradients are the mean over layers at first, before the base optimizer.
    """

    def __init__(
        self,
        start: Start,
        coupled: bool,
        layers: int = 16,
        steps: int = 300,
        text: pathlib.Path | None = None,
    ) -> None:
        self.start, self.coupled = start, coupled
        super().__init__(layers, steps, text)

    def _model(self) -> Transformer:
        return Transformer(256, self.layers, causal=True, branch=1 / self.layers)

    def init(self, key: jax.Array) -> optax.Params:
        """Draws parameters."""
        params = super().init(key)
        if self.start == "independent":
            return params
        blocks = alike(params["params"]["blocks"])
        if self.start == "permuted":
            permute = jax.vmap(lambda layer, key: permuted(layer, self.model.heads, key))
            blocks = permute(blocks, jax.random.split(jax.random.fold_in(key, 1), self.layers))
        return {"params": params["params"] | {"blocks": blocks}}

    def before(self) -> optax.GradientTransformation:
        """The mean over layers, for the first steps."""
        if not self.coupled:
            return optax.identity()
        mean = ds.mean(lambda count: jnp.where(count < COUPLED * self.steps, 1.0, 0.0))
        return ds.augment_over_depth(mean, depth=self.depth)


def permuted(layer: optax.Params, heads: int, key: jax.Array) -> optax.Params:
    """One block with its hidden units and its heads in another order, which does the same."""
    of_units, of_heads = jax.random.split(key)
    units = jax.random.permutation(of_units, layer["mlp_in"]["bias"].size)
    width = layer["out"]["bias"].size
    order = jax.random.permutation(of_heads, heads)
    features, thirds = (
        jnp.arange(size).reshape(heads, -1)[order].reshape(-1) for size in (width, 3 * width)
    )
    return layer | {
        "mlp_in": jax.tree.map(lambda leaf: leaf[..., units], layer["mlp_in"]),
        "mlp_out": layer["mlp_out"] | {"kernel": layer["mlp_out"]["kernel"][units]},
        "qkv": jax.tree.map(lambda leaf: leaf[..., thirds], layer["qkv"]),
        "out": layer["out"] | {"kernel": layer["out"]["kernel"][features]},
    }
