"""One tensor through all layers is mixed alike, to rounding, however it is laid out."""

import itertools
import pathlib
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import depthsmooth as ds
from depthsmooth.operators.stencil import Stencil, exists, join
from tests.laid_out import mixed as mixed_by

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.optimised]


def random_stencil(layers, radius, seed):
    offsets = tuple(range(-radius, radius + 1))
    weights = np.random.default_rng(seed).normal(size=(len(offsets), layers))
    return Stencil(offsets, weights * exists(offsets, layers))


def deal(layers, leaves):
    """Layers dealt to leaves in turn."""
    return [tuple(range(j, layers, leaves)) for j in range(leaves)]


@st.composite
def layouts(draw, layers):
    """Which leaf holds which layers, and how many depth axes it has: the ways of real models."""
    kind = draw(st.sampled_from(["stacked", "unrolled", "dealt", "two axes", "sequence", "any"]))
    divisors = [k for k in range(1, layers + 1) if layers % k == 0]
    if kind == "stacked":
        return [tuple(range(layers))], [(layers,)]
    if kind == "unrolled":
        return deal(layers, layers), [()] * layers
    if kind == "dealt":
        k = draw(st.sampled_from(divisors))
        return deal(layers, k), [(layers // k,)] * k
    if kind == "two axes":
        k = draw(st.sampled_from(divisors))
        return [tuple(range(layers))], [(k, layers // k)]
    if kind == "sequence":
        cuts = sorted(draw(st.sets(st.integers(1, layers))) | {0, layers})
        held = [tuple(range(a, b)) for a, b in itertools.pairwise(cuts)]
        return held, [(len(ours),) for ours in held]
    owner = draw(st.lists(st.integers(0, 2), min_size=layers, max_size=layers))
    held = [tuple(i for i in range(layers) if owner[i] == j) for j in range(3)]
    held = [ours for ours in held if ours]
    return held, [(len(ours),) for ours in held]


@st.composite
def laid_out(draw):
    """A stack of layers, and the same layers in another layout along other axes."""
    layers = draw(st.integers(1, 8))
    tail = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    stack = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(layers, *tail))
    held, sizes = draw(layouts(layers))
    arrays, axes = [], []
    for ours, size in zip(held, sizes, strict=True):
        front = stack[list(ours)].reshape((*size, *tail))
        to = tuple(draw(st.permutations(range(len(size) + len(tail))))[: len(size)])
        arrays.append(np.moveaxis(front, range(len(size)), to))
        axes.append(to)
    return stack, arrays, axes, held


@given(
    layout=laid_out(),
    radius=st.integers(1, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    traced=st.booleans(),
)
def test_stacked_is_unrolled_is_interleaved(layout, radius, seed, dtype, traced):
    """To 1e-6 of the largest entry, before results are rounded to a narrower type."""
    stack, arrays, axes, held = layout
    stencil = random_stencil(len(stack), radius, seed)

    def mix(updates, weights, axes, held):
        known = stencil.weights if weights is None else weights
        return mixed_by(Stencil(stencil.offsets, known), updates, axes, held)

    weights = jnp.asarray(stencil.weights, "float32") if traced else None
    run = jax.jit(mix, static_argnums=(2, 3))
    [whole] = run([jnp.asarray(stack, dtype)], weights, ((0,),), (tuple(range(len(stack))),))
    parts = run([jnp.asarray(a, dtype) for a in arrays], weights, tuple(axes), tuple(held))
    eager = mix([jnp.asarray(a, dtype) for a in arrays], weights, axes, held)
    largest = np.abs(np.asarray(whole, float)).max(initial=0)
    tolerance = largest * {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    for part, again, to, ours in zip(parts, eager, axes, held, strict=True):
        front = np.moveaxis(np.asarray(part, float), to, range(len(to)))
        expected = np.asarray(whole, float)[list(ours)].reshape(front.shape)
        assert np.abs(front - expected).max(initial=0) <= tolerance
        assert np.abs(np.asarray(again, float) - np.asarray(part, float)).max() <= tolerance


def dense(stencil):
    """The L × L matrix of a stencil."""
    matrix = np.zeros((stencil.layers,) * 2)
    for offset, weights in zip(stencil.offsets, stencil.weights, strict=True):
        for i, j in enumerate(stencil.neighbours(offset)):
            if j is not None:
                matrix[i, j] = weights[i]
    return matrix


def test_a_join_is_block_diagonal():
    one, two = random_stencil(3, 2, 0), random_stencil(4, 1, 1)
    joined = join([one, two])
    assert joined.offsets == (-2, -1, 0, 1, 2)
    assert joined.runs == (3, 4)
    expected = np.zeros((7, 7))
    expected[:3, :3], expected[3:, 3:] = dense(one), dense(two)
    np.testing.assert_array_equal(dense(joined), expected)
    updates = jnp.asarray(np.random.default_rng(2).normal(size=(7, 5)), "float32")
    [mixed] = mixed_by(joined, [updates], [(0,)], [range(7)])
    np.testing.assert_allclose(mixed, expected @ updates, rtol=1e-5, atol=1e-5)


def test_what_one_run_holds_never_reaches_another():
    """Not even an infinity, or a NaN, times a weight of 0."""
    updates = jnp.asarray([1.0, jnp.nan, 3.0, 4.0])
    joined = join([ds.window(0.5)(2, 0), ds.window(0.5)(2, 0)])
    [mixed] = mixed_by(joined, [updates], [(0,)], [range(4)])
    assert jnp.isnan(mixed).tolist() == [True, True, False, False]
    apart = mixed_by(joined, list(updates), [()] * 4, [(i,) for i in range(4)])
    assert [bool(jnp.isnan(layer)) for layer in apart] == [True, True, False, False]


def test_unrolled_layers_are_not_brought_together():
    """No operation of the compiled update writes more than a layer, or needs memory of its own."""
    updates = {f"block_{i}": jnp.ones((64, 64)) for i in range(12)}
    tx = ds.smooth_over_depth(0.2, depth=ds.Depth.from_rules({".*": ds.numbered()}))
    compiled = jax.jit(tx.update, donate_argnums=0).lower(updates, tx.init(updates)).compile()
    assert "concatenate" not in compiled.as_text()
    assert "f32[12," not in compiled.as_text()
    stacked = jax.jit(tx.update).lower(updates, tx.init(updates)).compile().memory_analysis()
    assert stacked.temp_size_in_bytes <= 64


def test_a_masked_layer_counts_as_absent():
    """Its neighbours keep the share they would have taken from it, as at an end of the stack."""
    depth = ds.Depth.from_rules({"block_.*": ds.numbered()})
    updates = {f"block_{i}": jnp.full(3, float(i)) for i in range(5)}
    masked = updates | {"block_2": optax.MaskedNode()}
    tx = ds.smooth_over_depth(0.5, depth=depth)
    result, _ = tx.update(masked, tx.init(masked))
    assert isinstance(result["block_2"], optax.MaskedNode)
    assert [float(result[f"block_{i}"][0]) for i in (0, 1, 3, 4)] == [0.25, 0.75, 3.25, 3.75]


def test_a_compiled_update_is_the_same_in_every_layout():
    """To 1e-6 of the largest entry: compilers fuse, and round, each layout in its own way."""
    layers = np.random.default_rng(0).normal(size=(7, 33, 65)).astype("float32")

    def smooth(tree, rule):
        tx = ds.smooth_over_depth(0.3, depth=ds.Depth.from_rules({".*": rule}))
        return jax.jit(tx.update)(tree, tx.init(tree))[0]

    stacked = np.asarray(smooth({"layers": jnp.asarray(layers)}, 0)["layers"])
    last = smooth({"layers": jnp.asarray(np.moveaxis(layers, 0, -1))}, -1)["layers"]
    unrolled = smooth(
        {f"block_{k}": jnp.asarray(layer) for k, layer in enumerate(layers)}, ds.numbered()
    )
    tolerance = 1e-6 * np.abs(stacked).max()
    assert np.abs(np.moveaxis(np.asarray(last), -1, 0) - stacked).max() <= tolerance
    apart = np.asarray([unrolled[f"block_{k}"] for k in range(7)])
    assert np.abs(apart - stacked).max() <= tolerance


def test_the_path_from_the_update_to_the_sum_is_short(monkeypatch):
    """At most eight functions in three files."""
    frames, pad = [], jax.lax.pad

    def recorded(*args):
        frames.append(traceback.extract_stack())
        return pad(*args)

    monkeypatch.setattr(jax.lax, "pad", recorded)
    updates = {"layers": jnp.ones((3, 17))}
    tx = ds.smooth_over_depth(0.2, depth=ds.Depth.from_rules({"layers": 0}))
    tx.update(updates, tx.init(updates))
    package = pathlib.Path(ds.__file__).parent
    ours = [
        (pathlib.Path(frame.filename).relative_to(package).as_posix(), frame.name)
        for frame in frames[0]
        if pathlib.Path(frame.filename).is_relative_to(package) and "<" not in frame.name
    ]
    assert ours[0] == ("transform.py", "update_fn")
    assert len(ours) <= 8
    assert len({file for file, _ in ours}) <= 3
