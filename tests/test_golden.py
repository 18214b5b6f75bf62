"""The authors' own codes and their replication, run in PyTorch: their outputs are ours.

A selection of what was recorded is in ``tests/data/golden``; the whole record is run where it is at
hand. Where we differ on purpose:

- *alone*: a layer without neighbours is left as it is. The authors' window and laplacian scale it
  by 1 - alpha/2, as if its missing neighbours took their share with them.
- *zero layers* stay zero where norms are kept. In the authors' code the neighbours leak in.
- *gaps*: a missing layer keeps those before it and those after it apart. The authors' ema carries
  its average over the gap.

Left out: ILL_CONDITIONED, where mixing cancels all but 1e-5 of an update, so that what is then
scaled up is rounding. None of these codes' outputs is NaN: only their in-place forms divide 0 by 0.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import depthsmooth as ds
from tests.golden import RECORD, SELECTION, TOLERANCE, Golden

pytestmark = pytest.mark.optimised

GOLDEN = {"selection": Golden(SELECTION)} | ({"record": Golden(RECORD)} if RECORD.exists() else {})
VARIANTS = {
    "none": "standard",
    "rescale": "norm_preserving",
    "normalize_before": "directional",
    "standard": "standard",
    "norm": "norm_preserving",
    "directional": "directional",
}

# For these alphas and norms of either kind the mixed layers are 0, but for rounding.
ILL_CONDITIONED = {
    ("A:window", 0.5, "alternating"),  # neighbours of the other sign take half each
    ("B+D:GradientSmoothingAdamW._smooth_updates", 0.5, "alternating"),  # the same
    ("A:laplacian", 0.5, "constant"),  # neighbours of the same sign, taken away
    ("A:ema", None, "alternating"),  # an average of both signs
}


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def operator_of(op, params):
    """The operator that is called like that in the authors' codes."""
    match op.split(":")[-1]:
        case "window" | "post_window" | "GradientSmoothingAdamW._smooth_updates":
            return ds.window(params["alpha"])
        case "laplacian":
            return ds.sharpen(params["alpha"])
        case "ema":
            return ds.ema(params["rho"], reverse=params["reverse"])
        case "momentum_smoother":
            return ds.ema(params["beta"], reverse=params["reverse"])
    rate = 0.0 if params.get("equal_avg") else math.log(2)
    gamma = params["gamma"]
    smoothed = ds.exponential(gamma, params["k"], rate, params["direction"])
    if params["mult"] == 1:
        return smoothed

    def subtracted(layers, count):
        """With mult = -1 they take the mean of the neighbours away."""
        matrix = 2 * gamma * np.eye(layers) - ds.operator_matrix(smoothed, layers, count)
        return ds.from_matrix(matrix)(layers, count)

    return subtracted


def cases(*prefixes, missing=False):
    """Recorded cases, by operation and variant."""
    parameters = []
    for name, golden in GOLDEN.items():
        chosen = [
            case
            for case in golden.cases
            if case["op"].startswith(prefixes) and bool(case.get("missing_layers")) == missing
        ]
        by_kind = {}
        for case in chosen:
            kind = (case["op"], case["params"].get("normalize", case["params"].get("variant", "")))
            by_kind.setdefault(kind, []).append(case)
        for (op, kind), some in by_kind.items():
            parameters.append(
                pytest.param(golden, some, id=" ".join(filter(None, [name, op, kind])))
            )
    return parameters


def over_patterns(tx, tree):
    """The updates of a tree whose leaves have an axis of independent patterns in front."""
    return jax.vmap(lambda one: tx.update(one, tx.init(one))[0])(tree)


def scale_of(layers, operator, variant):
    """What the difference of each layer is relative to: the size of the terms of its sum."""
    size = np.abs(layers).reshape(*layers.shape[:2], -1).max(-1)
    if variant != "standard":
        return size
    matrix = np.abs(ds.operator_matrix(operator, layers.shape[1]))
    return size @ matrix.T


