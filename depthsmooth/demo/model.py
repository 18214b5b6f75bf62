"""A decoder-only transformer over bytes, its blocks stacked by ``nn.scan``."""

import flax.linen as nn
import jax

VOCABULARY = 256


class Block(nn.Module):
    """Causal attention, then an MLP, each normalised before and added to the stream."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """Maps the stream (batch, context, width) to itself; ``nn.scan`` wants the None."""
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False, name="attention")
        x = x + attention(nn.LayerNorm(name="attention_norm")(x), mask=mask)
        hidden = nn.Dense(4 * width, name="mlp_in")(nn.LayerNorm(name="mlp_norm")(x))
        return x + nn.Dense(width, name="mlp_out")(nn.gelu(hidden)), None


class Transformer(nn.Module):
    """Predicts the next byte: tokens (batch, context) to logits (batch, context, 256)."""

    layers: int
    width: int
    heads: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Applies embedding, blocks, norm and head."""
        context = tokens.shape[-1]
        positions = self.param("positions", nn.initializers.normal(0.02), (context, self.width))
        x = nn.Embed(VOCABULARY, self.width, name="embed")(tokens) + positions
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        x, _ = blocks(self.heads, name="blocks")(x, nn.make_causal_mask(tokens))
        return nn.Dense(VOCABULARY, name="head")(nn.LayerNorm(name="norm")(x))
