"""A byte-level language model on real text: the standard library's source, or the user's own."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from benchmarks.quality.arms import Base
from benchmarks.quality.model import Transformer
from benchmarks.quality.task import Task
from depthsmooth import trace_depth
from depthsmooth.demo.text import load

BATCH, CONTEXT, EXAMINED = 8, 32, 64


class Text(Task):
    """A decoder learns to tell the next byte."""

    rates: ClassVar[Mapping[Base, float]] = {"sgd": 0.3, "adamw": 8e-3, "muon": 1.6e-2}

    def __init__(
        self, layers: int = 16, steps: int = 300, text: pathlib.Path | None = None
    ) -> None:
        super().__init__(layers, steps)
        corpus = load(text, 2 * CONTEXT)
        self.data = corpus.digest
        self.train = jnp.asarray(corpus.train)
        half = len(corpus.validation) // 2
        self.validation = jnp.asarray(corpus.validation[: 2 * half].reshape(2, half))
        self.model = self._model()
        params = jax.eval_shape(self.init, jax.random.key(0))
        windows = jax.ShapeDtypeStruct((BATCH, CONTEXT + 1), jnp.int32)
        self.depth = trace_depth(self._loss, params, windows)

    def _model(self) -> Transformer:
        return Transformer(256, self.layers, causal=True)

    def init(self, key: jax.Array) -> optax.Params:
        """Draws parameters."""
        return self.model.init(key, jnp.zeros((1, CONTEXT), jnp.int32))

    def loss(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Mean cross-entropy in nats per byte."""
        return self._loss(params, _windows(self.train, key, BATCH))

    def evaluate(
        self, params: optax.Params, key: jax.Array, part: jax.Array
    ) -> dict[str, jax.Array]:
        """Of text that is not learnt from: loss, and bits per byte."""
        loss = self._loss(params, _windows(self.validation[part], key, EXAMINED))
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def states(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Of one batch."""
        return self.model.apply(params, _windows(self.validation[0], key, BATCH)[:, :-1])[1]

    def _loss(self, params: optax.Params, windows: jax.Array) -> jax.Array:
        logits, _ = self.model.apply(params, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def _windows(content: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Random places of the text: int32 of shape (count, CONTEXT + 1)."""
    starts = jax.random.randint(key, (count, 1), 0, len(content) - CONTEXT)
    return content[starts + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
