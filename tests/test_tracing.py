"""trace_depth is exact: real Flax models, and loops that are not over layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from depthsmooth import Depth, DepthNotFoundError, trace_depth


def float32(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


class Block(nn.Module):
    """Attention and MLP, normalised before, with a dropout that needs a key."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, deterministic):
        h = nn.LayerNorm(dtype=self.dtype)(x)
        mask = nn.make_causal_mask(x[..., 0])
        h = nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(h, mask=mask)
        x = x + nn.Dropout(0.1, deterministic=deterministic)(h)
        h = nn.Dense(16, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(8, dtype=self.dtype)(nn.gelu(h)), None


class Model(nn.Module):
    """Stacks of scanned blocks between an embedding and a head that shares it."""

    axis: int = 0
    depths: tuple = (3,)
    remat: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens, deterministic=True):
        embed = nn.Embed(11, 8)
        x = embed(tokens) + self.param("positions", nn.initializers.normal(), (5, 8))
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for stack, depth in enumerate(self.depths):
            scanned = nn.scan(
                block,
                variable_axes={"params": self.axis},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=depth,
            )
            x, _ = scanned(self.dtype, name=f"stack_{stack}")(x, deterministic)
        return embed.attend(nn.LayerNorm()(x))


TOKENS = jax.ShapeDtypeStruct((2, 5), "int32")


