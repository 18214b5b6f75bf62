"""trace_depth on models put together at random, whose depth is known from how they were made."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    times = draw(st.integers(1, 2))
    cut = 0 if merged and len(depth) > 1 else draw(st.integers(0, depth[0] - 1))
    indexed = draw(st.booleans())

    def once(x, weights):
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


SQUARE = (WIDTH, WIDTH)
OTHERS = [
    Part({"kernel": SQUARE}, project, {}),
    Part({"kernel": SQUARE, "input": SQUARE}, recur, {}),
    Part({"kernel": SQUARE, "scale": (WIDTH,)}, share, {}),
    Part({"table": (3, WIDTH, 5)}, chunk, {}),
    Part({"kernel": (3, *SQUARE)}, vote, {}),
]


def trace(parts, grad):
    """What trace_depth says of some parts one after another: for each leaf its place."""

    def forward(params, x):
        for name, part in zip(params, parts, strict=True):
            x = part.apply(params[name], x)
        return x.sum()

    params = {
        f"part_{k}": {
            name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in part.shapes.items()
        }
        for k, part in enumerate(parts)
    }
    try:
        return trace_depth(jax.value_and_grad(forward) if grad else forward, params, X)
    except DepthNotFoundError:
        return Depth()


@settings(max_examples=150)
@given(
    parts=st.lists(stacks() | st.sampled_from(OTHERS), min_size=1, max_size=4),
    grad=st.booleans(),
)
def test_every_leaf_of_a_random_model_is_right(parts, grad):
    depth = trace(parts, grad)
    expected = {
        f"part_{k}/{name}": place
        for k, part in enumerate(parts)
        for name, place in part.truth.items()
    }
    assert {path: (place.axes, place.layers) for path, place in depth.items()} == {
        path: (axes, tuple(map(int, np.asarray(layers))))
        for path, (axes, layers) in expected.items()
    }
    groups = {(place.group, path.partition("/")[0]) for path, place in depth.items()}
    assert len(groups) == len({group for group, _ in groups}) == len({part for _, part in groups})
