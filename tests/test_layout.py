"""Depth: what users say and read, and every way in which it refuses."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from depthsmooth import Depth, Place, numbered
from depthsmooth.depth.paths import leaves_of

PARAMS = {
    "embed": jnp.ones((8, 4)),
    "layers": {"kernel": jnp.ones((6, 4, 4)), "bias": jnp.ones((6, 4))},
    "head": {"layers_norm": jnp.ones(4)},
}


LAYERS = tuple(range(6))


def test_is_a_mapping_from_path_to_place():
    depth = Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)
    assert dict(depth) == {
        "layers/kernel": Place("layers/.*", "layers/kernel", (0,), LAYERS, "rule"),
        "layers/bias": Place("layers/.*", "layers/bias", (0,), LAYERS, "rule"),
    }
    assert depth["layers/bias"].axes == (0,)
    assert "embed" not in depth
    assert len(depth) == 2


def test_is_immutable_and_hashable():
    rules = Depth.from_rules({"layers/.*": 0})
    depth = rules.resolve(PARAMS)
    assert {depth: 1}[Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)] == 1
    assert depth != rules
    with pytest.raises(dataclasses.FrozenInstanceError):
        depth.leaves = ()


def test_prints_as_a_table():
    rules = Depth.from_rules({"layers/.*": 0})
    assert str(rules).startswith("rule       axis\nlayers/.*     0\nnot matched with a tree yet")
    assert "depth.resolve(params)" in str(rules)
    assert str(rules.resolve(PARAMS)) == (
        "group       layers  axis  leaves  parameters  found by\n"
        "layers/.*        6     0       2         120  rule\n"
        "left alone                     2          36\n"
        "left alone: embed (8, 4), head/layers_norm (4,)"
    )
    assert "layers/.*" in repr(rules)


def test_negative_axes_count_from_the_end_of_each_leaf():
    params = {"kernel": jnp.ones((4, 5, 6)), "bias": jnp.ones((5, 6))}
    depth = Depth.from_rules({".*": -1}).resolve(params)
    assert (depth["kernel"].axes, depth["bias"].axes) == ((2,), (1,))
    assert "1, 2" in str(depth)


def test_groups_may_have_different_layers():
    params = {"encoder": jnp.ones((6, 4)), "decoder": jnp.ones((2, 4))}
    depth = Depth.from_rules({"encoder": 0, "decoder": 0}).resolve(params)
    assert [len(depth[path].layers) for path in ("encoder", "decoder")] == [6, 2]


def test_no_rules_place_nothing():
    depth = Depth.from_rules({})
    assert len(depth.resolve(PARAMS)) == 0
    assert str(depth) == "no rules: nothing is mixed"
    assert str(depth.resolve(PARAMS)).splitlines()[1].split() == ["left", "alone", "4", "156"]


def test_reads_paths_shapes_and_dtypes_only():
    abstract = jax.eval_shape(lambda: PARAMS)
    rules = Depth.from_rules({"layers/.*": 0})
    assert rules.resolve(abstract) == rules.resolve(PARAMS)


def test_a_tree_without_leaves_is_no_error():
    rules = Depth.from_rules({"layers/.*": 0})
    for empty in (None, {}, optax.MaskedNode()):
        assert rules.resolve(empty) == Depth()


def test_masked_leaves_may_be_all_that_a_rule_matches():
    masked = PARAMS | {"layers": {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()}}
    assert len(Depth.from_rules({"layers/.*": 0}).resolve(masked)) == 0
    traced = Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)
    assert len(traced.resolve(masked)) == 0
    assert len(traced.resolve(PARAMS | {"layers": optax.MaskedNode()})) == 0


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"params": PARAMS},
            r"layers/bias \(6, 4\) has a place .* not in the tree.*params/layers/bias",
        ),
        (
            PARAMS | {"layers": {"kernel": PARAMS["layers"]["kernel"]}},
            r"layers/bias \(6, 4\) has a place .* not in the tree",
        ),
        (
            PARAMS | {"layers": {"kernel": jnp.ones((5, 4, 4)), "bias": jnp.ones((6, 4))}},
            r"layers/kernel \(5, 4, 4\) does not have the 6 layers on axis 0.*\(6, 4, 4\)",
        ),
        (
            PARAMS | {"layers": {"kernel": jnp.ones((6, 6, 4, 4)), "bias": jnp.ones((6, 4))}},
            r"layers/kernel \(6, 6, 4, 4\) does not have the 6 layers on axis 0.*\(6, 4, 4\)",
        ),
    ],
    ids=["nested", "one is missing", "fewer layers", "another axis"],
)
def test_a_resolved_depth_needs_its_own_tree(tree, message):
    depth = Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)
    with pytest.raises(ValueError, match=message + r".*same tree"):
        depth.resolve(tree)


def test_leaves_that_are_none_are_no_leaves():
    depth = Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)
    frozen = PARAMS | {"layers": {"kernel": PARAMS["layers"]["kernel"], "bias": None}}
    assert list(depth.resolve(frozen)) == ["layers/kernel"]
    assert list(depth.resolve(PARAMS | {"layers": None})) == []


def test_boxes_do_not_change_paths():
    boxed = PARAMS | {
        "layers": jax.tree.map(lambda leaf: nn.Partitioned(leaf, ()), PARAMS["layers"])
    }
    depth = Depth.from_rules({"layers/.*": 0}).resolve(boxed)
    assert depth == Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)
    assert list(depth) == ["layers/bias", "layers/kernel"]


def test_a_rule_for_a_masked_subtree_names_the_way():
    masked = PARAMS | {"layers": optax.MaskedNode()}
    with pytest.raises(ValueError, match=r"matches no leaf.* layers is masked.*resolve\(params\)"):
        Depth.from_rules({"layers/.*": 0}).resolve(masked)


def test_two_depths_are_joined():
    layers, embed = Depth.from_rules({"layers/.*": 0}), Depth.from_rules({"embed": 0})
    together = Depth.from_rules({"layers/.*": 0, "embed": 0})
    assert layers | embed == together
    assert layers.resolve(PARAMS) | embed == together.resolve(PARAMS)
    assert layers | embed.resolve(PARAMS) == together.resolve(PARAMS)
    assert layers.resolve(PARAMS) | embed.resolve(PARAMS) == together.resolve(PARAMS)
    assert layers | Depth.from_rules({}) == Depth() | layers == layers
    with pytest.raises(TypeError):
        layers | {"embed": 0}


def test_joined_depths_place_no_leaf_twice():
    layers, bias = Depth.from_rules({"layers/.*": 0}), Depth.from_rules({"layers/bias": 1})
    with pytest.raises(ValueError, match=r"layers/bias \(6, 4\) is in both .* one place"):
        layers.resolve(PARAMS) | bias
    with pytest.raises(ValueError, match=r"A group named 'layers/\.\*' is in both"):
        layers | layers


def test_joined_depths_are_of_one_tree():
    encoder = Depth.from_rules({".*": 0}).resolve({"encoder": jnp.ones((6, 4))})
    decoder = Depth.from_rules({".*": 0}).resolve({"decoder": jnp.ones((6, 4))})
    with pytest.raises(ValueError, match=r"different trees: encoder \(6, 4\) is in one, decoder"):
        encoder | decoder


def test_explains_which_layers_are_next():
    params = {f"block_{i}": {"w": jnp.ones(4)} for i in range(5)}
    for i in (0, 1, 3, 4):
        params[f"block_{i}"]["x"] = jnp.ones(4)
    depth = Depth.from_rules({r"block_(\d+)/.*": numbered()}).resolve(params)
    assert depth.explain("block_2/w").endswith("block_1/w (layer 1), block_3/w (layer 3).")
    assert depth.explain("block_1/x").endswith("Its neighbours are\nblock_0/x (layer 0).")
    alone = Depth.from_rules({r"block_(\d+)/.*": numbered()}).resolve(
        {"block_0": params["block_0"]}
    )
    assert alone.explain("block_0/x").endswith("It has no neighbour.")


def test_a_key_that_is_called_value_is_no_box():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Attention:
        query: jax.Array
        value: jax.Array

    params = {"layers": Attention(jnp.ones((3, 4)), nn.Partitioned(jnp.ones((3, 4)), ()))}
    assert [path for path, _ in leaves_of(params)[0]] == ["layers/query", "layers/value"]
    depth = Depth.from_rules({"layers/.*": 0}).resolve(params)
    plain = {"layers": Attention(jnp.ones((3, 4)), jnp.ones((3, 4)))}
    assert list(depth.resolve(plain)) == ["layers/query", "layers/value"]
    nested = {"layers": Attention({"kernel": jnp.ones((3, 4, 4))}, jnp.ones((3, 4)))}
    assert [path for path, _ in leaves_of(nested)[0]] == ["layers/query/kernel", "layers/value"]


def test_truth():
    assert Depth.from_rules({"layers/.*": 0})
    assert Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)
    assert not Depth.from_rules({})


@pytest.mark.parametrize(
    ("rules", "params", "message"),
    [
        (
            {"layer/.*": 0},
            PARAMS,
            r"'layer/\.\*' matches no leaf.*the leaves are layers/\w+ \(6, 4.*Correct it",
        ),
        (
            {"kernel": 0},
            PARAMS,
            r"'kernel' matches no leaf.*whole path",
        ),
        (
            {"layers/.*": 2},
            PARAMS,
            r"layers/bias \(6, 4\) has no axis 2.*'layers/\.\*'.*Correct the axis",
        ),
        (
            {".*": -2},
            PARAMS,
            r"head/layers_norm \(4,\) has no axis -2",
        ),
        (
            {"layers/.*": 0, ".*kernel": 1},
            PARAMS,
            r"layers/kernel \(6, 4, 4\) is matched by two rules, 'layers/\.\*' and '\.\*kernel'",
        ),
        (
            {"layers/.*|embed": 0},
            PARAMS,
            r"layers/bias \(6, 4\) has 6 layers on axis 0, but embed \(8, 4\).*has 8.*own",
        ),
        (
            {"steps": 0},
            {"steps": jnp.ones(6, "int32")},
            r"steps \(6,\) is of type int32.*optax\.masked",
        ),
        (
            {"a/b": 0},
            {"a": {"b": jnp.ones(6)}, "a/b": jnp.ones(6)},
            r"a/b \(6,\) is the path of 2 leaves.*Rename",
        ),
    ],
)
def test_refuses_with_path_shape_and_remedy(rules, params, message):
    with pytest.raises(ValueError, match=message):
        Depth.from_rules(rules).resolve(params)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"layers/(": 0}, r"'layers/\(' is no regular expression"),
        ({b"layers": 0}, r"b'layers' is no regular expression"),
        ({3: 0}, r"The rule 3 is no regular expression"),
        ({"layers": "0"}, r"'layers' has the axis '0'"),
        ({"layers": True}, r"'layers' has the axis True"),
        ({"layers": 0.0}, r"'layers' has the axis 0\.0"),
    ],
)
def test_refuses_a_rule_that_is_none(rules, message):
    with pytest.raises(ValueError, match=message):
        Depth.from_rules(rules)


@pytest.mark.parametrize("rules", ["layers/.*", [("layers/.*", 0)], None])
def test_refuses_rules_that_are_no_mapping(rules):
    with pytest.raises(ValueError, match=r"have to map patterns to axes"):
        Depth.from_rules(rules)


def test_a_depth_of_a_part_of_the_tree_names_the_part():
    depth = Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)
    message = (
        r"layers/bias \(6, 4\) has a place .* is not in the tree, where it is "
        r"params/model/layers/bias: the Depth was made from what is at 'params/model' there\. "
    )
    masked = {"params": {"model": PARAMS | {"embed": optax.MaskedNode()}}, "batch_stats": {}}
    with pytest.raises(ValueError, match=message):
        depth.resolve(masked)
    assert depth.resolve(masked["params"]["model"])
    module = nn.Dense(4)
    variables = module.init(jax.random.key(0), jnp.ones((2, 4)))
    with pytest.raises(
        ValueError, match=r"'params' there.*trace_depth\(model\.apply, variables, x"
    ):
        Depth.from_rules({"kernel": 0}).resolve(variables["params"]).resolve(variables)


def test_a_depth_of_a_whole_tree_names_the_part_that_the_optimizer_has():
    depth = Depth.from_rules({"params/layers/.*": 0}).resolve({"params": PARAMS})
    message = (
        r"params/layers/bias \(6, 4\) has a place .* is not in the tree, where it is layers/bias: "
        r"the Depth was made from a whole tree, of which the optimizer is given what is at 'params'"
    )
    with pytest.raises(ValueError, match=message + r".*model\.apply\(\{'params': p\}, x\)"):
        depth.resolve(PARAMS)


def test_a_tree_that_has_only_some_of_the_leaves_elsewhere_is_another_tree():
    depth = Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)
    for other in (
        {"a": {"layers": {"bias": jnp.ones((6, 4))}}, "kernel": jnp.ones((6, 4, 4))},
        {"bias": jnp.ones((6, 4)), "other": jnp.ones(3)},
    ):
        with pytest.raises(
            ValueError, match=r"layers/bias \(6, 4\) .* tree, whose leaves are .*same"
        ):
            depth.resolve(other)


@pytest.mark.parametrize("rules", [{"layers/.*": 0}, {}])
@pytest.mark.parametrize("count", [0, jnp.int32(0)])
def test_the_count_of_a_schedule_is_no_tree(rules, count):
    """Which optax.inject_hyperparams gives to each function, of a mask, too."""
    depth = Depth.from_rules(rules)
    for resolved in depth, depth.resolve(PARAMS):
        with pytest.raises(
            ValueError, match=r"the only leaf \(\) .* static_args=\('mask', 'where'\)"
        ):
            resolved.decay_mask(count)


@pytest.mark.parametrize("jit", [False, True])
def test_an_axis_that_vmap_hides_is_spoken_of(jit):
    params = {"layers": jnp.ones((3, 6, 4)), "other": jnp.ones((3, 4, 5))}

    def mapped(rules):
        def of_one(tree):
            return Depth.from_rules(rules).resolve(tree).map(lambda *leaf: leaf[1], tree)

        vmapped = jax.vmap(of_one)
        return (jax.jit(vmapped) if jit else vmapped)(params)

    hint = r"If this is in jax\.vmap: the axis that it maps is not there\. Count axes without it"
    with pytest.raises(ValueError, match=r"layers \(6, 4\) has no axis 2.*" + hint):
        mapped({"layers": 2})
    with pytest.raises(ValueError, match=r"other \(4, 5\) has 4 layers.*has 6\..*" + hint):
        mapped({".*": 0})
    assert mapped({"layers": 0})
    depth = Depth.from_rules({"layers": 1}).resolve(params)
    with pytest.raises(ValueError, match=r"layers \(6, 4\) does not have the 6 layers.*" + hint):
        jax.vmap(depth.decay_mask)(params)
    one = depth.from_rules({"layers": 0}).resolve(jax.tree.map(lambda leaf: leaf[0], params))
    jax.vmap(lambda tree: one.map(lambda *leaf: leaf[1], tree))(params)
    with pytest.raises(ValueError, match=r"layers \(3, 6, 4\) has no axis 3.*of its own\.$"):
        Depth.from_rules({"layers": 3}).resolve(params)


def test_a_tree_that_is_a_leaf_is_named_where_leaves_are_missing():
    depth = Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)
    with pytest.raises(ValueError, match=r"whose leaves are the only leaf \(2, 10\)\. Make"):
        depth.resolve(jnp.ones((2, 10)))
