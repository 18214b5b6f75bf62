"""Reinforcement learning with answers that can be checked: a decoder learns to add by GRPO."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from benchmarks.quality import addition
from benchmarks.quality.addition import ANSWER, PROMPT
from benchmarks.quality.arms import Base
from benchmarks.quality.model import Transformer
from benchmarks.quality.task import Task, halves
from depthsmooth import trace_depth

PROMPTS, GROUP, BETA, EPSILON = 8, 8, 0.04, 1e-4


class Policy(Task):
    """Group-relative policy optimisation of a pretrained decoder, one update for each sample.

    References:
      Shao et al., DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.
    """

    rates: ClassVar[Mapping[Base, float]] = {"sgd": 0.01, "adamw": 1e-3, "muon": 2e-3}
    decay: ClassVar[float] = 0.0
    data = addition.SETTINGS

    def __init__(self, layers: int = 12, steps: int = 100) -> None:
        super().__init__(layers, steps)
        self.model = Transformer(addition.VOCABULARY, layers, causal=True)
        tokens = jax.ShapeDtypeStruct((PROMPTS, PROMPT + ANSWER - 1), jnp.int32)
        params = jax.eval_shape(self.model.init, jax.random.key(0), tokens)
        self.depth = trace_depth(
            lambda params, tokens: self.model.apply(params, tokens)[0], params, tokens
        )

    @functools.cached_property
    def reference(self) -> optax.Params:
        """The pretrained decoder, the same for all seeds."""
        with jax.ensure_compile_time_eval():  # what asks for it may be traced
            return addition.pretrained(self.model)

    def init(self, key: jax.Array) -> optax.Params:
        """The pretrained decoder."""
        return self.reference

    def loss(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """The surrogate of answers that the policy itself draws, and β times its divergence."""
        draw, sample = jax.random.split(key)
        sums = jnp.repeat(addition.taught(draw, PROMPTS), GROUP, 0)
        answered = self.answered(jax.lax.stop_gradient(params), sums, sample)
        advantage = advantages(reward(answered, sums)[0].reshape(PROMPTS, GROUP)).reshape(-1, 1)
        own = addition.log_probabilities(self.model, params, answered)
        reference = addition.log_probabilities(self.model, self.reference, answered)
        return surrogate(own, advantage) + BETA * divergence(own, reference)

    def evaluate(
        self, params: optax.Params, key: jax.Array, part: jax.Array
    ) -> dict[str, jax.Array]:
        """Of answers to half of the held-out prompts: 1 − reward, reward, and the share right."""
        sums = halves(addition.HELD)[part]
        rewards, exact = reward(self.answered(params, sums, key), sums)
        return {"loss": 1 - rewards.mean(), "reward": rewards.mean(), "exact": exact.mean()}

    def states(self, params: optax.Params, key: jax.Array) -> jax.Array:
        """Of held-out prompts and their right answers."""
        sums = jax.random.choice(key, addition.HELD, (PROMPTS,))
        return self.model.apply(params, sums[:, :-1])[1]

    def answered(self, params: optax.Params, sums: jax.Array, key: jax.Array) -> jax.Array:
        """The sums with answers of the policy in place of the right ones, at temperature 1."""

        def write(place: jax.Array, tokens: jax.Array) -> jax.Array:
            logits, _ = self.model.apply(params, tokens[:, :-1])
            drawn = jax.random.categorical(jax.random.fold_in(key, place), logits[:, place - 1])
            return tokens.at[:, place].set(drawn)

        hidden = sums.at[:, PROMPT:].set(0)
        return jax.lax.fori_loop(PROMPT, PROMPT + ANSWER, write, hidden)


def reward(answered: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """5/8 for the right answer and 1/8 for each right digit; and whether the answer is right.

    Args:
      answered: prompts and answers, of shape (batch, PROMPT + ANSWER).
      sums: the same prompts with the right answers.

    Returns:
      Rewards from 0 to 1, and booleans, both of shape (batch,).

    Example:
      >>> right = jnp.array([[3, 7, 10, 4, 5, 11, 2, 8, 0]])
      >>> reward(right.at[0, -1].set(1), right)
      (Array([0.25], dtype=float32), Array([False], dtype=bool))
    """
    digits = answered[:, PROMPT:] == sums[:, PROMPT:]
    exact = digits.all(1)
    return (5 * exact + digits.sum(1)) / 8, exact


def advantages(rewards: jax.Array) -> jax.Array:
    """(r − mean) / (std + ε) over the last axis, the answers to one prompt."""
    deviation = rewards - rewards.mean(-1, keepdims=True)
    return deviation / (rewards.std(-1, keepdims=True) + EPSILON)


def surrogate(own: jax.Array, advantage: jax.Array) -> jax.Array:
    """−mean(A · log π) over the digits of all answers.

    GRPO clips the ratio to the policy that drew the answers. Here that is the policy itself: the
    ratio is 1, never clipped, and its gradient is that of log π.
    """
    return -(advantage * own).mean()


def divergence(own: jax.Array, reference: jax.Array) -> jax.Array:
    """KL(π ‖ reference), the mean of the unbiased estimator r − log r − 1, r = reference / π."""
    log_ratio = reference - own
    return (jnp.exp(log_ratio) - log_ratio - 1).mean()