def assert_same(actual, expected, scale, tolerance, skip=()):
    """Compares layer by layer, except for some patterns."""
    difference = np.abs(np.asarray(actual) - expected).reshape(*scale.shape, -1).max(-1)
    good = difference <= tolerance * scale
    good[list(skip)] = True
    assert good.all(), (difference - tolerance * scale).max()


def skipped(golden, case):
    patterns = golden.patterns(case)
    return [patterns.index(name) for name in case.get("ill_conditioned_patterns", [])]


@pytest.mark.parametrize(
    ("golden", "some"),
    cases(
        "A:window",
        "A:laplacian",
        "A:ema",
        "A:momentum_smoother",
        "A:compute_neighbor_averaged_gradients",
    ),
)
def test_operators_and_variants(golden, some):
    for case in some:
        inputs = golden.array(case, case["X"])
        expected = golden.array(case, case["out"]["Y"])
        operator = operator_of(case["op"], case["params"])
        variant = VARIANTS[case["params"].get("normalize", "none")]
        depth = ds.Depth.from_rules({"layers": 0})
        tx = ds.augment_over_depth(operator, depth=depth, variant=variant)
        mixed = np.array(over_patterns(tx, {"layers": jnp.asarray(inputs)})["layers"])
        assert mixed.dtype == inputs.dtype
        if case["L"] == 1:
            np.testing.assert_array_equal(mixed, inputs)
            [[alone]] = np.asarray(theirs_alone(case))
            if variant == "standard":
                mixed = alone * mixed
        if variant != "standard":
            zero = ~inputs.reshape(*inputs.shape[:2], -1).any(-1)
            assert not mixed[zero].any()
            mixed[zero] = expected[zero]
        scale = scale_of(inputs, operator, variant)
        if case["L"] == 1:
            scale = np.maximum(scale, scale_of(inputs, operator, "norm_preserving"))
        tolerance = TOLERANCE[case["dtype"]]
        assert_same(mixed, expected, scale, tolerance, skipped(golden, case))


def theirs_alone(case):
    """What the authors' codes do to a single layer."""
    if case["op"] in ("A:window", "A:laplacian"):
        return [[1 - case["params"]["alpha"] / 2]]
    return ds.operator_matrix(operator_of(case["op"], case["params"]), 1)


def test_zero_layers_leak_in_the_authors_code():
    golden = GOLDEN["selection"]
    leaked = 0
    for case in golden.cases:
        if case["op"] == "A:window" and case["params"]["normalize"] != "none" and case["L"] > 1:
            inputs, expected = golden.array(case, case["X"]), golden.array(case, case["out"]["Y"])
            leaked += expected[inputs == 0].any()
    assert leaked


@pytest.mark.parametrize(("golden", "some"), cases("A:", missing=True))
def test_missing_layers(golden, some):
    """Layers with leaves of their own, some of them masked."""
    for case in some:
        inputs = golden.array(case, case["X"])
        expected = golden.array(case, case["out"]["Y"])
        missing, layers = case["missing_layers"], case["L"]
        operator = operator_of(case["op"], case["params"])
        variant = VARIANTS[case["params"]["normalize"]]
        tree = {
            f"layer_{k}": optax.MaskedNode() if k in missing else jnp.asarray(inputs[:, k])
            for k in range(layers)
        }
        depth = ds.Depth.from_rules({"layer_.*": ds.numbered()})
        tx = ds.augment_over_depth(operator, depth=depth, variant=variant)
        mixed = over_patterns(tx, tree)
        present = [k for k in range(layers) if k not in missing]
        ours = np.stack([mixed[f"layer_{k}"] for k in present], 1)
        theirs, before = expected[:, present], inputs[:, present]
        if case["op"] == "A:ema":
            together = ds.augment_over_depth(
                operator, depth=ds.Depth.from_rules({"layers": 0}), variant=variant
            )
            ours = np.array(over_patterns(together, {"layers": jnp.asarray(before)})["layers"])
        elif variant == "standard":
            alone = [not {k - 1, k + 1} & set(present) for k in present]
            np.testing.assert_array_equal(ours[:, alone], before[:, alone])
            ours[:, alone] *= 1 - case["params"]["alpha"] / 2
        zero = ~before.reshape(*before.shape[:2], -1).any(-1)
        ours[zero] = theirs[zero]
        scale = scale_of(inputs, operator, "standard")[:, present]
        assert_same(ours, theirs, scale, TOLERANCE[case["dtype"]], skipped(golden, case))


