"""trace_depth on layers of several kinds, in pieces, under any name, and in nested loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import depthsmooth as ds
from depthsmooth import DepthNotFoundError, trace_depth

D = 4
X = jax.ShapeDtypeStruct((5, D), "float32")


def f(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def held(fn, params, *args, grad=False):
    """For each leaf that is placed its group, and its layers."""
    followed = jax.grad(lambda *args: fn(*args).sum()) if grad else fn
    depth = trace_depth(followed, params, *(args or (X,)))
    return {path: (place.group, place.layers) for path, place in depth.items()}


def ones(tree):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), tree)


def reached(depth, params, path):
    """The leaves to which smoothing brings something of one leaf."""
    tx = ds.smooth_over_depth(0.5, depth=depth)
    paths = {
        jax.tree_util.keystr(k, simple=True, separator="/"): k
        for k, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    updates = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: jnp.full(leaf.shape, float(keys == paths[path])), params
    )
    mixed, _ = tx.update(updates, tx.init(ones(params)))
    at = dict(jax.tree_util.tree_leaves_with_path(mixed))
    return {other for other, keys in paths.items() if bool(at[keys].any())}


ATTENTION = {"norm": f(D), "qkv": {"kernel": f(D, 3 * D)}, "out": {"kernel": f(D, D), "bias": f(D)}}
MLP = {"norm": f(D), "up": {"kernel": f(D, D)}, "out": {"kernel": f(D, D), "bias": f(D)}}


def attention_or_mlp(x, p):
    h = x * p["norm"]
    if "qkv" in p:
        q, k, v = jnp.split(h @ p["qkv"]["kernel"], 3, -1)
        h = jax.nn.softmax(q @ k.T) @ v
    else:
        h = jnp.tanh(h @ p["up"]["kernel"])
    return x + h @ p["out"]["kernel"] + p["out"]["bias"]


def in_turn(p, x):
    for block in p["blocks"]:
        x = attention_or_mlp(x, block)
    return x


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_attention_and_mlp_in_turn_are_two_kinds(grad):
    """They share a norm and an output projection, and are no layers of one kind."""
    params = {"blocks": [ATTENTION, MLP] * 3}
    found = held(in_turn, params, grad=grad)
    assert {path: at for path, at in found.items() if "out/kernel" in path} == {
        f"blocks/{i}/out/kernel": (f"blocks/* (kind {1 + i % 2})", (i // 2,)) for i in range(6)
    }
    assert len(found) == len(jax.tree.leaves(params))
    depth = trace_depth(in_turn, params, X)
    assert depth.groups == {"blocks/* (kind 1)": 3, "blocks/* (kind 2)": 3}
    assert "blocks/* (kind 2)" in str(depth)
    assert reached(depth, params, "blocks/2/out/kernel") == {
        f"blocks/{i}/out/kernel" for i in (0, 2, 4)
    }


def test_a_norm_is_no_layer_of_the_matrices_beside_it():
    model = nn.Sequential(
        [part for _ in range(4) for part in (nn.Dense(D), nn.relu, nn.LayerNorm())]
    )
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    depth = trace_depth(model.apply, params, X)
    numbers = sorted({int(path.split("/")[1].partition("_")[2]) for path in depth})
    dense, norms = numbers[::2], numbers[1::2]
    assert len(dense) == len(norms) == 4
    assert reached(depth, params, f"params/layers_{dense[1]}/bias") == {
        f"params/layers_{i}/bias" for i in dense[:3]
    }
    assert reached(depth, params, f"params/layers_{norms[1]}/bias") == {
        f"params/layers_{i}/bias" for i in norms[:3]
    }


def test_recurrent_recurrent_attention():
    """As in RecurrentGemma: of one kind are each third layer, and the two between."""
    mlp = {"ffw": {"up": f(D, 8), "down": f(8, D)}, "norm": f(D)}
    recurrent = mlp | {"rec": {name: f(D, D) for name in ("x", "y", "gate", "input", "out")}}
    attention = mlp | {"attn": {name: f(D, D) for name in ("q", "k", "v", "out", "bias_table")}}

    def forward(p, x):
        for block in p["blocks"]:
            h = x * block["norm"]
            for w in block.get("rec", block.get("attn")).values():
                h = jnp.tanh(h @ w)
            x = x + h
            x = x + jnp.tanh(x @ block["ffw"]["up"]) @ block["ffw"]["down"]
        return x

    params = {"blocks": [recurrent, recurrent, attention] * 2}
    found = held(forward, params)
    assert [found[f"blocks/{i}/ffw/up"] for i in range(6)] == [
        (f"blocks/* (kind {kind})", (layer,))
        for kind, layer in ((1, 0), (1, 1), (2, 0), (1, 2), (1, 3), (2, 1))
    ]


EXPERTS = {"router": f(D, 3), "experts": {"up": f(3, D, 8), "down": f(3, 8, D)}}
LIST_OF_EXPERTS = {"router": f(D, 3), "experts": [{"up": f(D, 8), "down": f(8, D)}] * 3}
DENSE = {"up": f(D, 8), "down": f(8, D)}


def moe(p, x):
    for block in p["layers"]:
        x = x + jnp.tanh((x * block["norm"]) @ block["q"]) @ block["o"]
        if "up" in block:
            x = x + jnp.tanh(x @ block["up"]) @ block["down"]
            continue
        weights, total = jax.nn.softmax(x @ block["router"]), jnp.zeros_like(x)
        for k in range(3):
            expert = block["experts"]
            expert = expert[k] if isinstance(expert, list) else {n: w[k] for n, w in expert.items()}
            total = total + jnp.tanh(x @ expert["up"]) @ expert["down"] * weights[:, k : k + 1]
        x = x + total
    return x


@pytest.mark.parametrize("experts", [EXPERTS, LIST_OF_EXPERTS], ids=["stacked", "in a list"])
@pytest.mark.parametrize("pattern", [(0, 1), (0, 0, 1), (1, 0, 0)], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_dense_layers_and_those_of_experts_are_of_one_kind(grad, pattern, experts):
    shared = {"norm": f(D), "q": f(D, D), "o": f(D, D)}
    kinds = [DENSE, experts]
    params = {"layers": [shared | kinds[k] for k in pattern * 2]}
    found = held(moe, params, grad=grad)
    count = len(pattern) * 2
    assert {f"layers/{i}/q": ("layers/*", (i,)) for i in range(count)}.items() <= found.items()
    assert len(found) == len(jax.tree.leaves(params))


def taps(h, p):
    return sum(p["taps"][k] * jnp.roll(h, k, 0) for k in range(3))


def experts(h, p):
    return sum(jnp.tanh(h @ p["experts"][k]) for k in range(3))


def heads(h, p):
    return jnp.concatenate([h @ p["heads"][k] for k in range(2)], -1)


def table(h, p):
    return h * p["table"]


PIECES = {
    "a table that data is multiplied by": (table, {"table": f(5, D)}),
    "taps": (taps, {"taps": f(3, D)}),
    "experts": (experts, {"experts": f(3, D, D)}),
    "heads": (heads, {"heads": f(2, D, D // 2)}),
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_tensors_that_are_no_matrices_or_in_pieces_in_some_layers(grad, every, name):
    piece, own = PIECES[name]
    params = {
        f"layer_{i}": {"scale": f(D), "out": f(D, D)}
        | (own if i % every == 0 else {"mix": f(D, D)})
        for i in range(6)
    }

    def forward(p, x):
        x = x @ p["stem"]
        for i in range(6):
            one = p[f"layer_{i}"]
            h = x * one["scale"]
            x = x + (jnp.tanh(h @ one["mix"]) if "mix" in one else piece(h, one)) @ one["out"]
        return x

    assert held(forward, params | {"stem": f(D, D)}, grad=grad) == {
        f"layer_{i}/{tensor}": ("layer_*", (i,))
        for i in range(6)
        for tensor in params[f"layer_{i}"]
    }


def residual(p, x):
    for one in p.values():
        x = x + jnp.tanh(x @ one["a"]) @ one["b"]
    return x


PAIR = {"a": f(D, D), "b": f(D, D)}
NAMES = {
    "a number in the middle": [f"processor_{i}_mlp" for i in range(12)],
    "a number before a part": [f"transformer_layer_{i}_attention" for i in range(3)],
    "a first without a number": ["self_attention", *(f"self_attention_{i}" for i in range(1, 12))],
    "Keras": ["transformer_encoder", "transformer_encoder_1", "transformer_encoder_2"],
    "a word that is no layer": [f"step{i}" for i in range(3)],
    "a Haiku module": [f"gnn/~_networks/processor_edges_{i}_mesh_mlp/~" for i in range(3)],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_names_need_not_say_layer_where_they_compose(grad, name):
    keys = NAMES[name]

    def forward(p, x):
        for key in keys:
            x = x + jnp.tanh(x @ p[key]["a"]) @ p[key]["b"]
        return x

    found = held(forward, dict.fromkeys(keys, PAIR), grad=grad)
    assert {path: layers for path, (_, layers) in found.items()} == {
        f"{key}/{w}": (i,) for i, key in enumerate(keys) for w in "ab"
    }
    assert len({group for group, _ in found.values()}) == 1


def test_the_keys_of_a_flat_dict_have_dots():
    names = [f"model.layers.{i}" for i in range(11)]
    params = {f"{name}.{w}.weight": f(D, D) for name in names for w in ("q_proj", "o_proj")}

    def forward(p, x):
        for name in names:
            x = x + jnp.tanh(x @ p[f"{name}.q_proj.weight"]) @ p[f"{name}.o_proj.weight"]
        return x

    assert held(forward, params) == {
        f"{name}.{w}.weight": ("model.layers.*", (i,))
        for i, name in enumerate(names)
        for w in ("q_proj", "o_proj")
    }


def test_streams_as_in_ferminet():
    """The first takes features of another size, and the last has one stream alone."""

    def forward(p, x):
        one, two = x, jnp.ones((5, 2))
        for stream in p["streams"]:
            one = jnp.tanh(jnp.concatenate([one, two], -1) @ stream["single"]["w"])
            two = jnp.tanh(two @ stream["double"]["w"])
        return one @ p["orbital"]

    streams = [
        {"single": {"w": f(6 if i == 0 else 7, 4)}, "double": {"w": f(2 if i == 0 else 3, 3)}}
        for i in range(4)
    ]
    found = held(forward, {"streams": streams, "orbital": f(4, 2)})
    assert {path: layers for path, (_, layers) in found.items()} == {
        f"streams/{i}/{kind}/w": (i - 1,)
        for i in range(1, 4)
        for kind in ("single", "double")
        if (i, kind) != (3, "double")  # nothing comes of it
    }


class Perceptron(nn.Module):
    """Layers of a matrix and a norm, in two lists of modules."""

    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = nn.relu(nn.LayerNorm()(nn.Dense(D)(x)))
        return nn.Dense(2)(x)


class FlatTransformer(nn.Module):
    """Blocks without modules of their own, in which all matrices have one shape."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            h = nn.Dense(D)(nn.LayerNorm()(x))
            x = x + nn.Dense(D)(nn.relu(h))
        return x


