"""find_depth: no wrong leaf on real parameter trees, and a remedy wherever it abstains.

``tests/data/trees.json`` holds 45 parameter trees, of models of other projects, of small ones of
each framework, and four written down from sources: each leaf with its path, shape, axis names, and,
where it is depth, its group, its axes, and its layer (or its place in a repeating pattern).
"""

import json
import pathlib

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import depthsmooth as ds
from depthsmooth import AmbiguousDepthError, DepthNotFoundError, find_depth

TREES = json.loads((pathlib.Path(__file__).parent / "data" / "trees.json").read_text())


def tree_of(name, *, boxed):
    """The parameters of a model as shapes, in boxes with their axis names or plain."""
    tree = {}
    for path, shape, names, *_ in TREES[name]["leaves"]:
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        leaf = jax.ShapeDtypeStruct(tuple(shape), "float32")
        node[last] = nn.LogicallyPartitioned(leaf, tuple(names)) if boxed and names else leaf
    return tree


def truth_of(name):
    """For each leaf that is depth its group, its axes and its layer."""
    return {
        path: (place[0], tuple(place[1]), place[2])
        for path, _, _, *place in TREES[name]["leaves"]
        if place
    }


def assert_right(depth, name):
    """No leaf is placed that is not depth, and all that are placed are placed right."""
    truth = truth_of(name)
    groups = {}
    for path, place in depth.items():
        group, axes, layer = truth[path]
        assert place.axes == axes, path
        assert place.layer == (layer or 0), path
        assert groups.setdefault(place.group, group) == group, path
    assert len(set(groups.values())) == len(groups), "a group is torn in two"


def found(name, boxed):
    try:
        return find_depth(tree_of(name, boxed=boxed)), None
    except (AmbiguousDepthError, DepthNotFoundError) as error:
        return ds.Depth(), error


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("boxed", [True, False], ids=["boxed", "plain"])
def test_no_leaf_of_a_real_model_is_wrong(name, boxed):
    depth, error = found(name, boxed)
    assert_right(depth, name)
    truth = truth_of(name)
    if error is None:
        assert set(depth) == set(truth)
    elif truth:
        assert "trace_depth(fn, params, batch)" in str(error)
        assert isinstance(error, AmbiguousDepthError)


@pytest.mark.parametrize(("boxed", "promised"), [(True, 0.948), (False, 0.915)])
def test_recall(boxed, promised):
    placed = sum(len(found(name, boxed)[0]) for name in TREES)
    assert placed / sum(len(truth_of(name)) for name in TREES) >= promised


NAMES = {"interleaved": ds.interleaved, "numbered": ds.numbered}


@pytest.mark.parametrize("boxed", [True, False], ids=["boxed", "plain"])
def test_the_rules_it_offers_where_it_abstains_are_right(boxed):
    """One of the readings is the truth, but for the one layout that no rule can say."""
    offered = []
    for name in TREES:
        _, error = found(name, boxed)
        if not isinstance(error, AmbiguousDepthError) or not truth_of(name):
            continue
        if not all(error.readings.values()):
            assert name == "maxtext_linen_gemma4_scan"
            continue
        rules = {pattern: eval(rules[0], NAMES) for pattern, rules in error.readings.items()}
        depth = ds.Depth.from_rules(rules).resolve(tree_of(name, boxed=boxed))
        assert_right(depth, name)
        assert set(depth) == set(truth_of(name))
        offered.append(name)
    assert "t5x_scalable_t5_scan_axis0" in offered
    assert len(offered) == (2 if boxed else 7)


def block(*lead, width=4, names=("mlp", "attn")):
    """The parameters of a transformer block, with leading axes."""
    kernel = {
        name: {"kernel": jnp.ones((*lead, *((width, 2 * width)[:: 1 - 2 * (k % 2)])))}
        for k, name in enumerate(names)
    }
    return {"norm": {"scale": jnp.ones((*lead, width))}, **kernel}


def layers_of(depth):
    return {path: place.layers for path, place in depth.items()}


