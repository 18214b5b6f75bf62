"""Sequences to be written backwards, in the set-up of the published replication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from benchmarks.quality.arms import Base
from benchmarks.quality.model import Transformer
from benchmarks.quality.task import Task
from depthsmooth import trace_depth

VOCABULARY, LENGTH, BATCH, EXAMINED = 32, 12, 8, 128


class Reversal(Task):
    """An encoder learns to give the last token first.

    References:
      The replication in https://github.com/supergitty520/fe-e-transformer-research has these
      sizes, this initialisation and AdamW at 2e-3 without a schedule.
    """

    rates: ClassVar[Mapping[Base, float]] = {"sgd": 0.3, "adamw": 2e-3, "muon": 4e-3}

    def __init__(self, layers: int = 24, steps: int = 200) -> None:
        super().__init__(layers, steps)
        self.model = Transformer(VOCABULARY, layers)
        tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
        params = jax.eval_shape(self.init, jax.random.key(0))
        self.depth = trace_depth(
            lambda params, tokens: self.model.apply(params, tokens)[0], params, tokens
        )

    def init(self, key: jax.Array) -> optax.Params:
        """Draws parameters."""
        return self.model.init(key, jnp.zeros((1, LENGTH), jnp.int32))

    def loss(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Mean cross-entropy in nats per token."""
        return self._examined(params, _tokens(key, BATCH))[0]

    def evaluate(
        self, params: optax.Params, key: jax.Array, part: jax.Array
    ) -> dict[str, jax.Array]:
        """Loss, and the share of tokens that are right."""
        loss, accuracy = self._examined(params, _tokens(key, EXAMINED))
        return {"loss": loss, "accuracy": accuracy}

    def states(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Of one batch."""
        return self.model.apply(params, _tokens(key, BATCH))[1]

    def schedule(self, count: jax.Array) -> jax.Array:
        """As published: none."""
        return jnp.ones_like(count, float)

    def _examined(self, params: optax.Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, _ = self.model.apply(params, tokens)
        wanted = tokens[:, ::-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return losses.mean(), (logits.argmax(-1) == wanted).mean()


def _tokens(key: jax.Array, batch: int) -> jax.Array:
    return jax.random.randint(key, (batch, LENGTH), 0, VOCABULARY)