def abstract_params(model):
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def assert_exact(depth, params, axis, depths):
    """Every leaf under stack_k is depth on the axis, and no other leaf is."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        stack = [k for k in range(len(depths)) if f"params/stack_{k}/" in path]
        if not stack:
            assert path not in depth
            continue
        place = depth[path]
        assert place.axes == (axis % leaf.ndim,)
        assert len(place.layers) == depths[stack[0]] == leaf.shape[place.axes[0]]
        assert place.group == f"params/stack_{stack[0]}"
    assert len(depth) == 16 * len(depths)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("depths", [(3,), (4, 2)], ids=["one stack", "two stacks"])
def test_flax_scan(axis, remat, grad, dtype, depths):
    model = Model(axis=axis, depths=depths, remat=remat, dtype=dtype)
    params = abstract_params(model)

    def loss(params, tokens, key):
        logits = model.apply(params, tokens, deterministic=False, rngs={"dropout": key})
        return logits.astype("float32").var()

    fn = jax.jit(jax.value_and_grad(loss)) if grad else loss
    depth = trace_depth(fn, params, TOKENS, jax.random.key(1))
    assert_exact(depth, params, axis, depths)


def test_layers_that_are_as_many_as_everything_else():
    """Shapes say nothing here: all sizes are 8."""
    model = Model(depths=(8,), axis=1)
    params = abstract_params(model)
    assert_exact(trace_depth(model.apply, params, TOKENS), params, 1, (8,))


def test_one_layer_is_depth_too():
    model = Model(depths=(1,), axis=1)
    params = abstract_params(model)
    assert_exact(trace_depth(model.apply, params, TOKENS), params, 1, (1,))


def test_arrays_and_shapes_give_the_same_depth_and_nothing_is_computed():
    model = Model()
    params = abstract_params(model)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    assert trace_depth(model.apply, zeros, jnp.zeros((2, 5), "int32")) == trace_depth(
        model.apply, params, TOKENS
    )
    # 400 TB, more than any machine has.
    huge = {"w": float32(100, 10**6, 10**6)}
    x = float32(1, 10**6)
    depth = trace_depth(lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"]), huge, x)
    assert len(depth["w"].layers) == 100


def test_arguments_that_are_no_arrays_are_passed_on():
    params = abstract_params(Model())

    def forward(params, model, tokens, *, deterministic, note):
        assert deterministic is True
        assert note == "as it is"
        return model.apply(params, tokens, deterministic=deterministic)

    depth = trace_depth(forward, params, Model(), TOKENS, deterministic=True, note="as it is")
    assert len(depth) == 16


def test_prints_what_it_found():
    model = Model(depths=(3, 2))
    table = str(trace_depth(model.apply, abstract_params(model), TOKENS)).splitlines()
    assert [line.split() for line in table[:4]] == [
        ["group", "layers", "axis", "leaves", "parameters", "found", "by"],
        ["params/stack_0", "3", "0", "16", "1,800", "trace"],
        ["params/stack_1", "2", "0", "16", "1,200", "trace"],
        ["left", "alone", "4", "144"],
    ]
    assert "params/Embed_0/embedding (11, 8)" in table[4]


X = float32(2, 4)
STACK = float32(3, 4, 4)


def compose(x, w):
    return jnp.tanh(x @ w), None


def scan_once(params, x):
    return jax.lax.scan(compose, x, params["w"])[0]


LAYERS = {
    "transposed before": (
        lambda p, x: jax.lax.scan(compose, x, jnp.transpose(p["v"], (2, 1, 0)))[0],
        {"v": 2},
    ),
    "cast, scaled and reshaped before": (
        lambda p, x: jax.lax.scan(
            lambda x, w: compose(x, w[0].astype("float32")),
            x,
            0.5 * p["w"].astype("bfloat16")[:, None],
        )[0],
        {"w": 0},
    ),
    "in a jitted function": (jax.jit(scan_once), {"w": 0}),
    "in a branch": (
        lambda p, x: jax.lax.cond(x.sum() > 0, scan_once, lambda p, x: x, p, x),
        {"w": 0},
    ),
    "contracted in a branch": (
        lambda p, x: jax.lax.scan(
            lambda x, w: (jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x), None), x, p["w"]
        )[0],
        {"w": 0},
    ),
    "contracted in an inner loop": (
        lambda p, x: jax.lax.scan(
            lambda x, w: (jax.lax.scan(lambda c, r: (c + r @ w, r @ w), x[0], x)[1], None),
            x,
            p["w"],
        )[0],
        {"w": 0},
    ),
    "contracted in an inner loop that carries the slice": (
        lambda p, x: jax.lax.scan(
            lambda x, w: (
                jax.lax.scan(
                    lambda c, _: (jax.jit(lambda x, w: (jnp.tanh(x @ w), w))(*c), None),
                    (x, w),
                    length=2,
                )[0][0],
                None,
            ),
            x,
            p["w"],
        )[0],
        {"w": 0},
    ),
    "after a loop that carried the stack along": (
        lambda p, x: scan_once(
            *reversed(
                jax.lax.scan(
                    lambda c, _: (jax.jit(lambda x, p: (2 * x, p))(*c), None), (x, p), length=2
                )[0]
            )
        ),
        {"w": 0},
    ),
    "contracted in a while loop": (
        lambda p, x: jax.lax.scan(
            lambda x, w: (jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ w, x), None),
            x,
            p["w"],
        )[0],
        {"w": 0},
    ),
    "followed by a while loop": (
        lambda p, x: jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, 2.0 * c[1]), (0, scan_once(p, x))
        )[1],
        {"w": 0},
    ),
    "with a number in the carry": (
        lambda p, x: jax.lax.scan(
            lambda c, w: ((compose(c[0], w)[0], 0.0), None), (x, 0.0), p["w"]
        )[0][0],
        {"w": 0},
    ),
    "followed by a loop that ends at once": (
        lambda p, x: jax.lax.while_loop(
            lambda c: c[0], lambda c: (False, 2.0 * c[1]), (True, scan_once(p, x))
        )[1],
        {"w": 0},
    ),
    "with a key in the carry": (
        lambda p, x: jax.lax.scan(
            lambda c, w: ((compose(c[0], w)[0], jax.random.split(c[1])[0]), None),
            (x, jax.random.key(0)),
            p["w"],
        )[0][0],
        {"w": 0},
    ),
    "in two streams that change places": (
        lambda p, x: jax.lax.scan(lambda c, w: ((c[1], c[0] + c[1] @ w), None), (x, x), p["w"])[0],
        {"w": 0},
    ),
    "backwards": (
        lambda p, x: jax.lax.scan(compose, x, p["w"], reverse=True)[0],
        {"w": 0},
    ),
    "the slices stacked again and scanned": (
        lambda p, x: jax.lax.scan(
            compose, x, jax.lax.scan(lambda c, w: (c, 2 * w), 0.0, p["w"])[1]
        )[0],
        {"w": 0},
    ),
    "with a scale that is only multiplied": (
        lambda p, x: jax.lax.scan(lambda x, wb: (wb[1] * (x @ wb[0]), None), x, (p["w"], p["b"]))[
            0
        ],
        {"w": 0, "b": 0},
    ),
    "with what it starts from": (
        lambda p, x: jax.lax.scan(compose, x + p["b"][0], p["w"])[0],
        {"w": 0},
    ),
    "with a batch that is closed over": (
        lambda p, x: jax.lax.scan(compose, jnp.ones((2, 4)), p["w"])[0],
        {"w": 0},
    ),
    "under vmap over the batch": (
        jax.vmap(lambda p, x: jax.lax.scan(compose, x, p["w"])[0], in_axes=(None, 0)),
        {"w": 0},
    ),
}
PARAMS = {"w": STACK, "v": float32(4, 4, 3), "b": float32(3, 4)}


@pytest.mark.parametrize("name", LAYERS)
def test_loops_over_layers(name):
    fn, axes = LAYERS[name]
    depth = trace_depth(fn, PARAMS, X)
    assert {path: place.axes for path, place in depth.items()} == {p: (a,) for p, a in axes.items()}


def experts_in_constants(p, x):
    def body(total, expert):
        return total + jax.nn.relu(x @ expert), None

    return jax.lax.scan(body, jnp.zeros_like(x), p["w"])[0]


def experts_with_the_input_in_the_carry(p, x):
    def body(carry, expert):
        x, total = carry
        return (x, total + x @ expert), None

    return jax.lax.scan(body, (x, jnp.zeros_like(x)), p["w"])[0][1]


def experts_in_a_jitted_body(p, x):
    @jax.jit
    def expert(x, total, w):
        return x, total + x @ w

    return jax.lax.scan(lambda c, w: (expert(*c, w), None), (x, jnp.zeros_like(x)), p["w"])[0][1]


def experts_with_their_input_through_an_inner_loop(p, x):
    def body(carry, expert):
        (x, total), _ = jax.lax.scan(
            lambda c, _: (jax.jit(lambda x, t: (x, t + x @ expert))(*c), None), carry, length=1
        )
        return (x, total), None

    return jax.lax.scan(body, (x, jnp.zeros_like(x)), p["w"])[0][1]


def experts_with_a_key(p, x):
    def body(carry, expert):
        key, total = carry
        key, drop = jax.random.split(key)
        return (key, total + jax.random.normal(drop, x.shape) * x @ expert), None

    return jax.lax.scan(body, (jax.random.key(0), jnp.zeros_like(x)), p["w"])[0][1]


def time_with_embedded_tokens_that_are_closed_over(p, x):
    inputs = p["b"][jnp.array([0, 2, 1])] + p["b"]

    def body(state, token):
        return jnp.tanh(state @ p["w"][0]) * (state @ token)[:, None], None

    return jax.lax.scan(body, x, inputs)[0]


def experts_with_a_nonlinear_total(p, x):
    return jax.lax.scan(lambda t, w: (jax.nn.relu(t) + x @ w, None), jnp.zeros_like(x), p["w"])[0]


def experts_under_checkpoint(p, x):
    @jax.checkpoint
    def expert(carry, w):
        x, total = carry
        return (x, total + jnp.tanh(x @ w)), None

    return jax.lax.scan(expert, (x, jnp.zeros_like(x)), p["w"])[0][1]


def experts_behind_a_barrier(p, x):
    def expert(carry, w):
        x, total = jax.lax.optimization_barrier(carry)
        return (x, total + x @ w), None

    return jax.lax.scan(expert, (x, jnp.zeros_like(x)), p["w"])[0][1]


def experts_with_a_capacity(p, x):
    def expert(carry, w):
        capacity, total = carry
        routed = jnp.minimum(capacity, 1.0)
        return (capacity - routed, total + (routed[:, None] * x) @ w), None

    return jax.lax.scan(expert, (jnp.ones(2), jnp.zeros_like(x)), p["w"])[0][1]


def experts_of_tokens_in_turn(p, x):
    def expert(carry, w):
        x, total = carry
        return (jnp.roll(x, 1, axis=0), total + x @ w), None

    return jax.lax.scan(expert, (x, jnp.zeros_like(x)), p["w"])[0][1]


def attention_to_learned_keys_in_chunks(p, x):
    def chunk(carry, keys):
        top, total = carry
        scores = x @ keys
        higher = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - higher[:, None])
        return (higher, total * jnp.exp(top - higher)[:, None] + weights @ keys.T), None

    return jax.lax.scan(chunk, (jnp.zeros(2), jnp.zeros_like(x)), p["w"])[0][1]


def experts_with_a_counter(p, x):
    def body(carry, expert):
        i, total = carry
        routed = jax.lax.dynamic_index_in_dim(x, i % 2)
        return (i + 1, total + routed @ expert), None

    return jax.lax.scan(body, (0, jnp.zeros_like(x)), p["w"])[0][1]


def vocabulary_in_chunks(p, x):
    def body(total, chunk):
        return jnp.logaddexp(total, jax.nn.logsumexp(x @ chunk, axis=-1)), None

    return jax.lax.scan(body, jnp.full(2, -jnp.inf), p["w"])[0]


def recurrent_with_learned_positions(p, x):
    def body(state, position):
        return jnp.tanh(state @ p["w"][0] + position), None

    return jax.lax.scan(body, x, p["b"])[0]


def one_layer_applied_again_and_again(p, x):
    return jax.lax.scan(lambda x, _: compose(x, p["w"][0]), x, length=3)[0]


def ensemble(p, x):
    return jax.vmap(lambda w: x @ w)(p["w"])


NOT_LAYERS = [
    experts_in_constants,
    experts_with_the_input_in_the_carry,
    experts_in_a_jitted_body,
    experts_with_their_input_through_an_inner_loop,
    experts_with_a_key,
    experts_with_a_nonlinear_total,
    experts_under_checkpoint,
    experts_behind_a_barrier,
    experts_with_a_capacity,
    experts_of_tokens_in_turn,
    attention_to_learned_keys_in_chunks,
    experts_with_a_counter,
    time_with_embedded_tokens_that_are_closed_over,
    vocabulary_in_chunks,
    recurrent_with_learned_positions,
    one_layer_applied_again_and_again,
    ensemble,
]


@pytest.mark.parametrize("fn", NOT_LAYERS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_loops_over_other_things(fn, grad):
    """Their input is made from a parameter, so that the gradient passes through them."""

    def loss(p, x):
        return fn(p, jnp.tanh(x @ p["embed"])).sum()

    params = PARAMS | {"embed": float32(4, 4)}
    with pytest.raises(DepthNotFoundError, match=r"No parameter, like b \(3, 4\).*from_rules"):
        trace_depth(jax.grad(loss) if grad else loss, params, X)


@pytest.mark.parametrize("fn", NOT_LAYERS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_layers_beside_and_around_loops_over_other_things(fn, grad):
    """Real layers before, and the other loop inside each of further layers."""

    def loss(p, x):
        x = jax.lax.scan(compose, x, p["layers"])[0]
        x = x + jnp.mean(fn(p["beside"], x))
        layer = jax.checkpoint(lambda x, inside: (x + jnp.tanh(fn(inside, x)).mean(), None))
        return jax.lax.scan(layer, x, p["inside"])[0].sum()

    params = {
        "layers": STACK,
        "beside": PARAMS,
        "inside": jax.tree.map(lambda leaf: float32(5, *leaf.shape), PARAMS),
    }
    depth = trace_depth(jax.grad(loss) if grad else loss, params, X)
    used = {path: (place.axes, place.layers) for path, place in depth.items()}
    assert used.pop("layers") == ((0,), (0, 1, 2))
    assert used
    assert all(
        path.startswith("inside/") and place == ((0,), tuple(range(5)))
        for path, place in used.items()
    )


def test_experts_inside_layers():
    def layer(x, layer):
        def expert(total, w):
            return total + x @ w, None

        return jax.lax.scan(expert, x, layer)[0], None

    params = {"experts": float32(5, 3, 4, 4)}  # experts outside, layers inside
    depth = trace_depth(
        lambda p, x: jax.lax.scan(layer, x, p["experts"].transpose(1, 0, 2, 3))[0], params, X
    )
    assert (depth["experts"].axes, depth["experts"].layers) == ((1,), (0, 1, 2))


def test_a_function_called_twice_has_two_stacks():
    run = jax.jit(lambda w, x: jax.lax.scan(compose, x, w)[0])
    params = {"encoder": STACK, "decoder": STACK}
    depth = trace_depth(lambda p, x: run(p["decoder"], run(p["encoder"], x)), params, X)
    assert {place.group for place in depth.values()} == {"encoder", "decoder"}


def test_stacks_without_a_common_path_keep_their_own_names():
    params = {"a": STACK, "b": STACK, "c": STACK, "d": STACK}

    def forward(p, x):
        for stack in ((p["a"], p["b"]), (p["c"], p["d"])):
            x, _ = jax.lax.scan(lambda x, w: (x @ w[0] @ w[1], None), x, stack)
        return x

    depth = trace_depth(forward, params, X)
    assert {path: place.group for path, place in depth.items()} == {
        "a": "layers",
        "b": "layers",
        "c": "layers (2)",
        "d": "layers (2)",
    }


def test_an_axis_that_is_lost_on_the_way_is_not_guessed():
    params = {"w": float32(12, 4), "v": STACK}

    def forward(p, x):
        w = p["w"].reshape(3, 4, 4)
        return jax.lax.scan(lambda x, layer: (x @ layer[0] @ layer[1], None), x, (w, p["v"]))[0]

    assert list(trace_depth(forward, params, X)) == ["v"]


def test_integers_in_the_layers_are_left_alone():
    params = {"w": STACK, "step": jax.ShapeDtypeStruct((3,), "int32")}

    def forward(p, x):
        return jax.lax.scan(lambda x, layer: compose(x, layer["w"] * layer["step"]), x, p)[0]

    assert list(trace_depth(forward, params, X)) == ["w"]


def test_any_keyword_is_the_functions_own():
    def forward(p, x, *, fn, params, leaves):
        return scan_once(p, x + fn + params + leaves)

    depth = trace_depth(forward, {"w": STACK}, X, fn=X, params=X, leaves=1.0)
    assert list(depth) == ["w"]


def test_refuses_what_is_no_function_and_no_params():
    with pytest.raises(ValueError, match="takes the function first"):
        trace_depth({"w": STACK}, scan_once, X)
    with pytest.raises(DepthNotFoundError, match="There are no parameters"):
        trace_depth(lambda p, x: x, {}, X)


def test_disable_jit_changes_nothing():
    with jax.disable_jit():
        assert list(trace_depth(scan_once, {"w": STACK}, X)) == ["w"]


def test_boxed_params_serve_plain_updates():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "features"))
            return x + nn.Dense(4, kernel_init=kernel_init)(nn.gelu(x)), None

    model = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((2, 4)), None))
    depth = trace_depth(model.apply, params, X, None)
    assert list(depth) == ["params/Dense_0/bias", "params/Dense_0/kernel"]
    assert depth.resolve(nn.unbox(params)) == depth


def test_different_axes_in_different_loops_are_refused_with_path_and_shape():
    params = {"w": float32(4, 4, 4)}

    def forward(p, x):
        x = jax.lax.scan(compose, x, p["w"])[0]
        return jax.lax.scan(compose, x, jnp.swapaxes(p["w"], 0, 1))[0]

    with pytest.raises(ValueError, match=r"w \(4, 4, 4\).*axes \[0, 1\].*from_rules"):
        trace_depth(forward, params, X)


def test_equals_the_rules_that_say_the_same():
    model = Model(axis=-1)
    params = abstract_params(model)
    traced = trace_depth(model.apply, params, TOKENS)
    said = Depth.from_rules({"params/stack_0/.*": -1}).resolve(params)
    assert {path: (place.axes, place.layers) for path, place in traced.items()} == {
        path: (place.axes, place.layers) for path, place in said.items()
    }