@pytest.mark.parametrize(
    "keys",
    [
        [f"block_{i}" for i in range(12)],
        [f"block_{i}" for i in range(1, 13)],
        [f"Block{i:03}" for i in range(12)],
        ["block", *(f"block_{i}" for i in range(1, 12))],
        [f"encoder_layer-{i}" for i in range(12)],
    ],
    ids=["from 0", "from 1", "zero-padded", "haiku", "dashes"],
)
def test_numbered_siblings_in_numeric_order(keys):
    params = {key: block() for key in reversed(keys)} | {"head": jnp.ones((4, 2))}
    depth = find_depth(params)
    assert [depth[f"{key}/mlp/kernel"].layer for key in keys] == list(range(12))
    assert "head" not in depth
    assert len({place.group for place in depth.values()}) == 1


def test_a_list_named_after_layers():
    depth = find_depth({"layers": [block() for _ in range(11)]})
    assert depth["layers/10/norm/scale"].layer == 10


def test_stacks_along_the_one_axis_they_agree_on():
    first = find_depth({"layers": block(6)})
    assert {place.axes for place in first.values()} == {(0,)}
    swapped = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), block(6))
    assert {place.axes for place in find_depth({"layers": swapped}).values()} == {(1,)}
    last = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), block(6))
    assert {place.axes for place in find_depth({"layers": last}).values()} == {(1,), (2,)}


def test_two_stacks_side_by_side():
    depth = find_depth({"encoder": {"layers": block(6)}, "decoder": {"layers": block(3)}})
    assert {place.group: len(place.layers) for place in depth.values()} == {
        "encoder/layers": 6,
        "decoder/layers": 3,
    }


def test_siblings_without_a_tensor_that_others_have():
    """Every other layer has experts: they are kept apart by the layers between them."""
    params = {f"layers_{i}": block(names=("mlp", "o", "experts")[: 2 + i % 2]) for i in range(4)}
    depth = find_depth(params)
    assert [depth[f"layers_{i}/experts/kernel"].layer for i in (1, 3)] == [1, 3]
    runs = {track.paths[0]: track.spans() for track in depth.tracks}
    assert runs["layers_1/experts/kernel"] == (1, 1, 1, 1)
    assert runs["layers_0/mlp/kernel"] == (4,)


def attention(width=4):
    return {"q": {"kernel": jnp.ones((width, width))}, "o": {"kernel": jnp.ones((width, width))}}


def expert():
    return {"up": {"kernel": jnp.ones((4, 8))}, "down": {"kernel": jnp.ones((8, 4))}}


def test_layers_of_each_kind_are_a_group():
    """As in a hybrid: two recurrent blocks, then one with attention."""
    recurrent = block(names=("in", "out", "gate"))
    layers = [recurrent, recurrent, attention()] * 3
    depth = find_depth({"layers": layers})
    assert depth.groups == {"layers/* (kind 1)": 6, "layers/* (kind 2)": 3}
    assert [depth[f"layers/{i}/in/kernel"].layer for i in (0, 1, 3, 4, 6, 7)] == list(range(6))
    assert [depth[f"layers/{i}/q/kernel"].layer for i in (2, 5, 8)] == list(range(3))
    one_after_another = find_depth({"layers": [recurrent] * 3 + [attention()] * 2})
    assert one_after_another.groups == {"layers/* (kind 1)": 3, "layers/* (kind 2)": 2}


def test_a_layer_that_is_alone_of_its_kind_is_left_alone():
    depth = find_depth(
        {"layers": [block(), block(), block(), attention() | {"norm": block()["norm"]}]}
    )
    assert depth.groups == {"layers/*": 3}
    assert "layers/3 is the only layer of its kind" in depth.explain("layers/3/q/kernel")


@pytest.mark.parametrize("names", [("mlp",), ("up", "down", "gate")], ids=["an MLP", "a gated one"])
def test_layers_with_experts_are_of_one_kind_with_those_that_have_an_mlp(names):
    """However little of their matrices the attention is that they have in common."""
    dense = attention() | block(names=names)
    sparse = attention() | block(names=()) | {"experts": [expert() for _ in range(3)]}
    depth = find_depth({"layers": [dense, sparse] * 2})
    assert depth.groups == {"layers/*": 4}
    assert [depth[f"layers/{i}/q/kernel"].layer for i in range(4)] == [0, 1, 2, 3]
    assert [depth[f"layers/{i}/experts/2/up/kernel"].layer for i in (1, 3)] == [1, 3]


