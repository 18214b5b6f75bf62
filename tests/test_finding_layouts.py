"""find_depth on parameter trees of the projects that are named, and on what looks like them.

Each is written down with its truth, small, after the names and shapes of the project. What is
found has to be all of the truth, and nothing else. Where it refuses, the true one of the rules
that it offers for each pattern, taken together, have to give the truth, without another refusal.
"""

import re

import jax
import pytest

import depthsmooth as ds
from depthsmooth import AmbiguousDepthError, DepthNotFoundError, find_depth
from depthsmooth.depth.leaves import Leaf, Place
from tests.test_finding import TREES, tree_of, truth_of

NAMES = {"interleaved": ds.interleaved, "numbered": ds.numbered, "sequence": ds.sequence}


class Made:
    """A tree that is made up, and which of its leaves are layers."""

    def __init__(self):
        self.shapes, self.places = {}, {}

    def other(self, leaves, above=""):
        """Adds leaves that are no layers."""
        self.shapes |= {above + path: tuple(shape) for path, shape in leaves.items()}
        return self

    def layers(self, template, *kinds, count, start=0, order=None, group=None):
        """Adds numbered layers, whose kinds take turns or have an order."""
        held = [0] * len(kinds)
        for i in range(count):
            kind = order[i] if order else i % len(kinds)
            for name, shape in kinds[kind].items():
                path = template.format(start + i, name=name)
                self.shapes[path] = tuple(shape)
                place = (f"{group or template} {kind}", name, (), (held[kind],))
                self.places[path] = Place(*place, "truth")
            held[kind] += 1
        return self

    def mixed(self, template, *kinds):
        """Adds numbered layers of one kind, some of which have tensors that others have not."""
        for i, kind in enumerate(kinds):
            for name, shape in kind.items():
                path = template.format(i, name=name)
                self.shapes[path] = tuple(shape)
                self.places[path] = Place(template, f"{name} {shape}", (), (i,), "truth")
        return self

    def stack(self, template, kind, count, axis=0, turn=0, turns=1, group=None):
        """Adds a stack, which may be one of several in turn."""
        for name, shape in kind.items():
            path = template.format(name=name)
            sizes = list(shape)
            at = len(sizes) if axis < 0 else axis
            sizes.insert(at, count)
            self.shapes[path] = tuple(sizes)
            layers = tuple(i * turns + turn for i in range(count))
            self.places[path] = Place(group or template, name, (at,), layers, "truth")
        return self

    @property
    def tree(self):
        tree = {}
        for path, shape in self.shapes.items():
            *above, last = path.split("/")
            node = tree
            for key in above:
                node = node.setdefault(key, {})
            node[last] = jax.ShapeDtypeStruct(shape, "float32")
        return tree

    @property
    def truth(self):
        leaves = [Leaf(path, shape, self.places.get(path)) for path, shape in self.shapes.items()]
        return ds.Depth(tuple(leaves))


def neighbours(depth, among=None):
    """All that smoothing mixes: pairs of layers of one tensor, each an index in a leaf."""
    held = {}
    for path, place in depth.items():
        for index, layer in enumerate(place.layers):
            if among is None or path in among:
                track = held.setdefault((place.group, place.tensor), {})
                track[layer] = (path, place.axes, index)
    return {
        (track[layer], track[layer + 1])
        for track in held.values()
        for layer in track
        if layer + 1 in track
    }


def settle(error, tree, truth):
    """The Depth that the true one of the rules for each pattern gives."""
    paths = {leaf.path for leaf in truth.leaves}
    true, matched = neighbours(truth), []
    chosen = {}
    for pattern, rules in error.readings.items():
        among = {path for path in paths if re.fullmatch(pattern, path)}
        assert repr(pattern) in str(error)
        matched += among
        mixed = {pair for pair in true if {path for path, _, _ in pair} & among}
        for rule in (*rules, "()"):
            said = ds.Depth.from_rules({pattern: eval(rule, NAMES)})
            if neighbours(said.resolve(tree), among) == mixed:
                chosen.setdefault(pattern, eval(rule, NAMES))
        assert pattern in chosen, f"{pattern}: none of {rules} is true"
    assert len(matched) == len(set(matched)), "a leaf is matched twice"
    return find_depth(tree, known=ds.Depth.from_rules(chosen))


