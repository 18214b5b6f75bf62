"""Noise to be told from handwritten digits by a U-shaped transformer, three containers deep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthsmooth as ds
from benchmarks.quality.arms import Base
from benchmarks.quality.images import load_digits, patches
from benchmarks.quality.model import Block, dense, stack
from benchmarks.quality.task import Task, halves

TIMES, BATCH, DRAWS = 1000, 16, 4
"""Steps from image to noise; images in a batch; draws of noise for each image examined."""
PATCH = 2


class Diffusion(Task):
    """A diffusion model learns what noise was added to an image.

    The blocks of all containers are one sequence of layers. ``skip``, which the blocks of
    ``out_blocks`` alone have, is left alone: controls are matrices for all of the layers.

    References:
      Bao et al., `All are Worth Words: A ViT Backbone for Diffusion Models
      <https://arxiv.org/abs/2209.12152>`_, 2023.
      Ho, Jain, Abbeel, `Denoising Diffusion Probabilistic Models
      <https://arxiv.org/abs/2006.11239>`_, 2020.
      Nichol, Dhariwal, `Improved Denoising Diffusion Probabilistic Models
      <https://arxiv.org/abs/2102.09672>`_, 2021 (the cosine schedule).
    """

    rates: ClassVar[Mapping[Base, float]] = {"sgd": 0.1, "adamw": 1e-2, "muon": 1e-2}

    def __init__(self, layers: int = 9, steps: int = 600) -> None:
        """Loads the digits.

        Raises:
          ValueError: if the layers are not one in the middle of two halves.
        """
        if layers < 3 or layers % 2 == 0:
            raise ValueError(
                f"--layers {layers}: diffusion has one block between as many before it as after "
                "it. Give an odd number from 3 on."
            )
        super().__init__(layers, steps)
        images = load_digits()
        self.data = images.digest
        self.train, self.test = (
            jnp.asarray(patches(images.normalised(pixels), PATCH), jnp.float32)
            for pixels in (images.train, images.test)
        )
        self.test = halves(self.test)
        self.model = UTransformer(layers // 2)
        blocks = ds.sequence(("params/in_blocks", 0), "params/mid_block", ("params/out_blocks", 0))
        rules = ds.Depth.from_rules({"params/.*_blocks?/(?!skip).*": blocks})
        self.depth = rules.resolve(jax.eval_shape(self.init, jax.random.key(0)))

    def init(self, key: jax.Array) -> optax.Params:
        """Draws parameters."""
        return self.model.init(key, self.train[:1], jnp.zeros(1, jnp.int32))

    def loss(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Mean squared error of the noise that is predicted."""
        draw, noise = jax.random.split(key)
        drawn = jax.random.randint(draw, (BATCH,), 0, len(self.train))
        return self._error(params, self.train[drawn], noise)

    def evaluate(
        self, params: optax.Params, key: jax.Array, part: jax.Array
    ) -> dict[str, jax.Array]:
        """The same of half of the images that are held out, several times."""
        keys = jax.random.split(key, DRAWS)
        errors = jax.lax.map(lambda key: self._error(params, self.test[part], key), keys)
        return {"loss": errors.mean()}

    def states(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Of one batch."""
        noisy, times, _ = _noised(self.test[0, :BATCH], key)
        return self.model.apply(params, noisy, times)[1]

    def _error(self, params: optax.Params, tokens: jax.Array, key: jax.Array) -> jax.Array:
        noisy, times, noise = _noised(tokens, key)
        return jnp.square(self.model.apply(params, noisy, times)[0] - noise).mean()


class UTransformer(nn.Module):
    """Noisy patches (batch, tokens, pixels) and their times (batch,) to the noise in them.

    Each block of the second half is also given what the block opposite of it has put out: the
    first what the last of the first half has.
    """

    half: int
    width: int = 32
    heads: int = 4

    @nn.compact
    def __call__(self, noisy: jax.Array, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives the noise, and the hidden states (2·half + 2, batch, tokens + 1, width)."""
        _, length, pixels = noisy.shape
        positions = self.param("positions", nn.initializers.normal(0.5), (length + 1, self.width))
        time = dense(self.width, self.width, "time")(_waves(times, self.width))
        tokens = dense(self.width, pixels, "embed")(noisy)
        first = jnp.concatenate([time[:, None], tokens], 1) + positions
        inner, before = stack(self.half, "in_blocks", self.heads)(first, None)
        middle, _ = Block(self.heads, name="mid_block")(inner)
        out_blocks = nn.scan(
            SkipBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.half
        )
        last, after = out_blocks(self.heads, name="out_blocks")(middle, before[::-1])
        noise = dense(pixels, self.width, "head")(nn.LayerNorm(name="norm")(last[:, 1:]))
        return noise, jnp.concatenate([first[None], before, middle[None], after])


class SkipBlock(Block):
    """A block that joins a second stream to the first."""

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps two streams (batch, tokens, width) to one, twice."""
        width = x.shape[-1]
        return super().__call__(dense(width, 2 * width, "skip")(jnp.concatenate([x, skip], -1)))


def _noised(tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images with noise, the times that say how much, and the noise.

    Times begin at random and are spread evenly, which makes losses less noisy.
    """
    start, draw = jax.random.split(key)
    count = len(tokens)
    spread = (jax.random.uniform(start) + jnp.arange(count) / count) % 1.0
    times = 1 + jnp.floor(TIMES * spread).astype(jnp.int32)
    noise = jax.random.normal(draw, tokens.shape)
    angle = (times[:, None, None] / TIMES + 0.008) / 1.008 * np.pi / 2
    return jnp.cos(angle) * tokens + jnp.sin(angle) * noise, times, noise


def _waves(times: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of each time, (batch, width), with periods from 2π to 20,000π."""
    frequencies = 1e-4 ** (np.arange(width // 2) / (width // 2))
    angles = times[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
