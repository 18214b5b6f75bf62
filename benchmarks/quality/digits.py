"""Images to be told apart by a vision transformer: handwritten digits, or CIFAR-100."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.quality.arms import Base
from benchmarks.quality.images import load_cifar100, load_digits, patches
from benchmarks.quality.model import dense, stack
from benchmarks.quality.task import Task, halves
from depthsmooth import trace_depth

BATCH, EXAMINED = 16, 150
"""Images in a batch of training, and those examined at a time."""


class Digits(Task):
    """A vision transformer learns what an image shows.

    The digits have 16 patches and the model is 32 wide; CIFAR-100 has 64, and it is 64 wide.
    """

    rates: ClassVar[Mapping[Base, float]] = {"sgd": 0.02, "adamw": 2.5e-3, "muon": 8e-3}

    def __init__(
        self, layers: int = 12, steps: int = 300, cifar100: pathlib.Path | None = None
    ) -> None:
        super().__init__(layers, steps)
        self.images = load_cifar100(cifar100) if cifar100 else load_digits()
        self.data = self.images.digest
        self.train = jnp.asarray(self.images.train)
        self.labels = jnp.asarray(self.images.train_labels)
        self.test = halves(self.images.test)
        self.test_labels = halves(self.images.test_labels)
        self.model = self._model()
        params = jax.eval_shape(self.init, jax.random.key(0))
        self.depth = trace_depth(self._logits, params, self.test[0, :BATCH])

    def _model(self) -> nn.Module:
        patch, width = (4, 64) if self.images.classes == 100 else (2, 32)
        return VisionTransformer(self.images.classes, self.layers, patch, width)

    def init(self, key: jax.Array) -> optax.Params:
        """Draws parameters."""
        return self.model.init(key, jnp.zeros((1, *self.images.train.shape[1:])))

    def loss(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Mean cross-entropy in nats per image."""
        return self._loss(params, key)

    def _loss(self, params: optax.Params, key: jax.Array, *others: jax.Array) -> jax.Array:
        drawn = jax.random.randint(key, (BATCH,), 0, len(self.train))
        logits = self._logits(params, self.train[drawn], *others)
        return _losses(logits, self.labels[drawn]).mean()

    def evaluate(
        self, params: optax.Params, key: jax.Array, part: jax.Array
    ) -> dict[str, jax.Array]:
        """Of half of the images that are held out: loss, and the share that is told right."""

        def examined(image: jax.Array) -> jax.Array:
            return self._logits(params, image[None])[0]

        logits = jax.lax.map(examined, self.test[part], batch_size=EXAMINED)
        labels = self.test_labels[part]
        right = logits.argmax(-1) == labels
        return {"loss": _losses(logits, labels).mean(), "accuracy": right.mean()}

    def states(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Of one batch."""
        drawn = jax.random.randint(key, (BATCH,), 0, self.test.shape[1])
        return self.model.apply(params, self.images.normalised(self.test[0, drawn]))[1]

    def _logits(self, params: optax.Params, pixels: jax.Array, *others: jax.Array) -> jax.Array:
        return self.model.apply(params, self.images.normalised(pixels), *others)[0]


class VisionTransformer(nn.Module):
    """Images (batch, side, side, channels) to logits (batch, classes)."""

    classes: int
    layers: int
    patch: int
    width: int
    heads: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives logits, and the hidden states (layers + 1, batch, tokens, width)."""
        tokens = patches(images, self.patch)
        _, length, pixels = tokens.shape
        positions = self.param("positions", nn.initializers.normal(0.5), (length, self.width))
        first = dense(self.width, pixels, "embed")(tokens) + positions
        last, states = stack(self.layers, "blocks", self.heads)(first, None)
        pooled = nn.LayerNorm(name="norm")(last).mean(1)
        head = dense(self.classes, self.width, "head")
        return head(pooled), jnp.concatenate([first[None], states])


def _losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
