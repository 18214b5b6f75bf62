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
from depthsmooth.depth.paths import leaves_of, path_string
from tests import reference

DTYPES = {"float32": 1e-5, "bfloat16": 2e-3, "float16": 3e-4, "float64": 1e-11, "complex64": 1e-5}
"""And how far off results may be, of a tensor's largest value."""
OPERATORS = {
    "window": ds.window(0.3),
    "scheduled": ds.window(optax.linear_schedule(0.3, 0.1, 5)),
    "kernel": ds.from_kernel([0.1, 0.6, 0.2, 0.1, 0.0], boundary="zero"),
    "composed": ds.compose(ds.window(0.2), ds.ema(0.5)),
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
      rules: from patterns below the subtree to rules, or to functions of the path to the subtree.
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


def in_sequence(draw, count, tensors):
    """Stacks one after another."""
    early = draw(st.integers(1, count))
    held = {"early": early} | ({"late": count - early} if early < count else {})
    group = Group({name: {} for name in held}, {}, {})
    for name, (shape, dtype) in tensors.items():
        group.layers[name] = []
        for container, layers in held.items():
            group.tree[container][name] = values(draw, (layers, *shape), dtype)
            group.layers[name] += [(f"{container}/{name}", (k,)) for k in range(layers)]

    def rule(path):
        containers = [re.escape(path + container) for container in held]
        return ds.sequence(*((container, 0) for container in containers))

    group.rules["(early|late)/.*"] = rule
    return group


def divided(draw, count):
    outer = draw(st.sampled_from([k for k in range(1, count + 1) if count % k == 0]))
    return outer, count // outer


SHAPES = [(), (2,), (1,), (0,), (3, 2), (2, 1), (0, 2)]
"""Of tensors: few, for each is compiled; some have as many features as there are layers."""


@st.composite
def groups(draw):
    """A group with one to three tensors, of any shape and type, in any layout."""
    count = draw(st.sampled_from([1, 2, 3, 6]))
    shapes = st.sampled_from(SHAPES)
    names = st.sampled_from(["kernel", "bias", "w.1", "scale+", "é"])
    of = st.tuples(shapes, st.sampled_from(list(DTYPES)))
    tensors = draw(st.dictionaries(names, of, min_size=1, max_size=3))
    layout = draw(
        st.sampled_from(["stacked", "several", "numbered", "list", "interleaved", "sequence"])
    )
    if layout == "stacked":
        return stacked(draw, count, tensors, lambda count: (count,))
    if layout == "several":
        return stacked(draw, count, tensors, lambda count: divided(draw, count))
    if layout == "interleaved":
        return interleaved(draw, count, tensors)
    if layout == "sequence":
        return in_sequence(draw, count, tensors)
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
        re.escape(path) + name: rule(path) if callable(rule) else rule
        for path, group in found.items()
        for name, rule in group.rules.items()
    }


def arrays_of(tree):
    return {path: np.asarray(leaf) for path, leaf in leaves_of(tree)[0]}


def expected_of(tree, found, step):
    """What the formulas give, run by run of layers; and how ill-conditioned the norms are."""
    wide = {
        path: leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
        for path, leaf in arrays_of(tree).items()
    }
    worst = dict.fromkeys(wide, 0.0)
    for prefix, group in found.items():
        for run in runs_of(prefix, group, step):
            blocks = {
                name: np.stack([wide[prefix + path][index] for path, index in layers])
                for name, layers in run.items()
            }
            count = len(next(iter(blocks.values())))
            if count == 1:
                continue
            matrix = np.asarray(ds.operator_matrix(OPERATORS[step.operator], count))
            mixed = reference.augmented(blocks, matrix, step.variant, step.norm_over)
            for name, layers in run.items():
                scaled_up = condition(blocks[name], matrix, step.variant)
                for value, (path, index) in zip(mixed[name], layers, strict=True):
                    wide[prefix + path][index] = value
                    worst[prefix + path] = max(worst[prefix + path], scaled_up)
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


