"""Each layer as its own: on stacks what plain Optax does to a model that is unrolled."""

import dataclasses
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import depthsmooth as ds

RATE = 0.1
contrib = optax.contrib


def small(layer):
    """What is decayed or masked: matrices."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, layer)


def later(step, **_):
    return step > 1


def normalized(leaf):
    return leaf / jnp.linalg.norm(leaf)


# What Optax has, each as a user would make it. For these it makes no difference how many layers are
# in a tree.
TRANSFORMATIONS = {
    "acprop": lambda: contrib.acprop(RATE),
    "adabelief": lambda: optax.adabelief(RATE),
    "adadelta": lambda: optax.adadelta(RATE),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=4),
    "adagrad": lambda: optax.adagrad(RATE),
    "adam": lambda: optax.adam(RATE),
    "adamax": lambda: optax.adamax(RATE),
    "adamaxw": lambda: optax.adamaxw(RATE),
    "adamw": lambda: optax.adamw(RATE, weight_decay=0.1, mask=small),
    "adan": lambda: optax.adan(RATE),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "ademamix": lambda: contrib.ademamix(RATE),
    "adopt": lambda: contrib.adopt(RATE),
    "amsgrad": lambda: optax.amsgrad(RATE),
    "apply_every": lambda: optax.apply_every(2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.lamb(RATE), 3),
    "centralize": lambda: optax.centralize(),
    "chain": lambda: optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()),
    "clip": lambda: optax.clip(0.3),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.3),
    "cocob": lambda: contrib.cocob(),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.lamb(RATE), later),
    "conditionally_transform": lambda: optax.conditionally_transform(optax.lamb(RATE), later),
    "ema": lambda: optax.ema(0.9),
    "flatten": lambda: optax.flatten(optax.adam(RATE)),
    "freeze": lambda: optax.freeze(small),
    "fromage": lambda: optax.fromage(RATE),
    "galore": lambda: contrib.galore(RATE, rank=2),
    "identity": lambda: optax.identity(),
    # In bfloat16 the second moment's decay would be 1.
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        optax.lamb, hyperparam_dtype=jnp.float32
    )(optax.linear_schedule(RATE, 0.0, 9)),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(
        optax.lamb, hyperparam_dtype=jnp.float32
    )(RATE),
    "keep_params_nonnegative": lambda: optax.keep_params_nonnegative(),
    "lamb": lambda: optax.lamb(RATE),
    "lars": lambda: optax.lars(RATE),
    "lion": lambda: optax.lion(RATE),
    "madgrad": lambda: contrib.madgrad(RATE),
    "masked": lambda: optax.masked(optax.lamb(RATE), small),
    "measure_with_ema": lambda: optax.measure_with_ema(lambda updates, *_: updates, 0.9),
    "multi_transform": lambda: optax.multi_transform(
        {True: optax.lamb(RATE), False: optax.sgd(RATE)}, small
    ),
    "muon": lambda: contrib.muon(RATE),
    "nadam": lambda: optax.nadam(RATE),
    "nadamw": lambda: optax.nadamw(RATE),
    "named_chain": lambda: optax.named_chain(("lamb", optax.lamb(RATE))),
    "novograd": lambda: optax.novograd(RATE),
    "optimistic_adam": lambda: optax.optimistic_adam(RATE),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(RATE),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(RATE),
    "partition": lambda: optax.partition({True: optax.lamb(RATE), False: optax.sgd(RATE)}, small),
    "radam": lambda: optax.radam(RATE),
    "reduce_on_plateau": lambda: contrib.reduce_on_plateau(),
    "rmsprop": lambda: optax.rmsprop(RATE),
    "rprop": lambda: optax.rprop(RATE),
    "sam": lambda: contrib.sam(optax.sgd(RATE), optax.sgd(0.01), sync_period=2),
    "scale": lambda: optax.scale(0.5),
    "scale_by_acprop": lambda: contrib.scale_by_acprop(),
    "scale_by_adadelta": lambda: optax.scale_by_adadelta(),
    "scale_by_adam": lambda: optax.scale_by_adam(),
    "scale_by_adamax": lambda: optax.scale_by_adamax(),
    "scale_by_adan": lambda: optax.scale_by_adan(),
    "scale_by_ademamix": lambda: contrib.scale_by_ademamix(),
    "scale_by_adopt": lambda: contrib.scale_by_adopt(),
    "scale_by_amsgrad": lambda: optax.scale_by_amsgrad(),
    "scale_by_belief": lambda: optax.scale_by_belief(),
    "scale_by_cocob": lambda: contrib.scale_by_cocob(),
    "scale_by_distance_over_gradients": lambda: optax.scale_by_distance_over_gradients(),
    "scale_by_galore": lambda: contrib.scale_by_galore(rank=2),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(RATE),
    "scale_by_lion": lambda: optax.scale_by_lion(),
    "scale_by_madgrad": lambda: contrib.scale_by_madgrad(RATE),
    "scale_by_muon": lambda: optax.masked(
        contrib.scale_by_muon(
            weight_dimension_numbers=lambda tree: jax.tree.map(
                lambda _: contrib.MuonDimensionNumbers(), tree
            )
        ),
        small,
    ),
    "scale_by_novograd": lambda: optax.scale_by_novograd(),
    "scale_by_optimistic_gradient": lambda: optax.scale_by_optimistic_gradient(),
    "scale_by_param_block_norm": lambda: optax.scale_by_param_block_norm(),
    "scale_by_param_block_rms": lambda: optax.scale_by_param_block_rms(),
    "scale_by_radam": lambda: optax.scale_by_radam(),
    "scale_by_rms": lambda: optax.scale_by_rms(),
    "scale_by_rprop": lambda: optax.scale_by_rprop(RATE),
    "scale_by_rss": lambda: optax.scale_by_rss(),
    "scale_by_schedule": lambda: optax.scale_by_schedule(optax.linear_schedule(RATE, 0.0, 9)),
    "scale_by_sign": lambda: optax.scale_by_sign(),
    "scale_by_simplified_ademamix": lambda: contrib.scale_by_simplified_ademamix(),
    "scale_by_sm3": lambda: optax.scale_by_sm3(),
    "scale_by_stddev": lambda: optax.scale_by_stddev(),
    "scale_by_trust_ratio": lambda: optax.scale_by_trust_ratio(),
    "scale_by_yogi": lambda: optax.scale_by_yogi(),
    "schedule_free": lambda: contrib.schedule_free(optax.lamb(RATE), RATE, b1=0.9),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(RATE),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(RATE),
    "selective_transform": lambda: optax.selective_transform(optax.lamb(RATE), freeze_mask=small),
    "set_to_zero": lambda: optax.set_to_zero(),
    "sgd": lambda: optax.sgd(RATE, momentum=0.9),
    "sign_sgd": lambda: optax.sign_sgd(RATE),
    "signum": lambda: optax.signum(RATE),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(RATE),
    "sm3": lambda: optax.sm3(RATE),
    "snapshot": lambda: optax.snapshot("largest", lambda updates, *_: optax.tree.max(updates)),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(RATE)),
    "stateless": lambda: optax.stateless(lambda updates, _: jax.tree.map(normalized, updates)),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda u, _: normalized(u)),
    "trace": lambda: optax.trace(0.9),
    "with_extra_args_support": lambda: optax.with_extra_args_support(optax.lamb(RATE)),
    "yogi": lambda: optax.yogi(RATE),
    "zero_nans": lambda: optax.zero_nans(),
}

# These take a norm, or a distance, of all that they are given: in per_layer, of one layer.
OF_A_LAYER = {
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(1.0),
    "mechanize": lambda: contrib.mechanize(optax.sgd(RATE)),
    "momo": lambda: contrib.momo(RATE),
    "momo_adam": lambda: contrib.momo_adam(RATE),
    "normalize": lambda: contrib.normalize(),
    "normalize_by_update_norm": lambda: optax.normalize_by_update_norm(),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "prodigy": lambda: contrib.prodigy(),
    "scale_by_lbfgs": lambda: optax.scale_by_lbfgs(memory_size=2),
    "scale_by_polyak": lambda: optax.scale_by_polyak(),
}
# And these cannot be applied to one layer by itself.
REFUSED = {
    "add_noise": (lambda: optax.add_noise(0.1, 0.5, key=0), "random key"),
    "differentially_private_aggregate": (
        lambda: contrib.differentially_private_aggregate(1.0, 1.0, key=0),
        "random key",
    ),
    "dpsgd": (lambda: contrib.dpsgd(RATE, 1.0, 1.0, seed=0), "random key"),
    "lbfgs": (lambda: optax.lbfgs(memory_size=2), "value_fn is a function of all the parameters"),
    "noisy_sgd": (lambda: optax.noisy_sgd(RATE, key=0), "random key"),
    "scale_by_backtracking_linesearch": (
        lambda: optax.scale_by_backtracking_linesearch(2),
        "value_fn is a function of all the parameters",
    ),
    "scale_by_zoom_linesearch": (
        lambda: optax.scale_by_zoom_linesearch(2),
        "value_fn is a function of all the parameters",
    ),
    "sophia": (lambda: contrib.sophia(RATE), "random key"),
}
# Its parameters are two trees, and so is the Depth of these.
OTHER_TREES = {"lookahead"}


def transformations_of(module):
    """The names of the functions of a module that return a transformation."""
    names = set()
    for name in dir(module):
        function = getattr(module, name)
        function = getattr(function, "func", function)  # nadam is a part of adam
        if inspect.isfunction(function) and not name.startswith("_"):
            returned = str(inspect.signature(function).return_annotation)
            names |= {name} if "GradientTransformation" in returned else set()
    return names


def test_no_transformation_of_optax_is_forgotten():
    public = transformations_of(optax) | transformations_of(optax.contrib)
    assert len(public) > 100
    assert public == {*TRANSFORMATIONS, *OF_A_LAYER, *REFUSED, *OTHER_TREES}


LAYERS = 4
TENSORS = {"k": (6, 8), "o": (8, 6), "b": (8,)}
GROUPS = ("axis 0", "axis 1", "two axes", "turns", "blocks")
RULES = ds.Depth.from_rules(
    {
        "axis 0/.*": 0,
        "axis 1/.*": 1,
        "two axes/.*": (0, 1),
        r"turns/layers_(\d)/.*": ds.interleaved(0),
        r"blocks/block_(\d)/.*": ds.numbered(),
    }
)


def stacked(layers, dtype="float32"):
    """The layers of each group in the layout that is its name."""

    def tensors(layers, fn):
        return {
            name: jnp.asarray(fn(np.stack([layer[name] for layer in layers])), dtype)
            for name in TENSORS
        }

    return {
        "axis 0": tensors(layers["axis 0"], lambda stack: stack),
        "axis 1": tensors(layers["axis 1"], lambda stack: np.moveaxis(stack, 0, 1)),
        "two axes": tensors(
            layers["two axes"], lambda stack: stack.reshape(2, 2, *stack.shape[1:])
        ),
        "turns": {
            f"layers_{j}": tensors(layers["turns"][j::2], lambda stack: stack) for j in range(2)
        },
        "blocks": {
            f"block_{j}": tensors([layer], lambda stack: stack[0])
            for j, layer in enumerate(layers["blocks"])
        },
        "embed": jnp.asarray(layers["embed"], dtype),
    }


def part(tree, *index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def unstacked(tree):
    """The layers of each group, and what is in none."""
    every, numbers = slice(None), range(LAYERS)
    return {
        "axis 0": [part(tree["axis 0"], i) for i in numbers],
        "axis 1": [part(tree["axis 1"], every, i) for i in numbers],
        "two axes": [part(tree["two axes"], i // 2, i % 2) for i in numbers],
        "turns": [part(tree["turns"][f"layers_{i % 2}"], i // 2) for i in numbers],
        "blocks": [tree["blocks"][f"block_{i}"] for i in numbers],
        "embed": tree["embed"],
    }


def drawn(seed):
    rng = np.random.default_rng(seed)
    layers = {
        group: [
            {name: rng.normal(size=shape) for name, shape in TENSORS.items()} for _ in range(LAYERS)
        ]
        for group in GROUPS
    }
    return layers | {"embed": rng.normal(size=(5, 6))}


def steps_of(tx):
    """What makes five updates of parameters that move little, with the same gradients for all."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
        moved = jax.tree.map(lambda p, u: (p + 0.01 * u).astype(p.dtype), params, updates)
        return moved, state, updates

    def run(params, grads):
        state = tx.init(params)
        for of_step in grads:
            params, state, updates = step(params, state, of_step)
        return updates

    return run