def test_modules_that_are_alike_and_regular_are_layers():
    params = jax.eval_shape(Perceptron().init, jax.random.key(0), X)
    found = held(Perceptron().apply, params)
    assert {path: layers for path, (_, layers) in found.items() if "kernel" in path} == {
        f"params/Dense_{i}/kernel": (i,) for i in range(4)
    }


def test_matrices_of_a_block_that_are_alike_are_no_layers():
    params = jax.eval_shape(FlatTransformer().init, jax.random.key(0), X)
    with pytest.raises(DepthNotFoundError, match="not named after layers, may be parts of a block"):
        held(FlatTransformer().apply, params)


def chained(p, x):
    for one in p:
        x = jnp.tanh(x @ one["kernel"] + one["bias"])
    return x


def summed(p, x):
    for one in p:
        x = x + jnp.tanh(x @ one["kernel"] + one["bias"])
    return x


def in_pairs(p, x):
    for up, down in zip(p[::2], p[1::2], strict=True):
        x = x + jnp.tanh(x @ up["kernel"]) @ down["kernel"] + down["bias"] + up["bias"]
    return x


def one_block(p, x):
    value, out, up, down = (one["kernel"] for one in p[:4])
    x = x + jax.nn.softmax(x @ x.T) @ (x @ value) @ out
    return x + jnp.tanh(x @ up) @ down