def runs_of(prefix, group, step):
    """Layers between cuts and those left out; tensor by tensor, for these may be left out apart."""
    paths = {prefix + path for layers in group.layers.values() for path, _ in layers}
    one_rule = len(group.rules) == 1  # and so one group, whose blocks have norms
    tensors = [group.layers] if one_rule else [{name: of} for name, of in group.layers.items()]
    if step.kept >= paths:
        for layers in tensors:
            cut = step.cut(len(next(iter(layers.values()))))
            yield {name: of[:cut] for name, of in layers.items()}
            if cut is not None:
                yield {name: of[cut:] for name, of in layers.items()}
        return
    for name, layers in group.layers.items():
        for here, run in itertools.groupby(layers, lambda layer: prefix + layer[0] in step.kept):
            if here:
                yield {name: list(run)}


@dataclasses.dataclass(frozen=True)
class Step:
    """What is done with a tree.

    Attributes:
      operator: the name of one.
      variant: of :func:`depthsmooth.augment_over_depth`, or "shrunk".
      norm_over: what it has.
      within: the transformation of Optax around it.
      kept: paths of what is not left out by that.
      is_cut: whether no group is mixed across its middle.
      jit: whether it is compiled.
    """

    operator: str
    variant: str
    norm_over: str
    within: str
    kept: frozenset[str]
    is_cut: bool
    jit: bool

    def cut(self, layers):
        """Where so many layers are cut."""
        return layers // 2 if self.is_cut and layers > 1 else None

    def transformation(self, tree, depth):
        """The chain."""
        keywords = {"depth": depth, "norm_over": self.norm_over}
        if self.is_cut:
            keywords["depth"] = depth = depth.resolve(tree)  # for rules refuse cuts beside None
            cuts = {name: self.cut(layers) for name, layers in depth.groups.items()}
            keywords["cuts"] = {name: (cut,) for name, cut in cuts.items() if cut}
        if self.within == "where":
            keywords["where"] = lambda path, leaf: path in self.kept
        if self.variant == "shrunk":
            smooth = ds.shrink_over_depth(OPERATORS[self.operator], **keywords)
        else:
            operator = OPERATORS[self.operator]
            smooth = ds.augment_over_depth(operator, variant=self.variant, **keywords)
        return self.around(smooth)

    def around(self, smooth):
        """What is around smoothing."""

        def labels(tree):
            return jax.tree_util.tree_map_with_path(
                lambda keys, _: path_string(keys) in self.kept, tree
            )

        return {
            "masked": lambda: optax.masked(smooth, labels),
            "partition": lambda: optax.partition({True: smooth, False: optax.identity()}, labels),
            "chain": lambda: optax.chain(optax.identity(), smooth, optax.scale(-2)),
            "finite": lambda: optax.apply_if_finite(smooth, 2),
            "steps": lambda: optax.MultiSteps(smooth, 2),
        }.get(self.within, lambda: smooth)()


PARTLY = ("masked", "partition", "where")
"""What leaves paths out."""


@st.composite
def steps(draw):
    """A tree, and what is done with it."""
    tree, found = draw(trees().filter(lambda drawn: drawn[1]))
    places = ["", "chain", "finite", *PARTLY]
    if all(leaf.dtype == np.float32 for leaf in arrays_of(tree).values()):
        places.append("steps")  # which keeps means in float32
    within = draw(st.sampled_from(places))
    salt = draw(st.integers(0, 9))
    paths = frozenset(arrays_of(tree))
    kept = frozenset(path for path in paths if zlib.crc32(f"{salt}{path}".encode()) % 4)
    placed = {
        prefix + path
        for prefix, group in found.items()
        for layers in group.layers.values()
        for path, _ in layers
    }
    if within == "where" and not kept & placed:  # which is refused
        within = ""
    partly = within in PARTLY
    return (
        tree,
        found,
        Step(
            operator=draw(st.sampled_from(list(OPERATORS))),
            variant=draw(st.sampled_from(["standard", "norm_preserving", "directional", "shrunk"])),
            norm_over="tensor" if partly else draw(st.sampled_from(["tensor", "block"])),
            within=within,
            kept=kept if partly else paths,
            is_cut=not partly and draw(st.booleans()),
            jit=draw(st.integers(0, 9)) == 0,
        ),
    )