def test_one_rule_is_for_layers_of_several_kinds():
    """And for those that are alone of theirs, unless they hold layers."""
    order = [block(), attention(), attention(), block()]
    stack = {"encoder": {"norm": {"scale": jnp.ones((6, 4))}, "w": jnp.ones((6, 4, 4))}}
    pyramid = {"blocks": [block(width=4 + (i > 0)) for i in range(3)]}
    for layers in (order, [*order, stack], [*order, pyramid]):
        with pytest.raises(AmbiguousDepthError, match=r"take no turns|in common") as raised:
            find_depth({"layers": layers})
        assert raised.value.readings == {r"layers/(\d+)/.*": ("numbered()",)}
    params = {"layers": [*order, {"blocks": [block() for _ in range(3)]}]}
    with pytest.raises(AmbiguousDepthError) as raised:
        find_depth(params)
    assert raised.value.readings == {
        "layers/(0|3)/.*": ("sequence('layers/0', 'layers/3')",),
        "layers/(1|2)/.*": ("numbered()",),
    }
    known = ds.Depth.from_rules({r"layers/[0-3]/.*": ()})
    assert find_depth(params, known=known)["layers/4/blocks/2/norm/scale"].layer == 2


def test_a_refusal_lists_every_doubt():
    towers = {f"tower{name}": {f"stage_{i}": block() for i in range(3)} for name in "abcdefgh"}
    with pytest.raises(AmbiguousDepthError) as raised:
        find_depth(towers | {f"block_{i}": block() for i in range(3)})
    assert len(raised.value.readings) == 8
    for pattern, rules in raised.value.readings.items():
        assert f"{{{pattern!r}: {rules[0]}}}" in str(raised.value)


def test_a_refusal_lists_what_is_doubtful_once_the_rest_is_settled():
    """Critics are no matter beside layers; they are if the encoder has none."""
    params = {"encoder": block(6)} | {f"critic_{i}": block() for i in range(2)}
    with pytest.raises(AmbiguousDepthError) as raised:
        find_depth(params)
    assert set(raised.value.readings) == {"encoder/.*", r"critic[-_]?(\d*)/.*"}
    depth = find_depth(params, known=ds.Depth.from_rules({"encoder/.*": 0}))
    assert "copies side by side" in depth.explain("critic_0/mlp/kernel")


def test_blocks_of_any_name_are_not_left_alone_in_silence():
    params = {f"{name}_{i}": block() for name in ("block", "stage") for i in range(3)}
    with pytest.raises(AmbiguousDepthError, match=r"stage_0.*copies side by side") as raised:
        find_depth(params)
    assert list(raised.value.readings.values()) == [("numbered()",)]


@pytest.mark.parametrize(
    "mlp",
    [
        {"layers": [{"kernel": jnp.ones((6, 4, 4)), "bias": jnp.ones((6, 4))}] * 2},
        {"layers": {"up": jnp.ones((6, 4, 8)), "down": jnp.ones((6, 8, 4)), "b": jnp.ones((6, 4))}},
    ],
    ids=["a list", "a stack"],
)
def test_what_is_in_a_stack_of_another_name_is_no_doubt_of_its_own(mlp):
    with pytest.raises(AmbiguousDepthError) as raised:
        find_depth({"encoder": block(6, names=("attn", "out")) | {"mlp": mlp}})
    assert raised.value.readings == {"encoder/.*": ("0",)}


def test_patterns_of_a_refusal_match_no_other_leaves():
    """Nor integers, which no rule can mix, nor the siblings that are unlike."""
    blocks = [block(width=4 + (i == 0)) | {"steps": jnp.ones(4, "int32")} for i in range(4)]
    with pytest.raises(AmbiguousDepthError) as raised:
        find_depth({"layers": blocks})
    [(pattern, rules)] = raised.value.readings.items()
    assert rules == ("numbered()",)
    depth = ds.Depth.from_rules({pattern: ds.numbered()}).resolve({"layers": blocks})
    assert set(depth) == {
        f"layers/{i}/{name}"
        for i in (1, 2, 3)
        for name in ("norm/scale", "mlp/kernel", "attn/kernel")
    }