def with_value(tx, name):
    """SAM takes no further arguments at all."""
    if name != "sam":
        return optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(
        tx.init, lambda updates, state, params, value: tx.update(updates, state, params)
    )


# In bfloat16 XLA rounds products of a batch of matrices otherwise than those of one.
ROUNDED = {"galore", "scale_by_galore"}


def assert_close(ours, theirs, name, dtype):
    tolerance = 2**-6 if dtype == "bfloat16" and name in ROUNDED else 1e-6
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = np.asarray(one, "float64"), np.asarray(other, "float64")
        assert np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


QUICK = {"adafactor", "adamw", "apply_if_finite", "clip_by_block_rms", "inject_hyperparams"}
QUICK |= {"lamb", "lars", "muon", "novograd", "partition", "scale_by_sm3", "snapshot"}
QUICK |= {"clip_by_global_norm", "polyak_sgd"}


def cases(names):
    return [
        pytest.param(
            name,
            dtype,
            marks=[] if name in QUICK and dtype == "float32" else pytest.mark.slow,
        )
        for dtype in ("float32", "bfloat16")
        for name in names
    ]


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # of Optax's, which are tried all the same
@pytest.mark.parametrize(("name", "dtype"), cases([*TRANSFORMATIONS, *OF_A_LAYER]))
def test_each_layer_is_a_tree_of_its_own(name, dtype):
    """In every layout; and but for what takes a layer as a whole, plain Optax unrolled."""
    make = (TRANSFORMATIONS | OF_A_LAYER)[name]
    layers, *grads = map(drawn, range(6))
    tx = with_value(ds.per_layer(make(), depth=RULES), name)
    ours = unstacked(steps_of(tx)(stacked(layers, dtype), [stacked(g, dtype) for g in grads]))
    whole, *of_steps = (unstacked(stacked(of, dtype)) for of in (layers, *grads))
    plain = steps_of(with_value(make(), name))
    theirs = {
        group: [plain(whole[group][i], [of[group][i] for of in of_steps]) for i in range(LAYERS)]
        for group in GROUPS
    }
    theirs["embed"] = plain(whole["embed"], [of["embed"] for of in of_steps])
    assert_close(ours, theirs, name, dtype)
    together = plain(whole, of_steps)
    if name in TRANSFORMATIONS:
        assert_close(ours, together, name, dtype)
    elif dtype == "float32" and name not in ("prodigy", "dadapt_adamw"):
        with pytest.raises(AssertionError):
            assert_close(ours, together, name, dtype)