@pytest.mark.parametrize(
    "keys", [[f"Dense_{i}" for i in range(6)], ["conv2d", *(f"conv2d_{i}" for i in range(1, 6))]]
)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_matrices_that_are_applied_to_the_same_kind_of_data(grad, keys):
    """What is added to the stream tells the two matrices of a block apart."""
    params = {key: {"kernel": f(D, D), "bias": f(D)} for key in keys}
    for fn in (chained, summed):
        found = held(lambda p, x, fn=fn: fn([p[key] for key in keys], x), params, grad=grad)
        assert {path: layers for path, (_, layers) in found.items()} == {
            f"{key}/{tensor}": (i,) for i, key in enumerate(keys) for tensor in ("kernel", "bias")
        }
    for fn in (in_pairs, one_block):
        with pytest.raises(DepthNotFoundError, match=r"may be parts of a block|do not compose"):
            held(lambda p, x, fn=fn: fn([p[key] for key in keys], x), params, grad=grad)


def layers_by_taps(p, x, i):
    return sum(jnp.roll(x, k, 0) * p["own"][i, k] for k in range(3)) @ p["out"][i]


def layers_of_experts(p, x, i):
    return sum(jnp.tanh(x @ p["own"][i][e]) @ p["out"][i] for e in range(3))


def layers_of_heads(p, x, i):
    return jnp.concatenate([x @ p["own"][i][h] for h in range(2)], -1) @ p["out"][i]