def test_a_gap_keeps_layers_apart():
    """Where their ema carries its average on."""
    golden = GOLDEN["selection"]
    [case] = [
        case
        for case in golden.cases
        if case["op"] == "A:ema"
        and case.get("missing_layers") == [2]
        and case["params"] == {"rho": 0.5, "reverse": False, "normalize": "none"}
    ]
    inputs, theirs = golden.array(case, case["X"]), golden.array(case, case["out"]["Y"])
    np.testing.assert_allclose(theirs[:, 3], 0.5 * theirs[:, 1] + 0.5 * inputs[:, 3])
    tree = {f"layer_{k}": jnp.asarray(inputs[:, k]) for k in (0, 1, 3, 4)}
    depth = ds.Depth.from_rules({"layer_.*": ds.numbered()})
    tree["layer_2"] = optax.MaskedNode()
    ours = over_patterns(ds.augment_over_depth(ds.ema(0.5), depth=depth), tree)
    np.testing.assert_array_equal(ours["layer_3"], inputs[:, 3])


@pytest.mark.parametrize(("golden", "some"), cases("A-matrix:"))
def test_matrices(golden, some):
    for case in some:
        if case["params"].get("normalize", "none") != "none":
            continue
        operator = operator_of(case["op"], case["params"])
        matrix = ds.operator_matrix(operator, case["L"])
        expected = golden.array(case, case["out"]["Y"])
        if case["L"] == 1 and case["op"] in ("A-matrix:window", "A-matrix:laplacian"):
            assert matrix == 1
            assert expected == pytest.approx(1 - case["params"]["alpha"] / 2)
        else:
            np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("golden", "some"), cases("B+D:"))
def test_replication(golden, some):
    """Norms over the block of two tensors, and the metrics before and after."""
    depth = ds.Depth.from_rules({"[ab]": 0})
    for case in some:
        inputs = {name: golden.array(case, key) for name, key in case["X"].items()}
        expected = {name: golden.array(case, case["out"][f"Y{name}"]) for name in "ab"}
        operator = operator_of(case["op"], case["params"])
        variant = VARIANTS[case["params"]["variant"]]
        tx = ds.augment_over_depth(operator, depth=depth, variant=variant, norm_over="block")
        mixed = over_patterns(tx, jax.tree.map(jnp.asarray, inputs))
        tolerance, skip = TOLERANCE[case["dtype"]], skipped(golden, case)
        # A tensor's size is relative to that of the block that its norm is of.
        scale = sum(scale_of(tensor, operator, variant) for tensor in inputs.values())
        for name in "ab":
            zero = ~inputs[name].reshape(*inputs[name].shape[:2], -1).any(-1)
            if variant != "standard":
                assert not np.asarray(mixed[name])[zero].any()
            assert_same(mixed[name], expected[name], scale, tolerance, skip)
        kept = [k for k in range(len(scale)) if k not in skip]
        metrics = golden.array(case, case["out"]["metrics"])
        for column, tree in enumerate([inputs, mixed]):
            ours = np.asarray(jax.vmap(functools.partial(metrics_of, depth))(tree))
            np.testing.assert_allclose(
                ours[kept], metrics[kept, column], rtol=tolerance, atol=tolerance
            )


def metrics_of(depth, tree):
    [metrics] = ds.depth_metrics(tree, depth).values()
    return jnp.stack(metrics[:3])


@pytest.mark.parametrize(("golden", "some"), cases("D:"))
def test_metrics(golden, some):
    depth = ds.Depth.from_rules({"layers": 0})
    for case in some:
        inputs = {"layers": golden.array(case, case["X"])}
        expected = golden.array(case, case["out"]["Y"])
        ours = jax.vmap(functools.partial(metrics_of, depth))(inputs)
        tolerance = TOLERANCE[case["dtype"]]
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


