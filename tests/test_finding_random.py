"""find_depth on random trees: towers of layers beside what is none, and keys in any order.

Of towers the truth is known: all of it is found, or refused and settled by the true ones of the
rules that the refusal offers; nothing is mixed that is not, and nothing is left alone in silence.
Of keys in any order there is no truth: whatever is said of a refusal has to settle it.
"""

import random

import jax
import pytest

import depthsmooth as ds
from depthsmooth import AmbiguousDepthError, DepthNotFoundError, find_depth
from tests.test_finding_layouts import (
    EXPERTS,
    LORA,
    MOE,
    NAMES,
    Made,
    found_or_settled,
    neighbours,
    within,
)

CONTAINERS = (
    *("model", "encoder", "decoder", "language_model", "visual", "vision_tower", "audio_tower"),
    *("text_model/encoder", "speech_encoder", "draft_model", "critic", "actor", "action_expert"),
    *("params/Transformer", "policy", "head", "tower_0", "adapter", "net", "output", "task_net"),
)
LISTS = ("layers", "blocks", "h", "layer", "encoder_layers")
NUMBERED = ("block", "layers", "encoderblock", "TransformerBlock", "decoder_layer", "x_layers")


def attention(draw, d):
    return draw.choice(
        [
            {"attn/qkv/kernel": (d, 3 * d), "attn/out/kernel": (d, d)},
            {f"attn/{name}/w": (d, d) for name in "qkvo"},
            {f"attn/{name}/kernel": (d, 2, d // 2) for name in "qkv"}
            | {"attn/o/kernel": (2, d // 2, d), "attn/q/bias": (2, d // 2)},
        ]
    )


def mlp(draw, d):
    wide = draw.choice([2, 3, 4]) * d
    return draw.choice(
        [
            {"mlp/up/kernel": (d, wide), "mlp/down/kernel": (wide, d)},
            {"mlp/w1": (d, wide), "mlp/w2": (wide, d), "mlp/w3": (d, wide)},
            {"mlp/layers/0/w": (d, wide), "mlp/layers/0/b": (wide,), "mlp/layers/1/w": (wide, d)},
        ]
    )


def norms(draw, d):
    return draw.choice(
        [
            {"norm1/scale": (d,), "norm2/scale": (d,)},
            {"ln/scale": (d,), "ln/bias": (d,)},
            {"ln1": (d,), "ln2": (d,)},
        ]
    )


def block(draw, d):
    return attention(draw, d) | mlp(draw, d) | norms(draw, d)


def mamba(draw, d):
    return {"in/w": (d, 4 * d), "out/w": (2 * d, d), "A_log": (2 * d, 4)} | norms(draw, d)


def listed(draw, made, above, count, d):
    made.layers(f"{above}{draw.choice(LISTS)}/{{}}/{{name}}", block(draw, d), count=count)


def named(draw, made, above, count, d):
    template = f"{above}{draw.choice(NUMBERED)}_{{}}/{{name}}"
    made.layers(template, block(draw, d), count=count, start=draw.choice([0, 1]))


def unnamed(draw, made, above, count, d):
    name = draw.choice(["net/", "stage_"])
    made.layers(f"{above}{name}{{}}/{{name}}", block(draw, d), count=count)


def with_dots(draw, made, above, count, d):
    made.layers(f"{above}{draw.choice(LISTS)}.{{}}.{{name}}", block(draw, d), count=count)


def in_the_middle(draw, made, above, count, d):
    made.layers(f"{above}{draw.choice(NUMBERED)}_{{}}_{{name}}", block(draw, d), count=count)


def stacked(draw, made, above, count, d):
    kind, axis = block(draw, d), draw.choice([0, 0, 1])
    made.stack(f"{above}{draw.choice((*LISTS, 'encoder'))}/{{name}}", kind, count, axis=axis)


def in_turn(draw, made, above, count, d):
    kind, turns = block(draw, d), draw.choice([2, 3])
    for turn in range(turns):
        template = f"{above}layers/layers_{turn}/{{name}}"
        made.stack(template, kind, count, turn=turn, turns=turns, group=above)


def with_experts(draw, made, above, count, d):
    key = draw.choice(["experts", "mlp/experts", "local_experts", "moe/experts"])
    kind = attention(draw, d) | norms(draw, d) | within(key, EXPERTS)
    made.layers(f"{above}{draw.choice(LISTS)}/{{}}/{{name}}", kind, count=count)


def with_experts_in_some(draw, made, above, count, d):
    shared, dense = attention(draw, d) | norms(draw, d), mlp(draw, d)
    kinds = draw.choice([[0, 1] * count, [0] * 2 + [1] * count])
    template = f"{above}{draw.choice(LISTS)}/{{}}/{{name}}"
    made.mixed(template, *[shared | (MOE if kind else dense) for kind in kinds])


def kinds(draw, made, above, count, d):
    parts = attention(draw, d) | {"norm/scale": (d,)}, mlp(draw, d) | {"norm/scale": (d,)}
    rounds = [0, 1] * count
    after = [0] * count + [1] * count
    template = f"{above}{draw.choice(LISTS)}/{{}}/{{name}}"
    order = draw.choice([rounds, after])
    made.layers(template, *parts, count=len(order), order=order)


def hybrid(draw, made, above, count, d):
    order = [draw.randrange(2) for _ in range(2 * count)] + [0, 1]
    template = f"{above}layers/{{}}/{{name}}"
    made.layers(template, block(draw, d), mamba(draw, d), count=len(order), order=order)


def adapters(draw, made, above, count, d):
    if draw.random() < 0.5:
        made.stack(f"{above}{draw.choice(LISTS)}/{{name}}", LORA, count)
    else:
        made.layers(f"{above}{draw.choice(LISTS)}/{{}}/{{name}}", LORA, count=count)


def residual_units(draw, made, above, count, d):
    same = {"conv1/w": (1, 1, 4 * d, d), "conv2/w": (3, 3, d, d), "conv3/w": (1, 1, d, 4 * d)}
    same |= {"bn/scale": (d,)}
    first = same | {"conv1/w": (1, 1, d, d), "proj/w": (1, 1, d, 4 * d)}
    made.other(first, above=f"{above}block1/unit1/")
    made.layers(f"{above}block1/unit{{}}/{{name}}", same, count=count, start=2)


TOWERS = (
    *(listed, named, unnamed, with_dots, in_the_middle, stacked, in_turn, with_experts),
    *(with_experts_in_some, kinds, hybrid, adapters, residual_units),
)

DENSE = {"kernel": (8, 8), "bias": (8,)}
PERCEPTRON = {f"Dense_{i}/{name}": shape for i in range(2) for name, shape in DENSE.items()}
BESIDE = (
    {f"critic_{i}/{name}": shape for i in range(2) for name, shape in PERCEPTRON.items()},
    {f"detection/heads/{i}/{name}": shape for i in range(3) for name, shape in PERCEPTRON.items()},
    {f"router/experts/{i}/{name}": shape for i in range(4) for name, shape in PERCEPTRON.items()},
    {f"classifier/layers_{i}/{name}": shape for i in (0, 2, 4) for name, shape in DENSE.items()},
    {f"features/conv_layers/{i}/conv/kernel": (3, 1 + 7 * (i > 0), 8) for i in range(5)},
    {f"projector/linear_{i}/{name}": shape for i in range(2) for name, shape in DENSE.items()},
    {"embed/embedding": (40, 8), "final_norm/scale": (8,), "head/kernel": (8, 40)},
)


@pytest.mark.parametrize("seed", range(150))
def test_towers_are_found_or_settled(seed):
    draw, made = random.Random(seed), Made()
    for container in draw.sample(CONTAINERS, draw.choice([1, 1, 2, 3])):
        count, width = draw.randint(2, 6), draw.choice([4, 6, 8, 12])
        draw.choice(TOWERS)(draw, made, f"{container}/", count, width)
    for leaves in draw.sample(BESIDE, draw.choice([0, 1, 2])):
        made.other(leaves)
    depth, _ = found_or_settled(made.tree, made.truth)
    assert neighbours(depth) == neighbours(made.truth)


KEYS = (
    *("layers", "blocks", "h", "block", "encoder", "stage", "experts", "heads", "mlp", "attn"),
    *("norm", "ln", "critic", "language_model", "layer_norm", "lora_a", "lora_b", "x.y", "a b"),
    *("w", "bias", "scale", "repeat", "conv_layers", "up", "x[0]", "fpn", "expert_layer", "+"),
)
SHAPES = (
    *((8,), (8, 8), (8, 16), (16, 8), (4, 8), (4, 8, 8), (4, 8, 16), (8, 4, 8), (8, 4), (2, 4, 8)),
    *((2, 4, 8, 8), (3, 3, 8, 8), (), (4,), (8, 2, 4)),
)


def anything(draw, depth):
    """A tree of any keys, in which lists repeat one tree, or a few."""
    if depth == 0 or draw.random() < 0.25:
        dtype = "int32" if draw.random() < 0.05 else "float32"
        return jax.ShapeDtypeStruct(draw.choice(SHAPES), dtype)
    if draw.random() < 0.45:
        return {key: anything(draw, depth - 1) for key in draw.sample(KEYS, draw.randint(1, 4))}
    some = [anything(draw, depth - 1) for _ in range(draw.choice([1, 1, 2, 3]))]
    items = [some[i % len(some)] for i in range(draw.randint(1, 6))]
    if draw.random() < 0.4:
        return items
    stem, start, step = draw.choice(KEYS), draw.choice([0, 0, 1, 2]), draw.choice([1, 1, 1, 3])
    sign, rest = draw.choice(["_", "", "-", "."]), draw.choice(["", "", "", "_mlp", ".w"])
    tree = {f"{stem}{sign}{start + i * step}{rest}": item for i, item in enumerate(items)}
    return tree | ({stem: draw.choice(items)} if start == 1 else {})


@pytest.mark.parametrize("seed", range(8))
def test_what_is_said_of_any_refusal_settles_it(seed):
    draw, refused = random.Random(seed), 0
    for _ in range(60):
        tree = anything(draw, draw.choice([2, 3, 4]))
        try:
            find_depth(tree)
        except DepthNotFoundError:
            continue
        except AmbiguousDepthError as error:
            refused += 1
            said = {
                pattern: eval(draw.choice((*rules, "()")), NAMES)
                for pattern, rules in error.readings.items()
            }
            find_depth(tree, known=ds.Depth.from_rules(said))
    assert refused > 10