DENSE = {f"Dense_{i}": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for i in range(2)}
SIDE_BY_SIDE = {
    "players": {f"player_{i}": DENSE for i in range(2)},
    "experts that are numbered": {f"expert_layer_{i}": DENSE for i in range(4)},
    "a pyramid of features": {"fpn": {"layer_blocks": [DENSE for _ in range(4)]}},
    "two streams": {f"{part}_{i}": block() for part in ("attn", "mlp") for i in range(2)},
    "inputs for each layer": {f"per_layer_gate_{i}": block() for i in range(3)},
    "attention here and there": {f"AttnBlock_{i}": block() for i in range(3)},
    "heads of tasks": {f"output_block_{i}": DENSE for i in range(4)},
    "stages of a U-Net": {
        f"down_blocks_{i}": {f"resnets_{j}": DENSE for j in range(2)} for i in range(3)
    },
}


@pytest.mark.parametrize("params", SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE.keys())
def test_what_may_be_side_by_side_is_no_layers(params):
    with pytest.raises(AmbiguousDepthError, match=r"its siblings may be layers, or copies"):
        find_depth(params)
    beside = params | {f"block_{i}": block() for i in range(3)}
    depth = find_depth(beside)
    assert {path.partition("/")[0] for path in depth} == {"block_0", "block_1", "block_2"}


def test_what_else_is_numbered_does_not_stop_it():
    params = {f"encoderblock_{i}": block() for i in range(3)}
    head = {f"layers_{i}": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for i in (0, 2)}
    features = {"conv_layers": [block(width=2 + (i > 0)) for i in range(4)]}
    depth = find_depth(params | {"classifier": head} | features)
    assert {path.partition("/")[0] for path in depth} == set(params)
    assert "not the same shape" in depth.explain("conv_layers/0/attn/kernel")
    assert "holes" in depth.explain("classifier/layers_0/kernel")


DOUBTFUL = {
    "a stem and a norm in one list": (
        {"layers": [{"kernel": jnp.ones((3, 4))}, block(), block(), {"scale": jnp.ones(4)}]},
        r"layers/0 has nothing in common",
    ),
    "stacks without a norm": (
        {f"blocks_{i}": {"wi": jnp.ones((3, 4, 8)), "wo": jnp.ones((3, 8, 4))} for i in range(2)},
        r"each of them may be a stack",
    ),
    "a first block that is unlike": (
        {"block": block() | {"bias": jnp.ones(4)}, "block_1": block(), "block_2": block()},
        r"block may be the first of them",
    ),
    "lists of lists": (
        {"block": [[block() for _ in range(2)] for _ in range(2)]},
        r"hold what may be layers",
    ),
}


@pytest.mark.parametrize(("params", "message"), DOUBTFUL.values(), ids=DOUBTFUL.keys())
def test_blocks_that_are_not_certain(params, message):
    with pytest.raises(AmbiguousDepthError, match=message):
        find_depth(params)


def test_projections_onto_several_heads_are_no_stack():
    query = {"kernel": jnp.ones((6, 3, 2)), "bias": jnp.ones((3, 2))}
    params = {f"block_{i}": block() for i in range(2)} | {"query_layer": query}
    assert {path.partition("/")[0] for path in find_depth(params)} == {"block_0", "block_1"}
    with pytest.raises(DepthNotFoundError):
        find_depth({"qkv_layer": {"q": query, "k": query}})


def test_layers_of_stacked_blocks_take_no_turns():
    """As in T5: they have no tensor in common but a norm."""
    norm = {"scale": jnp.ones((4, 3))}
    stacked = {
        "layer_0": {"q": jnp.ones((4, 5, 3)), "o": jnp.ones((4, 3, 5)), "norm": norm},
        "layer_1": {"wi": jnp.ones((4, 3, 7)), "wo": jnp.ones((4, 7, 3)), "norm": norm},
    }
    assert {place.layers for place in find_depth({"blocks": stacked}).values()} == {(0, 1, 2, 3)}


