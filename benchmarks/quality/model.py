"""The transformer block that all tasks repeat, stacked by ``nn.scan``."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Block(nn.Module):
    """Attention, then an MLP, each normalised before and added to the stream.

    Kernels and biases begin uniform in ±1/√(features in). ``branch`` multiplies what is added.
    """

    heads: int
    causal: bool = False
    branch: float = 1.0
    expansion: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, jax.Array]:
        """Maps the stream (batch, tokens, width) to itself, twice: ``nn.scan`` keeps the second."""
        batch, tokens, width = x.shape
        hidden = dense(3 * width, width, "qkv")(nn.LayerNorm(name="attention_norm")(x))
        queries, keys, values = jnp.split(hidden.reshape(batch, tokens, self.heads, -1), 3, -1)
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=self.causal)
        x = x + self.branch * dense(width, width, "out")(mixed.reshape(x.shape))
        inner = self.expansion * width
        hidden = dense(inner, width, "mlp_in")(nn.LayerNorm(name="mlp_norm")(x))
        x = x + self.branch * dense(width, inner, "mlp_out")(nn.gelu(hidden, approximate=False))
        return x, x


def alike(blocks: optax.Params) -> optax.Params:
    """Stacked blocks, all of which are the first."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), blocks)


def dense(features: int, inputs: int, name: str, *, bias: bool = True) -> nn.Dense:
    """A linear layer that begins uniform in ±1/√inputs."""
    draw = functools.partial(_uniform, limit=inputs**-0.5)
    return nn.Dense(features, use_bias=bias, kernel_init=draw, bias_init=draw, name=name)


def _uniform(
    key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, limit: float
) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def stack(
    layers: int, name: str, heads: int, causal: bool = False, branch: float = 1.0
) -> nn.Module:
    """Blocks in a row: gives the stream, and what it was after each, (layers, batch, …)."""
    blocks = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=layers,
    )
    return blocks(heads, causal, branch, name=name)


class Transformer(nn.Module):
    """Tokens (batch, tokens) to logits (batch, tokens, vocabulary)."""

    vocabulary: int
    layers: int
    width: int = 32
    heads: int = 4
    causal: bool = False
    branch: float = 1.0

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives logits, and the hidden states (layers + 1, batch, tokens, width)."""
        length = tokens.shape[-1]
        embed = nn.Embed(
            self.vocabulary, self.width, embedding_init=nn.initializers.normal(1.0), name="embed"
        )
        positions = self.param("positions", nn.initializers.normal(0.02), (length, self.width))
        first = embed(tokens) + positions
        blocks = stack(self.layers, "blocks", self.heads, self.causal, self.branch)
        last, states = blocks(first, None)
        head = dense(self.vocabulary, self.width, "head", bias=False)
        return head(nn.LayerNorm(name="norm")(last)), jnp.concatenate([first[None], states])
