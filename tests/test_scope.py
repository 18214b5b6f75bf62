"""ds.projections tells linear layers from the rest by the names of real frameworks."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import depthsmooth as ds
from depthsmooth.depth.paths import leaves_of
from tests.test_finding import TREES

KEY = jax.random.key(0)


def names(tree):
    return dict(leaves_of(tree)[0])


def selected(tree):
    return {path for path, leaf in names(tree).items() if ds.projections(path, leaf)}


class LinenBlock(nn.Module):
    """Linear layers of many kinds, and what is none."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(name="ln_1")(x)
        y = nn.MultiHeadDotProductAttention(2)(nn.RMSNorm()(y))
        y = nn.GroupNorm(2)(nn.Dense(8)(y))
        scale = self.param("layer_scale", nn.initializers.ones, (8,))
        return x + scale * nn.Conv(8, (3,))(nn.Einsum((8, 8), "...i,ij->...j")(y)), None


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_linen(axis):
    x = jnp.ones((2, 4, 8))
    block = LinenBlock()
    if axis is not None:
        block = nn.scan(
            LinenBlock, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
        )()
    params = block.init(KEY, x, None)["params"]
    kept = {path.rsplit("/", 1)[0].split("/")[-1] for path in selected(params)}
    assert {name.rstrip("_0123456789") for name in kept} == {
        "Conv",
        "Dense",
        "Einsum",
        "key",
        "out",
        "query",
        "value",
    }
    linear = [path for path in names(params) if path.split("/")[-1] in ("kernel", "bias")]
    norms = [path for path in linear if "Norm" in path or "ln_" in path]
    assert selected(params) == set(linear) - set(norms)


def test_nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1 = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.mlp = nnx.Linear(8, 8, rngs=rngs)
            self.post_norm = nnx.RMSNorm(8, rngs=rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(axis_size=3)
    def stack(rngs):
        return Block(rngs)

    state = nnx.state(stack(nnx.Rngs(0)), nnx.Param)
    paths = set(names(state))
    assert any("attention" in path for path in paths)
    assert selected(state) == {path for path in paths if "norm" not in path}


def test_equinox():
    class Block(eqx.Module):
        ln: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        norms: list
        mlp: eqx.nn.MLP

    def make(key):
        norms = [eqx.nn.RMSNorm(8), eqx.nn.GroupNorm(2, 8)]
        attention = eqx.nn.MultiheadAttention(2, 8, use_output_bias=True, key=key)
        return Block(eqx.nn.LayerNorm(8), attention, norms, eqx.nn.MLP(8, 8, 16, 2, key=key))

    for blocks in (make(KEY), eqx.filter_vmap(make)(jax.random.split(KEY, 3))):
        params = eqx.filter(blocks, eqx.is_inexact_array)
        paths = set(names(params))
        assert selected(params) == {path for path in paths if not path.startswith(("ln", "norms"))}
        assert {"attention/output_proj/bias", "mlp/layers/1/weight"} <= selected(params)


def test_haiku():
    def block(x):
        y = hk.LayerNorm(-1, True, True)(x)
        y = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal())(y, y, y)
        return x + hk.nets.MLP([16, 8])(hk.RMSNorm(-1)(y))

    params = hk.transform(block).init(KEY, jnp.ones((4, 8)))
    paths = set(names(params))
    assert selected(params) == {path for path in paths if path.split("/")[-1] in ("w", "b")}
    assert {path.split("/")[-1] for path in paths - selected(params)} == {"scale", "offset"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("layers/wq", True),
        ("layers/w_gate", True),
        ("layers/w1", True),
        ("layers/b1", True),
        ("layers/b_out", True),
        ("layers/ln1_scale", False),
        ("layers/ln_b", False),
        ("layers/ln1/b", False),
        ("layers/gn/bias", False),
        ("layers/3/input_layernorm/kernel", False),
        ("layers/3/self_attn/q_norm/kernel", False),
        ("layers/time_faaaa", False),
        ("layers/position_bias", False),
        ("layers/e_score_correction_bias", False),
        ("layers/cls_token", False),
        ("layers/attention/output_b", True),
        ("layers/mlp/downscale_weight", True),
        ("layers/value_embed/weight", False),
        ("layers/embed_proj/weight", True),
        ("layers/attn_norm/weight", False),
        ("layers/LayerNormDense_0/kernel", True),
        ("layers/LayerNormDense_0/ln_bias", False),
        ("layers/post_attention/w", True),
        ("layers/rel_pos_bias", False),
        ("layers/pos_embedding", False),
        ("layers/gamma", False),
        ("layers/A_log", False),
        ("layers/dt_bias", False),
        ("layers/sinks", False),
        ("layers/wi_0_bias", True),
        ("scale", False),
        ("kernel", True),
        ("", False),
    ],
)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_names(path, expected, shape):
    assert ds.projections(path, jax.ShapeDtypeStruct(shape, "float32")) is expected


def test_names_that_say_nothing_go_by_the_number_of_axes():
    assert ds.projections("layers/gating", jax.ShapeDtypeStruct((12, 8, 8), "float32"))
    assert not ds.projections("layers/gating", jax.ShapeDtypeStruct((12, 8), "float32"))
    assert not ds.projections("layers/temperature", jax.ShapeDtypeStruct((12, 8, 1), "float32"))
    assert not ds.projections("layers/A_log", jax.ShapeDtypeStruct((12, 8, 16), "float32"))


def test_trees_of_other_projects():
    """All but norms, embeddings and some vectors; missed: matrices named by numbers alone."""
    rest = ("norm", "ln", "embedding", "layer_scalar", "a_log", "dt_bias", "sinks")
    missed = set()
    for name, tree in TREES.items():
        for path, shape, _, *place in tree["leaves"]:
            if not place:
                continue
            expected = not any(word in "/".join(path.split("/")[-2:]).lower() for word in rest)
            if ds.projections(path, jax.ShapeDtypeStruct(shape, "float32")) != expected:
                assert expected
                missed.add((name, path))
    assert len(missed) == 8
    assert {name for name, _ in missed} == {"handrolled_list"}
