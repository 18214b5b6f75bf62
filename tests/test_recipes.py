"""docs/recipes.md: its rules, read from the page, give every leaf of real trees its true layers.

In the section of a project, the first block of Python is its rules, each with a name.
"""

import ast
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import depthsmooth as ds
from tests.test_finding import TREES, tree_of, truth_of

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
SECTIONS = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
UNCHECKED = re.compile("# .*(by reading only|no tree)")

TREES_OF = {
    "MaxText": {
        "scanned": ["linen_llama2_scan", "linen_mixtral_scan", "nnx_llama2_scan"],
        "unrolled": ["linen_llama2_unrolled"],
        "alternating": ["nnx_gptoss_scan", "nnx_llama4_scan", "nnx_qwen3next_scan"],
        "gemma3": ["linen_gemma3_scan", "nnx_gemma3_scan"],
        "deepseek": ["linen_deepseek_scan", "linen_deepseek_mtp_scan", "nnx_deepseek_scan"],
        "deepseek_unrolled": ["linen_deepseek_unrolled", "nnx_deepseek_unrolled"],
        "pipeline": ["linen_pipeline_circular", "nnx_pipeline_circular"],
        "pipeline_scanned": ["linen_pipeline_scan_per_stage", "nnx_pipeline_scan_per_stage"],
        "pipeline_unrolled": ["linen_pipeline_seq_per_stage"],
    },
    "big_vision": {
        "scanned": ["vit_scan_tok", "vit_scan_depth1"],
        "unrolled": ["vit_unrolled_tok", "vit_unrolled_map"],
        "mixer": ["mixer_unrolled"],
    },
    "t5x": {"scanned": ["scalable_t5_scan_axis0"], "unrolled": ["scalable_t5_unrolled"]},
    "tunix": {"layers": ["llama3_unrolled"]},
    "EasyDeL": {},
    "Levanter": {"blocks": ["blockseq"]},
    "Hugging Face Flax": {"gpt2": ["gpt2"]},
}
PREFIXES = {"big_vision": "bigvision", "Levanter": "haliax", "Hugging Face Flax": "hf_flax"}
INNER = ("big_vision", "t5x")
"""Projects whose optimizer gets the tree within ``params``."""

REMAINDER = "layers_remainder/layers_*"
"""A group of trees whose layers come after those of the group `layers` beside it."""