def found_or_settled(tree, truth):
    """The Depth of a tree, and whether it took the true rules of a refusal."""
    try:
        return find_depth(tree), False
    except AmbiguousDepthError as error:
        return settle(error, tree, truth), True


def within(key, kind):
    return {f"{key}/{name}": shape for name, shape in kind.items()}


D = 8
NORMS = {"norm1/scale": (D,), "norm2/scale": (D,)}
ATTENTION = {f"attn/{name}/kernel": (D, D) for name in "qkvo"}
FUSED = {"attn/qkv/kernel": (D, 24), "attn/out/kernel": (D, D)}
MLP = {"mlp/up/kernel": (D, 16), "mlp/down/kernel": (16, D), "mlp/up/bias": (16,)}
GATED = {"mlp/gate/kernel": (D, 16)} | MLP
BLOCK = ATTENTION | MLP | NORMS
NARROW = {name: tuple({8: 6, 16: 10, 24: 18}[n] for n in shape) for name, shape in BLOCK.items()}
MAMBA = {"mixer/in/kernel": (D, 32), "mixer/out/kernel": (16, D), "mixer/A_log": (16, 4)} | NORMS
EXPERTS = {
    f"{expert}/{name}/kernel": shape
    for expert in range(3)
    for name, shape in (("up", (D, 16)), ("down", (16, D)))
}
LORA = {
    f"{name}/lora_{factor}": shape
    for name in ("attn/q", "attn/v")
    for factor, shape in (("a", (D, 3)), ("b", (3, D)))
}
MOE = within("experts", EXPERTS) | {"router/kernel": (D, 3)}
HEADS = {"q/lora_a": (2, D, 3), "q/lora_b": (2, 3, 4), "o/lora_a": (2, 4, 3), "o/lora_b": (2, 3, D)}
DENSE = {"kernel": (D, D), "bias": (D,)}


def towers(*templates):
    made = Made()
    for number, template in enumerate(templates):
        made.layers(template, (BLOCK, NARROW)[number % 2], count=3 + number)
    return made


def resnet(unit, first, count=3):
    """Stages of other widths, whose first unit has other inputs and a projection."""
    made = Made().other({"stem/kernel": (7, 7, 3, D)})
    for stage in range(1, 3):
        width = D * stage
        same = {"conv1/kernel": (1, 1, 4 * width, width), "conv2/kernel": (3, 3, width, width)}
        same |= {"conv3/kernel": (1, 1, width, 4 * width), "bn/scale": (width,)}
        other = same | {"conv1/kernel": (1, 1, D, width), "proj/kernel": (1, 1, D, 4 * width)}
        path = unit.format(stage=stage)
        made.other({path.format(first, name=name): shape for name, shape in other.items()})
        made.layers(path, same, count=count, start=first + 1)
    return made


def sequential():
    """Flax names the modules of a Sequential by their place in it, activations too."""
    made = Made()
    for i in range(4):
        for at, kind in ((3 * i, DENSE), (3 * i + 2, {"scale": (D,), "bias": (D,)})):
            for name, shape in kind.items():
                path = f"layers_{at}/{name}"
                made.shapes[path] = shape
                made.places[path] = Place(f"{at % 3}", name, (), (i,), "truth")
    return made


def pipeline():
    """MaxText's: three stages, that take turns in two repeats."""
    made = Made()
    for name, shape in BLOCK.items():
        path = f"decoder/pipeline_module/layers/{name}"
        made.shapes[path] = (2, 3, *shape)
        made.places[path] = Place("pipeline", name, (0, 1), tuple(range(6)), "truth")
    return made