@pytest.fixture(autouse=True, scope="module")
def wide_types():
    with jax.enable_x64(True):
        yield


def check_step(drawn):
    """A step of a chain gives what the formulas do, and leaves all else as it is."""
    tree, found, step = drawn
    tx = step.transformation(tree, ds.Depth.from_rules(rules_of(found)))
    state = tx.init(tree)
    update = jax.jit(tx.update) if step.jit else tx.update
    result, state = update(tree, state, tree)
    if step.within == "steps":
        assert not any(leaf.any() for leaf in arrays_of(result).values())
        result, state = update(tree, state, tree)
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    wide, worst = expected_of(tree, found, step)
    before, after = arrays_of(tree), arrays_of(result)
    for path, leaf in after.items():
        assert (leaf.dtype, leaf.shape) == (before[path].dtype, before[path].shape), path
        wanted = wide[path] * (-2 if step.within == "chain" else 1)
        largest = np.abs(np.append(wide[path], before[path])).max(initial=0.0)
        share = DTYPES.get(str(leaf.dtype), 0.0)
        if share and (step.norm_over == "block" or step.operator == "scheduled"):
            # Norms may be of float32 in part, and schedules count in it.
            share = max(share, DTYPES["float32"])
        limit = share * largest * min(4 + worst[path], 1e16)
        np.testing.assert_allclose(
            leaf.astype(wanted.dtype), wanted, rtol=0, atol=limit, err_msg=path
        )


LENIENT = settings(
    max_examples=100,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to make one smaller may take long
)
LONGER = settings(LENIENT, max_examples=300)
AT_LENGTH = settings(LENIENT, max_examples=5000, derandomize=False, print_blob=True)


@LENIENT
@given(steps())
def test_no_step_is_wrong(drawn):
    check_step(drawn)


@pytest.mark.slow
@LONGER
@given(steps())
def test_no_step_is_wrong_for_longer(drawn):
    check_step(drawn)


@pytest.mark.nightly
@AT_LENGTH
@given(steps())
def test_no_step_is_wrong_at_length(drawn):
    check_step(drawn)


@dataclasses.dataclass
class Mistake:
    """Rules that do not fit a tree, what an error has to name, and a pattern of what to do."""

    tree: Any
    rules: dict[str, Any]
    names: tuple[str, ...]
    remedy: str
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)


def at_leaf(draw, kind, tree, rules, path):
    """A mistake about one leaf of a tree."""
    leaf, pattern = arrays_of(tree)[path], re.escape(path)
    shown = f"{path} {leaf.shape}"
    if kind == "axis":
        axis = draw(st.sampled_from([7, -9, (0, 8)]))
        return Mistake(tree, {pattern: axis}, (shown, repr(pattern)), "Correct the axis")
    if kind == "twice":
        axes, remedy = ((0, 0), "Correct the axes") if leaf.ndim else (0, "Correct the axis")
        return Mistake(tree, {pattern: axes}, (shown, repr(pattern)), remedy)
    if kind == "two rules":
        again = f"(?:{pattern})"
        return Mistake(tree, {**rules, again: 0}, (shown, repr(again)), "Narrow one of them")
    if kind == "rule":
        rule = draw(st.sampled_from([None, "0", 1.5, True, {"axis": 0}]))
        return Mistake(tree, {pattern: rule}, (repr(pattern), repr(rule)), "like 0 or -1")
    where = {"where": lambda path, leaf: False}
    first = next(iter(ds.Depth.from_rules(rules).resolve(tree)))
    shown = f"{first} {arrays_of(tree)[first].shape}"
    return Mistake(tree, rules, (shown,), "To smooth nothing, use", where)


