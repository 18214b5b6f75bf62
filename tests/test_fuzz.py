"""Trees, layouts, types and chains at random: never a wrong result, never an error without help."""

import dataclasses
import itertools
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import depthsmooth as ds
from depthsmooth.places import leaves_of, path_string
from tests import reference

DTYPES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3, "float64": 1e-11, "complex64": 1e-5}
"""And how far off results may be, of a tensor's largest value."""
OPERATORS = {
    "window": ds.window(0.3),
    "sharpen": ds.sharpen(0.4),
    "ema": ds.ema(0.6, reverse=True),
    "exponential": ds.exponential(radius=2, self_weight=0.5),
    "diffusion": ds.diffusion(2.0),
    "mean": ds.mean(0.5),
    "shuffled": ds.shuffled(ds.window(0.5), 3),
}


class Pair(NamedTuple):
    """A container with names."""

    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    """Another."""

    kernel: Any
    other: Any


@dataclasses.dataclass
class Group:
    """Tensors of L layers, the subtree that holds them, and where it holds which.

    Attributes:
      tree: the subtree.
      rules: from patterns below the subtree to rules.
      layers: from each tensor to its layers, each a leaf's path and an index into the leaf.
    """

    tree: Any
    rules: dict[str, Any]
    layers: dict[str, list[tuple[str, tuple[Any, ...]]]]


def values(draw, shape, dtype):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    drawn = rng.normal(size=shape)
    drawn = drawn + 1j * rng.normal(size=shape) if dtype == "complex64" else drawn
    return jnp.asarray(drawn, dtype)


def stacked(draw, count, tensors, axes_of):
    """Each tensor with its own axis, or several, which the layers are merged from."""
    group = Group({}, {}, {})
    for name, (shape, dtype) in tensors.items():
        sizes = axes_of(count)
        axes = draw(st.permutations(range(len(shape) + len(sizes))))[: len(sizes)]
        full = list(shape)
        for axis, size in sorted(zip(axes, sizes, strict=True)):
            full.insert(axis, size)
        group.tree[name] = values(draw, full, dtype)
        group.rules[re.escape(name)] = tuple(axes) if len(axes) > 1 else axes[0]
        places = itertools.product(*map(range, sizes))
        group.layers[name] = [
            (
                name,
                tuple(
                    dict(zip(axes, place, strict=True)).get(k, slice(None))
                    for k in range(len(full))
                ),
            )
            for place in places
        ]
    return group


def numbered(draw, count, tensors, *, as_list):
    """A leaf for each layer, in a dict in any order, or in a list."""
    first = 0 if as_list else draw(st.integers(0, 1))
    blocks = {
        str(first + k): {name: values(draw, *of) for name, of in tensors.items()}
        for k in range(count)
    }
    prefix = "" if as_list else "block_"
    order = draw(st.permutations(list(blocks)))
    tree = list(blocks.values()) if as_list else {f"block_{k}": blocks[k] for k in order}
    layers = {name: [(f"{prefix}{k}/{name}", ()) for k in blocks] for name in tensors}
    return Group(tree, {rf"{prefix}(\d+)/.*": ds.numbered()}, layers)


