"""Rates for each layer: decay and freezing are a loop over layers, in every layout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import depthsmooth as ds
from tests.test_per_layer import GROUPS, LAYERS, RULES, drawn, stacked

TREE = {"embed": jnp.ones(3), "layers": {"w": jnp.ones((4, 2, 3)), "b": jnp.ones((2, 4))}}
TREE |= {"norm": jnp.ones(3), "head": jnp.ones((3, 2))}
DEPTH = ds.Depth.from_rules({"layers/w": 0, "layers/b": 1})


def updated(tx, tree, count=0):
    state = ds.SmoothOverDepthState(jnp.int32(count))
    tx.init(tree)
    return tx.update(tree, state)[0]


def looped(layers, change):
    """Each layer of each group, changed by itself, and the embedding, which is layer -1."""
    after = {
        group: [
            {name: change(leaf, layer) for name, leaf in tensors.items()}
            for layer, tensors in enumerate(layers[group])
        ]
        for group in GROUPS
    }
    return after | {"embed": change(layers["embed"], -1)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ["alone", "before", "behind"])
def test_decay_is_a_loop_over_layers_in_every_layout(order, dtype):
    layers, decay = drawn(0), ds.layer_decay(0.7, depth=RULES)
    smooth = ds.smooth_over_depth(0.2, depth=RULES)
    chains = {"alone": [decay], "before": [decay, smooth], "behind": [smooth, decay]}
    updates = stacked(layers, dtype)
    theirs = stacked(looped(layers, lambda leaf, layer: leaf * 0.7 ** (LAYERS - layer)), dtype)
    if order == "before":
        theirs = updated(smooth, theirs)
    if order == "behind":
        smoothed = updated(smooth, stacked(layers))
        factors = looped(layers, lambda leaf, layer: 0 * leaf + 0.7 ** (LAYERS - layer))
        theirs = jax.tree.map(
            lambda leaf, factor: (leaf * factor).astype(dtype), smoothed, stacked(factors)
        )
    tx = optax.chain(*chains[order])
    ours, _ = tx.update(updates, tx.init(updates))
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    tolerance = 1e-6 if dtype == "float32" else 2**-6
    chex.assert_trees_all_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_exponents_are_those_of_beit_and_timm():
    """BEiT gives a model of L layers L + 2 ids: 0 to the embeddings, L + 1 to the head."""
    after = updated(ds.layer_decay(0.5, depth=DEPTH), TREE)
    of_ids = [0.5 ** (4 + 1 - number) for number in range(4 + 2)]
    assert after["embed"].tolist() == [of_ids[0]] * 3
    assert after["layers"]["w"][:, 0, 0].tolist() == of_ids[1:-1]
    assert after["layers"]["b"][0].tolist() == of_ids[1:-1]
    assert after["head"][0].tolist() == [of_ids[-1]] * 2 == [1.0] * 2
    assert after["norm"].tolist() == [1.0] * 3


def test_electras_are_those_times_one_more_rate():
    """Its _get_layer_lrs: depth 0, layer + 1 and L + 2 below rate ** (L + 2 - depth)."""
    after = updated(ds.layer_decay(0.8, depth=DEPTH), TREE)
    electra = {"embed": 0.8 ** (4 + 2)} | {k: 0.8 ** (4 + 2 - (k + 1)) for k in range(4)}
    np.testing.assert_allclose(0.8 * after["embed"], electra["embed"], rtol=1e-6)
    np.testing.assert_allclose(
        0.8 * after["layers"]["w"][:, 0, 0], [electra[k] for k in range(4)], rtol=1e-6
    )


def test_a_rate_may_be_scheduled_or_traced():
    scheduled = ds.layer_decay(optax.linear_schedule(0.5, 1.0, 10), depth=DEPTH)
    assert updated(scheduled, TREE, count=0)["embed"][0] == 0.5**5
    assert updated(scheduled, TREE, count=10)["embed"][0] == 1
    traced = jax.jit(lambda rate: updated(ds.layer_decay(rate, depth=DEPTH), TREE))(0.5)
    chex.assert_trees_all_close(traced, updated(ds.layer_decay(0.5, depth=DEPTH), TREE), rtol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"first": "stem.*"},
            r"matches no leaf outside of the layers.*embed, head.*first=None",
        ),
        ({"last": "head"}, r"norm is in no layer, and neither first, '\.\*embed\.\*', nor last"),
        ({"last": ".*"}, r"embed is matched by first, .* and by last"),
        ({"rate": 1.5}, r"rate is 1.5, but has to be in 0 <= rate <= 1"),
    ],
)
def test_what_is_before_the_layers_is_never_guessed(keywords, message):
    arguments = {"rate": 0.5, "depth": DEPTH} | keywords
    with pytest.raises(ValueError, match=message):
        ds.layer_decay(**arguments).init(TREE)


def test_first_may_be_none():
    after = updated(ds.layer_decay(0.5, depth=DEPTH, first=None), TREE)
    assert after["embed"].tolist() == [1.0] * 3


def test_masked_layers_count():
    """Else the rate of the others would be too large."""
    tx = ds.layer_decay(0.5, depth=ds.Depth.from_rules({r"block_(\d)": ds.numbered()}), first=None)
    params = {f"block_{k}": jnp.ones(2) for k in range(4)}
    part = params | {"block_3": optax.MaskedNode()}
    with pytest.raises(ValueError, match=r"block_3 is masked.*depth=rules.resolve\(params\)"):
        tx.init(part)
    depth = ds.Depth.from_rules({r"block_(\d)": ds.numbered()}).resolve(params)
    after = updated(ds.layer_decay(0.5, depth=depth, first=None), part)
    assert [float(after[f"block_{k}"][0]) for k in range(3)] == [0.5**4, 0.5**3, 0.5**2]


@pytest.mark.parametrize("which", [(0, 1, -1), [0, 1, 3], lambda n, _: jnp.arange(n) != 2])
def test_frozen_layers_are_exactly_0_in_every_layout(which):
    layers = drawn(0)
    frozen = ds.freeze_layers(which, depth=RULES)
    ours = updated(frozen, stacked(layers))
    theirs = stacked(looped(layers, lambda leaf, layer: leaf if layer in (-1, 2) else 0 * leaf))
    chex.assert_trees_all_equal(ours, theirs)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, stacked(layers))
    kept = jax.tree.map(jnp.isnan, updated(frozen, broken))
    chex.assert_trees_all_equal(kept, jax.tree.map(lambda leaf: leaf != 0, theirs))


def test_moments_and_parameters_of_frozen_layers_stay():
    freeze = ds.freeze_layers(range(2), depth=DEPTH)
    tx = optax.chain(freeze, optax.adamw(0.1, weight_decay=0.1), freeze)
    params, state = TREE, tx.init(TREE)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["layers"]["w"][:2], 1)
    assert (params["layers"]["w"][2:] < 1).all()
    for moment in ("mu", "nu"):
        held = optax.tree.get(state, moment)["layers"]
        assert not held["w"][:2].any()
        assert not held["b"][:, :2].any()
        assert held["w"][2:].all()


def test_smoothing_takes_from_frozen_layers_what_it_is_put_behind():
    freeze, smooth = ds.freeze_layers([0], depth=DEPTH), ds.smooth_over_depth(0.2, depth=DEPTH)
    before, behind = optax.chain(freeze, smooth), optax.chain(smooth, freeze)
    column = [tx.update(TREE, tx.init(TREE))[0]["layers"]["w"][:, 0, 0] for tx in (before, behind)]
    np.testing.assert_allclose(column[0], [0.1, 0.9, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(column[1], [0, 1, 1, 1], rtol=1e-6)


def test_layers_thaw_by_a_function_of_the_step():
    tx = ds.freeze_layers(lambda n, count: jnp.arange(n) < n - count, depth=DEPTH)
    step = jax.jit(tx.update)
    state, thawed = tx.init(TREE), []
    for _ in range(5):
        updates, state = step(TREE, state)
        thawed.append(updates["layers"]["w"][:, 0, 0].tolist())
    assert thawed == [[0.0] * (4 - k) + [1.0] * k for k in range(5)]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ([4], r"which has the layer 4, but the 4 layers have the numbers 0 to 3"),
        ([0.5], r"which has the layer 0.5"),
        ({"blocks": [0]}, r"which has a group 'blocks', but the groups are 'layers/b', 'layers/w'"),
        (lambda n, _: jnp.arange(n), r"of shape \(4,\) and type int32, .* a bool for each"),
        (lambda n, _: jnp.ones(n + 1, bool), r"of shape \(5,\)"),
    ],
)
def test_layers_that_are_not_there_are_refused(which, message):
    with pytest.raises(ValueError, match=message):
        ds.freeze_layers(which, depth=DEPTH).init(TREE)


def test_one_group_may_be_frozen():
    after = updated(ds.freeze_layers({"layers/w": [0]}, depth=DEPTH), TREE)
    assert after["layers"]["w"][:, 0, 0].tolist() == [0, 1, 1, 1]
    assert after["layers"]["b"].all()


@pytest.mark.parametrize("mode", ["auto", "explicit", "manual"])
def test_split_layers_send_nothing(mode):
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4,), ("stage",), axis_types=(kind,))
    specs = {"layers": {"w": jax.P("stage"), "b": jax.P(None, "stage")}} | dict.fromkeys(
        ("embed", "norm", "head"), jax.P()
    )
    depth = DEPTH.resolve(TREE)
    named = {"axis_name": "stage"} if mode == "manual" else {}
    decay = ds.layer_decay(0.5, depth=depth, **named)
    freeze = ds.freeze_layers(lambda n, count: jnp.arange(n) < 2 + count, depth=depth, **named)
    tx, alone = optax.chain(decay, freeze), ds.layer_decay(0.5, depth=DEPTH)
    expected = updated(ds.freeze_layers([0, 1], depth=DEPTH), updated(alone, TREE))

    def update(tree):
        return tx.update(tree, (ds.SmoothOverDepthState(jnp.int32(0)),) * 2)[0]

    with jax.set_mesh(mesh):
        tree = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), TREE, specs
        )
        if mode == "manual":
            update = jax.shard_map(update, mesh=mesh, in_specs=(specs,), out_specs=specs)
        compiled = jax.jit(update).lower(tree).compile()
        chex.assert_trees_all_close(jax.device_get(compiled(tree)), expected, rtol=1e-6)
    for operation in ("all-reduce", "all-gather", "collective-permute", "all-to-all"):
        assert f" {operation}(" not in compiled.as_text()


GAPS = ds.Depth(
    tuple(
        ds.depth.Leaf(path, (len(held), 2), ds.Place("moe", path, (0,), held, "rule"))
        for path, held in {"w": (0, 1, 2, 3), "router": (0, 2), "alone": (1,)}.items()
    )
)


def test_diagonal_gives_each_layer_its_number_whatever_is_missing():
    tree = {"w": jnp.ones((4, 2)), "router": jnp.ones((2, 2)), "alone": jnp.ones((1, 2))}
    for values in ([1.0, 2.0, 3.0, 4.0], lambda layers, _: 1.0 + jnp.arange(layers)):
        tx = ds.augment_over_depth(ds.diagonal(values), depth=GAPS)
        after, _ = tx.update(tree, tx.init(tree))
        assert after["w"][:, 0].tolist() == [1, 2, 3, 4]
        assert after["router"][:, 0].tolist() == [1, 3]
        assert after["alone"][:, 0].tolist() == [2]


def test_diagonal_gives_the_only_layer_its_number():
    tree, depth = {"layers": jnp.ones((1, 2))}, ds.Depth.from_rules({"layers": 0})
    tx = ds.augment_over_depth(ds.diagonal([0.5]), depth=depth)
    assert updated(tx, tree)["layers"].tolist() == [[0.5, 0.5]]


def test_diagonal_may_be_scheduled_and_traced():
    def scheduled(layers, count):
        return optax.linear_schedule(1.0, 0.5, 10)(count) * jnp.ones(layers)

    tx = ds.augment_over_depth(ds.diagonal(scheduled), depth=DEPTH)
    for count, factor in ((0, 1.0), (10, 0.5)):
        assert updated(tx, TREE, count)["layers"]["w"][0, 0, 0] == factor

    @jax.jit
    def traced(values):
        return updated(ds.augment_over_depth(ds.diagonal(values), depth=DEPTH), TREE)

    assert traced(jnp.arange(4.0))["layers"]["b"][0].tolist() == [0, 1, 2, 3]


def test_diagonal_in_other_operators():
    values = np.array([1.0, 0.5, 0.25, 2.0])
    matrix = ds.operator_matrix(ds.compose(ds.window(0.2), ds.diagonal(values)), 4)
    np.testing.assert_allclose(matrix, ds.operator_matrix(ds.window(0.2), 4) * values)
    shuffled = ds.operator_matrix(ds.shuffled(ds.diagonal(values), seed=0), 4)
    assert sorted(shuffled.diagonal()) == sorted(values)
    np.testing.assert_array_equal(shuffled, np.diag(shuffled.diagonal()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], r"of shape \(2,\) .* but there are 4 layers"),
        (2.0, r"of shape \(\)"),
        (["a"] * 4, r"type <U1"),
        ([1j] * 4, r"type complex128, but there are 4 layers: give a real number"),
    ],
)
def test_a_diagonal_that_does_not_fit_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ds.augment_over_depth(ds.diagonal(values), depth=DEPTH).init(TREE)


def test_a_diagonal_of_a_function_of_other_arguments_is_refused():
    with pytest.raises(ValueError, match=r"has to be called as values\(layers, count\)"):
        ds.diagonal(lambda layers: np.ones(layers))
