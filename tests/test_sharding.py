"""Layers, and features, that devices split: the same results, and nothing sent but halos."""

import collections
import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding

import depthsmooth as ds
from benchmarks import hlo
from depthsmooth.operators import stencil
from tests.laid_out import mixed as mixed_by

pytestmark = pytest.mark.optimised

LAYERS, STAGES = 8, 4
VARIANTS = ["standard", "norm_preserving", "directional", "shrunk"]
MODES = ["auto", "explicit", "manual"]
RULES = ds.Depth.from_rules({"layers/kernel": 0, "layers/bias": 1})
SPECS = {
    "depth": {"kernel": jax.P("stage"), "bias": jax.P(None, "stage")},
    "features": {"kernel": jax.P(None, None, "model"), "bias": jax.P("model")},
    "both": {"kernel": jax.P("stage", None, "model"), "bias": jax.P("model", "stage")},
    "features over both": {"kernel": jax.P(None, ("stage", "model")), "bias": jax.P("model")},
}
# These differ in what they read: both neighbours, by weights that are traced; earlier layers alone;
# every layer.
OPERATORS = {
    "window": ds.window(optax.linear_schedule(0.3, 0.1, 10)),
    "ema, radius 7": ds.ema(0.5),
    "matrix": ds.from_matrix(np.random.default_rng(3).normal(size=(LAYERS, LAYERS))),
}
DENSE = {"matrix": ds.from_matrix(np.random.default_rng(3).normal(size=(24, 24)))}


def tree(dtype="float32", layers=LAYERS):
    rng = np.random.default_rng(0)
    return {
        "layers": {
            "kernel": jnp.asarray(rng.normal(size=(layers, 8, 16)), dtype),
            "bias": jnp.asarray(10 * rng.normal(size=(8, layers)), dtype),
        },
        "head": jnp.ones(4, dtype),
    }


def specs_of(spec):
    return {"layers": SPECS[spec], "head": jax.P()}


def make(variant, operator, **keywords):
    if variant == "shrunk":
        return ds.shrink_over_depth(operator, **keywords)
    return ds.augment_over_depth(operator, variant=variant, **keywords)


def a_mesh(mode, stages=STAGES):
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    return jax.make_mesh((stages, 8 // stages), ("stage", "model"), axis_types=(kind, kind))


def placed(whole, mesh, specs):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), whole, specs
    )


def compiled(update, whole, mode, specs, stages=STAGES, **shard_map):
    """The update, compiled for devices that split the tree, and what it gives."""
    mesh = a_mesh(mode, stages)
    parts = placed(whole, mesh, specs)
    if mode == "manual":
        update = jax.shard_map(update, mesh=mesh, in_specs=(specs,), out_specs=specs, **shard_map)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts)
    if mode == "explicit":
        with jax.set_mesh(mesh):
            program = jax.jit(update).lower(parts).compile()
            return program, program(parts)
    program = jax.jit(update, out_shardings=shardings).lower(parts).compile()
    return program, program(parts)


def depth_in(mode, whole, specs, stages=STAGES, rules=RULES):
    """The Depth that an optimizer is given there, and the keywords."""
    depth = rules.resolve(placed(whole, a_mesh(mode, stages), specs))
    return {"depth": depth} | ({"axis_name": "stage"} if mode == "manual" else {})


