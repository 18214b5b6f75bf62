"""Which tensors of a layer are mixed."""

import re

import jax

from depthsmooth.depth.leaves import shape_of

# LayerNorm_0 of Flax, input_layernorm of Llama; ln_1 of GPT-2; bn of ResNets, gn of BiT.
_NORM = re.compile(r"norm|(^|_)(ln|bn|gn)(_|$)")
# value_embed/weight, an embedding in each layer; embed/b of Haiku, word_embeddings/weight of BERT.
_NOT_LINEAR = re.compile(_NORM.pattern + r"|(^|_)embed(ding)?s?$")
# w of Haiku and query_w of AlphaFold, weight of Equinox and PyTorch, mlp/linear of Gemma in openpi,
# MoE_0/router of the small models with experts in tests/data, q/lora_a of Gemma;
# wq of the Scaling Book, wqkv of blocks written by hand.
_MATRIX = re.compile(r"(^|_)(w|weight|linear|router|lora)(_|$)|^w[a-z]{1,3}$")
# b of Haiku, output_b of AlphaFold, bq beside wq, b_Q of TransformerLens, b_out beside w_out;
# wi_0_bias of GPT-OSS in MaxText, bias_n of the GRU of Equinox.
_BIAS = re.compile(r"^b(ias)?$|_b$|^b_?[a-z]$|^b_(in|out)$|_bias$|^bias_")
# rel_pos_w of SAM, position_bias, dt_bias and A_log of Qwen3-Next, time_maa_w of RWKV,
# e_score_correction_bias of DeepSeek, cls_token of ViT and probe of big_vision.
# Vectors that are stacked along two axes have as many axes as matrices: layer_scale, layer_scalar
# of Gemma 4, gamma and beta of Keras, offset of Haiku.
_OTHER = re.compile(
    r"embed|(^|_)(pos|position|dt|time|a_log|correction|scale|token|probe)(_|$)"
    r"|scalar|gamma|beta|offset"
)


def projections(path: str, leaf: jax.Array) -> bool:
    """The paper's Proj scope: kernels and biases of linear layers, no norms, no embeddings.

    Tells by the names that Flax, nnx, Equinox and Haiku use, and by those usual in JAX written
    by hand: ``kernel``, ``weight``, ``w``, ``wq``, ``w_in``, ``bias``, ``b``, but not in a
    ``norm`` or ``ln``. A leaf of another name is a projection if it has three axes or more that
    are longer than 1, as no vector has that is stacked once.

    Args:
      path: the leaf's keys joined by ``/``.
      leaf: the leaf, stacked or not, along any axis.

    Returns:
      Whether it belongs to a linear layer.

    Example:
      >>> scale, kernel = jax.ShapeDtypeStruct((12, 8), "float32"), jax.numpy.ones((8, 12, 8))
      >>> projections("layers/mlp/kernel", kernel), projections("layers/norm/scale", scale)
      (True, False)

    References:
      Meng, Sugolov, Papyan, `Gradient Smoothing
      <https://arxiv.org/abs/2606.30813>`_, 2026 (scopes Full and Proj).
    """
    names = [_snake_case(key) for key in path.split("/")]
    named = [name for name in names if name]
    name, module = (["", *named])[-1], (["", "", *named])[-2]
    if name == "kernel":
        # EasyDeL's norms have a kernel, as in input_layernorm/kernel.
        return not module.endswith("norm")
    if _OTHER.search(name) or _NORM.search(name) or _NOT_LINEAR.search(module):
        return False
    return (
        bool(_MATRIX.search(name) or _BIAS.search(name))
        # A temperature of shape (layers, heads, 1) is a vector for all that.
        or sum(size > 1 for size in shape_of(leaf)) >= 3
    )


def _snake_case(key: str) -> str:
    """A key in snake case, without numbers: ``LayerNorm_0`` is ``layer_norm``.

    Example:
      >>> _snake_case("LayerNorm_0"), _snake_case("wi_1"), _snake_case("3"), _snake_case("~")
      ('layer_norm', 'wi', '', '')
    """
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
    return re.sub(r"[^a-z]+", "_", snake).strip("_")
