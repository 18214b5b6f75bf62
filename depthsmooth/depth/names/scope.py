"""Which tensors of a layer are mixed."""

import re

import jax

from depthsmooth.depth.leaves import shape_of

_NORM = re.compile(r"norm|(^|_)(ln|bn|gn|rms)(_|$)")
_NOT_LINEAR = re.compile(_NORM.pattern + r"|(^|_)embed(ding)?s?$")
_IS_NORM = re.compile(r"(norm|(^|_)(ln|bn|gn|rms))$")
_MATRIX = re.compile(r"(^|_)(w|weights?|linear|einsum|router|proj|lora)(_|$)|^w([a-z]{1,3}|_.*)$")
_BIAS = re.compile(r"^b(ias)?$|_b$|^b_?[a-z]{1,2}$|^b_(in|out|gate|up|down|proj)$|_bias$|^bias_")
_OTHER = re.compile(
    r"embed|(^|_)(pos|position|dt|rel\w*|time|a_log|correction)(_|$)|scalar|gamma|beta|offset"
    r"|(^|_)(scale|token|latent|probe|prompt)s?(_|$)"
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
    names = [_plain(key) for key in path.split("/")]
    named = [name for name in names if name]
    name, module = (["", *named])[-1], (["", "", *named])[-2]
    if name == "kernel":
        return not _IS_NORM.search(module)
    if _OTHER.search(name) or _NORM.search(name) or _NOT_LINEAR.search(module):
        return False
    return (
        bool(_MATRIX.search(name) or _BIAS.search(name))
        or sum(size > 1 for size in shape_of(leaf)) >= 3
    )


def _plain(key: str) -> str:
    """A key in snake case, without numbers: ``LayerNorm_0`` is ``layer_norm``.

    Example:
      >>> _plain("LayerNorm_0"), _plain("wi_1"), _plain("3"), _plain("~")
      ('layer_norm', 'wi', '', '')
    """
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
    return re.sub(r"[^a-z]+", "_", snake).strip("_")
