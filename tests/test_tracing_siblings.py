"""trace_depth on layers with leaves of their own, and on all that merely looks like them."""

import jax
import jax.numpy as jnp
import pytest

from depthsmooth import DepthNotFoundError, trace_depth

WIDTH = 4


def float32(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


X = float32(2, WIDTH)


def block(*lead, **more):
    return {"wi": float32(*lead, WIDTH, WIDTH), "wo": float32(*lead, WIDTH, WIDTH), **more}


def apply(x, p):
    return x + jax.nn.relu(x @ p["wi"]) @ p["wo"]


def apply_all(x, blocks):
    for p in blocks:
        x = apply(x, p)
    return x


def scan(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def each_in_place(x, experts):
    for k, p in enumerate(experts):
        x = x.at[k % 2].set(apply(x, p)[k % 2])
    return x


def down(x, blocks):
    for p in blocks:
        x = jnp.tanh(x @ p["down"])
    return x


def up(x, blocks):
    for p in reversed(blocks):
        x = jnp.tanh(x @ p["up"])
    return x


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def numbered(count, **more):
    return {f"block_{i}": block(**more) for i in range(count)}


def in_order(p):
    return [p[f"block_{i}"] for i in range(len(p))]


def layers_of(fn, params, *args, grad=False):
    """For each leaf that is placed its group and layers; nothing if there is none."""
    followed = jax.grad(lambda *args: fn(*args).sum()) if grad else fn
    try:
        depth = trace_depth(followed, params, *(args or (X,)))
    except DepthNotFoundError:
        return {}
    return {path: (place.group, place.layers) for path, place in depth.items()}


def modulated(p, x, condition):
    """As in a DiT: what modulates the blocks comes from one product for all of them."""
    kernels = jnp.stack([block["ada"] for block in in_order(p)])
    shifts = jnp.einsum("bd,lde->lbe", condition, kernels)
    for shift, weights in zip(shifts, in_order(p), strict=True):
        x = apply(x + shift, weights)
    return x


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_tensors_that_are_used_all_at_once_do_not_upset_the_order(grad):
    params = numbered(12, ada=float32(WIDTH, WIDTH))
    found = layers_of(modulated, params, X, X, grad=grad)
    assert found == {
        f"block_{i}/{name}": ("block_*", (i,)) for i in range(12) for name in ("wi", "wo", "ada")
    }


def test_kinds_that_share_no_tensor_take_turns():
    """Attention and convolution in turn, as in a hybrid: each kind has its own order."""
    kinds = [{"attn": float32(WIDTH, WIDTH)}, {"conv": float32(WIDTH, WIDTH)}]
    params = [kinds[i % 2] for i in range(6)]

    def forward(p, x):
        for layer in p["layers"]:
            x = x + jnp.tanh(x @ next(iter(layer.values())))
        return x

    found = layers_of(forward, {"layers": params})
    assert list(found.values()) == [(f"layers/* (kind {1 + i % 2})", (i // 2,)) for i in range(6)]


NOT_LAYERS = {
    "experts in a list": (
        lambda p, x: x + jax.vmap(apply, (None, 0))(x, stack(p["experts"])).sum(0),
        {"experts": [block() for _ in range(4)]},
    ),
    "critics in a list": (
        lambda p, x: jax.vmap(apply, (None, 0))(x, stack(p["critics"])).min(0),
        {"critics": [block() for _ in range(3)]},
    ),
    "experts in a list, each writing its part of one array": (
        lambda p, x: each_in_place(x, p["experts"]),
        {"experts": [block() for _ in range(3)]},
    ),
    "experts in blocks_i": (
        lambda p, x: x + sum(apply(x, w) for w in in_order(p)),
        numbered(4),
    ),
    "a generator and a discriminator": (
        lambda p, x: apply(apply(x, p[0]), p[1]),
        (block(), block()),
    ),
    "an encoder, a block and a decoder": (
        lambda p, x: apply(x @ p[0]["w"], p[1]) @ p[2]["w"],
        [{"w": float32(WIDTH, WIDTH)}, block(), {"w": float32(WIDTH, WIDTH)}],
    ),
    "stages of the same width": (
        lambda p, x: apply_all(apply_all(x, p["layers"][0]["blocks"]), p["layers"][1]["blocks"]),
        {"layers": [{"blocks": [block() for _ in range(3)]} for _ in range(2)]},
    ),
    "a matrix for each of the two parts of a layer": (
        lambda p, x: x + jax.nn.relu(x @ p["ffn"][0]) @ p["ffn"][1],
        {"ffn": float32(2, WIDTH, WIDTH)},
    ),
    "the same beside a norm, in a block": (
        lambda p, x: (
            x
            + jax.nn.relu((x * p["block"]["ln"]) @ p["block"]["ffn"][0] + p["block"]["bias"][0])
            @ p["block"]["ffn"][1]
            + p["block"]["bias"][1]
        ),
        {
            "block": {
                "ffn": float32(2, WIDTH, WIDTH),
                "bias": float32(2, WIDTH),
                "ln": float32(WIDTH),
            }
        },
    ),
    "the same in what is numbered by itself": (
        lambda p, x: x + jax.nn.relu(x @ p["layers_0"]["ffn"][0]) @ p["layers_0"]["ffn"][1],
        {"layers_0": {"ffn": float32(2, WIDTH, WIDTH)}},
    ),
    "the same beside a norm, in what names no layers": (
        lambda p, x: (x * p["ln"] @ p["w"][0] + p["b"][0]) @ p["w"][1] + p["b"][1],
        {"w": float32(2, WIDTH, WIDTH), "b": float32(2, WIDTH), "ln": float32(WIDTH)},
    ),
    "a table of vectors": (
        lambda p, x: (x * p["table"][0] + p["table"][1]) * p["table"][2],
        {"table": float32(3, WIDTH)},
    ),
    "a loop over groups, with a Python loop inside": (
        lambda p, x: jax.lax.scan(
            lambda x, w: (jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None), x, p["layers"]
        )[0],
        {"layers": float32(3, 2, WIDTH, WIDTH)},
    ),
    "a Python loop over groups, with a loop inside": (
        lambda p, x: jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w), None),
            jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"][0])[0],
            p["layers"][1],
        )[0],
        {"layers": float32(2, 3, WIDTH, WIDTH)},
    ),
    "blocks that are passed down and up again": (
        lambda p, x: up(down(x, in_order(p)), in_order(p)),
        {
            f"block_{i}": {"down": float32(WIDTH, WIDTH), "up": float32(WIDTH, WIDTH)}
            for i in range(4)
        },
    ),
    "groups with a norm for each, and a Python loop inside": (
        lambda p, x: jax.lax.scan(
            lambda x, w: (jnp.tanh(jnp.tanh(x * w["ln"] @ w["w"][0]) @ w["w"][1]), None),
            x,
            p["layers"],
        )[0],
        {"layers": {"w": float32(3, 2, WIDTH, WIDTH), "ln": float32(3, WIDTH)}},
    ),
    "rounds of layers that are stored along one axis": (
        lambda p, x: jax.lax.scan(
            lambda x, w: (jnp.tanh(scan(x, w[0]) @ w[1]), None),
            x,
            (p["rec"].reshape(3, 2, WIDTH, WIDTH), p["attn"]),
        )[0],
        {"rec": float32(6, WIDTH, WIDTH), "attn": float32(3, WIDTH, WIDTH)},
    ),
    "a flat list of weights and biases": (
        lambda p, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[3]) @ p[4] + p[5]),
        [float32(WIDTH, WIDTH), float32(WIDTH)] * 3,
    ),
    "a flat list of a block's weights": (
        lambda p, x: x + jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) @ p[2] @ p[3],
        [float32(WIDTH, WIDTH)] * 4,
    ),
    "rows of a matrix": (
        lambda p, x: jax.lax.fori_loop(
            0, WIDTH, lambda i, y: y.at[i].set(x[0, i] - p["lower"][i] @ y), jnp.zeros(WIDTH)
        ),
        {"lower": float32(WIDTH, WIDTH)},
    ),
    "residual codebooks": (
        lambda p, x: jax.lax.scan(
            lambda x, codes: (x - codes[jnp.argmax(x @ codes.T, -1)], None), x, p["codebooks"]
        )[0],
        {"codebooks": float32(3, 7, WIDTH)},
    ),
}