def without_a_first_number(name):
    """Haiku and Keras give the first of one name no number."""
    made = Made().layers(f"{name}_{{}}/{{name}}", BLOCK, count=4)
    for held in (made.shapes, made.places):
        first = [path for path in held if path.startswith(f"{name}_0/")]
        held |= {path.replace(f"{name}_0/", f"{name}/"): held.pop(path) for path in first}
    return made


def griffin():
    """RecurrentGemma: two recurrent blocks, then one with attention; all have an MLP."""
    rest = {"mlp_block/ffw_up/w": (2, D, 12), "mlp_block/ffw_down/kernel": (12, D)} | NORMS
    recurrent = {f"recurrent_block/linear_{name}/kernel": (D, D) for name in ("x", "y", "out")}
    recurrent |= {"recurrent_block/conv_1d/w": (4, D), "recurrent_block/rg_lru/a_gate/w": (2, 4, 4)}
    attention = {f"attention_block/proj_{name}/kernel": (D, D) for name in "qkvf"}
    order = [0, 0, 1, 0, 0, 1, 0, 0]
    kinds = recurrent | rest, attention | rest
    return Made().layers("blocks.{}/{name}", *kinds, count=8, order=order).other({"norm": (D,)})


def openpi():
    """Two models that share their attention, in one scan, beside a scan of another width."""
    llm = {
        f"{part}{which}/{name}": shape
        for which, width in (("", D), ("_1", 6))
        for part, name, shape in (
            ("attn/q_einsum", "w", (2, width, 4)),
            ("attn/attn_vec_einsum", "w", (2, 4, width)),
            ("pre_attention_norm", "scale", (width,)),
            ("mlp", "linear", (16, width)),
        )
    }
    made = Made().stack("PaliGemma/llm/layers/{name}", llm, 5)
    made.stack("PaliGemma/img/Transformer/encoderblock/{name}", NARROW, 3)
    return made.other({"PaliGemma/llm/final_norm/scale": (D,), "action_in_proj/kernel": (3, 6)})


def graphcast():
    """Numbers in the middle of keys, of two families that take turns in depth."""
    kind = {"mlp/linear_0/w": (D, D), "mlp/linear_1/w": (D, D), "layer_norm/scale": (D,)}
    made = Made()
    for name in ("edges", "nodes"):
        made.layers(f"mesh_gnn/processor_{name}_{{}}_mesh_{{name}}", kind, count=4)
    return made.other({"mesh_gnn/encoder_edges_mlp/linear_0/w": (4, D)})