def test_parts_of_stacked_blocks_take_no_turns():
    layer = [{"q": jnp.ones((4, 5, 3)), "norm": {"scale": jnp.ones((4, 3))}} for _ in range(2)]
    stacked = {"blocks": {"layer_0": layer[0], "layer_1": {"wi": jnp.ones((4, 3, 7))}}}
    assert {place.layers for place in find_depth(stacked).values()} == {(0, 1, 2, 3)}


def test_stacks_side_by_side_are_groups_of_their_own():
    def named(tree):
        return jax.tree.map(
            lambda leaf: nn.Partitioned(leaf, ("layers", *[None] * (leaf.ndim - 1))), tree
        )

    for names in (("encoder", "decoder"), ("dense_layers", "moe_layers")):
        params = {"model": {name: named(block(4)) for name in names}}
        assert {place.group for place in find_depth(params).values()} == {
            f"model/{name}" for name in names
        }


def test_layers_within_what_is_numbered_by_itself():
    blocks = {f"encoderblock_{i}": block() for i in range(3)}
    octo = {"BlockTransformer_0": {"Transformer_0": blocks}}
    assert {place.layers for place in find_depth(octo).values()} == {(0,), (1,), (2,)}
    haiku = {"__layer_stack_no_per_layer_1": block(5), "head": jnp.ones((4, 2))}
    assert {place.axes for place in find_depth(haiku).values()} == {(0,)}


def test_names_that_are_no_axes():
    gates = nn.Partitioned(jnp.ones((3, 4, 4)), ("blocks", None, None))
    params = {f"block_{i}": block() | {"gates": {"w": gates}} for i in range(3)}
    assert find_depth(params)["block_1/gates/w"].axes == ()
    inputs = nn.Partitioned(jnp.ones((4, 3, 2)), ("embed", "layers", "per_layer_dim"))
    with pytest.raises(AmbiguousDepthError, match=r"not named after layers"):
        find_depth(params | {"per_layer_projection": {"kernel": inputs}})
    dims = nn.Partitioned(jnp.ones((4, 3, 2)), ("embed", None, "per_layer_dim"))
    assert "inputs/kernel" not in find_depth(params | {"inputs": {"kernel": dims}})


@pytest.mark.parametrize("extra", [[], [{"w": jnp.ones((4, 4))}]], ids=["bare", "some bare"])
def test_the_rules_it_offers_match_leaves_without_a_name(extra):
    params = {"layers": [*[jnp.ones((4, 4))] * 3, *extra]}
    with pytest.raises(AmbiguousDepthError, match=r"layers/0 \(4, 4\)") as raised:
        find_depth(params)
    for rules in raised.value.readings.values():
        for rule in (*rules, "()"):
            known = ds.Depth.from_rules({next(iter(raised.value.readings)): eval(rule, NAMES)})
            find_depth(params, known=known)


def test_bare_matrices_of_different_sizes_are_no_layers_of_one_stack():
    params = {"layers": [jnp.ones((8, 8))] * 2 + [jnp.ones((4, 4))] * 2}
    with pytest.raises(AmbiguousDepthError, match=r"layers/\* has not the same shape") as raised:
        find_depth(params)
    assert list(raised.value.readings.values()) == [()]


def test_names_of_what_is_no_box():
    class Named(eqx.Module):
        weight: jax.Array
        names: tuple = eqx.field(static=True, default=("layers", "in", "out"))

    params = {f"block_{i}": block() | {"gate": Named(jnp.ones((4, 4, 4)))} for i in range(3)}
    assert find_depth(params)["block_1/gate/weight"].axes == ()


def test_layers_that_may_hold_layers_are_not_certain():
    swin = {f"layers_{i}": {f"blocks_{j}": block() for j in range(2)} for i in range(3)}
    with pytest.raises(AmbiguousDepthError, match=r"hold what may be layers, layers_\d/blocks_\*"):
        find_depth(swin)
    widths = {
        f"layers_{i}": {f"blocks_{j}": block(width=4 << i) for j in range(2)} for i in range(3)
    }
    assert {place.group for place in find_depth(widths).values()} == {
        f"layers_{i}/blocks_*" for i in range(3)
    }