@pytest.mark.parametrize("path", ["layers", "layers/w", "transformer_blocks/mlp/w", "h/w", "w"])
def test_two_layers_that_are_indexed(path):
    """What has two of every tensor, or is named after layers, are layers."""
    *containers, name = path.split("/")
    weights = {name: float32(2, WIDTH, WIDTH)}
    if path == "w":
        weights["b"] = float32(2, WIDTH)

    def forward(p, x):
        for key in containers:
            p = p[key]
        for i in range(2):
            x = jnp.tanh(x @ p[name][i]) + (p["b"][i] if "b" in p else 0)
        return x

    for key in reversed(containers):
        weights = {key: weights}
    assert layers_of(forward, weights)[path][1] == (0, 1)


@pytest.mark.parametrize("name", NOT_LAYERS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_is_left_alone(name, grad):
    fn, params = NOT_LAYERS[name]
    assert layers_of(fn, params, grad=grad) == {}


def test_lists_of_layers_within_lists():
    """The layers are what repeats: neither encoder and decoder, nor embedding, blocks and head."""
    blocks = [block() for _ in range(4)]

    def both(p, x):
        return apply_all(apply_all(x, p[0]), p[1])

    def around(p, x):
        return apply_all(x @ p[0], p[1]) @ p[2]

    expected = {f"{i}/{w}": (i,) for i in range(4) for w in ("wi", "wo")}
    found = layers_of(both, (blocks, blocks))
    assert found == {
        f"{side}/{path}": (f"{side}/*", layers)
        for side in range(2)
        for path, layers in expected.items()
    }
    found = layers_of(around, (float32(WIDTH, WIDTH), blocks, float32(WIDTH, 2)))
    assert found == {f"1/{path}": ("1/*", layers) for path, layers in expected.items()}


@pytest.mark.parametrize("outer", ["stages", "layers"])
def test_stages_of_other_widths_hold_the_layers(outer):
    params = {
        outer: [
            {
                "layers": [{"w": float32(size, size)} for _ in range(3)],
                "down": float32(size, 2 * size),
            }
            for size in (4, 8)
        ]
    }

    def forward(p, x):
        for stage in p[outer]:
            for layer in stage["layers"]:
                x = x + jnp.tanh(x @ layer["w"])
            x = x @ stage["down"]
        return x

    found = layers_of(forward, params)
    assert found == {
        f"{outer}/{s}/layers/{i}/w": (f"{outer}/{s}/layers/*", (i,))
        for s in range(2)
        for i in range(3)
    }


def test_small_stacks_within_blocks_are_parts_of_them():
    def forward(p, x):
        for w in in_order(p):
            x = x + (x * w["ln"][0]) @ w["wi"]
            x = x + (x * w["ln"][1]) @ w["wo"]
            for k in range(3):
                x = jnp.tanh(x @ w["mlp"][k])
        return x

    found = layers_of(forward, numbered(4, ln=float32(2, WIDTH), mlp=float32(3, WIDTH, WIDTH)))
    assert found["block_3/ln"] == found["block_3/mlp"] == ("block_*", (3,))
    assert len(found) == 16


def test_layers_named_like_parts_of_a_block():
    """A perceptron's layers within blocks, and the two unlike layers of each of T5's blocks."""

    def perceptron(x, w):
        return x + jnp.tanh(x @ w["layers_0"]["kernel"]) @ w["layers_1"]["kernel"]

    def two_layers(x, w):
        x = x + jnp.tanh(x @ w["layer"][0]["q"]) @ w["layer"][0]["o"]
        return x + jnp.tanh(x @ w["layer"][1]["wi"]) @ w["layer"][1]["wo"]

    square = float32(WIDTH, WIDTH)
    dense = {"layers_0": {"kernel": square}, "layers_1": {"kernel": square}}
    t5 = {"layer": [{"q": square, "o": square}, {"wi": square, "wo": square}]}
    for fn, one in ((perceptron, dense), (two_layers, t5)):
        params = {f"block_{i}": one for i in range(3)}
        found = layers_of(
            lambda p, x, fn=fn: fn(fn(fn(x, p["block_0"]), p["block_1"]), p["block_2"]), params
        )
        assert {group for group, _ in found.values()} == {"block_*"}
        assert len(found) == len(jax.tree.leaves(params))


def test_pairs_of_vectors_within_scanned_blocks_are_parts_of_them():
    def forward(p, x):
        def body(x, w):
            x = x + (x * w["ln"][0]) @ w["wi"]
            return x + (x * w["ln"][1]) @ w["wo"], None

        return jax.lax.scan(body, x, p["blocks"])[0]

    found = layers_of(forward, {"blocks": block(5, ln=float32(5, 2, WIDTH))})
    assert found == dict.fromkeys(
        ("blocks/ln", "blocks/wi", "blocks/wo"), ("blocks", tuple(range(5)))
    )


def test_layers_within_what_is_numbered_by_itself():
    def forward(p, x):
        return apply_all(x, in_order(p["BlockTransformer_0"]))

    found = layers_of(forward, {"BlockTransformer_0": numbered(3)})
    assert {layers for _, layers in found.values()} == {(0,), (1,), (2,)}


def test_what_is_around_the_layers_in_one_list_is_left_alone():
    """As in a Sequential of a stem, blocks and a norm."""
    ends = {"kernel": float32(WIDTH, WIDTH)}, {"scale": float32(WIDTH)}
    params = {"layers": [ends[0], *[block() for _ in range(3)], ends[1]]}

    def forward(p, x):
        first, *blocks, last = p["layers"]
        return apply_all(x @ first["kernel"], blocks) * last["scale"]

    found = layers_of(forward, params)
    assert found == {
        f"layers/{i}/{w}": ("layers/*", (i - 1,)) for i in (1, 2, 3) for w in ("wi", "wo")
    }


def test_the_layers_of_a_scanned_block_are_no_turns():
    """Attention and feed-forward within T5's blocks have no tensor in common but a norm."""
    norm = {"scale": float32(5, WIDTH)}
    layer = {"layer_0": {"q": float32(5, WIDTH, 6), "o": float32(5, 6, WIDTH), "norm": norm}}
    layer["layer_1"] = {"wi": float32(5, WIDTH, 6), "wo": float32(5, 6, WIDTH), "norm": norm}

    def forward(p, x):
        def body(x, w):
            x = x * w["layer_0"]["norm"]["scale"] * w["layer_1"]["norm"]["scale"]
            x = x + jnp.tanh(x @ w["layer_0"]["q"]) @ w["layer_0"]["o"]
            return x + jnp.tanh(x @ w["layer_1"]["wi"]) @ w["layer_1"]["wo"], None

        return jax.lax.scan(body, x, p["blocks"])[0]

    assert set(layers_of(forward, {"blocks": layer}).values()) == {("blocks", tuple(range(5)))}


def test_parts_of_a_scanned_block_are_no_turns():
    """Their shapes differ, and they are no blocks: both are tensors of each layer."""
    parts = {
        "layers_0": {"kernel": float32(5, WIDTH, 8)},
        "layers_1": {"kernel": float32(5, 8, WIDTH)},
    }

    def forward(p, x):
        def body(x, w):
            return x + jnp.tanh(x @ w["layers_0"]["kernel"]) @ w["layers_1"]["kernel"], None

        return jax.lax.scan(body, x, p["blocks"])[0]

    depth = trace_depth(forward, {"blocks": parts}, X)
    assert {place.layers for place in depth.values()} == {tuple(range(5))}
    assert depth.resolve({"blocks": parts}) == depth


@pytest.mark.parametrize(
    ("fn", "params", "message"),
    [
        (
            lambda p, x: apply_all(x, [p[f"stage_{i}"] for i in range(2)]),
            {f"stage_{i}": block() for i in range(2)},
            r"stage_0/wi \(4, 4\) is left alone: .* not named after layers.*'\.\*block_\.\*'",
        ),
        (lambda p, x: x, numbered(3), r"no data meets any parameter, like block_0/wi \(4, 4\)"),
        (lambda p, x: apply_all(jnp.ones((2, 4)), p.values()), numbered(3), "its data among args"),
    ],
)
def test_says_why_nothing_was_found(fn, params, message):
    with pytest.raises(ValueError, match=message):
        trace_depth(fn, params, X)
