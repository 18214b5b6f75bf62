"""docs/recipes.md on the code of the projects themselves, where that is at hand.

A project's code is looked for where Python looks for modules: install it, or name its sources, as
in ``PYTHONPATH=maxtext/src python -m pytest tests/test_projects.py -rs``. What is missing is
skipped.
"""

import ast
import collections
import importlib
import inspect
import pathlib
import re
import sys
import types
import unittest.mock
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, nnx
from flax.training.train_state import TrainState

import depthsmooth as ds
from tests.test_finding import tree_of
from tests.test_recipes import PYTHON, SECTIONS, rules_of

pytestmark = pytest.mark.filterwarnings("default")  # what projects warn of is theirs


def source_of(path, name):
    """The source of a function, or of a class, in a file of a project."""
    for directory in sys.path:
        if (file := pathlib.Path(directory) / path).exists():
            text = file.read_text()
            [node] = [
                node for node in ast.walk(ast.parse(text)) if getattr(node, "name", None) == name
            ]
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            return [line[node.col_offset :] for line in lines]
    pytest.skip(f"{path} is not where Python looks")


def changed(source, project, *, number=0):
    """The source, less its outer indentation, after a diff of the page, which leaves lines out."""
    diff = re.findall(r"```diff\n(.*?)```", SECTIONS[project], re.DOTALL)[number]
    source, at, outer = list(source), 0, 0
    for sign, line in re.findall(r"^([ +-])(?!import )(.*)$", diff, re.MULTILINE):
        if sign == "+":
            source.insert(at, line[outer:])
            at += 1
            continue
        shown = re.compile(r"( *)" + re.escape(line.strip()).replace("…", ".*"))
        at, found = next((i, m) for i in range(at, len(source)) if (m := shown.match(source[i])))
        outer = len(line) - len(line.lstrip()) - len(found[1])
        del source[at : at + (sign == "-")]
        at += sign == " "
    return source


def defined(source, **names):
    """What a source defines last, with the names that it needs from around it."""
    text = "\n".join(source)
    exec(text, names)
    return names[ast.parse(text).body[-1].name]


def gradients(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), params)


def zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), tree)


def assert_smoothed(make: Callable, unchanged: Callable, rules, params):
    """A step of an optimizer without decay is that of the unchanged one, smoothed."""
    updates, mixed = (
        tx.update(gradients(params), tx.init(params), params)[0] for tx in (unchanged(), make())
    )
    smooth = ds.smooth_over_depth(depth=ds.Depth.from_rules(rules))
    expected, _ = smooth.update(updates, smooth.init(params))
    chex.assert_trees_all_close(mixed, expected, rtol=1e-4, atol=1e-7)
    differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), mixed, updates)
    assert max(jax.tree.leaves(differences)) > 0


def test_maxtext():
    source = source_of("maxtext/optimizers/optimizers.py", "get_optimizer")
    rules, _ = rules_of("MaxText")
    config = types.SimpleNamespace(
        opt_type="adamw", adam_b1=0.9, adam_b2=0.95, adam_eps=1e-8, adam_eps_root=0.0,
        adam_weight_decay=0.0, mu_dtype="float32", trainable_parameters_mask=(),
    )  # fmt: skip
    names = {"optax": optax, "ds": ds, "get_adamw_mask": lambda config: None, **rules}
    names["_get_path_mask_fn"] = lambda *patterns, **keywords: None
    assert_smoothed(
        *(
            lambda source=source: defined(source, **names)(config, 1e-3)
            for source in (changed(source, "MaxText"), source)
        ),
        rules["scanned"],
        zeros(tree_of("maxtext_nnx_llama2_scan", boxed=False)),
    )


def with_stand_ins(monkeypatch, module, *unused):
    """A module of a project, without what its package imports, or it itself and has no use for."""
    name, _ = module.split(".")
    package = types.ModuleType(name)
    package.__path__ = [f"{directory}/{name}" for directory in sys.path]
    monkeypatch.setitem(sys.modules, name, package)
    for each in unused:
        monkeypatch.setitem(sys.modules, each, unittest.mock.MagicMock())
    return pytest.importorskip(module)


