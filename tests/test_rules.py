"""Rules: every layout that users can say, and an error with its remedy for all that fits none."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import depthsmooth as ds
from depthsmooth import Depth, interleaved, numbered, sequence


def ones(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def layers(rules, params):
    """For each leaf that the rules place its layers."""
    return {path: place.layers for path, place in Depth.from_rules(rules).resolve(params).items()}


BLOCKS = {f"block_{i}": {"Dense_0": ones(4, 4), "Dense_1": ones(4, 4)} for i in range(11)}


def test_several_axes_from_outer_to_inner():
    depth = Depth.from_rules({".*": (-1, 0)}).resolve({"w": ones(2, 4, 3)})
    assert (depth["w"].axes, depth["w"].layers) == ((2, 0), tuple(range(6)))


@pytest.mark.parametrize("pattern", ["block_.*", r"block_(\d+)/.*"])
def test_numbered_by_the_first_number_that_differs_or_the_captured_one(pattern):
    found = layers({pattern: numbered()}, BLOCKS)
    assert found == {f"block_{i}/Dense_{j}": (i,) for i in range(11) for j in range(2)}


def test_a_number_that_the_pattern_says_is_passed_over():
    params = {"model_2": {f"Gemma4Layer_{i}": ones(4) for i in range(3)}}
    assert set(layers({"model_2/.*": numbered()}, params).values()) == {(0,), (1,), (2,)}
    with pytest.raises(
        ValueError, match=r"that in 'model_2' or that in 'Gemma4Layer_0'.*'model_\(\\\\d\+\)'"
    ):
        layers({".*": numbered()}, params)


def test_several_numbers_are_refused_where_paths_are_of_other_lengths():
    params = {"m_2": {"a": ones(4), "net": {f"layer_{i}": ones(4) for i in range(3)}}}
    with pytest.raises(ValueError, match=r"m_2/a .* that in 'm_2' or that in 'layer_0'"):
        layers({".*": numbered()}, params)


def test_parts_of_the_only_layer_that_is_there_are_no_layers():
    """Neither where the other layers are masked, nor where there is but one."""
    params = {f"block_{i}": {f"Dense_{j}": ones(4) for j in range(2)} for i in range(3)}
    masked = params | {f"block_{i}": optax.MaskedNode() for i in range(2)}
    hidden = {key: dict.fromkeys(block, optax.MaskedNode()) for key, block in params.items()}
    hidden["block_2"] = params["block_2"]
    for tree in masked, hidden:
        assert set(layers({"block_.*": numbered()}, tree).values()) == {(2,)}
    with pytest.raises(
        ValueError, match=r"block_0/Dense_0 \(4,\) has several numbers.*parentheses"
    ):
        layers({"block_.*": numbered()}, {"block_0": params["block_0"]})
    only = layers({r"block_(\d+)/.*": numbered()}, {"block_0": params["block_0"]})
    assert set(only.values()) == {(0,)}


def test_a_pattern_of_two_numbers_that_vary_has_to_say_which():
    params = {f"stage_{s}": {f"block_{i}": {"w": ones(4)} for i in range(3)} for s in range(2)}
    message = r"stage_0/block_0/w \(4,\) has several numbers.*'stage_0' or that in 'block_0'"
    with pytest.raises(ValueError, match=message):
        layers({r"stage_\d+/block_.*": numbered()}, params)
    assert layers({r"stage_\d+/.*": numbered()}, params)["stage_1/block_2/w"] == (1,)
    assert layers({r"stage_\d+/block_(\d+)/.*": numbered()}, params)["stage_1/block_2/w"] == (2,)


def test_another_number_by_parentheses():
    params = {f"tower_{t}": {f"mlp_{i}": ones(4) for i in range(3)} for t in range(2)}
    depth = Depth.from_rules({r"tower_\d/mlp_(\d+)": numbered()}).resolve(params)
    assert depth["tower_1/mlp_2"].layer == 2
    assert len(depth.tracks) == 2


@pytest.mark.parametrize("pattern", ["attn.*", r"attn_?(\d*)/.*"])
def test_haiku_names_the_first_without_a_number(pattern):
    keys = ["attn", *(f"attn_{i}" for i in range(1, 11))]
    params = {key: {"w": ones(4), "linear_0": ones(4)} for key in keys}
    found = layers({pattern: numbered()}, params)
    assert [found[f"{key}/w"] for key in keys] == [(i,) for i in range(11)]


def test_layers_numbered_from_one():
    params = {f"layer_{i}": ones(4) for i in range(1, 4)}
    assert layers({".*": numbered()}, params) == {f"layer_{i}": (i - 1,) for i in range(1, 4)}


def test_interleaved_along_several_axes():
    params = {f"layers_{j}": ones(2, 3, 4) for j in range(2)}
    found = layers({".*": interleaved((0, 1))}, params)
    assert found == {"layers_0": (0, 2, 4, 6, 8, 10), "layers_1": (1, 3, 5, 7, 9, 11)}


def test_a_tensor_of_some_places_in_the_pattern_only():
    params = {f"layers_{j}": {"w": ones(2, 4)} for j in range(4)}
    params["layers_3"]["router"] = ones(2, 8)
    params["layers_2"]["router"] = ones(2, 8)
    depth = Depth.from_rules({".*": interleaved(0)}).resolve(params)
    assert depth["layers_3/router"].layers == (3, 7)
    runs = {track.paths[0]: track.spans() for track in depth.tracks}
    assert runs["layers_2/router"] == (1, 1, 2, 1, 1, 2)


def test_a_sequence_of_an_interleaved_stack_and_its_remainder():
    stacks = {f"layers_{j}": {"w": ones(4, 2)} for j in range(6)}
    params = {
        "decoder": {
            "layers": stacks,
            "layers_remainder": {f"layers_{j}": {"w": ones(4)} for j in range(2)},
        }
    }
    rule = sequence(
        (r"decoder/layers/layers_\d", interleaved(1)), r"decoder/layers_remainder/.*_\d"
    )
    depth = Depth.from_rules({"decoder/layers.*": rule}).resolve(params)
    assert depth["decoder/layers_remainder/layers_1/w"].layers == (13,)
    [track] = depth.tracks
    assert track.spans() == (14,)


@pytest.mark.parametrize(
    ("keys", "rule"),
    [("01", ()), *((keys, numbered()) for keys in ("01", ("h_0", "h_1"), "xy"))],
)
def test_the_remedy_for_a_container_of_layers_works(keys, rule):
    params = {"a": {key: {"w": ones(4)} for key in keys}, "b": {"w": ones(4)}}
    with pytest.raises(ValueError, match="would be one layer, but holds") as error:
        Depth.from_rules({".*": sequence(("a", rule), "b")}).resolve(params)
    named = re.findall(r"r'(a/.*?)'", str(error.value))
    [track] = Depth.from_rules({".*": sequence(*named, "b")}).resolve(params).tracks
    assert track.paths == (f"a/{keys[0]}/w", f"a/{keys[1]}/w", "b/w")


def test_a_masked_container_keeps_those_beside_it_apart():
    params = {"a": {"w": ones(3, 4)}, "b": {"w": ones(4)}, "c": {"w": ones(3, 4)}}
    depth = Depth.from_rules({"[abc]/w": sequence(("a", 0), "b", ("c", 0))})
    [track] = depth.resolve(params | {"b": optax.MaskedNode()}).tracks
    assert track.spans() == (3, 1, 3)


@pytest.mark.parametrize("hidden", [0, 1, 5])
def test_masked_layers_leave_no_hole(hidden):
    params = {f"layers_{j}": {"w": ones(2, 4)} for j in range(6)}
    params[f"layers_{hidden}"] = optax.MaskedNode()
    found = layers({"layers_.*": interleaved(0)}, params)
    last = 4 if hidden == 5 else 5
    assert found[f"layers_{last}/w"][0] == last
    assert found["layers_3/w"] == (3, 9)


@pytest.mark.parametrize(
    ("rules", "params", "message"),
    [
        (
            {"block_.*": numbered()},
            {f"block_{i}": ones(4) for i in (0, 1, 3, 4)},
            r"like block_0 \(4,\), have the numbers 0 to 4 without 2.*Correct the pattern",
        ),
        (
            {"block_.*": numbered()},
            {f"block_{i}": ones(4) for i in (2, 3)},
            r"block_2 \(4,\).*from 2 on.*numbered from 0 or 1",
        ),
        (
            {".*": numbered()},
            {"block_0": ones(4), "block_1": ones(4), "head": ones(4)},
            r"head \(4,\) has no number.*Narrow the pattern",
        ),
        (
            {".*": numbered()},
            {"block_0": ones(4), "block_1": ones(5)},
            r"block_1 \(5,\) has layers of shape \(5,\), but block_0 \(4,\).*narrow its pattern",
        ),
        (
            {".*": interleaved(0)},
            {"block_0": ones(4, 2), "block_1": ones(5, 2)},
            r"block_1 \(5, 2\) has 5 layers on axis 0, but block_0 \(4, 2\)",
        ),
        (
            {".*": numbered()},
            {"block_1": ones(4), "block_01": ones(4), "block_0": ones(4)},
            r"block_1 \(4,\) and block_01 \(4,\) are both layer 1|block_01.*are both layer 1",
        ),
        (
            {".*": sequence("in", "out")},
            {"in": [{"w": ones(4)}] * 3, "out": [{"w": ones(4)}] * 3},
            r"in/0/w \(4,\) is in the container 'in', .* one layer, but holds 0, 1, 2.*r'in/\\d\+'",
        ),
        (
            {".*": sequence(("in", numbered()), ("out", numbered()))},
            {"in": {"w": ones(4)}, "out": {"w": ones(4)}},
            r"in/w \(4,\) is in the container 'in', .* one layer, but holds w",
        ),
        ({"b_(.)": numbered()}, {"b_²": ones(2), "b_1": ones(2)}, r"b_² \(2,\) has no number"),
        (
            {r"b(?:_(\d+))?": numbered()},
            {"b": ones(2), "b_1": ones(2)},
            r"b \(2,\) has no number .*as \(\\d\*\) if the first layer has none",
        ),
        ({".*": (0, -3)}, {"w": ones(4, 4, 4)}, r"w \(4, 4, 4\) has the axes \(0, -3\) twice"),
        (
            {".*": sequence("a", "b")},
            {"a": {"w": ones(4)}, "c": {"w": ones(4)}},
            r"container 'b' of the rule '\.\*' has no leaf.*a/w \(4,\)",
        ),
        (
            {".*": sequence("a", "b")},
            {"a": {"w": ones(4)}, "b": {"w": ones(4)}, "c": {"w": ones(4)}},
            r"c/w \(4,\) is matched by the rule '\.\*', but is in none of its containers 'a', 'b'",
        ),
        (
            {".*": sequence("a", ("[ab]", 0))},
            {"a": {"w": ones(4)}, "b": {"w": ones(4)}},
            r"a/w \(4,\) is in two containers",
        ),
        (
            {".*": sequence(("a", 0), "b")},
            {"a": {"w": ones(3, 4)}, "b": {"w": ones(5)}},
            r"b/w \(5,\) has layers of shape \(5,\), but a/w \(3, 4\) has layers of shape \(4,\)",
        ),
    ],
)
def test_refuses_with_path_shape_and_remedy(rules, params, message):
    with pytest.raises(ValueError, match=message):
        Depth.from_rules(rules).resolve(params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sequence(), r"needs the patterns of its containers"),
        (lambda: sequence("a", 3), r"has the container 3; it takes patterns, and pairs"),
        (lambda: sequence(("a", "0")), r"The rule 'a' has the axis '0'"),
        (lambda: sequence("("), r"'\(' is no regular expression"),
        (lambda: sequence(("a", sequence("b"))), r"cannot be a container of another"),
        (lambda: interleaved("0"), r"has the axis '0'"),
        (
            lambda: Depth.from_rules({r"stage_(\d+)/block_(\d+)": numbered()}),
            r"several pairs of parentheses.*\(\?:\.\.\.\)",
        ),
        (lambda: Depth.from_rules({"a": (0, "b")}), r"'a' has the axis \(0, 'b'\)"),
    ],
)
def test_refuses_what_is_no_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_json_round_trip():
    rules = Depth.from_rules(
        {"a/.*": (0, 1), "b_.*": numbered(), "c_.*": sequence(("c_0", interleaved(1)), "c_1")}
    )
    assert Depth.from_json(rules.to_json()) == rules
    depth = Depth.from_rules({"block_.*": numbered()}).resolve(BLOCKS | {"head": ones(4)})
    again = Depth.from_json(depth.to_json())
    assert again == depth
    assert hash(again) == hash(depth)
    assert again.explain("head") == depth.explain("head")


def rules_json(pattern):
    return f'{{"rules":[["{pattern}",{{"axes":[0],"numbered":false,"containers":[]}}]]}}'


def place_json(axis, layers):
    place = f'{{"group":"g","tensor":"t","axes":[{axis}],"layers":{layers},"found_by":"rule"'
    place += ',"shards":1}'
    leaf = f'{{"path":"a","shape":[3],"place":{place},"reason":""}}'
    return f'{{"leaves":[{leaf}]}}'


def test_reads_json_of_earlier_versions():
    """They wrote leaves and rules, one of them empty."""
    old = place_json(0, [0, 1, 2]).replace('"reason":""}]}', '"reason":""}],"rules":[]}')
    assert old != place_json(0, [0, 1, 2])
    assert Depth.from_json(old) == Depth.from_json(place_json(0, [0, 1, 2]))
    old = rules_json("a").replace("{", '{"leaves":[],', 1)
    assert Depth.from_json(old) == Depth.from_rules({"a": 0})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"leaves": 3}', '{"leaves": [{}], "rules": []}', "null"),
        place_json(7, [0, 1, 2]),
        place_json(0, [0, 1]),
        place_json(0, [5, 5, 5]),
        place_json(0, [-1, 0, 1]),
        rules_json("("),
    ],
)
def test_refuses_json_that_is_no_depth(text):
    assert Depth.from_json(place_json(0, [0, 1, 2]))
    assert Depth.from_json(rules_json("a")) == Depth.from_rules({"a": 0})
    with pytest.raises(ValueError, match=r"not a Depth in JSON"):
        Depth.from_json(text)


def test_explains_unknown_paths_and_rules():
    depth = Depth.from_rules({"block_.*": numbered()})
    with pytest.raises(ValueError, match=r"no leaf 'block_0'.*depth\.resolve\(params\)"):
        depth.explain("block_0")
    with pytest.raises(ValueError, match=r"no leaf 'block_3/Dense'.*block_3/Dense_0 \(4, 4\)"):
        depth.resolve(BLOCKS).explain("block_3/Dense")


def test_a_container_may_have_flags_of_its_own():
    rules = {".*": sequence(("(?i)IN", 0), "mid")}
    found = layers(rules, {"in": {"w": optax.MaskedNode()}, "mid": {"w": ones(2)}})
    assert found == {"mid/w": (1,)}


def test_a_container_may_be_a_list_of_unlike_parts():
    params = {"in": [{"q": ones(4)}, {"wi": ones(4)}], "out": [{"q": ones(4)}, {"wi": ones(4)}]}
    found = layers({".*": sequence("in", "out")}, params)
    assert found == {"in/0/q": (0,), "in/1/wi": (0,), "out/0/q": (1,), "out/1/wi": (1,)}


def test_numbers_are_leaves_too():
    assert layers({"b_.*": numbered()}, {"b_0": 1.0, "b_1": 2.0}) == {"b_0": (0,), "b_1": (1,)}
    with pytest.raises(ValueError, match=r"b_0 \(\) is of type function"):
        layers({"b_.*": numbered()}, {"b_0": ones, "b_1": ones})


def test_a_resolved_depth_refuses_layers_of_other_shapes():
    depth = Depth.from_rules({"block_.*": numbered()}).resolve(BLOCKS)
    other = BLOCKS | {"block_3": {"Dense_0": jnp.ones((5, 4)), "Dense_1": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match=r"block_3/Dense_0 \(5, 4\) has layers of shape"):
        depth.resolve(other)


def refused(rules, params):
    """What is said of rules, and each rule that it names instead, matched with the same tree."""
    with pytest.raises(ValueError, match=r"'.*'") as error:
        Depth.from_rules(rules).resolve(params)
    names = {"numbered": numbered, "interleaved": interleaved, "sequence": sequence}
    said = re.findall(r"\{'.*?': [^{}]*\}", str(error.value))
    return str(error.value), [layers(eval(rule, names), params) for rule in said]


def test_rules_without_a_tensor_of_two_layers_are_refused():
    params = {f"layer_{i}": {f"dense_{i}": ones(2, 2)} for i in range(4)}
    for pattern in r"layer_(\d+)/.*", "layer_.*":
        message, [found] = refused({pattern: numbered()}, params)
        assert "would mix nothing: layer_0/dense_0 (2, 2) is in layer 0" in message
        assert found == {f"layer_{i}/dense_{i}": (i,) for i in range(4)}
    stacks = {f"layer_{i}": {f"dense_{i}": ones(3, 2)} for i in range(4)}
    _, [found] = refused({r"layer_(\d+)/.*": interleaved(0)}, stacks)
    assert found["layer_1/dense_1"] == (1, 5, 9)
    for rule in numbered(), sequence(r"layer_\d"):
        unlike = {"layer_0": {"a": ones(2, 2)}, "layer_1": {"b": ones(2, 2)}}
        message, found = refused({"layer_.*": rule}, unlike)
        assert "leave the rule out" in message
        assert found == []


ATTENTION = {"norm": ones(4), "qkv": {"w": ones(4, 12)}, "out": {"w": ones(4, 4), "b": ones(4)}}
MLP = {"norm": ones(4), "up": {"w": ones(4, 4)}, "out": {"w": ones(4, 4), "b": ones(4)}}


def test_a_rule_may_cover_kinds_in_turn():
    """They share a norm and an output projection: as tensors of one track they would be mixed."""
    params = {f"block_{i}": (ATTENTION, MLP)[i % 2] for i in range(6)}
    rules = Depth.from_rules({"block_.*": numbered()})
    depth = rules.resolve(params)
    assert depth.groups == {"block_.* (kind 1)": 3, "block_.* (kind 2)": 3}
    assert [depth[f"block_{i}/out/w"].layers for i in range(6)] == [(i // 2,) for i in range(6)]
    assert all(len({int(p[6]) % 2 for p in track.paths}) == 1 for track in depth.tracks)
    assert "block_.* (kind 2)       3" in str(depth)
    assert Depth.from_json(depth.to_json()) == depth
    with pytest.raises(ValueError, match=r"'block_.\*' has 2 kinds .*'block_.\* \(kind 1\)'"):
        ds.smooth_over_depth(0.1, depth=rules, cuts={"block_.*": (2,)}).init(params)
    ds.smooth_over_depth(0.1, depth=rules, cuts={"block_.* (kind 1)": (2,)}).init(params)


def test_stacks_of_two_kinds_take_turns_by_kind():
    stacks = [jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape)), k) for k in (ATTENTION, MLP)]
    params = {f"layers_{i}": stacks[i == 2] for i in range(3)}
    found = layers({"layers_.*": interleaved(0)}, params)
    assert [found[f"layers_{i}/out/w"] for i in range(3)] == [(0, 2, 4), (1, 3, 5), (0, 1, 2)]


def test_layers_of_experts_are_of_one_kind_with_dense_ones():
    attention = {"norm": ones(4), "q": ones(4, 4), "o": ones(4, 4)}
    dense = {"up": ones(4, 8), "down": ones(8, 4)}
    experts = {"router": ones(4, 3), "experts": {"up": ones(3, 4, 8), "down": ones(3, 8, 4)}}
    params = {f"layers_{i}": attention | (dense, experts)[i % 2] for i in range(4)}
    depth = Depth.from_rules({"layers_.*": numbered()}).resolve(params)
    assert depth.groups == {"layers_.*": 4}
    assert [depth[f"layers_{i}/q"].layers for i in range(4)] == [(i,) for i in range(4)]


def test_a_layer_of_which_most_is_masked_is_of_the_kind_that_it_is():
    params = {f"block_{i}": {name: ones(4, 4) for name in ("q", "k", "o")} for i in range(4)}
    hidden = dict.fromkeys(("q", "o"), optax.MaskedNode())
    masked = params | {"block_1": params["block_1"] | hidden}
    depth = Depth.from_rules({"block_.*": numbered()}).resolve(masked)
    assert depth.groups == {"block_.*": 4}
    assert [depth[f"block_{i}/k"].layers for i in range(4)] == [(0,), (1,), (2,), (3,)]


def test_what_is_masked_brings_no_kind_together():
    """Which kind a masked layer is of is not known, nor whether it is between two of a kind."""
    params = {f"block_{i}": (ATTENTION, MLP)[i % 2] for i in range(6)}
    masked = params | {"block_2": optax.MaskedNode()}
    depth = Depth.from_rules({"block_.*": numbered()}).resolve(masked)
    assert [depth[f"block_{i}/norm"].layers for i in (0, 4)] == [(0,), (4,)]
    assert depth["block_0/norm"].group != depth["block_1/norm"].group


DENSE = {"kernel": ones(6, 4, 4)}
BIASED = {"kernel": ones(6, 4, 4), "bias": ones(6, 4)}


@pytest.mark.parametrize(
    "part",
    [DENSE, BIASED, {"kernel": ones(4, 6, 3), "bias": ones(4, 6)}, {"norm": {"scale": ones(6, 4)}}],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_parts_of_a_stack_are_no_layers(part, parts):
    params = {"layers": {f"Dense_{i}": part for i in range(parts)}}
    message, (stack, turns, said) = refused({"layers/.*": numbered()}, params)
    assert re.search(r"layers/Dense_0/\S+ \(\d, \d.*has an axis more than one layer needs", message)
    assert {len(of) for of in stack.values()} <= {6, 4}
    assert {len(of) for of in turns.values()} == {len(of) for of in stack.values()}
    assert {of for path, of in said.items() if "Dense_0" in path} == {(0,)}


def test_stacks_that_take_turns_are_no_layers():
    params = {"layers": {f"layers_{j}": BIASED for j in range(2)}}
    _, (_, turns, _) = refused({"layers/.*": numbered()}, params)
    assert turns["layers/layers_1/bias"] == (1, 3, 5, 7, 9, 11)


@pytest.mark.parametrize(
    "layer",
    [
        {"kernel": ones(6, 4, 4), "bias": ones(4)},
        {"kernel": ones(6, 4, 4), "out": ones(4, 4)},
        {"kernel": ones(6, 4, 4), "out": ones(4, 6, 5)},
        {"kernel": ones(1, 4, 8), "out": ones(1, 8, 4)},
        {"w": ones(4, 4)},
        {"norm": {"scale": ones(4)}},
    ],
)
def test_a_list_of_layers_is_no_stack(layer):
    found = layers({".*": numbered()}, {f"Dense_{i}": layer for i in range(2)})
    assert set(found.values()) == {(0,), (1,)}


def test_experts_of_layers_are_no_stack():
    experts = {"wi": ones(8, 4, 6), "wo": ones(8, 6, 4)}
    for params in ({f"layer_{i}": experts for i in range(3)}, {"layers": [experts] * 3}):
        assert set(layers({".*": numbered()}, params).values()) == {(0,), (1,), (2,)}


def test_a_number_in_parentheses_is_believed():
    params = {"layers": {f"Dense_{i}": BIASED for i in range(2)}}
    found = layers({r"layers/Dense_(\d)/.*": numbered()}, params)
    assert set(found.values()) == {(0,), (1,)}


@pytest.mark.parametrize("masked", [optax.MaskedNode(), None])
def test_what_is_masked_may_be_what_would_be_mixed(masked):
    """Also beside leaves of Equinox that are None, which are there in no layer."""
    blocks = {f"block_{i}": {"w": ones(4, 4), f"only_{i}": ones(4)} for i in range(4)}
    for pattern in "block_.*", r"block_(\d+)/.*":
        one = {name: block if name == "block_2" else masked for name, block in blocks.items()}
        assert set(layers({pattern: numbered()}, one).values()) == {(2,)}
        unlike = {name: block | {"w": masked} for name, block in blocks.items()}
        found = layers({pattern: numbered()}, unlike)
        assert found == {f"block_{i}/only_{i}": (i,) for i in range(4)}
        beside = {name: {f"only_{name}": ones(4)} for name in blocks} | {"head": masked}
        with pytest.raises(ValueError, match="would mix nothing"):
            layers({pattern: numbered()}, beside)
    convolutions = {f"Conv_{i}": {"kernel": ones(3, 3, 4, 4), "bias": masked} for i in range(2)}
    assert len(layers({"Conv_.*": numbered()}, convolutions)) == 2
    found = layers({".*": sequence("in", "mid")}, {"in": masked, "mid": {"w": ones(2)}})
    assert found == {"mid/w": (1,)}


@pytest.mark.parametrize(
    ("rules", "params"),
    [
        ({"block_.*": numbered()}, {"block_0": {"w": ones(4, 4)}}),
        ({"layers/.*": numbered()}, {"layers": [{"w": ones(4, 4)}]}),
        ({r"block_(0)/.*": numbered()}, {f"block_{i}": {"w": ones(4)} for i in range(3)}),
        ({".*": sequence("mid")}, {"mid": {"w": ones(4, 4)}}),
        ({".*": sequence("in", "out")}, {"in": {"v": ones(4)}, "out": {"w": ones(4)}}),
    ],
)
def test_rules_that_find_one_layer_are_refused(rules, params):
    message, found = refused(rules, params)
    assert re.search(r"would mix nothing: \S+ \([\d, ]+\) is in .* or leave the rule out", message)
    assert all(of for of in found)


@pytest.mark.parametrize(
    ("rules", "params"),
    [
        ({"layers/.*": 0}, {"layers": {"w": ones(1, 4, 4), "bias": ones(1, 4)}}),
        ({".*": (0, 1)}, {"w": ones(1, 1, 4)}),
        ({r"block_(\d+)/.*": numbered()}, {"block_0": {"w": ones(4, 4)}}),
        ({r"block_(\d+)": interleaved(0)}, {"block_0": ones(1, 4)}),
        ({".*": sequence(("a", 0))}, {"a": ones(1, 4)}),
        ({".*": ()}, {"a": ones(4), "b": ones(4)}),
        ({".*": sequence("a", "b")}, {"a": {"w": ones(4)}, "b": {"w": ones(4)}}),
    ],
)
def test_rules_that_say_one_layer_are_believed(rules, params):
    assert layers(rules, params)


def block(*lead):
    return {"kernel": ones(*lead, 4, 4), "bias": ones(*lead, 4)}


LISTS = {
    "list": ({"layers": [block() for _ in range(3)]}, "layers/.*"),
    "named": ({f"block_{i}": {"mlp": block()} for i in range(3)}, ".*"),
    "first without a number": ({f"block{i}": block() for i in ("", "_1", "_2")}, "block.*"),
    "unlike sizes": ({"h": [{"up": ones(4, 8), "down": ones(8, 4)}] * 3}, "h/.*"),
    "norms": ({f"LayerNorm_{i}": {"scale": ones(4)} for i in range(3)}, ".*"),
    "parts": ({"layers": [{f"Dense_{j}": block() for j in range(2)}] * 3}, ".*"),
}


@pytest.mark.parametrize("name", LISTS)
def test_an_axis_of_siblings_that_are_layers_is_refused(name):
    """For a vector has no other axis, or sizes disagree."""
    params, pattern = LISTS[name]
    for rule in (0, -1) if name == "unlike sizes" else (0, -1, (0, 1), interleaved(0)):
        message, [found, *_] = refused({pattern: rule}, params)
        assert re.search(r"^\S+ \(\d[\d, ]*\) (is a vector|has \d layers on axis)", message)
        assert set(found.values()) == {(0,), (1,), (2,)}


def test_an_axis_of_siblings_of_which_each_is_said_to_be_a_stack():
    params = {"layers": [{"norm": {"scale": ones(4)}} for _ in range(3)]}
    message, found = refused({"layers/.*": 0}, params)
    assert "layers/0/norm/scale (4,) is a vector" in message
    assert found == [
        {f"layers/{i}/norm/scale": (i,) for i in range(3)},
        {"layers/0/norm/scale": (0, 1, 2, 3)},
    ]
    _, [_, dealt] = refused({"layers/.*": interleaved(0)}, params)
    assert dealt["layers/2/norm/scale"] == (2, 5, 8, 11)


@pytest.mark.parametrize("rule", [0, (0, 1), interleaved(0)])
@pytest.mark.parametrize("key", ["Dense", "layers"])
def test_an_axis_of_siblings_that_are_stacks_is_believed(rule, key):
    lead = (6, 2) if rule == (0, 1) else (6,)
    params = {"layers": {f"{key}_{j}": block(*lead) for j in range(2)}}
    assert len(layers({"layers/.*": rule}, params)) == 4
    bare = {"layers": [ones(4, 4)] * 3}
    assert len(layers({"layers/.*": 0}, bare)) == 3
    scalars = {"layers": {"gate_0": ones(6), "gate_1": ones(6)}}
    assert len(layers({"layers/.*": 0}, scalars)) == 2


def test_an_axis_of_siblings_that_are_layers_of_two_shapes():
    params = {"layers": [{"weight": ones(4, k), "bias": ones(4)} for k in (4, 8, 8)]}
    message, _ = refused({"layers/.*": 0}, params)
    assert "If each of them is a layer, the rule is numbered(), for those alike." in message


def test_a_container_of_siblings_that_are_layers_is_no_stack():
    params = {"in": [block() for _ in range(2)], "mid": block()}
    with pytest.raises(ValueError, match=r"in/0/bias \(4,\) is a vector, all of") as error:
        layers({".*": sequence(("in", 0), "mid")}, params)
    containers = re.findall(r"\('.*?', \S+\)", str(error.value))
    names = {"numbered": numbered}
    [single, stack] = [eval(container, names) for container in containers]
    found = layers({".*": sequence(single, "mid")}, params)
    assert {path: of for path, of in found.items() if "bias" in path} == {
        "in/0/bias": (0,),
        "in/1/bias": (1,),
        "mid/bias": (2,),
    }
    assert stack == ("in/0", 0)


def test_layers_of_other_shapes_are_narrowed_to_those_alike():
    """As in a ResNet, of which the stages have other widths."""
    widths = [4, 4, 8, 8, 8, 16]
    params = {
        f"block_{i}": {"conv": ones(3, 3, width, width), "norm": ones(width)}
        for i, width in enumerate(widths)
    }
    message, [found] = refused({"block_.*": numbered()}, params)
    assert re.search(
        r"block_2/conv \(3, 3, 8, 8\) has layers of shape .* narrow its pattern", message
    )
    assert found == {f"block_{i}/{name}": (i - 2,) for i in (2, 3, 4) for name in ("conv", "norm")}
    bare = {f"block_{i}": ones(width) for i, width in enumerate(widths)}
    assert refused({".*": numbered()}, bare)[1] == [{f"block_{i}": (i - 2,) for i in (2, 3, 4)}]
    mixed = {path: layer | {"x": ones(i)} for i, (path, layer) in enumerate(params.items())}
    assert refused({".*(conv|norm)": sequence("block_.")}, mixed)[1] == []


def test_a_tree_that_is_a_leaf_is_named():
    leaf = ones(2, 10)
    for rules, message in (
        ({"": 2}, r"^the only leaf \(2, 10\) has no axis 2"),
        ({"": numbered()}, r"^the only leaf \(2, 10\) has no number"),
        ({"x": 0}, r"leaves are the only leaf \(2, 10\), whose path is ''\. Correct it"),
    ):
        with pytest.raises(ValueError, match=message):
            layers(rules, leaf)
    assert layers({"": 1}, leaf) == {"": tuple(range(10))}


def test_of_siblings_within_siblings_those_named_layers_are_layers():
    params = {f"tower_{t}": {"layers": [block() for _ in range(3)]} for t in range(2)}
    _, [found, _] = refused({".*": 0}, params)
    assert found["tower_0/layers/2/bias"] == (2,)


def test_layers_that_are_all_of_other_shapes_have_no_rule():
    params = {f"block_{i}": ones(2 + i) for i in range(3)}
    message, found = refused({".*": numbered()}, params)
    assert message.endswith("narrow its pattern.")
    assert found == []