def rules_of(project):
    """The rules of a project by their names, and the names of those that have no tree."""
    code = PYTHON.search(SECTIONS[project])[1]
    rules = {}
    exec(code, {"ds": ds}, rules)
    lines = code.splitlines()
    statements = zip(rules, ast.parse(code).body, strict=True)
    return rules, {
        name
        for name, node in statements
        if UNCHECKED.search("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    }


def layers_of(name):
    """For each leaf that is depth its group, its axes, and all layers that it holds, in order."""
    truth = truth_of(name)
    shapes = {path: shape for path, shape, *_ in TREES[name]["leaves"]}
    steps, held = {}, {}
    for group, _, layer in truth.values():
        steps.setdefault(group, set()).add(layer)
    for path, (group, axes, layer) in truth.items():
        stacked = math.prod(shapes[path][axis] for axis in axes)
        held[path] = [(layer or 0) + i * len(steps[group]) for i in range(stacked)]
    found = {}
    for path, (group, axes, _) in truth.items():
        whole = group.replace(REMAINDER, "layers")
        before = [held[other][-1] for other, (of, *_) in truth.items() if of == whole != group]
        start = max(before, default=-1) + 1
        found[path] = (whole, axes, tuple(start + layer for layer in held[path]))
    return found


def moved(tree, truth):
    """A tree whose layers are stacked along axis 1, made of one where they are along axis 0."""

    def move(path, leaf):
        if jax.tree_util.keystr(path, simple=True, separator="/") not in truth:
            return leaf
        layers, size, *rest = leaf.shape
        return jax.ShapeDtypeStruct((size, layers, *rest), leaf.dtype)

    truth = {path: (group, (1,), layers) for path, (group, _, layers) in truth.items()}
    return jax.tree_util.tree_map_with_path(move, tree), truth


CASES = [
    (project, name, f"{PREFIXES.get(project, project.lower())}_{tree}")
    for project, names in TREES_OF.items()
    for name, trees in names.items()
    for tree in trees
]


@pytest.mark.parametrize(("project", "name", "of"), CASES)
def test_every_leaf_gets_its_true_layers(project, name, of):
    tree, truth = tree_of(of, boxed=False), layers_of(of)
    if project in INNER:
        tree = tree["params"]
        truth = {path.removeprefix("params/"): place for path, place in truth.items()}
    if of == "t5x_scalable_t5_scan_axis0":
        tree, truth = moved(tree, truth)
    depth = ds.Depth.from_rules(rules_of(project)[0][name]).resolve(tree)
    assert {path: (place.axes, place.layers) for path, place in depth.items()} == {
        path: (axes, layers) for path, (_, axes, layers) in truth.items()
    }
    groups = {(place.group, truth[path][0]) for path, place in depth.items()}
    assert len(groups) == len({group for group, _ in groups}) == len({true for _, true in groups})


def test_every_rule_has_a_tree_or_says_that_it_has_none():
    assert set(SECTIONS) == set(TREES_OF)
    for project, checked in TREES_OF.items():
        rules, unchecked = rules_of(project)
        assert set(checked) == set(rules) - unchecked, project


def test_every_tree_of_these_projects_has_a_rule():
    trees = {of for _, _, of in CASES}
    prefixes = tuple({of.partition("_")[0] for of in trees})
    without = {name for name in TREES if name.startswith(prefixes)} - trees
    assert without == {"maxtext_linen_gemma4_scan"}


def test_the_table_says_what_is_checked():
    rows = re.findall(r"^\| \[(.*?)\]\(#(.*?)\) \|.*?\| (.*?) \|", PAGE, re.MULTILINE)
    assert {project: "tree-checked" in rules for project, _, rules in rows} == {
        project: bool(checked) for project, checked in TREES_OF.items()
    }
    anchors = [name.lower().replace(" ", "-") for name in SECTIONS]
    assert [anchor for _, anchor, _ in rows] == anchors


def test_the_example_of_a_table():
    depth = ds.Depth.from_rules(rules_of("MaxText")[0]["scanned"])
    table = str(depth.resolve(tree_of("maxtext_nnx_llama2_scan", boxed=False)))
    assert f"```text\n{table}\n```" in PAGE


def test_gemma3_without_a_remainder():
    tree = tree_of("maxtext_nnx_gemma3_scan", boxed=False)
    del tree["decoder"]["layers_remainder"]
    rules, _ = rules_of("MaxText")
    depth = ds.Depth.from_rules(rules["alternating"]).resolve(tree)
    assert depth["decoder/layers/layers_5/mlp/wo/kernel"].layers == (5, 11)
    with pytest.raises(ValueError, match="layers_remainder"):
        ds.Depth.from_rules(rules["gemma3"]).resolve(tree)


@pytest.mark.parametrize("code", PYTHON.findall(PAGE))
def test_python_is_python(code):
    ast.parse(code)


def test_all_that_it_names_is_there():
    names = set(re.findall(r"\bds\.(\w+)", PAGE))
    assert {"adamw", "muon", "SmoothOverDepthState"} < names
    assert not [name for name in names if not hasattr(ds, name)]


def test_pmap_needs_rules_that_are_resolved():
    params = {"transformer": {"h": {str(i): jnp.full((2, 2), float(i)) for i in range(3)}}}
    rules = ds.Depth.from_rules({r"transformer/h/(\d+)": ds.numbered()})
    replicated = jax.tree.map(lambda leaf: leaf[None], params)

    def smoothed(depth):
        tx = ds.smooth_over_depth(0.5, depth=depth)
        step = jax.pmap(lambda grads: tx.update(grads, tx.init(params))[0], "batch")
        return step(replicated)["transformer"]["h"]["0"]

    assert smoothed(rules.resolve(params)).ravel().tolist() == [0.25] * 4
    with pytest.raises(ValueError, match=r"rules\.resolve\(params\)"):
        smoothed(rules)