def updated(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


def assert_same(result, expected):
    """To 1e-6 of the largest entry of each leaf."""
    for leaf, other in zip(*map(jax.tree.leaves, (result, expected)), strict=True):
        difference = np.abs(np.asarray(leaf) - np.asarray(other))
        assert difference.max() <= 1e-6 * np.abs(np.asarray(other)).max()


def sent(program):
    return sorted(hlo.collectives(program.as_text()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operators", [OPERATORS, DENSE], ids=["shifts", "dense"])
def test_every_sharding_gives_the_same(variant, spec, mode, operators):
    if spec != "both" and (operators is DENSE or (variant != "standard" and "over" not in spec)):
        pytest.skip("covered by where both layers and features are split")
    norm_over = "block" if spec == "both" else "tensor"
    whole, specs = tree(layers=24 if operators is DENSE else LAYERS), specs_of(spec)
    keywords = depth_in(mode, whole, specs) | {"norm_over": norm_over}

    def all_updates(keywords):
        return lambda updates: [
            updated(make(variant, operator, **keywords), updates) for operator in operators.values()
        ]

    expected = jax.jit(all_updates({"depth": RULES, "norm_over": norm_over}))(whole)
    fn, mesh = all_updates(keywords), a_mesh(mode)
    parts = placed(whole, mesh, specs)
    if mode == "manual":
        out = [specs] * len(operators)
        fn = jax.shard_map(fn, mesh=mesh, in_specs=(specs,), out_specs=out)
    with jax.set_mesh(mesh):
        results = jax.jit(fn)(parts)
    for result, like in zip(results, expected, strict=True):
        assert_same(result, like)
        if mode != "auto":
            for leaf, part in zip(*map(jax.tree.leaves, (result, parts)), strict=True):
                assert leaf.sharding.is_equivalent_to(part.sharding, leaf.ndim)


KERNEL, BIAS = 8 * 16, 8  # elements of one layer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ["depth", "both"])
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_what_is_sent_is_the_halo(mode, spec, radius):
    """The radius in layers to each side."""
    whole, specs = tree(), specs_of(spec)
    tx = ds.augment_over_depth(ds.exponential(0.5, radius), **depth_in(mode, whole, specs))
    program, _ = compiled(lambda updates: updated(tx, updates), whole, mode, specs)
    per_shard = LAYERS // STAGES
    hops = [min(per_shard, radius - k) for k in range(0, radius, per_shard)]
    split = 1 if spec == "depth" else 2
    expected = [
        ("collective-permute", layers * elements // split * 4)
        for layers in hops
        for elements in (KERNEL, BIAS)
        for _ in range(2)
    ]
    assert sent(program) == sorted(expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_halos_are_sent_in_the_type_that_they_have(variant):
    """Read before compilation: compilers for CPU make float32 of all that is sent."""
    whole, specs = tree("bfloat16"), specs_of("both")
    tx = make(variant, ds.window(0.3), **depth_in("manual", whole, specs))
    fn = jax.shard_map(
        lambda updates: updated(tx, updates),
        mesh=a_mesh("manual"),
        in_specs=(specs,),
        out_specs=specs,
    )
    text = jax.jit(fn).lower(whole).as_text()
    types = re.findall(r"stablehlo.collective_permute.*-> tensor<(?:\d+x)*(\w+)>", text)
    assert types == ["bf16"] * 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ["features", "features over both"])
def test_nothing_is_sent_where_layers_are_together(mode, spec):
    whole, specs = tree(), specs_of(spec)
    keywords = depth_in(mode, whole, specs)
    tx = optax.chain(*(ds.augment_over_depth(one, **keywords) for one in OPERATORS.values()))
    program, _ = compiled(lambda updates: updated(tx, updates), whole, mode, specs)
    assert sent(program) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ["depth", "features", "both"])
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_norms_add_what_is_small(mode, spec, variant):
    """Some numbers for each layer; and the halo is not sent again for them."""
    whole, specs = tree(), specs_of(spec)
    tx = make(variant, ds.window(0.3), **depth_in(mode, whole, specs))
    program, _ = compiled(lambda updates: updated(tx, updates), whole, mode, specs)
    everything = collections.Counter(sent(program))
    assert "all-gather" not in {kind for kind, _ in everything}
    split = 2 if spec == "both" else 1
    halos = [("collective-permute", 4 * size // split) for size in (KERNEL, BIAS) for _ in "ab"]
    once = collections.Counter([] if spec == "features" else halos)
    assert everything >= once
    # For two tensors, and norms before and after mixing, L numbers of 4 bytes.
    numbers = 2 * 2 * 4 * LAYERS * (2 if variant == "directional" else 1)
    assert sum(size for _, size in (everything - once).elements()) <= numbers
    if spec == "depth" and mode != "manual" and variant != "directional":
        assert everything == once


@pytest.mark.parametrize("mode", MODES)
def test_shards_of_dense_operators_go_round(mode):
    """Each device gets every other shard once."""
    whole, specs = {"layers": {"kernel": tree(layers=32)["layers"]["kernel"]}}, {}
    specs = {"layers": {"kernel": jax.P("stage")}}
    rules = ds.Depth.from_rules({".*": 0})
    tx = ds.augment_over_depth(ds.mean(0.4), **depth_in(mode, whole, specs, rules=rules))
    program, result = compiled(lambda updates: updated(tx, updates), whole, mode, specs)
    shard = 32 // STAGES * KERNEL * 4
    assert sent(program) == [("collective-permute", shard)] * (2 * (STAGES - 1))
    expected = updated(ds.augment_over_depth(ds.mean(0.4), depth=rules), whole)
    chex.assert_trees_all_close(
        jax.device_get(result), jax.device_get(expected), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stages", [2, 8])
@pytest.mark.parametrize("layout", ["axis 1", "dealt", "several axes", "reversed", "cuts"])
def test_layouts(mode, stages, layout):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), "float32")

    whole, rules, spec = {
        "axis 1": ({"a": normal(3, 8, 4)}, {"a": 1}, jax.P(None, "stage")),
        "dealt": (
            {f"a_{k}": normal(8, 4) for k in range(3)},
            {"a.*": ds.interleaved(0)},
            jax.P("stage"),
        ),
        "several axes": ({"a": normal(8, 3, 2)}, {"a": (0, 1)}, jax.P("stage")),
        "reversed": ({"a": normal(8, 4)}, {"a": 0}, jax.P("stage")),
        "cuts": ({"a": normal(16, 4)}, {"a": 0}, jax.P("stage")),
    }[layout]
    specs = dict.fromkeys(whole, spec)
    depth = ds.Depth.from_rules(rules).resolve(whole)
    if layout == "reversed":
        [leaf] = depth.leaves
        place = leaf.place.__class__("a", "a", (0,), tuple(range(7, -1, -1)), "trace")
        depth = ds.Depth((ds.Leaf("a", (8, 4), place),))
    cuts = {"cuts": (5, 9)} if layout == "cuts" else {}
    one = ds.exponential(0.5, 3)  # reads beyond the next shard, where that has one layer or two
    expected = updated(ds.augment_over_depth(one, depth=depth, **cuts), whole)
    keywords = depth_in(mode, whole, specs, stages, depth)
    assert {place.shards for place in keywords["depth"].values()} == {stages}
    tx = ds.augment_over_depth(one, **keywords, **cuts)
    program, result = compiled(lambda updates: updated(tx, updates), whole, mode, specs, stages)
    chex.assert_trees_all_close(
        jax.device_get(result), jax.device_get(expected), rtol=1e-6, atol=1e-6
    )
    assert {kind for kind, _ in sent(program)} == {"collective-permute"}


@given(st.data())
@settings(max_examples=15)
def test_shards_at_random(data):
    """One kernel of any offsets, over shards of any size, gives the same."""
    shards = data.draw(st.sampled_from([2, 4, 8]))
    layers = shards * data.draw(st.integers(1, 4))
    offsets = data.draw(
        st.lists(st.integers(1 - layers, layers - 1), min_size=1, max_size=6, unique=True)
    )
    axis = data.draw(st.integers(0, 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    there = stencil.exists(tuple(offsets), layers)
    # What is the same in all layers is a number in the program.
    columns = data.draw(st.sampled_from([1, layers]))
    operator = stencil.Stencil(tuple(offsets), rng.normal(size=(len(offsets), columns)) * there)
    shape = (layers, 3) if axis == 0 else (3, layers)
    updates = jnp.asarray(rng.normal(size=shape), "float32")

    def mixed(updates, **split):
        return mixed_by(operator, [updates], [(axis,)], [range(layers)], **split)[0]

    expected = jax.jit(mixed)(updates)
    views = jax.jit(functools.partial(mixed, shards=[shards]))
    assert_same(views(updates), expected)
    spec = jax.P("stage") if axis == 0 else jax.P(None, "stage")
    in_parts = jax.shard_map(
        functools.partial(mixed, shards=[shards], axis_name="stage"),
        mesh=jax.make_mesh((shards,), ("stage",), axis_types=(AxisType.Auto,)),
        in_specs=spec,
        out_specs=spec,
    )
    assert_same(jax.jit(in_parts)(updates), expected)


@pytest.mark.parametrize("names", [("stage", "model"), ("model", "stage")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["standard", "directional"])
def test_several_mesh_axes_may_split_the_layers(names, mode, variant):
    """In any order: JAX numbers devices in that of the mesh."""
    whole, specs = {"a": tree()["layers"]["kernel"]}, {"a": jax.P(names)}
    rules = ds.Depth.from_rules({"a": 0})
    expected = jax.jit(lambda u: updated(make(variant, ds.window(0.3), depth=rules), u))(whole)
    keywords = depth_in(mode, whole, specs, rules=rules)
    if mode == "manual":
        keywords["axis_name"] = names
    tx = make(variant, ds.window(0.3), **keywords)
    program, result = compiled(lambda updates: updated(tx, updates), whole, mode, specs)
    chex.assert_trees_all_close(
        jax.device_get(result), jax.device_get(expected), rtol=1e-6, atol=1e-6
    )
    if variant == "standard":
        assert sent(program) == [("collective-permute", 4 * KERNEL)] * 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm_over", ["tensor", "block"])
@pytest.mark.parametrize("kernel", [jax.P("stage", None, "model"), jax.P(None, None, "model")])
def test_leaves_that_are_split_along_different_axes(variant, norm_over, kernel):
    """One after another in one step, also of a scan, whose types have to stay."""
    rng = np.random.default_rng(0)
    whole = {
        "a_kernel": jnp.asarray(rng.normal(size=(8, 4, 6)), "float32"),
        "bias": jnp.asarray(rng.normal(size=(8, 4)), "float32"),
        "other": jnp.ones((8, 4)),
    }
    specs = {"a_kernel": kernel, "bias": jax.P(*kernel[:1]), "other": jax.P()}
    depth = ds.Depth.from_rules({".*": 0}).resolve(whole)
    keywords = {"depth": depth, "axis_name": "stage", "norm_over": norm_over}
    tx = optax.chain(optax.scale_by_adam(), make(variant, ds.window(0.3), **keywords))

    def steps(updates):
        def step(carry, _):
            updates, state = carry
            after, state = tx.update(updates, state)
            return (after, state), None

        # The state differs along the axes that the updates do.
        state = jax.tree.map(jnp.zeros_like, tx.init(updates))
        return jax.lax.scan(step, (updates, state), length=2)[0][0]

    _, result = compiled(steps, whole, "manual", specs)
    expected = jax.jit(steps)(whole)
    chex.assert_trees_all_close(
        jax.device_get(result), jax.device_get(expected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_stays_between_cuts(mode):
    whole, specs = {"a": jnp.ones((40, 2)).at[0, 0].set(jnp.nan)}, {"a": jax.P("stage")}
    keywords = depth_in(mode, whole, specs, rules=ds.Depth.from_rules({"a": 0}))
    tx = ds.augment_over_depth(ds.mean(0.4), cuts=(17,), **keywords)
    _, result = compiled(lambda updates: updated(tx, updates), whole, mode, specs)
    assert np.isnan(np.asarray(result["a"])).any(1).tolist() == [True] * 17 + [False] * 23
    np.testing.assert_allclose(np.asarray(result["a"])[17:], 1, rtol=1e-6)


def test_an_explicit_mesh_need_not_be_set():
    mesh = a_mesh("explicit")
    whole, specs = {"a": tree(layers=32)["layers"]["kernel"]}, {"a": jax.P("stage")}
    rules = ds.Depth.from_rules({"a": 0})
    jitted = jax.jit(updated, static_argnums=0)
    for operator, run in ((ds.window(0.3), updated), (ds.mean(0.4), jitted)):
        tx = make("directional", operator, depth=rules)
        result = run(tx, placed(whole, mesh, specs))
        chex.assert_trees_all_close(
            jax.device_get(result), jax.device_get(jitted(tx, whole)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("variant", ["standard", "directional"])
def test_some_mesh_axes_may_be_manual_alone(kind, told, variant):
    """Features by shard_map, layers by the compiler."""
    kinds = (getattr(AxisType, kind), AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("stage", "model"), axis_types=kinds)
    whole, spec = {"a": tree()["layers"]["kernel"]}, jax.P("stage", None, "model")
    parts = placed(whole, mesh, {"a": spec})
    rules = ds.Depth.from_rules({"a": 0})
    depth = rules.resolve(parts if told else whole)
    tx = make(variant, ds.window(0.3), depth=depth)
    part = {"a": jax.P(None, None, "model")}
    with jax.set_mesh(mesh):
        fn = jax.shard_map(
            lambda updates: updated(tx, updates),
            in_specs=(part,),
            out_specs=part,
            axis_names={"model"},
        )
        result = jax.jit(fn)(parts)
    assert_same(result, updated(tx, whole))


def test_where_is_asked_of_whole_leaves():
    whole, specs = tree(), specs_of("both")
    keywords = {"where": lambda path, leaf: leaf.size > 100}
    expected = updated(ds.smooth_over_depth(0.3, depth=RULES, **keywords), whole)
    tx = ds.smooth_over_depth(0.3, **depth_in("manual", whole, specs), **keywords)
    _, result = compiled(lambda updates: updated(tx, updates), whole, "manual", specs)
    assert_same(result, expected)


def test_what_a_depth_knows_of_shards():
    mesh = a_mesh("auto")
    specs = specs_of("depth")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    abstract = jax.eval_shape(jax.jit(tree, out_shardings=shardings))
    parts = placed(tree(), mesh, specs)

    def loss(params, x):
        bias = params["layers"]["bias"].T

        def layer(x, params):
            kernel, bias = params
            return jnp.tanh(x @ kernel @ kernel.T + bias), None

        return jax.lax.scan(layer, x, (params["layers"]["kernel"], bias))[0].sum()

    x = jax.ShapeDtypeStruct((2, 8), "float32")
    deep = parts["layers"]["kernel"]
    stack = jax.device_put(jnp.ones((LAYERS, 4)), NamedSharding(mesh, jax.P("stage")))
    for made in (
        RULES.resolve(parts),
        RULES.resolve(abstract),
        ds.trace_depth(loss, parts, x),
        ds.trace_depth(loss, abstract, x),
        ds.find_depth({"layers": {"norm": {"scale": stack}, "mlp": {"kernel": deep}}}),
    ):
        assert {place.shards for place in made.values()} == {STAGES}
        assert ds.Depth.from_json(made.to_json()) == made
    assert {place.shards for place in RULES.resolve(tree()).values()} == {1}
    known = RULES.resolve(parts)
    # Updates that are traced do not say how they are split: the Depth remembers.
    seen = []
    jax.jit(lambda updates: seen.append(known.resolve(updates)) or 0.0)(parts)
    assert {place.shards for place in seen[0].values()} == {STAGES}
    assert {place.shards for place in known.resolve(tree()).values()} == {1}


def test_an_explicit_mesh_needs_no_depth_that_knows():
    whole, specs = tree(), specs_of("depth")
    tx = ds.smooth_over_depth(0.3, depth=RULES)
    program, _ = compiled(lambda updates: updated(tx, updates), whole, "explicit", specs)
    assert [kind for kind, _ in sent(program)] == ["collective-permute"] * 4


def test_a_depth_that_knows_nothing_of_shards_gives_the_same():
    whole, specs = tree(), specs_of("depth")
    tx = ds.smooth_over_depth(0.3, depth=RULES.resolve(whole))
    _, result = compiled(lambda updates: updated(tx, updates), whole, "auto", specs)
    assert_same(result, updated(tx, whole))


OPTIMIZERS = {
    "sgd": lambda **keywords: ds.sgd(0.1, 0.9, **keywords),
    "adamw": lambda **keywords: ds.adamw(0.1, **keywords),
    "lion": lambda **keywords: ds.lion(0.1, **keywords),
    "muon": lambda **keywords: ds.muon(0.1, **keywords),
    "normuon": lambda **keywords: ds.normuon(0.1, **keywords),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_complete_optimizers(mode, name):
    whole, specs = tree(), specs_of("depth")
    keywords = depth_in(mode, whole, specs) | {"alpha": 0.3}

    def step(tx):
        def fn(updates):
            state = tx.init(updates)
            first, state = tx.update(updates, state, updates)
            return tx.update(jax.tree.map(jnp.sin, updates), state, first)[0]

        return fn

    _, result = compiled(step(OPTIMIZERS[name](**keywords)), whole, mode, specs)
    expected = step(OPTIMIZERS[name](**keywords | {"depth": RULES}))(whole)
    chex.assert_trees_all_close(
        jax.device_get(result), jax.device_get(expected), rtol=1e-4, atol=1e-5
    )


def test_masks_of_parts():
    whole, specs = tree(), specs_of("both")
    depth = RULES.resolve(whole)
    seen = []

    def fn(updates):
        seen.append((depth.decay_mask(updates), ds.muon_dimension_numbers(depth, updates)))
        return updates

    compiled(fn, whole, "manual", specs)
    assert seen[0] == (depth.decay_mask(whole), ds.muon_dimension_numbers(depth, whole))


def in_shard_map(fn, spec, **keywords):
    return compiled(fn, tree(), "manual", specs_of(spec), **keywords)


def test_refuses_parts_of_layers_without_the_name_of_their_axis():
    tx = ds.smooth_over_depth(0.3, depth=RULES.resolve(tree()))
    message = (
        r"layers/bias \(8, 8\), of which shard_map .* 8 layers, is split into 4 parts, "
        r"and axis_name is None.*by axis_name=.*: it is split along 'stage' \(4\)\."
    )
    with pytest.raises(ValueError, match=message):
        in_shard_map(lambda updates: updated(tx, updates), "depth")


@pytest.mark.parametrize("name", ["model", "nothing", ("stage", "model")])
def test_refuses_the_name_of_another_axis(name):
    tx = ds.smooth_over_depth(0.3, depth=RULES.resolve(tree()), axis_name=name)
    with pytest.raises(ValueError, match=r"is split into 4 parts, and axis_name is"):
        in_shard_map(lambda updates: updated(tx, updates), "depth")


@pytest.mark.parametrize("names", ["stage", ("stage",)])
def test_refuses_the_name_of_an_axis_of_the_same_size(names):
    """What does not differ along an axis is not split along it."""
    mesh = jax.make_mesh((2, 2), ("stage", "model"), axis_types=(AxisType.Auto,) * 2)
    depth = ds.Depth.from_rules({"a": 0}).resolve({"a": jnp.ones((8, 4))})
    tx = ds.smooth_over_depth(0.3, depth=depth, axis_name=names)
    spec = {"a": jax.P("model")}
    fn = jax.shard_map(lambda u: updated(tx, u), mesh=mesh, in_specs=(spec,), out_specs=spec)
    with pytest.raises(ValueError, match=r"split into 2 parts, .* it is split along 'model' \(2\)"):
        jax.jit(fn)({"a": jnp.ones((8, 4))})


def test_refuses_a_depth_of_more_layers_than_there_are():
    tx = ds.smooth_over_depth(0.3, depth=RULES.resolve(tree(layers=8)), axis_name="stage")
    specs = jax.tree.map(lambda _: jax.P(), specs_of("depth"))
    with pytest.raises(ValueError, match=r"is split into 4 parts, .* it is split along none"):
        compiled(lambda updates: updated(tx, updates), tree(layers=2), "manual", specs)


def test_refuses_leaves_that_are_split_differently():
    whole = {f"block_{k}": jnp.ones((4, 4)) for k in range(4)}
    rules = ds.Depth.from_rules({"block_.*": ds.numbered()})
    specs = {f"block_{k}": jax.P("model" if k % 2 else "stage") for k in range(4)}
    mesh = jax.make_mesh((2, 2), ("stage", "model"), axis_types=(AxisType.Auto,) * 2)
    tx = ds.smooth_over_depth(0.3, depth=rules.resolve(whole))
    fn = jax.shard_map(lambda u: updated(tx, u), mesh=mesh, in_specs=(specs,), out_specs=specs)
    message = r"block_1 \(4, 4\) is mixed with block_0 .* along \['model'\], the other along"
    with pytest.raises(ValueError, match=message):
        jax.jit(fn)(whole)


@pytest.mark.parametrize(
    "inside",
    [
        lambda updates: ds.smooth_over_depth(0.3, depth=RULES.resolve(updates)),
        lambda updates: ds.smooth_over_depth(0.3, depth=ds.find_depth(updates)),
        lambda updates: ds.depth_metrics(updates, RULES),
    ],
    ids=["rules", "find_depth", "metrics"],
)
def test_refuses_to_look_for_layers_in_parts(inside):
    with pytest.raises(ValueError, match=r"whether that is a part of the layers"):
        in_shard_map(lambda updates: inside(updates) and updates, "depth")


@pytest.mark.parametrize("shards", [0, -2, 3, 16])
def test_refuses_shards_that_cannot_be(shards):
    text = RULES.resolve(tree()).to_json().replace('"shards":1', f'"shards":{shards}')
    with pytest.raises(ValueError, match=rf"can't have its layers in {shards} shards"):
        ds.Depth.from_json(text)


def test_what_cannot_be_split_evenly_is_not_known_to_be():
    sharding = NamedSharding(a_mesh("auto"), jax.P("stage"))
    uneven = {"a": jax.ShapeDtypeStruct((7, 4), "float32", sharding=sharding)}
    assert ds.Depth.from_rules({"a": 0}).resolve(uneven)["a"].shards == 1


@pytest.mark.parametrize("name", [3, 0, False, ["stage"], ("stage", 0), 1.5])
def test_refuses_what_is_no_name_of_an_axis(name):
    with pytest.raises(ValueError, match=r"axis_name is .* has to be the name of a mesh axis"):
        ds.smooth_over_depth(0.3, axis_name=name)


@pytest.mark.parametrize("depth", [None, RULES])
@pytest.mark.parametrize("spec", ["depth", "features"])
@pytest.mark.parametrize("checked", [False, True])
def test_refuses_to_find_depth_in_parts(depth, spec, checked):
    tx = ds.smooth_over_depth(0.3, depth=depth, axis_name="stage")
    with pytest.raises(ValueError, match=r"whether that is a part of the layers only the depth of"):
        in_shard_map(lambda updates: updated(tx, updates), spec, check_vma=checked)


def test_finds_depth_in_what_every_device_has():
    tx = ds.smooth_over_depth(0.3, depth=RULES)
    specs = jax.tree.map(lambda _: jax.P(), specs_of("depth"))
    _, result = compiled(lambda updates: updated(tx, updates), tree(), "manual", specs)
    assert_same(result, updated(tx, tree()))


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_refuses_norms_of_parts_that_are_not_known(variant):
    keywords = depth_in("manual", tree(), specs_of("both"))
    tx = make(variant, ds.window(0.3), **keywords)
    with pytest.raises(
        ValueError, match=r"bias \(8, 8\) are split into 2 parts .* check_vma=False"
    ):
        in_shard_map(lambda updates: updated(tx, updates), "both", check_vma=False)
    # Those of whole layers are known, and so is what has no norms.
    in_shard_map(lambda updates: updated(tx, updates), "depth", check_vma=False)
    standard = ds.smooth_over_depth(0.3, **keywords)
    in_shard_map(lambda updates: updated(standard, updates), "both", check_vma=False)


def test_norms_of_updates_that_differ_along_other_axes():
    """Devices with whole layers have norms of their own; with parts it is not known whose."""
    whole, spec = {"layers": {"kernel": tree()["layers"]["kernel"]}}, jax.P("stage")
    rules = ds.Depth.from_rules({".*": 0})
    specs = {"layers": {"kernel": spec}}
    tx = make("norm_preserving", ds.window(0.3), **depth_in("manual", whole, specs, rules=rules))

    def average(updates):
        own = jax.tree.map(lambda leaf: leaf * (1.0 + jax.lax.axis_index("model")), updates)
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "model"), updated(tx, own))

    _, result = compiled(average, whole, "manual", specs)
    alone = updated(make("norm_preserving", ds.window(0.3), depth=rules), whole)
    chex.assert_trees_all_close(
        jax.device_get(result), jax.tree.map(lambda leaf: 1.5 * np.asarray(leaf), alone), rtol=1e-5
    )
    mesh = jax.make_mesh((2, 2, 2), ("stage", "model", "data"), axis_types=(AxisType.Auto,) * 3)
    spec = {"layers": {"kernel": jax.P("stage", "model")}}

    def different(updates):
        own = jax.tree.map(lambda leaf: leaf * (1.0 + jax.lax.axis_index("data")), updates)
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "data"), updated(tx, own))

    fn = jax.shard_map(different, mesh=mesh, in_specs=(spec,), out_specs=spec)
    with pytest.raises(ValueError, match=r"differ along \('data', 'model'\), .* 4 devices"):
        jax.jit(fn)(whole)


@pytest.mark.parametrize("layers", [6, 7])
def test_refuses_what_cannot_be_split(layers):
    """By shards of different sizes, as JAX does itself."""
    with pytest.raises(ValueError, match=r"divisible|evenly"):
        compiled(lambda updates: updates, tree(layers=layers), "manual", specs_of("depth"))
    depth = RULES.resolve(tree(layers=layers))
    tx = ds.smooth_over_depth(0.3, depth=depth, axis_name="stage")
    message = rf"bias \(8, 2\) does not have the {layers} layers on axis 1, or an even part"
    message += rf"|bias \(8, {layers}\), .* is split into 3 parts, and axis_name is 'stage'"
    with pytest.raises(ValueError, match=message):
        in_shard_map(lambda updates: updated(tx, updates), "depth")


def test_refuses_to_split_what_is_no_stack_by_itself():
    whole = {"a_in": jnp.ones((8, 3)), "a_mid": jnp.ones(3), "a_out": jnp.ones((8, 3))}
    rules = {"a_.*": ds.sequence(("a_in", 0), "a_mid", ("a_out", 0))}
    depth = ds.Depth.from_rules(rules).resolve(whole)
    specs = {"a_in": jax.P("stage"), "a_mid": jax.P(), "a_out": jax.P("stage")}
    tx = ds.smooth_over_depth(0.3, depth=depth, axis_name="stage")
    message = r"a_in \(8, 3\), .* is mixed with .* only those of one stack.*Use jax\.jit"
    with pytest.raises(ValueError, match=message):
        compiled(lambda updates: updated(tx, updates), whole, "manual", specs)
    # In automatic mode it is the same as it is together.
    auto = ds.smooth_over_depth(0.3, depth=depth.resolve(placed(whole, a_mesh("auto"), specs)))
    _, result = compiled(lambda updates: updated(auto, updates), whole, "auto", specs)
    assert_same(result, updated(tx, whole))


@pytest.mark.parametrize("kind", ["sequence", "inner axis", "dealt, not alike"])
def test_layouts_that_an_explicit_mesh_cannot_have(kind):
    """An automatic one can."""
    stack = jnp.arange(32.0).reshape(8, 4)
    whole, rules, specs = {
        "sequence": (
            {"a_in": stack, "a_mid": jnp.ones(4), "a_out": stack},
            {"a_.*": ds.sequence(("a_in", 0), "a_mid", ("a_out", 0))},
            {"a_in": jax.P("stage"), "a_mid": jax.P(), "a_out": jax.P("stage")},
        ),
        "inner axis": (
            {"a": stack.reshape(2, 4, 4)},
            {"a": (0, 1)},
            {"a": jax.P(None, "stage")},
        ),
        "dealt, not alike": (
            {"a_0": stack, "a_1": stack},
            {"a_.*": ds.interleaved(0)},
            {"a_0": jax.P("stage"), "a_1": jax.P(None, "model")},
        ),
    }[kind]
    tx = ds.smooth_over_depth(0.3, depth=ds.Depth.from_rules(rules))
    expected = jax.jit(lambda updates: updated(tx, updates))(whole)
    _, result = compiled(lambda updates: updated(tx, updates), whole, "auto", specs)
    assert_same(result, expected)
    message = r"An explicit mesh splits a\S* \(.*stage.*mesh of AxisType\.Auto"
    with pytest.raises(ValueError, match=message):
        compiled(lambda updates: updated(tx, updates), whole, "explicit", specs)
    # Features may be split in any of these.
    features = {name: jax.P(*[None] * (leaf.ndim - 1), "model") for name, leaf in whole.items()}
    _, result = compiled(lambda updates: updated(tx, updates), whole, "explicit", features)
    assert_same(result, expected)


@pytest.mark.parametrize("spec", ["depth", "features", "both"])
def test_metrics_of_parts(spec):
    depth = RULES.resolve(tree())

    def measured(updates):
        return ds.depth_metrics(updates, depth, axis_name="stage")

    specs = specs_of(spec)
    parallel = jax.shard_map(measured, mesh=a_mesh("manual"), in_specs=(specs,), out_specs=jax.P())
    chex.assert_trees_all_close(
        jax.jit(parallel)(tree()), ds.depth_metrics(tree(), depth), rtol=1e-5
    )
    if spec != "features":
        with pytest.raises(ValueError, match=r"split into 4 parts, and axis_name is None"):
            in_shard_map(lambda updates: ds.depth_metrics(updates, depth) and updates, spec)


@pytest.mark.parametrize("mode", ["explicit", "manual"])
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_muon_refuses_parts_of_matrices(mode, name):
    """Orthogonal parts are no part of what is orthogonal."""
    whole, specs = tree(), specs_of("both")
    tx = OPTIMIZERS[name](**depth_in(mode, whole, specs))
    how = "shard_map" if mode == "manual" else "an explicit mesh"
    message = (
        rf"layers/kernel \(8, 8, 16\) is a matrix in each layer, which {how} splits along axis 2"
    )
    with pytest.raises(ValueError, match=message):
        compiled(
            lambda updates: tx.update(updates, tx.init(updates), updates)[0], whole, mode, specs
        )


def test_depth_is_traced_of_whole_arrays():
    """In an explicit mesh JAX does not scan over what is split; in shard_map are parts."""
    specs, mesh = {"kernel": jax.P("stage")}, a_mesh("explicit")

    def loss(params, x):
        return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, params["kernel"])[0].sum()

    params = placed({"kernel": jnp.ones((8, 4, 4))}, mesh, specs)
    x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, jax.P("stage")))
    with jax.set_mesh(mesh):
        depth = ds.trace_depth(loss, params, x)
    assert depth["kernel"].shards == STAGES
    assert "0, in 4 shards" in str(depth)
    fn = jax.shard_map(
        lambda params: ds.trace_depth(loss, params, jnp.ones((2, 4))) and params,
        mesh=a_mesh("manual"),
        in_specs=(specs,),
        out_specs=specs,
    )
    with pytest.raises(ValueError, match=r"trace_depth is called in shard_map"):
        jax.jit(fn)({"kernel": jnp.ones((8, 4, 4))})


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_step_is_exported_for_every_platform(platform, mode):
    """Lowering needs no such device."""
    whole, specs = tree(), specs_of("depth")
    keywords = {"depth": RULES} if mode is None else depth_in(mode, whole, specs)
    tx = ds.adamw(0.1, alpha=0.3, variant="norm_preserving", **keywords)

    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    mesh = a_mesh(mode)
    if mode is None:
        parts = whole
    else:
        parts = placed(whole, mesh, specs)
        if mode == "manual":
            step = jax.shard_map(step, mesh=mesh, in_specs=(specs, specs), out_specs=specs)
    with jax.set_mesh(mesh):
        exported = jax.export.export(jax.jit(step), platforms=[platform])(parts, parts)
        assert exported.platforms == (platform,)
        if platform == "cpu":
            chex.assert_trees_all_close(
                jax.device_get(exported.call(parts, parts)),
                jax.device_get(jax.jit(step)(parts, parts)),
                rtol=1e-6,
            )


def test_the_page_on_sharding(capsys):
    """Its code, line by line, from the parameters to three steps that one device makes alike."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "sharding.md").read_text()
    before, manual = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [table] = re.findall(r"```text\n(.*?)```", page, re.DOTALL)

    def init(key):
        kernel, head = (jax.random.normal(key, shape) / 8 for shape in ((8, 8, 8), (8, 8)))
        return {"layers": {"kernel": kernel}, "head": head}

    def loss(params, x):
        layer = lambda x, kernel: (x + jnp.tanh(x @ kernel), None)  # noqa: E731
        return (
            (jax.lax.scan(layer, x, params["layers"]["kernel"])[0] @ params["head"]) ** 2
        ).mean()

    batch = jax.random.normal(jax.random.key(1), (4, 8))
    names = {"jax": jax, "ds": ds, "optax": optax, "functools": functools}
    names |= {"init": init, "loss": loss, "batch": batch}
    exec(before, names)
    assert capsys.readouterr().out == table
    exec(manual, names)
    params, state = names["params"], names["state"]
    alone = init(jax.random.key(0))
    plain = ds.adamw(3e-4, depth=ds.trace_depth(loss, alone, batch))
    state_alone = plain.init(alone)
    grad, plain_update = jax.jit(jax.grad(loss)), jax.jit(plain.update)
    for _ in range(3):
        grads = jax.device_put(grad(params, batch), names["shardings"])
        params, state = names["update"](params, state, grads)
        updates, state_alone = plain_update(grad(alone, batch), state_alone, alone)
        alone = optax.apply_updates(alone, updates)
    chex.assert_trees_all_close(jax.device_get(params), jax.device_get(alone), rtol=1e-4, atol=1e-6)


def test_the_halo_is_not_the_whole():
    """The count of bytes that the tests rely on tells the difference."""
    text = (
        "%g = f32[8,4]{1,0} all-gather(f32[2,4]{1,0} %p), dimensions={0}\n"
        "%r = (f32[8]{0}, f32[8]{0}) all-reduce(%a, %b)\n"
        "%s = (bf16[1,4]{1,0}, bf16[1,4]{1,0}, u32[], u32[]) collective-permute-start(%c)\n"
        "%d = bf16[1,4]{1,0} collective-permute-done(%s)\n"
    )
    assert hlo.collectives(text) == [
        ("all-gather", 128),
        ("all-reduce", 64),
        ("collective-permute", 8),
    ]