def beside(draw, kind, tree, rules):
    """A mistake about what is put beside the rest of a tree, at a path of any depth."""
    path = draw(st.sampled_from(["added", "added.x/deep", "(model)/added"]))
    numbers = sorted(draw(st.sets(st.integers(0, 9), min_size=2, max_size=4)))
    made = {
        "integers": {"ids": jnp.arange(4)},
        "counts": {"one": jnp.ones((3, 2)), "two": jnp.ones((4, 2))},
        "shapes": {f"block_{k}": jnp.ones(2 + k) for k in range(3)},
        "holes": {f"block_{k}": jnp.ones(2) for k in (*numbers, numbers[-1] + 2)},
        "numbers": {"stage_1": {f"block_{k}": jnp.ones(2) for k in range(3)}},
        "no number": {"kernel": jnp.ones(2)},
        "container": {"one": jnp.ones((3, 2))},
    }[kind]
    rule, name, remedy = {
        "integers": (0, f"{path}/ids (4,)", "optax.masked"),
        "counts": (0, f"{path}/two (4, 2)", "give each stack a rule of its own"),
        "shapes": (ds.numbered(), f"{path}/block_1 (3,)", "narrow its pattern"),
        "holes": (ds.numbered(), f"{path}/block_{numbers[0]} (2,)", "Correct the pattern"),
        "numbers": (ds.numbered(), f"{path}/stage_1/block_0 (2,)", "Put it in parentheses"),
        "no number": (ds.numbered(), f"{path}/kernel (2,)", "Narrow the pattern"),
        "container": (ds.sequence((re.escape(path) + "/one", 0), "gone"), "'gone'", "has to match"),
    }[kind]
    for key in reversed(path.split("/")):
        made = {key: made}
    pattern = re.escape(path) + "/.*"
    named = (name,) if kind == "integers" else (name, repr(pattern))
    return Mistake(tree | made, rules | {pattern: rule}, named, remedy)


@st.composite
def mistakes(draw):
    """Any of these, in any tree."""
    tree, found = draw(trees().filter(lambda drawn: drawn[1]))
    rules = rules_of(found)
    prefix, group = draw(st.sampled_from(sorted(found.items(), key=lambda pair: pair[0])))
    _, layers = draw(st.sampled_from(sorted(group.layers.items())))
    kinds = {
        **dict.fromkeys(["axis", "twice", "two rules", "rule", "where"], at_leaf),
        **dict.fromkeys(
            ["integers", "counts", "shapes", "holes", "numbers", "no number", "container"], beside
        ),
        "nothing": None,
        "pattern": None,
        "cut": None,
    }
    kind = draw(st.sampled_from(list(kinds)))
    if kind == "nothing":
        leaf = prefix + layers[0][0]
        shown = f"{leaf} {arrays_of(tree)[leaf].shape}"
        # Of many leaves those are listed that are most like the pattern.
        pattern, listed = draw(st.sampled_from([("nowhere/.*", ""), (re.escape(leaf[:-1]), shown)]))
        remedy = r"the leaves are \S.* \([\d, ]*\).*Correct it"
        return Mistake(tree, rules | {pattern: 0}, (repr(pattern), listed), remedy)
    if kind == "pattern":
        return Mistake(tree, {"(": 0}, ("'('",), "a pattern for the whole path")
    if kind == "cut":
        remedy = r"Cuts of one group alone|rules\.resolve\(params\)"  # if some are masked
        return Mistake(tree, rules, ("9",), remedy, {"cuts": (9,)})
    if kinds[kind] is at_leaf:
        return at_leaf(draw, kind, tree, rules, prefix + layers[0][0])
    return beside(draw, kind, tree, rules)


def check_mistake(mistake):
    """What is wrong is a ValueError that names it, shows shapes, and says what to do."""

    def smooth():
        depth = ds.Depth.from_rules(mistake.rules)
        ds.smooth_over_depth(0.2, depth=depth, **mistake.keywords).init(mistake.tree)

    with pytest.raises(ValueError, match=mistake.remedy) as error:
        smooth()
    for name in mistake.names:
        assert name in str(error.value)


@LONGER
@given(mistakes())
def test_no_error_is_without_help(mistake):
    check_mistake(mistake)


@pytest.mark.nightly
@AT_LENGTH
@given(mistakes())
def test_no_error_is_without_help_at_length(mistake):
    check_mistake(mistake)