def test_parts_of_a_block_that_are_named_layers():
    unlike = {"layer": [{"q": jnp.ones((4, 4)), "o": jnp.ones((4, 4))}, block()]}
    perceptron = {f"layers_{i}": {"kernel": jnp.ones((4, 4))} for i in range(2)}
    for one in (unlike, perceptron):
        params = {f"block_{i}": one for i in range(3)}
        depth = find_depth(params)
        assert {place.group for place in depth.values()} == {"block_*"}
        assert len(depth) == len(jax.tree.leaves(params))


def test_a_stack_that_no_norm_tells_is_offered_and_not_taken():
    stack = {"up": jnp.ones((12, 8, 16)), "down": jnp.ones((12, 16, 8)), "bias": jnp.ones((12, 16))}
    with pytest.raises(
        AmbiguousDepthError, match=r"layers/bias \(12, 16\).* no norm tells"
    ) as raised:
        find_depth({"layers": stack})
    assert raised.value.readings == {"layers/.*": ("0",)}
    depth = find_depth({"layers": stack} | {f"block_{i}": block() for i in range(3)})
    assert {place.group for place in depth.values()} == {"block_*"}


NOT_LAYERS = {
    "experts that are stacked": {
        "moe_layer": {
            "experts": {
                "wi": {"kernel": jnp.ones((8, 4, 6)), "bias": jnp.ones((8, 6))},
                "wo": {"kernel": jnp.ones((8, 6, 4)), "bias": jnp.ones((8, 4))},
            }
        }
    },
    "numbered parts of one block": {
        "Block": {f"Dense_{i}": {"kernel": jnp.ones((4, 4))} for i in range(2)},
    },
    "an ensemble": {"critics": block(4)["mlp"] | {"bias": jnp.ones((4, 8))}},
    "nothing": {"embed": jnp.ones((8, 4)), "head": jnp.ones((4, 8))},
    "two blocks in the only layer": {"block_0": {f"Block_{i}": block() for i in range(2)}},
    "blocks in the only layer": {"block_0": {f"MlpBlock_{i}": block() for i in range(2)}},
}


@pytest.mark.parametrize("params", NOT_LAYERS.values(), ids=NOT_LAYERS.keys())
def test_finds_nothing_where_nothing_is_certain(params):
    with pytest.raises(DepthNotFoundError, match=r"trace_depth\(fn, params, batch\).*from_rules"):
        find_depth(params)