def layers_with_a_gate(p, x, i):
    return jnp.tanh(x @ p["own"][i, 0]) * (x @ p["own"][i, 1]) @ p["out"][i]


INDEXED = {
    "taps": (layers_by_taps, f(4, 3, D)),
    "experts": (layers_of_experts, f(4, 3, D, D)),
    "heads": (layers_of_heads, f(4, 2, D, D // 2)),
    "a gate": (layers_with_a_gate, f(4, 2, D, D)),
}


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_stacks_that_are_indexed_and_then_taken_in_pieces(grad, name):
    layer, shape = INDEXED[name]

    def forward(p, x):
        for i in range(4):
            x = x + layer(p, x, i)
        return x

    depth = trace_depth(
        jax.grad(lambda p, x: forward(p, x).sum()) if grad else forward,
        {"own": shape, "out": f(4, D, D)},
        X,
    )
    assert {path: (place.axes, place.layers) for path, place in depth.items()} == dict.fromkeys(
        ("own", "out"), ((0,), (0, 1, 2, 3))
    )


@pytest.mark.parametrize("key", ["expert_{}", "tower_{}", "quantizer_{}"])
def test_what_is_named_after_what_is_side_by_side_is_left_alone(key):
    params = {key.format(i): PAIR for i in range(3)}
    with pytest.raises(DepthNotFoundError, match="named after what is side by side"):
        held(residual, params)


def test_two_that_are_not_named_after_layers_are_left_alone():
    with pytest.raises(DepthNotFoundError, match="not named after layers, may be parts of a net"):
        held(residual, {f"cell_{i}": PAIR for i in range(2)})


def test_siblings_that_are_used_in_another_order_need_a_name():
    keys = ["step_0", "step_2", "step_1"]

    def forward(p, x):
        return residual({key: p[key] for key in keys}, x)

    with pytest.raises(DepthNotFoundError, match="not in numeric order"):
        held(forward, dict.fromkeys(sorted(keys), PAIR))


def inner(x, kernels, biases=None):
    biases = jnp.zeros(kernels.shape[0]) if biases is None else biases
    return jax.lax.scan(
        lambda x, wb: (x + jnp.tanh(x @ wb[0] + wb[1]), None), x, (kernels, biases)
    )[0]


SIDES = {
    "a projection of other data": (
        lambda x, one, data: inner(x, one["w"], data @ one["side"]),
        f(3, D, 2),
    ),
    "keys of a memory": (
        lambda x, one, data: inner(x, one["w"]) + (data @ one["side"]).sum(),
        f(3, D, D),
    ),
    "a norm": (lambda x, one, data: inner(x * one["side"], one["w"]), f(3, D)),
    "a gate": (lambda x, one, data: x + jax.nn.sigmoid(one["side"]) * inner(x, one["w"]), f(3, D)),
    "a gate that is computed": (
        lambda x, one, data: x + jax.nn.sigmoid(x @ one["side"] - 1) * inner(x, one["w"]),
        f(3, D, D),
    ),
    "a gate with a softmax": (
        lambda x, one, data: x + jax.nn.softmax(x @ one["side"]) * inner(x, one["w"]),
        f(3, D, D),
    ),
}


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_what_only_the_outer_loop_takes_is_no_layer_of_the_inner_order(grad, name):
    step, shape = SIDES[name]

    def forward(p, x, data):
        return jax.lax.scan(lambda x, one: (step(x, one, data), None), x, p)[0]

    found = held(forward, {"w": f(3, 2, D, D), "side": shape}, X, f(D), grad=grad)
    assert {path: layers for path, (_, layers) in found.items()} == {
        "w": tuple(range(6)),
        "side": (0, 1, 2),
    }
    assert found["w"][0] != found["side"][0]


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_kinds_in_each_round_of_a_scan_have_orders_of_their_own(grad):
    """A pattern of two recurrent blocks and an attention, scanned over."""
    recurrent = {"x": f(3, D, D), "y": f(3, D, D), "out": f(3, D, D)}
    attention = {"q": f(3, D, D), "k": f(3, D, D), "o": f(3, D, D)}
    blocks = {"layers_0": recurrent, "layers_1": recurrent, "layers_2": attention}

    def forward(p, x):
        def step(x, one):
            for block in one.values():
                for w in block.values():
                    x = x + jnp.tanh(x @ w)
            return x, None

        return jax.lax.scan(step, x, p["layers"])[0]

    found = held(forward, {"layers": blocks}, grad=grad)
    assert found["layers/layers_0/x"] == ("layers (kind 1)", (0, 2, 4))
    assert found["layers/layers_1/x"] == ("layers (kind 1)", (1, 3, 5))
    assert found["layers/layers_2/q"] == ("layers (kind 2)", (0, 1, 2))