FOUND = {
    "a language model beside sight": lambda: towers(
        "model/language_model/layers/{}/{name}", "model/visual/blocks/{}/{name}"
    ),
    "sound, sight and language": lambda: towers(
        "audio_tower/layers/{}/{name}",
        "vision_tower/vision_model/encoder/layers/{}/{name}",
        "language_model/model/layers/{}/{name}",
    ),
    "actor and critic": lambda: towers("actor/layers/{}/{name}", "critic/layers/{}/{name}"),
    "an action expert": lambda: towers("llm/h/{}/{name}", "action_expert/layers/{}/{name}"),
    "a draft model": lambda: towers("draft_model/layers/{}/{name}", "text_encoder/h/{}/{name}"),
    "members of an ensemble": lambda: towers(
        *(f"members/{member}/layers/{{}}/{{name}}" for member in range(3))
    ),
    "stages with layers": lambda: towers(
        *(f"stages/{stage}/blocks/{{}}/{{name}}" for stage in range(2))
    ),
    "stacked towers": lambda: (
        Made().stack("vision_tower/layers/{name}", NARROW, 5).stack("text/layers/{name}", BLOCK, 4)
    ),
    "openpi": openpi,
    "RecurrentGemma": griffin,
    "Jamba": lambda: Made().layers(
        "layers/{}/{name}", BLOCK, MAMBA, count=16, order=[int(i % 8 != 4) for i in range(16)]
    ),
    "attention and MLP in turn": lambda: Made().layers(
        "blocks/{}/{name}", ATTENTION | NORMS, MLP | NORMS, count=6
    ),
    "attention, then recurrence": lambda: Made().layers(
        "layers/{}/{name}", BLOCK, MAMBA, count=8, order=[0] * 3 + [1] * 5
    ),
    "stacks of two kinds in turn": lambda: (
        Made()
        .stack("blocks/layers_0/{name}", MAMBA, 5, turn=0, turns=2, group="mamba")
        .stack("blocks/layers_1/{name}", MAMBA, 5, turn=1, turns=2, group="mamba")
        .stack("blocks/layers_2/{name}", ATTENTION | NORMS, 5)
    ),
    "DeepSeek": lambda: Made().mixed(
        "layers/{}/{name}", *[ATTENTION | GATED | NORMS] * 2, *[ATTENTION | MOE | NORMS] * 3
    ),
    "experts in every other layer": lambda: Made().mixed(
        "layers/{}/{name}", *[FUSED | GATED | NORMS, FUSED | MOE | NORMS] * 3
    ),
    "experts in an array named as the MLP is": lambda: Made().mixed(
        "layers/{}/{name}", *[BLOCK, BLOCK | {"mlp/up/kernel": (3, D, 16)}] * 3
    ),
    "SAM, whose global layers have other positions": lambda: Made().mixed(
        "blocks/{}/{name}", *[BLOCK | {"rel": (27, 4)}, BLOCK | {"rel": (9, 4)}] * 2
    ),
    "Praxis": lambda: (
        Made()
        .stack("lm/repeat/sub/x_layers_0/{name}", BLOCK, 5, turn=0, turns=2, group="repeat")
        .stack("lm/repeat/sub/x_layers_1/{name}", BLOCK, 5, turn=1, turns=2, group="repeat")
    ),
    "Haliax": lambda: Made().stack("transformer/stacked/{name}", BLOCK, 5).other({"ln_f": (D,)}),
    "LoRA": lambda: Made().layers("layers/{}/{name}", LORA, count=4),
    "LoRA of heads": lambda: Made().layers(
        "layers/{}/{name}", {"q/lora_a": (D, 3), "q/lora_b": (3, 2, 4)}, count=4
    ),
    "LoRA of PEFT": lambda: Made().layers(
        "layers/{}/{name}", {"q/lora_A/default/w": (3, D), "q/lora_B/default/w": (D, 3)}, count=4
    ),
    "LoRA in a stack": lambda: Made().stack("layers/{name}", LORA, 6),
    "LoRA in a stack of MaxText": lambda: Made().stack("decoder/layers/{name}", LORA, 6, axis=1),
    "norms that are arrays": lambda: Made().stack(
        "layers/{name}", {"ln1": (D,), "ln2": (D,), "wi": (D, 16), "wo": (16, D)}, 5
    ),
    "BiT, whose norms have axes of size 1": lambda: Made().layers(
        "blocks/{}/{name}", MAMBA | {"norm1/scale": (1, 1, 1, D)}, count=4
    ),
    "norms of what is named output": lambda: Made().stack(
        "layer/{name}", {f"{a}/output/{b}": BLOCK[b] for a in "ab" for b in BLOCK}, 5
    ),
    "keys with dots": lambda: towers("model.layers.{}.{name}", "encoder.layer.{}.{name}"),
    "Haiku": lambda: without_a_first_number("block"),
    "numbers in the middle of keys": lambda: Made().layers(
        "transformer_layer_{}_{name}", ATTENTION | MLP, count=4
    ),
    "wav2vec 2.0": lambda: (
        Made()
        .other(
            {
                f"features/conv_layers/{i}/{name}": shape
                for i in range(7)
                for name, shape in (
                    ("conv/kernel", (3 if i < 5 else 2, D if i else 1, D)),
                    ("layer_norm/scale", (D,)),
                )
            }
        )
        .layers("encoder/layers/{}/{name}", BLOCK, count=4)
    ),
    "EnCodec": lambda: towers("lm/layers/{}/{name}").other(
        {
            f"quantizer/vq/layers/{i}/_codebook/{name}": (40, D)
            for i in range(4)
            for name in ("embed", "embed_avg")
        }
    ),
    "DETR": lambda: towers("encoder/layers/{}/{name}", "decoder/layers/{}/{name}").other(
        {
            f"bbox_embed/{i}/layers/{j}/{name}": shape
            for i in range(4)
            for j in range(3)
            for name, shape in DENSE.items()
        }
    ),
    "HiFi-GAN": lambda: towers("generator/blocks/{}/{name}").other(
        {f"periods/discriminators/{i}/conv_{j}/kernel": (5, D) for i in range(5) for j in range(2)}
    ),
    "Medusa": lambda: towers("model/layers/{}/{name}").other(
        {f"medusa_head/{i}/{j}/kernel": (D, D) for i in range(3) for j in range(2)}
    ),
}
SIDE_BY_SIDE = (
    *("experts", "mlp/experts", "block_sparse_moe/experts", "feed_forward/experts"),
    *("local_experts", "moe/experts", "heads", "adapters", "branches", "attn/heads"),
)
FOUND |= {
    f"{key} in a list in each layer": lambda key=key: Made().layers(
        "model/layers/{}/{name}", ATTENTION | NORMS | within(key, EXPERTS), count=3
    )
    for key in SIDE_BY_SIDE
}