class Config(dict):
    """Like those of ml_collections."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def test_big_vision(monkeypatch):
    unused = "tensorflow", "tensorflow.io", "tensorflow.io.gfile", "einops", "ml_collections"
    module = with_stand_ins(monkeypatch, "big_vision.optax", *unused)
    config = Config(lr=1e-3, optax_name="scale_by_adam", schedule={"decay_type": "cosine"})
    ours = Config(config)
    rules = rules_of("big_vision")[0]["unrolled"]
    exec(PYTHON.findall(SECTIONS["big_vision"])[1], {"config": ours, "unrolled": rules})
    params = zeros(tree_of("bigvision_vit_unrolled_tok", boxed=False)["params"])
    assert_smoothed(
        *(
            lambda config=config: module.make(config, params, sched_kw={"total_steps": 10})[0]
            for config in (ours, config)
        ),
        rules,
        params,
    )


def test_t5x(monkeypatch):
    unused = "jestimator", "jestimator.amos", "jestimator.amos_helper"
    optimizers = with_stand_ins(monkeypatch, "t5x.optimizers", *unused)
    rules = rules_of("t5x")[0]["unrolled"]
    names = {"ds": ds, "scanned": rules}  # as on the page, for the other layout
    exec(PYTHON.findall(SECTIONS["t5x"])[1], names)
    params = zeros(tree_of("t5x_scalable_t5_unrolled", boxed=False)["params"])
    ours, theirs = (
        optimizers.chain([optax.clip(1e9), adamw(1e-3, weight_decay=0.0)])
        for adamw in (names["adamw"], optax.adamw)
    )
    assert_smoothed(lambda: ours.optax_optimizer, lambda: theirs.optax_optimizer, rules, params)
    state = ours.init_state(params)
    ours.apply_gradient(ours.hyper_params, params, state, gradients(params))

    source = source_of("t5x/optimizers.py", "OptaxStatePartitionRules")
    axes = jax.tree.map(lambda leaf: jax.P(*"axes"[: leaf.ndim]), params)
    around = vars(optimizers) | {"ds": ds, "amos": sys.modules["jestimator.amos"]}
    derived, refused = (
        defined(each, **around).derive_optax_logical_axes
        for each in (changed(source, "t5x"), source)
    )
    placed = jax.tree.leaves(
        derived(state.param_states, axes),
        is_leaf=lambda node: isinstance(node, ds.SmoothOverDepthState),
    )
    assert ds.SmoothOverDepthState(count=None) in placed
    with pytest.raises(ValueError, match="unregistered optax state type SmoothOverDepthState"):
        refused(state.param_states, axes)


def test_levanter():
    source = source_of("levanter/optim/config.py", "AdamConfig")
    names = {"optax": optax, "ds": ds, **rules_of("Levanter")[0]}
    start = next(i for i, line in enumerate(source) if line.strip().startswith("def build("))
    build = [line[4:] for line in source[start:]]
    settings = types.SimpleNamespace(
        max_grad_norm=None, beta1=0.9, beta2=0.95, epsilon=1e-8, nesterov=False, weight_decay=0,
        update_rms_clipping=None, clip_update_norm=None, skip_bad_steps=False,
        lr_scheduler=lambda steps: optax.constant_schedule(1e-3),
    )  # fmt: skip
    assert_smoothed(
        *(
            lambda source=source: defined(source, **names)(settings, 10)
            for source in (changed(build, "Levanter"), build)
        ),
        names["stacked"],
        {"transformer": {"layers": {"stacked": {"kernel": jnp.zeros((4, 3, 2))}}}},
    )


@pytest.mark.parametrize(("scan_layers", "name"), [(True, "stacked"), (False, "blocks")])
def test_levanter_holds_its_layers_like_this(scan_layers, name):
    llama = pytest.importorskip("levanter.models.llama")
    config = llama.LlamaConfig(
        hidden_dim=16, intermediate_dim=32, num_layers=3, num_heads=2, num_kv_heads=2,
        scan_layers=scan_layers,
    )  # fmt: skip
    vocabulary = importlib.import_module("haliax").Axis("vocab", 64)
    model = llama.LlamaLMHeadModel.init(vocabulary, config, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    depth = ds.Depth.from_rules(rules_of("Levanter")[0][name]).resolve(params)
    assert list(depth.groups.values()) == [3]
    assert len(depth) == 9 * (1 if scan_layers else 3)


def test_tunix_trains():
    qwen2 = pytest.importorskip("tunix.models.qwen2.model")
    config = qwen2.ModelConfig(
        num_layers=3, vocab_size=32, embed_dim=8, hidden_dim=16, num_heads=2, head_dim=4,
        num_kv_heads=2, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=False,
    )  # fmt: skip
    model = qwen2.Qwen2(config, rngs=nnx.Rngs(0))
    rules, params = rules_of("tunix")[0]["layers"], nnx.state(model, nnx.Param)
    assert list(ds.Depth.from_rules(rules).resolve(params).groups.values()) == [3]
    tx = ds.adamw(1e-3, weight_decay=0.0, depth=ds.Depth.from_rules(rules))
    assert_smoothed(lambda: tx, lambda: optax.adamw(1e-3, weight_decay=0.0), rules, params)
    updates, _ = tx.update(gradients(params), tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, gradients(params))
    chex.assert_trees_all_close(nnx.state(model, nnx.Param), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", ["cosine_decay_schedule", None])
def test_tunix_command_line(schedule):
    """Also where the schedule of the learning rate has an alpha of its own."""
    source = source_of("tunix/cli/config.py", "create_optimizer")
    parts = {
        name: source_of("tunix/cli/config.py", name)
        for name in ("_extract_kwargs", "_get_schedule_fn", "_create_learning_rate")
    }
    config = {"opt_type": "adamw", "b1": 0.9, "weight_decay": 0.0, "learning_rate": 1e-3}
    if schedule:
        config |= {"schedule_type": schedule, "init_value": 1e-3, "decay_steps": 9, "alpha": 0.5}
        del config["learning_rate"]
    names = {
        "optax": optax, "jax": jax, "inspect": inspect, "collections": collections,
        "Callable": Callable, "Dict": dict, "Any": Any, "ds": ds, **rules_of("tunix")[0],
        "logging": types.SimpleNamespace(info=lambda *_: None),
        "omegaconf": types.SimpleNamespace(dictconfig=types.SimpleNamespace(DictConfig=dict)),
    }  # fmt: skip
    methods = {name: defined(part, **names) for name, part in parts.items()}
    trainer = type("Trainer", (), {"_get_nested_config": lambda self, keys: config, **methods})()
    assert_smoothed(
        *(
            lambda source=source: defined(source, **names)(trainer, "optimizer")
            for source in (changed(source, "tunix", number=1), source)
        ),
        names["layers"],
        {"layers": {str(k): {"kernel": jnp.zeros((3, 2))} for k in range(4)}},
    )


def test_easydel():
    factory = pytest.importorskip("eformer.optimizers")
    block = PYTHON.findall(SECTIONS["EasyDeL"])[1]
    layers = rules_of("EasyDeL")[0]["layers"]
    exec(block, {"layers": layers, "__name__": "registered"})
    params = {"model": {"layers": {str(k): {"kernel": jnp.zeros((3, 2))} for k in range(4)}}}
    made = {
        name: factory.OptimizerFactory.create(
            name,
            scheduler_config=factory.SchedulerConfig(learning_rate=1e-3, steps=10),
            weight_decay=0.0,
        )[0]
        for name in ("adamw_over_depth", "adamw")
    }
    assert_smoothed(lambda: made["adamw_over_depth"], lambda: made["adamw"], layers, params)


def test_hugging_face_flax():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
        pytest.skip("transformers 5 has no Flax models")
    sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    model = transformers.FlaxGPT2LMHeadModel(transformers.GPT2Config(**sizes), seed=0)
    depth = ds.Depth.from_rules(rules_of("Hugging Face Flax")[0]["gpt2"]).resolve(model.params)
    assert list(depth.groups.values()) == [4]
    assert len(depth) == 4 * len(jax.tree.leaves(model.params["transformer"]["h"]["0"]))
    tx = ds.adamw(1e-3, weight_decay=0.0, depth=depth)
    plain = optax.adamw(1e-3, weight_decay=0.0)
    assert_smoothed(
        lambda: tx, lambda: plain, rules_of("Hugging Face Flax")[0]["gpt2"], model.params
    )
    state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=tx)

    def loss(params, ids):
        return (state.apply_fn(input_ids=ids, params=params, train=False)[0] ** 2).mean()

    @jax.pmap
    def step(state, ids):
        return state.apply_gradients(grads=jax.grad(loss)(state.params, ids))

    devices = jax.local_device_count()
    after = step(jax_utils.replicate(state), jnp.ones((devices, 1, 8), int))
    gradients = jax.grad(loss)(state.params, jnp.ones((1, 8), int))
    alone = state.apply_gradients(grads=gradients).params
    chex.assert_trees_all_close(jax_utils.unreplicate(after).params, alone, rtol=0, atol=2e-5)
    assert after.step.tolist() == [1] * devices