@pytest.mark.filterwarnings('ignore:"seed" is deprecated')  # which Optax's dpsgd gives itself
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_applied_to_a_layer_is_refused(name):
    make, message = REFUSED[name]
    params = stacked(drawn(0))
    tx = ds.per_layer(make(), depth=RULES)

    def value_fn(params):
        return optax.tree.norm(params)

    def step():
        extra = {"value": 1.0, "grad": params, "value_fn": value_fn}
        return tx.update(params, tx.init(params), params, **extra)

    with pytest.raises(ValueError, match=f"{message}.*out of per_layer, into a chain with it"):
        step()


PARAMS = {"layers": {"k": jnp.ones((4, 6, 8)), "b": jnp.ones((4, 8))}, "head": jnp.ones((8, 3))}
DEPTH = ds.Depth.from_rules({"layers/.*": 0}).resolve(PARAMS)


def updated(tx, params, **extra_args):
    return tx.update(params, tx.init(params), params, **extra_args)[0]


MASK = jax.tree.map(lambda leaf: leaf.ndim > 2, PARAMS)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(RATE, mask=MASK),
        optax.masked(optax.lamb(RATE), MASK),
        optax.partition({True: optax.lamb(RATE), False: optax.sgd(RATE)}, MASK),
        optax.stateless(lambda u, _: jax.tree.map(lambda a, b: a * b, u, MASK)),
    ],
)
def test_a_mask_of_the_whole_model_is_refused_and_the_remedy_works(tx):
    with pytest.raises(
        ValueError, match=r"like head \(8, 3\).*give a function of the tree"
    ) as error:
        updated(ds.per_layer(tx, depth=DEPTH), PARAMS)
    [said] = re.findall(r"mask=(lambda layer: .*?), or take", str(error.value))
    masked = optax.masked(optax.set_to_zero(), eval(said))
    after = updated(ds.per_layer(masked, depth=DEPTH), PARAMS)
    chex.assert_trees_all_equal(
        after,
        {
            "layers": {"k": jnp.zeros((4, 6, 8)), "b": jnp.ones((4, 8))},
            "head": jnp.zeros((8, 3)),
        },
    )