REFUSED = {
    "a stack of critics, or of their layers": lambda: (
        Made().stack("critic/layers/{name}", BLOCK, 4).stack("actor/layers/{name}", BLOCK, 4)
    ),
    "a stack of experts, or of layers": lambda: (
        Made().stack("action_expert/layers/{name}", NARROW, 4).layers("h/{}/{name}", BLOCK, count=3)
    ),
    "a list beside layers": lambda: towers("speech_encoder/{}/{name}", "text/layers/{}/{name}"),
    "a list of a language model": lambda: towers("language_model/{}/{name}", "sight/h/{}/{name}"),
    "stages beside layers": lambda: towers("vision/stage_{}/{name}", "text/layers_{}/{name}"),
    "two stages beside layers": lambda: (
        Made()
        .layers("vision/stage_{}/{name}", NARROW, count=2)
        .layers("text/layers_{}/{name}", BLOCK, count=4)
    ),
    "a tower without a norm": lambda: (
        Made()
        .stack("vision/layers/{name}", {"up": (D, 16), "down": (16, D)}, 5)
        .layers("text/layers/{}/{name}", BLOCK, count=4)
    ),
    "layers in experts": lambda: towers("experts/layers/{}/{name}", "trunk/layers/{}/{name}"),
    "ResNets of big_vision": lambda: resnet("block{stage}/unit{{}}/{{name}}", 1),
    "ResNets of Hugging Face": lambda: resnet("stages/{stage}/layers/{{}}/{{name}}", 0),
    "another width at each stage": lambda: (
        Made()
        .layers("blocks_{}/{name}", BLOCK, count=4)
        .layers("blocks_{}/{name}", NARROW, count=3, start=4, group="narrow")
    ),
    "GraphCast": graphcast,
    "Keras": lambda: without_a_first_number("transformer_encoder").other(
        {"dense/kernel": (D, 4), "dense_1/kernel": (4, 2)}
    ),
    "a stack named encoder": lambda: (
        Made().stack("encoder/{name}", BLOCK, 6).stack("decoder/{name}", BLOCK, 4)
    ),
    "stacked arrays of the whole tree": lambda: (
        Made()
        .stack("{name}", {"ln1": (D,), "wq": (D, D), "wo": (D, D), "mlp_w": (D, 16)}, 6)
        .other({"embed": (40, D), "head": (D, 40)})
    ),
    "as many layers as width": lambda: Made().stack(
        "layers/{name}", {"norm/scale": (D,), "w": (D, D)}, D
    ),
    "a pipeline": pipeline,
    "an attention and an MLP that share their output": lambda: Made().layers(
        "blocks/{}/{name}",
        {"qkv/kernel": (D, 24), "out/kernel": (D, D), "out/bias": (D,)},
        {"up/kernel": (D, D), "out/kernel": (D, D), "out/bias": (D,)},
        count=6,
    ),
    "recurrence and attention that share their MLP": lambda: Made().mixed(
        "blocks/{}/{name}",
        *[{"rec/in": (D, D), "rec/out": (D, D)} | MLP | NORMS, FUSED | MLP | NORMS] * 3,
    ),
    "a Sequential of Dense and norm": lambda: Made().layers(
        "layers/{}/{name}", DENSE, {"scale": (D,), "bias": (D,)}, count=8
    ),
    "a Sequential with activations": sequential,
    "Nemotron-H": lambda: Made().layers(
        "layers/{}/{name}", MAMBA, ATTENTION | NORMS, count=9, order=[0, 0, 1, 0, 0, 0, 1, 0, 1]
    ),
    "down and up": lambda: Made().layers(
        "blocks/{}/{name}", BLOCK, MAMBA, count=6, order=[0, 1, 1, 1, 1, 0]
    ),
    "a stem in the list": lambda: (
        Made()
        .other({"layers/0/kernel": (3, D), "layers/4/scale": (D,)})
        .layers("layers/{}/{name}", BLOCK, count=3, start=1)
    ),
    "the upper layers alone": lambda: Made().layers("h/{}/{name}", BLOCK, count=4, start=8),
    "stacks that alternate": lambda: (
        Made()
        .stack("blocks_0/{name}", BLOCK, 4, turn=0, turns=2, group="blocks")
        .stack("blocks_1/{name}", BLOCK, 4, turn=1, turns=2, group="blocks")
    ),
    "layers with two blocks in each": lambda: Made().layers(
        "layers/{}/{name}", within("blocks/0", BLOCK) | within("blocks/1", BLOCK), count=3
    ),
    "Haiku, where the first has more": lambda: without_a_first_number("block").other(
        {"block/extra/kernel": (D, D)}
    ),
    "LoRA of heads alone": lambda: Made().layers("layers/{}/{name}", HEADS, count=4),
    "LoRA of heads in a stack": lambda: Made().stack("layers/{name}", HEADS, 5),
    "LoRA in a stack named encoder": lambda: Made().stack("encoder/{name}", LORA, 6),
}