def interleaved(draw, count, tensors):
    """Stacks that alternate."""
    deals = draw(st.sampled_from([k for k in range(1, count + 1) if count % k == 0]))
    group = Group({f"layers_{j}": {} for j in range(deals)}, {}, {})
    for name, (shape, dtype) in tensors.items():
        axis = draw(st.integers(0, len(shape)))
        for j in range(deals):
            full = (*shape[:axis], count // deals, *shape[axis:])
            group.tree[f"layers_{j}"][name] = values(draw, full, dtype)
        group.rules[rf"layers_(\d+)/{re.escape(name)}"] = ds.interleaved(axis)
        group.layers[name] = [
            (f"layers_{k % deals}/{name}", (*[slice(None)] * axis, k // deals))
            for k in range(count)
        ]
    return group


def divided(draw, count):
    outer = draw(st.sampled_from([k for k in range(1, count + 1) if count % k == 0]))
    return outer, count // outer


@st.composite
def groups(draw):
    """A group with one to three tensors, of any shape and type, in any layout."""
    count = draw(st.integers(1, 4) | st.just(6))
    shapes = st.lists(st.integers(0, 2), max_size=2).map(tuple)
    names = st.sampled_from(["kernel", "bias", "w.1", "scale+", "é"])
    of = st.tuples(shapes, st.sampled_from(list(DTYPES)))
    tensors = draw(st.dictionaries(names, of, min_size=1, max_size=3))
    layout = draw(st.sampled_from(["stacked", "several", "numbered", "list", "interleaved"]))
    if layout == "stacked":
        return stacked(draw, count, tensors, lambda count: (count,))
    if layout == "several":
        return stacked(draw, count, tensors, lambda count: divided(draw, count))
    if layout == "interleaved":
        return interleaved(draw, count, tensors)
    return numbered(draw, count, tensors, as_list=layout == "list")


JUNK = st.sampled_from(
    [
        lambda: None,
        dict,
        tuple,
        lambda: jnp.zeros((0, 3)),
        lambda: jnp.float32(2),
        lambda: jnp.arange(3),
        lambda: jnp.ones((2, 3), "bfloat16"),
        optax.MaskedNode,
    ]
).map(lambda make: make())


@st.composite
def trees(draw):
    """A tree of any containers around groups: the tree, and its groups by the paths to them."""
    found: dict[str, Group] = {}

    def node(path, budget):
        kind = draw(st.sampled_from(["group", "junk", "dict", "list", "tuple", "pair", "record"]))
        if budget == 0 or kind in ("group", "junk"):
            if kind == "junk":
                return draw(JUNK)
            found[path] = draw(groups())
            return found[path].tree
        keys = {
            "dict": ["a", "b.c", "stack(0)"],
            "pair": ["first", "second"],
            "record": ["kernel", "other"],
        }.get(kind, ["0", "1"])
        children = [node(f"{path}{key}/", budget - 1) for key in keys]
        if kind == "dict":
            return dict(zip(keys, children, strict=True))
        return {"list": list, "tuple": tuple}.get(
            kind, lambda c: (Pair if kind == "pair" else Record)(*c)
        )(children)

    tree = {"model": node("model/", 2), "head": draw(groups().map(lambda group: group.tree))}
    return tree, found


def rules_of(found):
    return {
        re.escape(path) + name: rule
        for path, group in found.items()
        for name, rule in group.rules.items()
    }


def arrays_of(tree):
    return {path: np.asarray(leaf) for path, leaf in leaves_of(tree)[0]}


def expected_of(tree, found, operator, variant, norm_over, kept):
    """What the formulas give, run by run of layers; and how ill-conditioned the norms are."""
    wide = {
        path: leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
        for path, leaf in arrays_of(tree).items()
    }
    worst = 0.0
    for prefix, group in found.items():
        for run in runs_of(prefix, group, kept):
            blocks = {
                name: np.stack([wide[prefix + path][index] for path, index in layers])
                for name, layers in run.items()
            }
            count = len(next(iter(blocks.values())))
            if count == 1:
                continue
            matrix = np.asarray(ds.operator_matrix(operator, count))
            mixed = reference.augmented(blocks, matrix, variant, norm_over)
            for name, layers in run.items():
                worst = max(worst, condition(blocks[name], matrix, variant))
                for value, (path, index) in zip(mixed[name], layers, strict=True):
                    wide[prefix + path][index] = value
    return wide, worst


def condition(tensor, matrix, variant):
    """By how much what is mixed is scaled up, and its rounding with it."""
    if variant == "standard" or not tensor.size:
        return 0.0
    flat = tensor.reshape(len(tensor), -1)
    if variant == "directional":
        flat = flat / np.linalg.norm(flat, axis=1)[:, None]
    mixed = np.linalg.norm(matrix @ flat, axis=1).min()
    return np.linalg.norm(flat, axis=1).max() / mixed if mixed else np.inf


def runs_of(prefix, group, kept):
    """Layers between those that are masked; tensor by tensor, for these may be masked apart."""
    if all(kept(prefix + path) for layers in group.layers.values() for path, _ in layers):
        one_rule = len(group.rules) == 1  # and so one group, whose blocks have norms
        tensors = group.layers.items()
        yield from [group.layers] if one_rule else ({name: layers} for name, layers in tensors)
        return
    for name, layers in group.layers.items():
        for here, run in itertools.groupby(layers, lambda layer: kept(prefix + layer[0])):
            if here:
                yield {name: list(run)}


def transformation(operator, variant, **keywords):
    if variant == "shrunk":
        return ds.shrink_over_depth(OPERATORS[operator], **keywords)
    return ds.augment_over_depth(OPERATORS[operator], variant=variant, **keywords)


def wrapped(smooth, wrapping, kept):
    def mask(tree):
        return jax.tree_util.tree_map_with_path(lambda keys, _: path_string(keys) in kept, tree)

    if wrapping == "masked":
        return optax.masked(smooth, mask)
    if wrapping == "chain":
        return optax.chain(optax.identity(), smooth, optax.scale(-2))
    return optax.MultiSteps(smooth, 2) if wrapping == "steps" else smooth


@st.composite
def steps(draw):
    """A tree, and what is done with it."""
    tree, found = draw(trees().filter(lambda drawn: drawn[1]))
    wrappings = ["", "chain", "masked"]
    if all(leaf.dtype == np.float32 for leaf in arrays_of(tree).values()):
        wrappings.append("steps")  # which keeps means in float32
    wrapping = draw(st.sampled_from(wrappings))
    salt = draw(st.integers(0, 9))
    paths = arrays_of(tree)
    kept = {path for path in paths if zlib.crc32(f"{salt}{path}".encode()) % 4}
    return (
        tree,
        found,
        draw(st.sampled_from(list(OPERATORS))),
        draw(st.sampled_from(["standard", "norm_preserving", "directional", "shrunk"])),
        "tensor" if wrapping == "masked" else draw(st.sampled_from(["tensor", "block"])),
        wrapping,
        kept if wrapping == "masked" else set(paths),
        draw(st.integers(0, 9)) == 0,
    )


@pytest.fixture(autouse=True, scope="module")
def wide_types():
    with jax.enable_x64(True):
        yield


def check_step(step):
    """A step of a chain gives what the formulas do, and leaves all else as it is."""
    tree, found, operator, variant, norm_over, wrapping, kept, jit = step
    depth = ds.Depth.from_rules(rules_of(found))
    smooth = transformation(operator, variant, depth=depth, norm_over=norm_over)
    tx = wrapped(smooth, wrapping, kept)
    state = tx.init(tree)
    update = jax.jit(tx.update) if jit else tx.update
    result, state = update(tree, state, tree)
    if wrapping == "steps":
        assert not any(leaf.any() for leaf in arrays_of(result).values())
        result, state = update(tree, state, tree)
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    wide, worst = expected_of(
        tree, found, OPERATORS[operator], variant, norm_over, kept.__contains__
    )
    before, after = arrays_of(tree), arrays_of(result)
    for path, leaf in after.items():
        assert (leaf.dtype, leaf.shape) == (before[path].dtype, before[path].shape), path
        wanted = wide[path] * (-2 if wrapping == "chain" else 1)
        largest = np.abs(np.append(wide[path], before[path])).max(initial=0.0)
        share = DTYPES.get(str(leaf.dtype), 0.0)
        if norm_over == "block" and share:  # whose norms may be of float32 in part
            share = max(share, DTYPES["float32"])
        limit = share * largest * min(4 + worst, 1e9)
        np.testing.assert_allclose(
            leaf.astype(wanted.dtype), wanted, rtol=0, atol=limit, err_msg=path
        )


LENIENT = settings(
    max_examples=300,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to make one smaller may take long
)
AT_LENGTH = settings(LENIENT, max_examples=5000, derandomize=False, print_blob=True)


@LENIENT
@given(steps())
def test_no_step_is_wrong(step):
    check_step(step)


@pytest.mark.nightly
@AT_LENGTH
@given(steps())
def test_no_step_is_wrong_at_length(step):
    check_step(step)


@st.composite
def mistakes(draw):
    """Rules that do not fit a tree: the tree, the rules, and what an error has to name."""
    tree, found = draw(trees().filter(lambda drawn: drawn[1]))
    rules = rules_of(found)
    prefix, group = draw(st.sampled_from(sorted(found.items(), key=lambda pair: pair[0])))
    _, layers = draw(st.sampled_from(sorted(group.layers.items())))
    path = prefix + layers[0][0]
    pattern = re.escape(path)
    mistake = draw(st.sampled_from(["nothing", "axis", "integer", "counts", "kind"]))
    if mistake == "nothing":
        return tree, rules | {"nowhere/.*": 0}, "nowhere/.*"
    if mistake == "axis":
        return tree, {pattern: draw(st.sampled_from([7, -9, (0, 8)]))}, path
    if mistake == "integer":
        return {"model": tree["model"], "count": jnp.arange(4)}, {"count": 0}, "count"
    if mistake == "counts":
        both = {"one": jnp.ones((3, 2)), "two": jnp.ones((4, 2))}
        return {**tree, "both": both}, {"both/.*": 0}, "both/"
    return tree, {pattern: draw(st.sampled_from([None, "0", 1.5, (0, 0)]))}, pattern


def check_mistake(mistake):
    """What is wrong is a ValueError that names it and goes on to say what to do."""
    tree, rules, named = mistake
    with pytest.raises(ValueError, match=re.escape(repr(named)[1:-1])) as error:
        ds.smooth_over_depth(0.2, depth=ds.Depth.from_rules(rules)).init(tree)
    assert len(str(error.value).split()) > 8, "it says what to do"


@LENIENT
@given(mistakes())
def test_no_error_is_without_help(mistake):
    check_mistake(mistake)


@pytest.mark.nightly
@AT_LENGTH
@given(mistakes())
def test_no_error_is_without_help_at_length(mistake):
    check_mistake(mistake)
