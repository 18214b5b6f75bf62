"""trace_depth on every way to lay layers out: which leaf holds which layers, in which order."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from depthsmooth import Depth, DepthNotFoundError, sequence, trace_depth


def float32(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


X = float32(2, 4)
W = float32(4, 4)


def layer(x, w):
    return jnp.tanh(x @ w)


def scan(x, stack, **options):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, stack, **options)[0]


def held(depth):
    """For each leaf its depth axes and its layers."""
    return {path: (place.axes, place.layers) for path, place in depth.items()}


def traced(fn, params, grad, *args):
    return trace_depth(jax.grad(lambda *a: fn(*a).sum()) if grad else fn, params, *(args or (X,)))


def loop_of_calls(p, x):
    for w in p["w"]:
        x = layer(x, w)
    return x


def while_loop(p, x):
    def body(carry):
        i, x = carry
        return i + 1, layer(x, p["w"][i])

    return jax.lax.while_loop(lambda c: (c[0] < 6) & (c[1].sum() < 9), body, (0, x))[1]


def countdown(p, x):
    def body(carry):
        i, x = carry
        return i - 1, layer(x, p["w"][i])

    return jax.lax.while_loop(lambda c: c[0] >= 0, body, (5, x))[1]


def split(p, x):
    for w in jnp.split(p["w"], 6):
        x = layer(x, w[0])
    return x


def again(stack):
    return lambda x, j: (layer(x, stack[j]), None)


UP, DOWN = tuple(range(6)), tuple(range(5, -1, -1))

STACKS = {
    "scan": (lambda p, x: scan(x, p["w"]), UP),
    "scan backwards": (lambda p, x: scan(x, p["w"], reverse=True), DOWN),
    "scan of the flipped stack": (lambda p, x: scan(x, p["w"][::-1]), DOWN),
    "flipped twice": (lambda p, x: scan(x, jnp.flip(p["w"], 0), reverse=True), UP),
    "fori_loop": (
        lambda p, x: jax.lax.fori_loop(0, 6, lambda i, x: layer(x, p["w"][i]), x),
        UP,
    ),
    "fori_loop from the end": (
        lambda p, x: jax.lax.fori_loop(0, 6, lambda i, x: layer(x, p["w"][5 - i]), x),
        DOWN,
    ),
    "dynamic_index_in_dim": (
        lambda p, x: jax.lax.fori_loop(
            0, 6, lambda i, x: layer(x, jax.lax.dynamic_index_in_dim(p["w"], i, 0, False)), x
        ),
        UP,
    ),
    "take": (
        lambda p, x: jax.lax.fori_loop(
            0, 6, lambda i, x: layer(x, jnp.take(p["w"], i, 0, mode="clip")), x
        ),
        UP,
    ),
    "scan over the numbers of the layers": (
        lambda p, x: jax.lax.scan(lambda x, i: (layer(x, p["w"][i]), None), x, jnp.arange(6))[0],
        UP,
    ),
    "a Python loop over the stack": (loop_of_calls, UP),
    "split": (split, UP),
    "two scans of halves": (
        lambda p, x: scan(scan(x, p["w"][:3]), p["w"][3:]),
        UP,
    ),
    "two scans of halves from the end": (
        lambda p, x: scan(scan(x, p["w"][3:], reverse=True), p["w"][:3], reverse=True),
        DOWN,
    ),
    "two scans of parts of the flipped stack": (
        lambda p, x: scan(scan(x, p["w"][::-1][:2]), p["w"][::-1][2:]),
        DOWN,
    ),
    "the first by itself": (lambda p, x: scan(layer(x, p["w"][0]), p["w"][1:]), UP),
    "the last by itself": (lambda p, x: layer(scan(x, p["w"][:5]), p["w"][5]), UP),
    "from the last by itself": (
        lambda p, x: scan(layer(x, p["w"][5]), p["w"][:5], reverse=True),
        DOWN,
    ),
    "rounds of a part": (
        lambda p, x: jax.lax.scan(
            lambda x, pair: (scan(x, pair), None),
            layer(layer(x, p["w"][0]), p["w"][1]),
            p["w"][2:].reshape(2, 2, 4, 4),
        )[0],
        UP,
    ),
    "two fori_loops": (
        lambda p, x: jax.lax.fori_loop(
            0,
            4,
            lambda i, x: layer(x, p["w"][2 + i]),
            jax.lax.fori_loop(0, 2, lambda i, x: layer(x, p["w"][i]), x),
        ),
        UP,
    ),
    "each layer again and again": (
        lambda p, x: jax.lax.fori_loop(
            0,
            6,
            lambda i, x: jax.lax.scan(again(p["w"]), x, jnp.full(6, i))[0],
            x,
        ),
        UP,
    ),
    "split into rounds of two": (
        lambda p, x: jax.lax.scan(
            lambda x, pair: (scan(x, pair), None), x, p["w"].reshape(3, 2, 4, 4)
        )[0],
        UP,
    ),
    "after a factor for each": (
        lambda p, x: scan(x, p["w"] * jnp.arange(1.0, 7.0)[:, None, None]),
        UP,
    ),
    "a product of two": (
        lambda p, x: scan(x, jnp.einsum("lij,lkj->lik", p["w"], p["w"])),
        UP,
    ),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_a_stack(name, grad):
    fn, layers = STACKS[name]
    depth = traced(fn, {"w": float32(6, 4, 4), "other": W}, grad)
    assert held(depth) == {"w": ((0,), layers)}


OUT_OF_ORDER = {
    "halves that are swapped": lambda p, x: scan(scan(x, p["w"][3:]), p["w"][:3]),
    "halves, each from its end": (
        lambda p, x: scan(scan(x, p["w"][:3], reverse=True), p["w"][3:], reverse=True)
    ),
    "halves of two models": lambda p, x: scan(x, p["w"][:3]) + scan(x, p["w"][3:]),
    "layers, and experts beside them": (
        lambda p, x: jax.vmap(layer, (None, 0))(scan(x, p["w"][:3]), p["w"][3:]).sum(0)
    ),
    "the rest from the last on": (
        lambda p, x: layer(layer(scan(x, p["w"][:4]), p["w"][5]), p["w"][4])
    ),
    "the rest in an order of numbers": (
        lambda p, x: jax.lax.scan(again(p["w"]), scan(x, p["w"][:4]), jnp.array([5, 4]))[0]
    ),
    "halves in opposite directions": lambda p, x: scan(scan(x, p["w"][:3]), p["w"][3:][::-1]),
    "halves that overlap": lambda p, x: scan(scan(x, p["w"][:4]), p["w"][2:]),
    "the even ones, then the odd ones": lambda p, x: scan(scan(x, p["w"][::2]), p["w"][1::2]),
    "a stack that is rolled": lambda p, x: scan(x, jnp.roll(p["w"], 2, axis=0)),
    "a sum with the flipped stack": lambda p, x: scan(x, p["w"] + p["w"][::-1]),
    "differences": lambda p, x: scan(x, p["w"][1:] - p["w"][:-1]),
    "the last by itself first": lambda p, x: scan(layer(x, p["w"][5]), p["w"][:5]),
    "the first by itself last": lambda p, x: layer(scan(x, p["w"][1:]), p["w"][0]),
    "blocks of it in another order": (
        lambda p, x: scan(scan(x, p["w"].reshape(3, 2, 4, 4)[2]), p["w"].reshape(3, 2, 4, 4)[0])
    ),
    "two fori_loops that are swapped": (
        lambda p, x: jax.lax.fori_loop(
            0,
            2,
            lambda i, x: layer(x, p["w"][i]),
            jax.lax.fori_loop(2, 6, lambda i, x: layer(x, p["w"][i]), x),
        )
    ),
    "every third": (
        lambda p, x: jax.lax.fori_loop(0, 2, lambda i, x: layer(x, p["w"][i + 2 * i]), x)
    ),
    "all but one": (
        lambda p, x: jax.lax.fori_loop(
            0, 5, lambda i, x: layer(x, p["w"][jnp.where(i < 2, i, i + 1)]), x
        )
    ),
    "a number that is carried along": (
        lambda p, x: jax.lax.scan(
            lambda carry, _: (
                (
                    jax.lax.fori_loop(0, 3, lambda j, x: layer(x, p["w"][carry[1] + j]), carry[0]),
                    (carry[1] + 3) % 6,
                ),
                None,
            ),
            (x, 3),
            None,
            length=2,
        )[0][0]
    ),
    "a counter from the middle": (
        lambda p, x: scan(
            jax.lax.fori_loop(0, 3, lambda i, x: layer(x, p["w"][i + 3]), x), p["w"][:3]
        )
    ),
}


def halves_of_merged_axes(p, x):
    merged = p["w"].reshape(6, 4, 4)
    return scan(scan(x, merged[2:]), merged[:2])


def rounds_in_another_order(p, x):
    rolled = jnp.roll(p["w"], 1, axis=0)
    return jax.lax.scan(lambda x, inner: (scan(x, inner), None), x, rolled)[0]


@pytest.mark.parametrize("forward", [halves_of_merged_axes, rounds_in_another_order])
def test_two_axes_whose_order_is_not_certain_are_left_alone(forward):
    with pytest.raises(DepthNotFoundError):
        trace_depth(forward, {"w": float32(2, 3, 4, 4)}, X)


@pytest.mark.parametrize(
    "rows",
    [
        lambda: jnp.broadcast_to(jnp.arange(6), (2, 6)),
        lambda: jax.lax.broadcasted_iota("int32", (2, 6), 1),
        lambda: jax.lax.map(lambda i: jnp.arange(6), jnp.arange(2)),
    ],
)
def test_the_number_of_an_iteration_is_not_that_of_another_loop(rows):
    """The rows are taken from the last to the first, the layers by each row from the first on."""

    def forward(p, x):
        def row(x, numbers):
            return jax.lax.scan(again(p["w"]), x, numbers)[0], None

        return jax.lax.scan(row, x, rows(), reverse=True)[0]

    try:
        depth = trace_depth(forward, {"w": float32(6, 4, 4)}, X)
    except DepthNotFoundError:
        return
    assert held(depth) == {"w": ((0,), UP)}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_layers_whose_order_is_not_that_of_the_stack_are_left_alone(name, grad):
    params = {"w": float32(6, 4, 4), "v": float32(3, 4, 4)}
    depth = traced(lambda p, x: scan(OUT_OF_ORDER[name](p, x), p["v"]), params, grad)
    assert held(depth) == {"v": ((0,), (0, 1, 2))}
    assert "is left alone" in depth.explain("w")


def test_while_loops_with_a_counter():
    params = {"w": float32(6, 4, 4)}
    assert held(trace_depth(while_loop, params, X)) == {"w": ((0,), UP)}
    assert held(trace_depth(countdown, params, X)) == {"w": ((0,), DOWN)}


def test_an_index_that_is_not_a_plain_counter_is_not_guessed():
    params = {"w": float32(6, 4, 4), "v": float32(6, 4, 4)}

    def forward(p, x):
        x = jax.lax.fori_loop(0, 6, lambda i, x: layer(x, p["w"][(5 * i) % 6]), x)
        return scan(x, p["v"])

    assert list(trace_depth(forward, params, X)) == ["v"]
    with pytest.raises(DepthNotFoundError):
        trace_depth(
            lambda p, x: jax.lax.fori_loop(
                0, 6, lambda i, x: layer(x, p["w"][x.sum().astype(int)]), x
            ),
            params,
            X,
        )


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_nested_scans_order_their_axes_from_outer_to_inner(grad):
    def rounds(x, stack):
        return jax.lax.scan(lambda x, inner: (scan(x, inner), None), x, stack)[0]

    params = {"w": float32(2, 3, 4, 4), "v": float32(4, 3, 4, 2)}

    def forward(p, x):
        return rounds(rounds(x, p["w"]), jnp.transpose(p["v"], (3, 1, 0, 2)))

    assert held(traced(forward, params, grad)) == {"w": ((0, 1), UP), "v": ((3, 1), UP)}


def test_merged_axes():
    params = {"w": float32(2, 4, 3, 4)}

    def forward(p, x):
        return scan(x, jnp.moveaxis(p["w"], 2, 1).reshape(6, 4, 4))

    assert held(trace_depth(forward, params, X)) == {"w": ((0, 2), UP)}


def test_inner_layers_and_one_beside_them_in_each_round():
    """As in gemma4: rounds of five local layers and a global one."""
    params = {"local": float32(2, 4, 5, 4), "global": float32(4, 2, 4)}

    def forward(p, x):
        def one_round(x, ws):
            local, last = ws
            return layer(scan(x, jnp.moveaxis(local, 1, 0)), last), None

        stacks = (jnp.moveaxis(p["local"], 1, 1), jnp.moveaxis(p["global"], 1, 0))
        return jax.lax.scan(one_round, x, stacks)[0]

    depth = trace_depth(forward, params, X)
    assert held(depth) == {
        "local": ((0, 2), (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)),
        "global": ((1,), (5, 11)),
    }
    assert len({place.group for place in depth.values()}) == 1


def block(*lead):
    return {"wi": float32(*lead, 4, 8), "wo": float32(*lead, 8, 4)}


def apply_block(x, p):
    return x + jnp.tanh(x @ p["wi"]) @ p["wo"]


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_stacks_that_take_turns(grad):
    params = {"layers": {f"layers_{j}": block(4) for j in range(3)}, "head": W}

    def forward(p, x):
        def pattern(x, ws):
            for j in range(3):
                x = apply_block(x, ws[f"layers_{j}"])
            return x, None

        return jax.lax.scan(pattern, x, p["layers"])[0] @ p["head"]

    depth = traced(forward, params, grad)
    assert len(depth) == 6
    for j in range(3):
        assert depth[f"layers/layers_{j}/wi"].layers == (j, j + 3, j + 6, j + 9)
    assert {len(track.paths) for track in depth.tracks} == {3}


def unrolled(p, x, *, order=None):
    for key in order or list(p["net"]):
        x = apply_block(x, p["net"][key])
    return x @ p["head"]


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_layers_with_leaves_of_their_own_in_the_order_of_use(grad, way):
    keys = [f"block_{i}" for i in range(12)][:: 1 if way == "up" else -1]
    params = {"net": {key: block() for key in sorted(keys)}, "head": W}

    def forward(p, x):
        return unrolled(p, x, order=keys)

    depth = traced(forward, params, grad)
    assert {path: place.layers for path, place in depth.items()} == {
        f"net/{key}/{w}": (i,) for i, key in enumerate(keys) for w in ("wi", "wo")
    }
    assert {place.group for place in depth.values()} == {"net/block_*"}


def test_a_list_of_layers():
    params = [block() for _ in range(11)]

    def forward(p, x):
        for layer_params in p:
            x = apply_block(x, layer_params)
        return x

    depth = trace_depth(forward, params, X)
    assert [depth[f"{i}/wo"].layer for i in range(11)] == list(range(11))


def test_layers_of_other_widths_are_other_tensors():
    sizes = [4, 6, 6, 6, 2]
    params = [{"w": float32(a, b)} for a, b in itertools.pairwise(sizes)]

    def forward(p, x):
        for w in p:
            x = layer(x, w["w"])
        return x

    depth = trace_depth(forward, params, X)
    assert {path: place.layer for path, place in depth.items()} == {"1/w": 0, "2/w": 1}


def experts(p, x):
    return sum(layer(x, p[f"block_{i}"]["wi"]) @ p[f"block_{i}"]["wo"] for i in range(3))


def gated(p, x):
    total = jnp.zeros_like(x)
    for i in range(3):
        total = total * jax.nn.sigmoid(total) + apply_block(x, p[f"block_{i}"])
    return total


@pytest.mark.parametrize("fn", [experts, gated])
def test_siblings_that_do_not_compose_are_no_layers(fn):
    params = {f"block_{i}": block() for i in range(3)}
    with pytest.raises(DepthNotFoundError):
        trace_depth(fn, params, X)


def test_numbered_parts_of_a_block_are_no_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.Dense(4)(nn.LayerNorm()(x))
            return x + nn.Dense(4)(nn.LayerNorm()(x))

    class Net(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            for _ in range(self.depth):
                x = Block()(x)
            return nn.Dense(2)(nn.LayerNorm()(x))

    def depth_of(layers):
        params = jax.eval_shape(Net(layers).init, jax.random.key(0), X)
        return trace_depth(Net(layers).apply, params, X)

    depth = depth_of(3)
    assert {place.group for place in depth.values()} == {"params/Block_*"}
    assert depth["params/Block_2/Dense_1/kernel"].layer == 2
    assert len(depth) == 24
    with pytest.raises(DepthNotFoundError):
        depth_of(1)


def test_sequences_said_by_rules_join_what_is_traced_apart():
    params = {"in_blocks": block(3), "mid_block": block(), "out_blocks": block(3)}
    rule = sequence(("in_blocks", 0), "mid_block", ("out_blocks", 0))
    depth = Depth.from_rules({".*_blocks?/.*": rule}).resolve(params)
    assert depth["out_blocks/wi"].layers == (4, 5, 6)
    assert [track.spans() for track in depth.tracks] == [(7,), (7,)]


def test_explains_what_is_left_alone():
    params = {"w": float32(6, 4, 4), "experts": float32(3, 4, 4), "head": W}

    def forward(p, x):
        x = scan(x, p["w"])
        total = jax.lax.scan(lambda t, w: (t + x @ w, None), x, p["experts"])[0]
        return total @ p["head"]

    depth = trace_depth(forward, params, X)
    assert "do not compose" in depth.explain("experts")
    assert "no layer of a loop" in depth.explain("head")
    assert depth.explain("w").startswith("w (6, 4, 4) is layers 0 to 5 of 6 of the group 'w'")