@pytest.mark.parametrize("name", FOUND | REFUSED)
def test_all_is_found_or_settled(name):
    made = (FOUND | REFUSED)[name]()
    depth, is_refused = found_or_settled(made.tree, made.truth)
    assert neighbours(depth) == neighbours(made.truth)
    assert is_refused == (name in REFUSED)


def is_right(depth, truth, among):
    """Whether the leaves are where they truly are, and others hold no layers."""
    return all(
        (place.axes, place.layer) == (truth[path][1], truth[path][2] or 0)
        if path in truth
        else len(place.layers) == 1
        for path, place in depth.items()
        if path in among
    )


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("boxed", [True, False], ids=["boxed", "plain"])
def test_a_refusal_of_a_real_tree_is_settled(name, boxed):
    tree, truth, chosen = tree_of(name, boxed=boxed), truth_of(name), {}
    paths = {path for path, *_ in TREES[name]["leaves"]}
    try:
        find_depth(tree)
    except DepthNotFoundError:
        assert not truth
    except AmbiguousDepthError as error:
        for pattern, rules in error.readings.items():
            among = {path for path in paths if re.fullmatch(pattern, path)}
            for rule in (*rules, "()"):
                said = ds.Depth.from_rules({pattern: eval(rule, NAMES)})
                if is_right(said.resolve(tree), truth, among):
                    chosen.setdefault(pattern, eval(rule, NAMES))
            if pattern not in chosen:
                assert name == "maxtext_linen_gemma4_scan", "a layout that no rule can say"
                chosen[pattern] = ()
        found = find_depth(tree, known=ds.Depth.from_rules(chosen))
        unsaid = {path for path in paths if "scanned_blocks" in path}
        assert is_right(found, truth, paths - unsaid)
        assert set(truth) - unsaid <= set(found)