def trajectories():
    return [
        pytest.param(golden, one, id=f"{name} {one['id']}")
        for name, golden in GOLDEN.items()
        for one in golden.trajectories
    ]


def optimizer_of(params, layers):
    """The chain of Optax transformations that a recorded optimizer is."""
    decay, rate = params["weight_decay"], params["lr"]
    depth = ds.Depth.from_rules({"blocks/.*": 0})
    proj = params.get("proj_only") or params.get("scope") == "proj"
    cuts = tuple(start for start, _ in params.get("splits", []) if start)
    keywords = {"depth": depth, "where": ds.projections if proj else None}
    base = "sgd" if "SGD" in params["optimizer"] else "adamw"
    if "variant" in params:
        keywords |= {"variant": VARIANTS[params["variant"]], "norm_over": "block"}
        return ds.adamw(rate, weight_decay=decay, alpha=params["alpha"], **keywords)
    if "method" not in params:
        return optax.adamw(rate, weight_decay=decay)
    keywords |= {"variant": VARIANTS[params["normalize"]], "cuts": cuts}
    if params["method"] == "window" and layers == 1:
        # On purpose a single layer is the identity: this is what they do to it.
        only = {"inp": False, "blocks": True, "out": False}
        smooth = optax.masked(optax.scale(1 - params["alpha"] / 2), only)
    else:
        smooth = ds.augment_over_depth(operator_of(params["method"], params), **keywords)
    mask = None
    if "param_groups" in params:

        def mask(tree):
            return jax.tree.map_with_path(
                lambda keys, _: jax.tree_util.keystr(keys) == "['blocks']['lin']['weight']", tree
            )

    def decays(weight):
        return optax.add_decayed_weights(weight, mask)

    outside = params.get("decouple_weight_decay")
    rest = [optax.scale_by_learning_rate(rate)]
    if outside is None:  # smoothed before the optimizer
        return optax.chain(smooth, optax.scale_by_adam(), decays(decay), *rest)
    if base == "adamw":
        steps = [smooth, decays(decay)] if outside else [decays(decay), smooth]
        return optax.chain(optax.scale_by_adam(), *steps, *rest)
    steps = [decays(-decay), smooth, decays(decay)] if outside else [smooth]
    momentum = [decays(decay), optax.trace(0.9)]
    return optax.chain(*momentum, *steps, *rest)


@pytest.mark.parametrize(("golden", "one"), trajectories())
def test_trajectories(golden, one):
    """From the recorded gradients, every parameter after every step."""
    names = {name.split("__params__")[1] for name in one["arrays"] if "__params__" in name}

    def recorded(kind):
        tree = {}
        for name in names:
            keys = name.split(".")
            node = tree
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = golden.array(one, f"{one['id']}__{kind}__{name}")
        return tree

    expected, gradients = recorded("params"), recorded("grads")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), expected)
    tx = optimizer_of(one["params"], one["L"])
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(one["params"]["steps"]):
        gradient = jax.tree.map(lambda leaf, at=step: leaf[at], gradients)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        now = jax.tree.map(lambda leaf, at=step: leaf[at + 1], expected)
        tolerance = TOLERANCE[one["dtype"]]
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(now), strict=True):
            scale = np.abs(theirs).max()
            assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * scale


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_nothing_else_is_ill_conditioned(golden):
    named = {
        (case["op"], case["params"].get("alpha"), pattern)
        for case in golden.cases
        for pattern in case.get("ill_conditioned_patterns", [])
    }
    assert named == ILL_CONDITIONED
    assert not any(case.get("has_nan") for case in golden.cases)


def test_nothing_is_left_out():
    counts = {
        name: (len(golden.cases), len(golden.trajectories)) for name, golden in GOLDEN.items()
    }
    assert counts["selection"] == (660, 12)
    assert counts.get("record", (1029, 45)) == (1029, 45)
