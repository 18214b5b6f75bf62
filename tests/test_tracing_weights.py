"""trace_depth on weights made of parameters and of other arrays, and on stacks made of siblings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthsmooth import DepthNotFoundError, trace_depth

D = 4
X = jax.ShapeDtypeStruct((5, D), "float32")
KEY = jax.random.key(0)
TRIANGLE = np.tril(np.ones((D, D), np.float32))


def f(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def scan(layer, x, stack, **options):
    return jax.lax.scan(lambda x, one: (layer(x, one), None), x, stack, **options)[0]


def dense(x, w):
    return jnp.tanh(x @ w)


def held(fn, params, args, grad):
    """For each leaf that is placed its axes and layers."""
    followed = jax.grad(lambda *args: fn(*args).sum()) if grad else fn
    depth = trace_depth(followed, params, *args)
    return {path: (place.axes, place.layers) for path, place in depth.items()}


def standardised(w):
    return (w - w.mean(0)) / (w.std(0) + 1e-5)


def spectral(w, u):
    """The weight divided by its largest singular value, as the vector u has it."""
    v = w.T @ u
    v = v / jnp.linalg.norm(v)
    u = w @ v
    u = u / jnp.linalg.norm(u)
    return w / (jax.lax.stop_gradient(u) @ w @ jax.lax.stop_gradient(v))


def key_that_is_carried(p, x, key):
    def body(carry, w):
        x, key = carry
        key, drawn = jax.random.split(key)
        return (dense(x, w * jax.random.bernoulli(drawn, 0.9, w.shape)), key), None

    return jax.lax.scan(body, (x, key), p["w"])[0][0]


def low_rank(p):
    return jnp.einsum("lir,lro->lio", p["a"], p["b"])


def magnitude_and_direction(x, one):
    frozen, own = one
    w = frozen + own["a"] @ own["b"]
    return jnp.tanh(x @ (w / jnp.linalg.norm(w, axis=0) * own["m"]))


def by_hand(stack, x):
    for index in range(len(stack)):
        x = dense(x, stack[index])
    return x


STACK, LORA = {"w": f(3, D, D)}, {"a": f(3, D, 2), "b": f(3, 2, D)}
EACH, ONE = f(3, D, D), f(D, D)

STACKS = {
    "masked by a constant, in the loop": (
        lambda p, x: scan(lambda x, w: dense(x, w * TRIANGLE), x, p["w"]),
        STACK,
        (X,),
    ),
    "masked before the loop": (lambda p, x, m: scan(dense, x, p["w"] * m), STACK, (X, ONE)),
    "masked before layers that are indexed": (
        lambda p, x, m: by_hand(p["w"] * m, x),
        STACK,
        (X, ONE),
    ),
    "a mask for each": (
        lambda p, x, m: scan(lambda x, o: dense(x, o[0] * o[1]), x, (p["w"], m)),
        STACK,
        (X, EACH),
    ),
    "masked by where": (
        lambda p, x, m: scan(lambda x, w: dense(x, jnp.where(m > 0, w, 0)), x, p["w"]),
        STACK,
        (X, ONE),
    ),
    "masked in a loop of indices": (
        lambda p, x, m: jax.lax.fori_loop(0, 3, lambda i, x: dense(x, p["w"][i] * m), x),
        STACK,
        (X, ONE),
    ),
    "masked before a loop of indices": (
        lambda p, x, m: (lambda w: jax.lax.fori_loop(0, 3, lambda i, x: dense(x, w[i]), x))(
            p["w"] * m
        ),
        STACK,
        (X, ONE),
    ),
    "DropConnect, with a key that is carried": (key_that_is_carried, STACK, (X, KEY)),
    "DropConnect, with a key for each": (
        lambda p, x, key: scan(
            lambda x, o: dense(x, o[0] * jax.random.bernoulli(o[1], 0.9, (D, D))),
            x,
            (p["w"], jax.random.split(key, 3)),
        ),
        STACK,
        (X, KEY),
    ),
    "DropConnect before the loop": (
        lambda p, x, key: scan(dense, x, p["w"] * jax.random.bernoulli(key, 0.9, p["w"].shape)),
        STACK,
        (X, KEY),
    ),
    "noise on the weights": (
        lambda p, x, key: scan(
            lambda x, w: dense(x, w + jax.random.normal(key, w.shape)), x, p["w"]
        ),
        STACK,
        (X, KEY),
    ),
    "weight standardisation": (
        lambda p, x: scan(lambda x, w: dense(x, standardised(w)), x, p["w"]),
        STACK,
        (X,),
    ),
    "weight standardisation before the first is taken by itself": (
        lambda p, x: (lambda w: scan(dense, dense(x, w[0]), w[1:]))(jax.vmap(standardised)(p["w"])),
        STACK,
        (X,),
    ),
    "weight standardisation with a gain": (
        lambda p, x: scan(lambda x, o: dense(x, standardised(o["w"]) * o["gain"]), x, p),
        STACK | {"gain": f(3, D)},
        (X,),
    ),
    "spectral norm in the loop": (
        lambda p, x, u: scan(lambda x, o: dense(x, spectral(*o)), x, (p["w"], u)),
        STACK,
        (X, f(3, D)),
    ),
    "spectral norm before the loop": (
        lambda p, x, u: scan(dense, x, jax.vmap(spectral)(p["w"], u)),
        STACK,
        (X, f(3, D)),
    ),
    "rounded, with the gradient straight through": (
        lambda p, x: scan(
            lambda x, w: dense(x, w + jax.lax.stop_gradient(jnp.sign(w) - w)), x, p["w"]
        ),
        STACK,
        (X,),
    ),
    "LoRA added before the loop": (
        lambda p, x, frozen: scan(dense, x, frozen + low_rank(p)),
        LORA,
        (X, EACH),
    ),
    "LoRA added in the loop": (
        lambda p, x, frozen: scan(
            lambda x, o: dense(x, o[0] + 2.0 * o[1]["a"] @ o[1]["b"]), x, (frozen, p)
        ),
        LORA,
        (X, EACH),
    ),
    "LoRA added to integers with a scale": (
        lambda p, x, frozen: scan(
            lambda x, o: dense(x, o[0].astype("float32") * 0.1 + o[1]["a"] @ o[1]["b"]),
            x,
            (frozen, p),
        ),
        LORA,
        (X, jax.ShapeDtypeStruct((3, D, D), "int8")),
    ),
    "DoRA": (
        lambda p, x, frozen: scan(magnitude_and_direction, x, (frozen, p)),
        LORA | {"m": f(3, D)},
        (X, EACH),
    ),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_a_stack_of_weights_that_are_made(name, grad):
    fn, params, args = STACKS[name]
    assert held(fn, params, args, grad) == dict.fromkeys(params, ((0,), (0, 1, 2)))


SIBLINGS = {
    "masked by a constant": (lambda o, i: o["w"] * TRIANGLE, (X,)),
    "masked": (lambda o, i, m: o["w"] * m, (X, ONE)),
    "a mask for each": (lambda o, i, m: o["w"] * m[i], (X, EACH)),
    "DropConnect": (
        lambda o, i, key: o["w"] * jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, (D, D)),
        (X, KEY),
    ),
    "weight standardisation": (lambda o, i: standardised(o["w"]), (X,)),
    "spectral norm": (lambda o, i, u: spectral(o["w"], u[i]), (X, f(3, D))),
    "spectral norm with one vector": (lambda o, i, u: spectral(o["w"], u), (X, f(D))),
    "LoRA": (lambda o, i, frozen: frozen[i] + o["a"] @ o["b"], (X, EACH)),
}


@pytest.mark.parametrize("name", SIBLINGS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_siblings_with_weights_that_are_made(name, grad):
    made, args = SIBLINGS[name]
    one = {"a": f(D, 2), "b": f(2, D)} if name == "LoRA" else {"w": f(D, D)}
    params = {f"layer_{i}": one for i in range(3)}

    def forward(p, x, *rest):
        for i in range(3):
            x = dense(x, made(p[f"layer_{i}"], i, *rest))
        return x

    assert held(forward, params, args, grad) == {
        f"layer_{i}/{tensor}": ((), (i,)) for i in range(3) for tensor in one
    }


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_siblings_that_are_all_masked_first(grad):
    def forward(p, x, mask):
        p = jax.tree.map(lambda leaf: leaf * mask if leaf.ndim == 2 else leaf, p)
        for one in p.values():
            x = jnp.tanh(x @ one["w"] + one["b"])
        return x

    params = {f"layer_{i}": {"w": f(D, D), "b": f(D)} for i in range(4)}
    assert held(forward, params, (X, ONE), grad) == {
        f"layer_{i}/{tensor}": ((), (i,)) for i in range(4) for tensor in "wb"
    }


def positions(p, x):
    """A table of positions is added to data: what it makes of them is no weight."""

    def step(x, table):
        y = x + table
        return x + jnp.tanh(y @ y.T) @ (y @ p["shared"]), None

    return jax.lax.scan(step, x, p["tables"])[0]


def diagonals(p, x, down, up):
    """VeRA trains vectors, which a frozen matrix is scaled by: no axis but one is theirs."""
    return scan(lambda x, o: jnp.tanh(x @ ((down * o["d"]) @ up)), x, p)


def coefficients(p, x, basis):
    return scan(lambda x, c: jnp.tanh(x @ jnp.einsum("k,kio->io", c, basis)), x, p["c"])


def weights_that_change_with_time(p, x, changes):
    """A loop over time, in which data modulates the one weight; the table is no layers."""

    def step(x, now):
        weight, position = now
        return jnp.tanh((x + position) @ weight), None

    return jax.lax.scan(step, x, (p["w"] * changes, p["table"]))[0]


NO_WEIGHTS = {
    "a weight that changes with time": (
        weights_that_change_with_time,
        {"w": f(D, D), "table": f(7, D)},
        (X, f(7, D, D)),
    ),
    "tables of positions": (positions, {"tables": f(3, 5, D), "shared": f(D, D)}, (X,)),
    "vectors that scale a frozen matrix": (diagonals, {"d": f(3, 2)}, (X, f(D, 2), f(2, D))),
    "coefficients of a frozen basis": (coefficients, {"c": f(3, 2)}, (X, f(2, D, D))),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_what_is_no_weight_is_left_alone(name, grad):
    fn, params, args = NO_WEIGHTS[name]
    with pytest.raises(DepthNotFoundError, match=r"the loops that take slices of it do not"):
        held(fn, params, args, grad)


def pairs(x, one, order=(0, 1)):
    for k in order:
        x = jnp.tanh(x @ one["w"][k] + one["b"][k])
    return x


def in_groups(p, groups, each):
    return jax.tree.map(lambda leaf: leaf.reshape(groups, each, *leaf.shape[1:]), p)


SIX = tuple(range(6))
GROUPS = {
    "pairs": (lambda p, x: scan(pairs, x, in_groups(p, 3, 2)), SIX),
    "pairs from the last": (
        lambda p, x: scan(lambda x, o: pairs(x, o, (1, 0)), x, in_groups(p, 3, 2), reverse=True),
        SIX[::-1],
    ),
    "threes": (lambda p, x: scan(lambda x, o: pairs(x, o, range(3)), x, in_groups(p, 2, 3)), SIX),
    "pairs in rounds": (
        lambda p, x: scan(
            lambda x, two: scan(pairs, x, two),
            x,
            jax.tree.map(lambda leaf: leaf.reshape(3, 1, 2, *leaf.shape[1:]), p),
        ),
        SIX,
    ),
    "masked pairs": (
        lambda p, x: scan(pairs, x, in_groups(p | {"w": p["w"] * TRIANGLE}, 3, 2)),
        SIX,
    ),
}
NOT_IN_ORDER = {
    "pairs the other way round": lambda p, x: scan(
        lambda x, o: pairs(x, o, (1, 0)), x, in_groups(p, 3, 2)
    ),
    "one of each pair": lambda p, x: scan(lambda x, o: pairs(x, o, (1,)), x, in_groups(p, 3, 2)),
    "pairs of both halves": lambda p, x: scan(
        pairs, x, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), in_groups(p, 2, 3))
    ),
    "pairs side by side": lambda p, x: scan(
        lambda x, o: dense(x, o["w"][0]) + dense(x, o["w"][1]), x, in_groups(p, 3, 2)
    ),
    "sums of pairs": lambda p, x: scan(
        lambda x, o: dense(x, o["w"].sum(0)),
        x,
        jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), in_groups(p, 2, 3)),
    ),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_groups_of_layers_that_a_step_applies_in_order(name, grad):
    fn, layers = GROUPS[name]
    params = {"w": f(6, D, D), "b": f(6, D)}
    assert held(fn, params, (X,), grad) == dict.fromkeys(params, ((0,), layers))


@pytest.mark.parametrize("name", NOT_IN_ORDER)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_groups_that_are_not_in_the_order_of_the_stack(name, grad):
    with pytest.raises(DepthNotFoundError, match=r"the order in which loops take its slices"):
        held(NOT_IN_ORDER[name], {"w": f(6, D, D), "b": f(6, D)}, (X,), grad)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_what_is_one_for_each_pair_has_an_order_of_its_own(grad):
    def forward(p, x):
        return scan(lambda x, o: pairs(x * o[1], o[0]), x, (in_groups(p["own"], 3, 2), p["s"]))

    params = {"own": {"w": f(6, D, D), "b": f(6, D)}, "s": f(3, D)}
    own = dict.fromkeys(("own/w", "own/b"), ((0,), SIX))
    assert held(forward, params, (X,), grad) == own | {"s": ((0,), (0, 1, 2))}
    assert trace_depth(forward, params, X).groups == {"own": 6, "s": 3}


def stacked(p, x, order=range(4), make=jnp.stack, **options):
    layers = [p[f"block_{i}"] for i in order]
    stack = jax.tree.map(lambda *leaves: make(leaves), *layers)
    return scan(lambda x, o: jnp.tanh(x @ o["a"] + o["b"]), x, stack, **options)


def concatenated(leaves):
    return jnp.concatenate([leaf[None] for leaf in leaves])


def in_rounds(p, x):
    stack = jnp.stack([p[f"block_{i}"]["a"] for i in range(4)]).reshape(2, 2, D, D)
    return scan(lambda x, two: scan(dense, x, two), x, stack)


BLOCKS = {f"block_{i}": {"a": f(D, D), "b": f(D)} for i in range(4)}
TOGETHER = {
    "stacked": (stacked, (0, 1, 2, 3)),
    "concatenated": (lambda p, x: stacked(p, x, make=concatenated), (0, 1, 2, 3)),
    "in another order": (lambda p, x: stacked(p, x, (2, 0, 3, 1)), (2, 0, 3, 1)),
    "from the last": (lambda p, x: stacked(p, x, reverse=True), (3, 2, 1, 0)),
    "along another axis": (
        lambda p, x: stacked(p, x, make=lambda leaves: jnp.moveaxis(jnp.stack(leaves, -1), -1, 0)),
        (0, 1, 2, 3),
    ),
    "indexed": (
        lambda p, x: by_hand(jnp.stack([p[f"block_{i}"]["a"] for i in range(4)]), x),
        (0, 1, 2, 3),
    ),
    "in rounds": (in_rounds, (0, 1, 2, 3)),
    "masked, then stacked": (
        lambda p, x: stacked(
            jax.tree.map(lambda leaf: leaf * TRIANGLE if leaf.ndim == 2 else leaf, p), x
        ),
        (0, 1, 2, 3),
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad"])
def test_siblings_that_the_function_stacks(name, grad):
    fn, order = TOGETHER[name]
    used = "a" if name in ("indexed", "in rounds") else "ab"
    params = {key: {tensor: one[tensor] for tensor in used} for key, one in BLOCKS.items()}
    assert held(fn, params, (X,), grad) == {
        f"block_{i}/{tensor}": ((), (order.index(i),)) for i in range(4) for tensor in used
    }
    followed = jax.grad(lambda *args: fn(*args).sum()) if grad else fn
    depth = trace_depth(followed, params, X)
    assert depth.groups == {"block_*": 4}
    assert [len(track.paths) for track in depth.tracks] == [4] * len(used)


def test_stacks_that_the_function_puts_together():
    """As with dense layers before those of experts, or layers that are frozen in part."""

    def forward(p, x):
        return scan(dense, x, jnp.concatenate([p["low"], p["mid"][None], p["high"][::-1]]))

    params = {"low": f(3, D, D), "mid": f(D, D), "high": f(2, D, D)}
    assert held(forward, params, (X,), False) == {
        "low": ((0,), (0, 1, 2)),
        "mid": ((), (3,)),
        "high": ((0,), (5, 4)),
    }
    assert len(trace_depth(forward, params, X).tracks) == 1


def twice(p, x):
    once = jax.jit(stacked)
    return once(p, x) - once(p, 2 * x)


@pytest.mark.parametrize("way", ["checkpoint", "twice"])
def test_stacks_that_are_made_again_are_the_same(way):
    """In the backward pass, or in a second forward pass: one tensor through all the layers."""

    def forward(p, x):
        return (twice if way == "twice" else stacked)(p, x).sum()

    for _ in range(4):
        depth = trace_depth(jax.grad(jax.checkpoint(forward)), BLOCKS, X)
        assert {(track.group, track.tensor_name) for track in depth.tracks} == {
            ("block_*", "block_*/a"),
            ("block_*", "block_*/b"),
        }


def test_stacks_that_take_turns_when_the_function_puts_them_together():
    def forward(p, x):
        return scan(dense, x, jnp.stack([p["a"], p["b"]], 1).reshape(6, D, D))

    params = {"a": f(3, D, D), "b": f(3, D, D)}
    assert held(forward, params, (X,), False) == {"a": ((0,), (0, 2, 4)), "b": ((0,), (1, 3, 5))}
    assert len(trace_depth(forward, params, X).tracks) == 1


NOT_TOGETHER = {
    "experts that are stacked, and run over": lambda p, x: jax.lax.scan(
        lambda y, w: (y + dense(x, w), None), x, p
    )[0],
    "experts that are stacked, and mapped": lambda p, x: (
        x + jax.vmap(dense, (None, 0))(x, p).sum(0)
    ),
}


@pytest.mark.parametrize("name", NOT_TOGETHER)
def test_what_is_stacked_and_does_not_compose(name):
    params = {f"block_{i}": {"a": f(D, D)} for i in range(4)}
    with pytest.raises(DepthNotFoundError, match="do not compose"):
        held(
            lambda p, x: NOT_TOGETHER[name](jnp.stack([one["a"] for one in p.values()]), x),
            params,
            (X,),
            False,
        )


NOT_ALL = {
    "a part of a leaf": lambda p, x: scan(dense, x, jnp.concatenate([p["w"][:2], p["v"]])),
    "a part in the loop, the rest in another": lambda p, x: scan(
        dense, scan(dense, x, jnp.concatenate([p["w"][:2], p["v"]])), p["w"][2:]
    ),
    "every other of a leaf": lambda p, x: scan(dense, x, jnp.concatenate([p["w"][::2], p["v"]])),
    "a leaf twice": lambda p, x: scan(dense, x, jnp.concatenate([p["w"], p["v"], p["w"]])),
}


@pytest.mark.parametrize("name", NOT_ALL)
def test_a_part_of_a_leaf_put_together_with_others_is_not_certain(name):
    params = {"w": f(4, D, D), "v": f(2, D, D)}
    assert "w" not in held(NOT_ALL[name], params, (X,), False)


def test_a_part_of_what_is_put_together_is_not_certain():
    def forward(p, x):
        return scan(dense, x, jnp.concatenate([p["w"], p["v"]])[1:])

    with pytest.raises(DepthNotFoundError, match=r"order .* is not certain"):
        held(forward, {"w": f(4, D, D), "v": f(2, D, D)}, (X,), False)
