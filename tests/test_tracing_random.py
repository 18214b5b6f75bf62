"""trace_depth on models put together at random, whose depth is known from how they were made."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthsmooth import Depth, DepthNotFoundError, trace_depth

WIDTH = 4
X = jax.ShapeDtypeStruct((2, WIDTH), "float32")


class Part(NamedTuple):
    """A part of a model.

    Attributes:
      shapes: the shape of each of its parameters.
      apply: its forward pass.
      truth: for each parameter that is depth its axes and layers.
    """

    shapes: dict[str, tuple[int, ...]]
    apply: object
    truth: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def layer(x, weights):
    """A residual block whose experts, where it has them, are summed in a loop of their own."""
    y = x * weights["scale"]
    if "experts" in weights:
        y = jax.lax.scan(lambda y, w: (y + jnp.tanh(x @ w), None), y, weights["experts"])[0]
    return x + jnp.tanh(y @ weights["kernel"])


def masked(weight, key):
    """What a network multiplies its weights by: a constant."""
    return weight * jnp.asarray(np.tril(np.ones((WIDTH, WIDTH), np.float32)))


def dropped(weight, key):
    """DropConnect: another mask for each layer."""
    return weight * jax.random.bernoulli(key, 0.9, weight.shape)


def standardised(weight, key):
    """Weight standardisation: by the mean and the deviation of the weight itself."""
    return (weight - weight.mean((-2, -1), keepdims=True)) / weight.std((-2, -1), keepdims=True)


def adapted(weight, key):
    """Added to a frozen weight."""
    return weight + jax.random.normal(jax.random.key(1), (WIDTH, WIDTH))


def normed(weight, key):
    """Spectral norm: divided by what the weight makes of a vector that is no parameter."""
    u = jnp.ones((WIDTH,))
    v = weight @ u
    return weight / jnp.sqrt((v * v).sum(-1, keepdims=True)[..., None])


PLAIN = [lambda weight, key: weight] * 3
MADE_OF = [*PLAIN, masked, dropped, standardised, adapted, normed]
"""What may be done to a weight before data meets it."""


@st.composite
def stored(draw, depth, tensor, flipped):
    """How a stack of tensors is kept: a shape, the depth axes in it, and the way back."""
    order = draw(st.permutations(range(len(depth) + len(tensor))))
    canonical = (*depth, *tensor)
    shape = tuple(canonical[axis] for axis in order)
    axes = tuple(order.index(k) for k in range(len(depth)))
    narrow = draw(st.booleans())

    def restore(leaf):
        stack = leaf.transpose(*(order.index(k) for k in range(len(canonical))))
        stack = stack.astype("bfloat16").astype("float32") if narrow else stack
        return jnp.flip(stack, tuple(range(len(depth)))) if flipped else stack

    return shape, axes, restore


@st.composite
def stacks(draw):
    """Layers that a loop, or one in another, or two loops after one another run over."""
    depth = tuple(draw(st.lists(st.integers(2, 3), min_size=1, max_size=2)))
    tensors = {"kernel": (WIDTH, WIDTH), "scale": (WIDTH,)}
    if draw(st.booleans()):
        tensors["experts"] = (5, WIDTH, WIDTH)
    flipped, reverse = draw(st.booleans()), draw(st.booleans())
    kept = {name: draw(stored(depth, tensor, flipped)) for name, tensor in tensors.items()}
    merged = draw(st.booleans())
    wrap = draw(st.sampled_from([lambda f: f, jax.checkpoint, jax.jit]))
    before, within = draw(st.sampled_from(MADE_OF)), draw(st.sampled_from(MADE_OF))
    low_rank = draw(st.booleans())
    if low_rank:
        kept |= {
            "down": draw(stored(depth, (WIDTH, 2), flipped)),
            "up": draw(stored(depth, (2, WIDTH), flipped)),
        }
        tensors |= {"down": (WIDTH, 2), "up": (2, WIDTH)}
    times = draw(st.integers(1, 2))
    cut = 0 if merged and len(depth) > 1 else draw(st.integers(0, depth[0] - 1))
    indexed = draw(st.booleans())

    def once(x, weights):
        kernel = weights["kernel"]
        if low_rank:
            kernel = kernel + weights["down"] @ weights["up"]
        weights = weights | {"kernel": within(kernel, jax.random.key(0))}
        return wrap(layer)(x, weights), None

    def loop(x, weights, levels):
        if levels == 0:
            return once(x, weights)
        if indexed:
            length = len(weights["kernel"])

            def body(i, x):
                at = length - 1 - i if reverse else i
                return loop(x, {name: w[at] for name, w in weights.items()}, levels - 1)[0]

            return jax.lax.fori_loop(0, length, body, x), None
        return jax.lax.scan(lambda x, w: loop(x, w, levels - 1), x, weights, reverse=reverse)[
            0
        ], None

    def apply(p, x):
        weights = {name: kept[name][2](p[name]) for name in tensors}
        weights["kernel"] = before(weights["kernel"], jax.random.key(0))
        if merged:
            weights = {k: w.reshape(-1, *w.shape[len(depth) :]) for k, w in weights.items()}
        parts = [{k: w[:cut] for k, w in weights.items()}, {k: w[cut:] for k, w in weights.items()}]
        for part in parts[:: -1 if reverse else 1] * times if cut else [weights] * times:
            x, _ = loop(x, part, 1 if merged else len(depth))
        return x

    layers = tuple(range(math.prod(depth)))
    layers = layers[::-1] if flipped != reverse else layers
    return Part(
        {name: kept[name][0] for name in tensors},
        apply,
        {name: (kept[name][1], layers) for name in tensors},
    )


@st.composite
def pairs(draw):
    """A stack that is reshaped into groups of layers, each of which a step applies in order."""
    rounds, each = draw(st.integers(2, 3)), draw(st.integers(2, 3))
    reverse, made = draw(st.booleans()), draw(st.sampled_from(MADE_OF))

    def apply(p, x):
        def step(x, kernels):
            for k in range(each)[:: -1 if reverse else 1]:
                x = x + jnp.tanh(x @ made(kernels[k], jax.random.key(k)))
            return x, None

        kernels = p["kernel"].reshape(rounds, each, WIDTH, WIDTH)
        return jax.lax.scan(step, x, kernels, reverse=reverse)[0]

    layers = tuple(range(rounds * each))[:: -1 if reverse else 1]
    return Part({"kernel": (rounds * each, WIDTH, WIDTH)}, apply, {"kernel": ((0,), layers)})


@st.composite
def rounds(draw):
    """Inner layers, and beside them what only the outer loop takes slices of."""
    outer, inner = draw(st.integers(2, 3)), draw(st.integers(2, 3))
    sides = {"projection": (WIDTH, inner), "norm": (WIDTH,), "gate": (WIDTH,), "matrix": SQUARE}
    side = draw(st.sampled_from(list(sides)))
    shape = (outer, *sides[side])

    def apply(p, x):
        condition = x[0]

        def step(x, one):
            biases = jnp.zeros(inner)
            if side == "projection":
                biases = condition @ one[side]
            elif side == "norm":
                x = x * one[side]
            y, _ = jax.lax.scan(
                lambda x, wb: (x + jnp.tanh(x @ wb[0] + wb[1]), None), x, (one["kernel"], biases)
            )
            if side == "gate":
                y = x + jax.nn.sigmoid(one[side]) * y
            elif side == "matrix":
                y = x + jax.nn.softmax(x @ one[side] - 1.0) * y
            return y, None

        return jax.lax.scan(step, x, p)[0]

    return Part(
        {"kernel": (outer, inner, *SQUARE), side: shape},
        apply,
        {
            "kernel": ((0, 1), tuple(range(outer * inner))),
            side: ((0,), tuple(range(outer))),
        },
    )


def dense(x, p, made):
    return jnp.tanh(x @ made(p["kernel"], jax.random.key(0)) + p["bias"])


def gated(x, p, made):
    return x + (x @ made(p["in"], jax.random.key(0)) * jax.nn.sigmoid(x)) @ p["out"]


def norm(x, p, made):
    return x * p["scale"] + p["bias"]


def convolved(x, p, made):
    """A short convolution by its taps."""
    h = sum(p["taps"][k] * jnp.roll(x, k, 0) for k in range(3))
    return x + (h * p["scale"]) @ made(p["out"], jax.random.key(0))


def mixed(x, p, made):
    """It shares most with the one before: both are layers of one kind."""
    return x + jnp.tanh((x * p["scale"]) @ p["mix"]) @ made(p["out"], jax.random.key(0))


def voted(x, p, made):
    """Experts in a Python loop."""
    return x + sum(jnp.tanh(x @ p["experts"][k]) for k in range(2)) @ made(
        p["router"], jax.random.key(0)
    )


SQUARE = (WIDTH, WIDTH)
BLOCKS = {
    "dense": (dense, {"kernel": SQUARE, "bias": (WIDTH,)}),
    "gated": (gated, {"in": SQUARE, "out": SQUARE}),
    "norm": (norm, {"scale": (WIDTH,), "bias": (WIDTH,)}),
    "hybrid": (convolved, {"scale": (WIDTH,), "taps": (3, WIDTH), "out": SQUARE}),
    "hybrid too": (mixed, {"scale": (WIDTH,), "mix": SQUARE, "out": SQUARE}),
    "voted": (voted, {"router": SQUARE, "experts": (2, *SQUARE)}),
}


@st.composite
def siblings(draw):
    """Layers with leaves of their own, of one kind or of several in turn."""
    pattern = draw(st.lists(st.sampled_from(list(BLOCKS)), min_size=1, max_size=3))
    blocks = pattern * draw(st.integers(3, 4))
    name = draw(st.sampled_from(["layers_{}", "layer_{}_part", "{}", "unit_{}"]))
    made = draw(st.sampled_from(MADE_OF))
    wrap = draw(st.sampled_from([lambda f: f, jax.checkpoint, jax.jit]))
    # Kernels of one shape without a name that says more are a block's as well as layers.
    if name in ("unit_{}", "{}") and {"dense", "norm"} & set(pattern):
        name = "layers_{}"

    def apply(p, x):
        for i, block in enumerate(blocks):
            own = {
                key.partition("/")[2]: leaf
                for key, leaf in p.items()
                if key.startswith(f"{name.format(i)}/")
            }
            x = wrap(lambda x, own, fn=BLOCKS[block][0]: fn(x, own, made))(x, own)
        return x

    kinds = [block.partition(" ")[0] for block in blocks]
    shapes, truth = {}, {}
    for i, block in enumerate(blocks):
        for tensor, shape in BLOCKS[block][1].items():
            path = f"{name.format(i)}/{tensor}"
            shapes[path] = shape
            truth[path] = ((), (kinds[:i].count(kinds[i]),))
    # Norms one after another, with nothing between them, are no layers.
    return Part(shapes, apply, {} if set(pattern) == {"norm"} else truth)


@st.composite
def put_together(draw):
    """Layers with leaves of their own that the function stacks, and scans over."""
    count, backwards = draw(st.integers(2, 5)), draw(st.booleans())
    stacked_first, reverse = draw(st.booleans()), draw(st.booleans())
    made = draw(st.sampled_from(MADE_OF))
    tensors = {"kernel": SQUARE, "scale": (WIDTH,)}
    order = list(range(count))[:: -1 if backwards else 1]

    def apply(p, x):
        layers = [{name: p[f"block_{i}/{name}"] for name in tensors} for i in order]
        stack = jax.tree.map(
            (lambda *w: jnp.stack(w))
            if stacked_first
            else (lambda *w: jnp.concatenate([one[None] for one in w])),
            *layers,
        )
        stack["kernel"] = made(stack["kernel"], jax.random.key(0))
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, stack, reverse=reverse)[0]

    used = order[:: -1 if reverse else 1]
    return Part(
        {f"block_{i}/{name}": shape for i in range(count) for name, shape in tensors.items()},
        apply,
        {f"block_{i}/{name}": ((), (used.index(i),)) for i in range(count) for name in tensors},
    )


def project(p, x):
    return x @ p["kernel"]


def recur(p, x):
    """A loop over time, with weights that all its steps share."""

    def step(carry, row):
        carry = jnp.tanh(carry @ p["kernel"] + row @ p["input"])
        return carry, carry

    return jax.lax.scan(step, jnp.zeros(WIDTH), x)[1]


def share(p, x):
    """The same layer again and again."""
    return jax.lax.fori_loop(0, 3, lambda _, x: layer(x, p), x)


def chunk(p, x):
    """The normalisation of a softmax over a vocabulary, a chunk at a time."""

    def add(total, chunk):
        return jnp.logaddexp(total, jax.nn.logsumexp(x @ chunk, -1)), None

    total, _ = jax.lax.scan(add, jnp.full(len(x), -jnp.inf), p["table"])
    return x - total[:, None]


def vote(p, x):
    """An ensemble, whose members run side by side."""
    return jax.vmap(project, (0, None))(p, x).mean(0)


OTHERS = [
    Part({"kernel": SQUARE}, project, {}),
    Part({"kernel": SQUARE, "input": SQUARE}, recur, {}),
    Part({"kernel": SQUARE, "scale": (WIDTH,)}, share, {}),
    Part({"table": (3, WIDTH, 5)}, chunk, {}),
    Part({"kernel": (3, *SQUARE)}, vote, {}),
]


NAMES = ["stem", "trunk", "neck", "crown"]


def trace(parts, grad):
    """What trace_depth says of some parts one after another: for each leaf its place."""

    def forward(params, x):
        for name, part in zip(NAMES, parts, strict=False):
            x = part.apply(params[name], x)
        return x.sum()

    params = {
        name: {leaf: jax.ShapeDtypeStruct(shape, "float32") for leaf, shape in part.shapes.items()}
        for name, part in zip(NAMES, parts, strict=False)
    }
    try:
        return trace_depth(jax.value_and_grad(forward) if grad else forward, params, X)
    except DepthNotFoundError:
        return Depth()


PARTS = stacks() | pairs() | rounds() | siblings() | put_together() | st.sampled_from(OTHERS)


def check(parts, grad):
    """Raises unless each leaf has the place that it was made to have."""
    depth = trace(parts, grad)
    expected = {
        f"{name}/{leaf}": place
        for name, part in zip(NAMES, parts, strict=False)
        for leaf, place in part.truth.items()
    }
    assert {path: (place.axes, place.layers) for path, place in depth.items()} == {
        path: (axes, tuple(map(int, np.asarray(layers))))
        for path, (axes, layers) in expected.items()
    }
    for track in depth.tracks:
        assert len({path.partition("/")[0] for path in track.paths}) == 1
        assert len({path.rpartition("/")[2] for path in track.paths}) == 1


@settings(max_examples=150)
@given(parts=st.lists(PARTS, min_size=1, max_size=4), grad=st.booleans())
def test_every_leaf_of_a_random_model_is_right(parts, grad):
    check(parts, grad)


@pytest.mark.nightly
@settings(max_examples=2000)
@given(parts=st.lists(PARTS, min_size=1, max_size=4), grad=st.booleans())
def test_every_leaf_of_many_random_models_is_right(parts, grad):
    check(parts, grad)