def test_a_mask_of_the_depth_says_where_it_is():
    tx = ds.per_layer(optax.adamw(RATE, mask=DEPTH.decay_mask), depth=DEPTH)
    with pytest.raises(ValueError, match="does not have the 4 layers on axis 0") as error:
        tx.init(PARAMS)
    assert "per_layer gives its transformation one layer" in " ".join(error.value.__notes__)


def test_layers_that_lack_a_tensor_are_no_tree_where_one_is_needed():
    leaves = {"w": (0, 1, 2, 3), "router": (1, 3)}
    depth = ds.Depth(
        tuple(
            ds.depth.Leaf(path, (len(held), 6), ds.Place("moe", path, (0,), held, "rule"))
            for path, held in leaves.items()
        )
    )
    params = {
        path: 1.0 + jnp.arange(len(held) * 6.0).reshape(-1, 6) for path, held in leaves.items()
    }
    with pytest.raises(ValueError, match=r"router \(2, 6\) and w \(4, 6\) are in the same"):
        ds.per_layer(optax.clip_by_global_norm(1.0), depth=depth).init(params)
    ours = updated(ds.per_layer(optax.lars(RATE), depth=depth), params)
    for path, leaf in params.items():
        for after, layer in zip(ours[path], leaf, strict=True):
            np.testing.assert_allclose(after, updated(optax.lars(RATE), layer), rtol=1e-6)
    without = optax.masked(
        optax.clip_by_global_norm(1.0), lambda layer: {"w": True, "router": False}
    )
    after = updated(ds.per_layer(without, depth=depth), params)
    np.testing.assert_allclose(jnp.linalg.norm(after["w"], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(after["router"], params["router"])


def test_every_two_parts_of_a_layer_are_asked_whether_they_mix():
    leaves = {"a": (0, 1, 2, 3), "b": (0, 1), "c": (1, 2, 3)}
    depth = ds.Depth(
        tuple(
            ds.depth.Leaf(path, (len(held), 6), ds.Place("moe", path, (0,), held, "rule"))
            for path, held in leaves.items()
        )
    )
    params = {path: jnp.ones((len(held), 6)) for path, held in leaves.items()}
    tx = optax.masked(
        optax.clip_by_global_norm(1.0), lambda layer: {"a": False, "b": True, "c": True}
    )
    with pytest.raises(ValueError, match=r"b \(2, 6\) and c \(3, 6\) are in the same layers"):
        ds.per_layer(tx, depth=depth).init(params)


def test_what_is_not_finite_in_one_layer_is_skipped_there_alone():
    grads = {"layers": PARAMS["layers"] | {"b": PARAMS["layers"]["b"].at[2, 0].set(jnp.nan)}}
    grads["head"] = PARAMS["head"]
    inside = ds.per_layer(optax.apply_if_finite(optax.sgd(1.0), 3), depth=DEPTH)
    outside = optax.apply_if_finite(ds.per_layer(optax.sgd(1.0), depth=DEPTH), 3)
    moved = [updated(tx, grads)["layers"]["k"][:, 0, 0].tolist() for tx in (inside, outside)]
    assert moved == [[-1, -1, 0, -1], [0, 0, 0, 0]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A tree of a class of its own."""

    block_0: jax.Array
    block_1: jax.Array


def test_a_tree_of_which_everything_is_masked_is_no_placeholder():
    masked = Model(optax.MaskedNode(), optax.MaskedNode())
    rules = ds.Depth.from_rules({r"block_(\d)": ds.numbered()})
    tx = ds.per_layer(optax.sgd(1.0), depth=rules)
    assert jax.tree.leaves(tx.update(masked, tx.init(masked))[0]) == []


def test_map_params_works_inside_and_outside():
    tx = ds.per_layer(optax.MultiSteps(optax.lamb(RATE), 2).gradient_transformation(), depth=DEPTH)
    told = optax.tree.map_params(
        tx,
        lambda _, of: of,
        tx.init(PARAMS),
        PARAMS,
        transform_non_params=lambda _: None,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    moments = optax.tree.get(told.inner_states["layers/.*"], "mu")
    assert all(moments["layers"][name] is leaf for name, leaf in PARAMS["layers"].items())
    assert optax.tree.get(told.inner_states["rest"], "mu")["head"] is PARAMS["head"]
    rules = ds.per_layer(optax.lamb(RATE), depth=ds.Depth.from_rules({"layers/.*": 0}))
    with pytest.raises(ValueError, match=r"rules.resolve\(params\)"):
        optax.tree.map_params(rules, lambda _: None, rules.init(PARAMS))


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        lambda tx: optax.masked(tx, {"layers": {"k": True, "b": True}, "head": True}),
        lambda tx: optax.partition({"all": tx}, {"layers": "all", "head": "all"}),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(1.0),
        lambda tx: optax.with_extra_args_support(optax.named_chain(("one", tx))),
    ],
)
def test_works_within_other_transformations(around):
    tx = ds.per_layer(optax.lamb(RATE), depth=DEPTH)
    chex.assert_trees_all_close(updated(around(tx), PARAMS), updated(tx, PARAMS), rtol=1e-6)


def test_a_part_that_is_masked_is_no_part_of_its_layer():
    tx = ds.per_layer(optax.clip_by_global_norm(1.0), depth=DEPTH)
    mask = {"layers": {"k": True, "b": False}, "head": True}
    after = updated(optax.masked(tx, mask), PARAMS)
    np.testing.assert_allclose(jnp.sum(after["layers"]["k"] ** 2, (1, 2)), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(after["layers"]["b"], PARAMS["layers"]["b"])


def test_trees_among_extra_arguments_are_those_of_the_layer():
    def update(updates, state, params=None, *, like, rate):
        del params
        norm = optax.tree.norm(like)
        return jax.tree.map(lambda leaf: rate * leaf / norm, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    like = jax.tree.map(lambda leaf: jnp.cumsum(leaf, 0), PARAMS)
    after = updated(ds.per_layer(tx, depth=DEPTH), PARAMS, like=like, rate=2.0)
    norms = jnp.sqrt(sum(jnp.sum(leaf**2, range(1, leaf.ndim)) for leaf in like["layers"].values()))
    np.testing.assert_allclose(after["layers"]["b"], jnp.outer(2 / norms, jnp.ones(8)), rtol=1e-6)


def test_the_rest_may_have_a_transformation_of_its_own():
    tx = ds.per_layer(optax.lars(RATE), depth=DEPTH, rest=optax.sgd(0.5))
    np.testing.assert_array_equal(updated(tx, PARAMS)["head"], -0.5 * PARAMS["head"])


def test_state_has_the_shapes_of_parameters_and_counts_once():
    state = ds.per_layer(optax.lamb(RATE), depth=DEPTH).init(PARAMS)
    adam = state.inner_states["layers/.*"].inner_state[0]
    assert jax.tree.map(jnp.shape, adam.mu["layers"]) == {"k": (4, 6, 8), "b": (4, 8)}
    assert adam.count.shape == ()
    state = ds.per_layer(optax.adafactor(RATE, min_dim_size_to_factor=4), depth=DEPTH).init(PARAMS)
    factored = optax.tree.get(state.inner_states["layers/.*"], "v_row")["layers"]
    assert factored["k"].shape == (4, 6)
    assert {leaf.shape for leaf in jax.tree.leaves(state) if leaf.dtype == "int32"} == {()}


def test_depth_is_found_where_it_is_not_given():
    params = {
        f"block_{k}": {"wi": jnp.full((3, 4), 1.0 + k), "wo": jnp.full((4, 3), 1.0 + k)}
        for k in range(3)
    }
    after = updated(ds.per_layer(optax.clip_by_global_norm(1.0)), params)
    for block in after.values():
        np.testing.assert_allclose(optax.tree.norm(block), 1.0, rtol=1e-6)


SPLIT = {
    "layers": {"k": jax.P("stage"), "b": jax.P("stage"), "head": jax.P()},
    "features": {"k": jax.P(None, None, "model"), "b": jax.P(None, "model"), "head": jax.P()},
    "both": {"k": jax.P("stage", None, "model"), "b": jax.P("stage", "model"), "head": jax.P()},
}


def split(tree, mesh, specs):
    return {
        "layers": {
            name: jax.device_put(leaf, jax.NamedSharding(mesh, specs[name]))
            for name, leaf in tree["layers"].items()
        },
        "head": jax.device_put(tree["head"], jax.NamedSharding(mesh, specs["head"])),
    }


def program_of(tx, state, params):
    """The compiled update, and how often it sends what."""
    compiled = jax.jit(tx.update).lower(params, state, params).compile()
    sent = re.findall(
        r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    return compiled, sent


@pytest.mark.parametrize("spec", SPLIT)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "novograd"])
def test_layers_on_other_devices_send_nothing(name, kind, spec):
    """Where features are split, norms of all layers are summed at once, as plain Optax sums one."""
    mesh = jax.make_mesh((4, 2), ("stage", "model"), axis_types=(kind, kind))
    whole = jax.tree.map(lambda leaf: jnp.cumsum(leaf, 0), PARAMS)
    tx = ds.per_layer(TRANSFORMATIONS[name](), depth=DEPTH)
    expected, _ = tx.update(whole, tx.init(whole), whole)
    with jax.set_mesh(mesh):
        params = split(whole, mesh, SPLIT[spec])
        state = tx.init(params)
        compiled, sent = program_of(tx, state, params)
        after, _ = compiled(params, state, params)
        chex.assert_trees_all_close(jax.device_get(after), expected, rtol=1e-5)
        if spec == "layers" or name == "adamw":
            assert sent == []
        else:  # a number for each layer that a device has
            layers = "1" if spec == "both" else "4"
            assert {what for _, what in sent} == {"all-reduce"}
            assert {n for shape, _ in sent for n in re.findall(r"f32\[(.*?)\]", shape)} == {layers}
            plain = TRANSFORMATIONS[name]()
            assert len(sent) <= len(program_of(plain, plain.init(params), params)[1])
        for leaf in jax.tree.leaves(state):
            if leaf.ndim and leaf.shape[0] == 4 and spec != "features":
                assert leaf.sharding.spec[0] == "stage"
        traced = jax.jit(tx.init)(params)
        if kind == AxisType.Explicit:
            assert jax.tree.map(jax.typeof, traced) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize("name", ["adamw", "lamb", "novograd"])
def test_in_shard_map_each_device_has_its_layers(name):
    mesh = jax.make_mesh((4,), ("stage",), axis_types=(AxisType.Auto,))
    whole = jax.tree.map(lambda leaf: jnp.cumsum(leaf, 0), PARAMS)
    tx = ds.per_layer(TRANSFORMATIONS[name](), depth=DEPTH)
    state = tx.init(whole)
    specs = {"layers": {"k": jax.P("stage"), "b": jax.P("stage")}, "head": jax.P()}
    of_state = jax.tree.map(
        lambda leaf: jax.P("stage") if leaf.ndim and leaf.shape[0] == 4 else jax.P(), state
    )
    update = jax.shard_map(
        tx.update,
        mesh=mesh,
        in_specs=(specs, of_state, specs),
        out_specs=(specs, of_state),
    )
    ours, theirs = update(whole, state, whole), tx.update(whole, state, whole)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