AMBIGUOUS = {
    "every size alike": (
        {"layers": {"norm": {"scale": jnp.ones((4, 4))}, "w": jnp.ones((4, 4, 4))}},
        r"norm/scale \(4, 4\).*more than one axis.*'layers/\.\*': 0\} or \{'layers/\.\*': 1\} if",
    ),
    "two axes": ({"layers": block(2, 3)}, r"norm/scale \(2, 3, 4\).*several axes.*\(0, 1\)"),
    "no name": ({"encoder": block(6)}, r"norm/scale \(6, 4\).*not named after layers.*: 0"),
    "stacks that are numbered": (
        {f"blocks_{i}": block(6) for i in range(2)},
        r"each of them is a stack",
    ),
    "a hole": (
        {f"block_{i}": block() for i in (0, 1, 3)},
        r"block_0.*holes; the rule is \{[^}]*: \(\)\} if not",
    ),
    "other shapes": (
        {f"block_{i}": block(width=4 + i // 2) for i in range(3)},
        r"has not the same shape in all of its siblings; the rule is \{[^}]*: \(\)\} if not",
    ),
    "copies or layers": ({f"critic_{i}": block() for i in range(3)}, r"copies side by side"),
    "small steps": (
        {"layers": [{"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for _ in range(3)]},
        r"steps within one",
    ),
}


@pytest.mark.parametrize(("params", "message"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_refuses_to_guess(params, message):
    with pytest.raises(AmbiguousDepthError, match=message) as refused:
        find_depth(params)
    assert "trace_depth(fn, params, batch)" in str(refused.value)
    assert refused.value.readings


@pytest.mark.parametrize(("rule", "axes"), [(0, (0,)), ((), ())], ids=["layers", "no layers"])
def test_what_is_known_settles_a_refusal(rule, axes):
    params = {f"block_{i}": block() for i in range(3)} | {"encoder": block(6)}
    with pytest.raises(AmbiguousDepthError, match=r"'encoder/\.\*': 0.*known=Depth.from_rules"):
        find_depth(params)
    known = ds.Depth.from_rules({"encoder/.*": rule})
    depth = find_depth(params, known=known)
    assert depth["encoder/norm/scale"].axes == axes
    assert depth["block_2/norm/scale"].layer == 2
    assert {leaf.path for leaf in depth.leaves} == set(depth)
    assert set(find_depth({"encoder": block(6)}, known=known)) == {
        "encoder/attn/kernel",
        "encoder/mlp/kernel",
        "encoder/norm/scale",
    }


def test_refuses_to_know_what_is_no_depth():
    with pytest.raises(ValueError, match=r"known is a dict, but has to be a Depth"):
        find_depth({"encoder": block(6)}, known={"encoder/.*": 0})


def test_leaves_that_are_no_arrays_are_left_alone():
    params = {f"block_{i}": block() | {"act": jax.nn.relu} for i in range(3)}
    assert "block_0/act" not in find_depth(params)
    assert len(find_depth(params)) == 9


def test_doubts_beside_certain_layers_do_not_stop_it():
    params = {f"block_{i}": block() for i in range(3)} | {f"critic_{i}": block() for i in range(2)}
    assert {path.partition("_")[0] for path in find_depth(params)} == {"block"}


def test_metadata_is_believed_only_with_a_name_for_each_axis():
    def boxed(names):
        norm = nn.Partitioned(jnp.ones((2, 5)), names)
        kernel = nn.Partitioned(jnp.ones((4, 5, 4)), (None, "layers", None))
        return {"layers": {"norm": {"scale": norm}, "w": kernel}}

    depth = find_depth(boxed(("layers",)))
    assert depth["layers/norm/scale"].axes == (1,)
    assert depth["layers/norm/scale"].found_by == "metadata"
    with pytest.raises(AmbiguousDepthError, match="different numbers of layers"):
        find_depth(boxed(("layers", "norm")))


def test_reads_paths_shapes_and_dtypes_only():
    params = {"layers": block(6)}
    assert find_depth(jax.eval_shape(lambda: params)) == find_depth(params)


def test_integers_are_left_alone():
    params = {"layers": block(6) | {"step": jnp.ones(6, "int32")}}
    assert "layers/step" not in find_depth(params)


def test_an_empty_tree_is_no_error():
    assert find_depth({}) == find_depth(None) == ds.Depth()


def test_explains_what_it_left_alone():
    depth = find_depth({"layers": block(6), "head": jnp.ones((4, 2)), "block_0": block()})
    assert "neither numbered like a layer nor in a stack" in depth.explain("head")
    assert "the only layer of its kind" in depth.explain("block_0/norm/scale")


@pytest.mark.parametrize("name", ["action_expert", "critic"])
def test_a_bare_list_in_a_network_of_its_own_is_not_left_in_silence(name):
    """Its items may be the layers of a second tower, or copies of it."""
    params = {"layers": [block() for _ in range(3)], name: [block() for _ in range(4)]}
    with pytest.raises(AmbiguousDepthError, match=rf"{name}/0/attn/kernel \(8, 4\)") as refused:
        find_depth(params)
    [(pattern, rules)] = refused.value.readings.items()
    assert rules == ("numbered()",)
    known = ds.Depth.from_rules({pattern: ds.numbered()})
    assert find_depth(params, known=known).groups == {"layers/*": 3, pattern: 4}
    copies = {"layers": params["layers"], f"{name}s": params[name]}
    assert find_depth(copies).groups == {"layers/*": 3}
