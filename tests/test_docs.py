"""The documentation: its code runs, its links lead somewhere, and it says what the package has."""

import ast
import collections
import importlib.util
import pathlib
import re
import runpy
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import depthsmooth as ds
from depthsmooth import plot

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def named(path):
    return str(path.relative_to(ROOT))


TRAINS = pytest.param("optimizers", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name", ["start", "depth", "operators", "own_operator", "per_layer", "signal", TRAINS, "faq"]
)
def test_code_prints_what_is_below_it(name, capsys):
    names = {}
    printed = None
    for kind, text in BLOCK.findall((DOCS / f"{name}.md").read_text()):
        if kind == "python":
            assert not printed, f"nothing is below what prints\n{printed}"
            exec(text, names)
            printed = capsys.readouterr().out
        else:
            assert printed == text
            printed = None
    assert not printed


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def leaves(*paths):
    """A tree with an array for each path."""
    tree = {}
    for path, shape in paths:
        *containers, name = path.split("/")
        node = tree
        for key in containers:
            node = node.setdefault(key, {})
        node[name] = jnp.ones(shape)
    return tree


THREE = ("in_blocks", (2, 4)), ("mid_block", (4,)), ("out_blocks", (2, 4))
LISTS = ("in_blocks/0", (4,)), ("in_blocks/1", (4,)), ("mid_block", (4,))
TREES = [
    leaves(("params/blocks/w", (4, 5))),
    leaves(("params/blocks/w", (2, 2, 5))),
    leaves(*((f"params/block_{k}/w", (5,)) for k in range(4))),
    leaves(*((f"layers/layers_{k}/w", (5, 2)) for k in range(2))),
    leaves(*((f"{path}/w", shape) for path, shape in THREE)),
    leaves(*((f"{path}/w", shape) for path, shape in LISTS), ("out_blocks/0/w", (4,))),
]


def test_each_rule_of_the_table_fits_its_layout():
    rules = re.findall(r"^\| .* \| `(\{.*\})` \|$", (DOCS / "depth.md").read_text(), re.MULTILINE)
    for rule, tree, layers in zip(rules, TREES, [4, 4, 4, 4, 5, 4], strict=True):
        depth = ds.Depth.from_rules(eval(rule)).resolve(tree)
        assert list(depth.groups.values()) == [layers], rule
        assert len(depth) == len(depth.leaves), rule


def test_the_questions_quote_the_results():
    section = re.search(r"## Does it help\?.*?(?=## Why)", (DOCS / "faq.md").read_text(), re.DOTALL)
    summary = re.findall(r"^> (.*)$", section.group(), re.MULTILINE)
    advice = [f"- **{words}**" for words in re.findall(r"\*\*(.*?)\*\*", section.group())]
    assert (len(summary), len(advice)) == (1, 2)
    for words in summary + advice:
        assert words in (ROOT / "RESULTS.md").read_text()


def test_accumulation_inside_of_a_chain_makes_the_same_steps():
    """As the questions say: for a constant α, and no others."""
    gradients = {"layers": jnp.array([0.0, 4.0, 1.0, 2.0])}

    def steps(alpha, inside):
        smooth = ds.smooth_over_depth(alpha, depth=ds.Depth.from_rules({"layers": 0}))
        adam = optax.scale_by_adam()
        accumulated = optax.MultiSteps(adam if inside else optax.chain(adam, smooth), 3)
        tx = accumulated.gradient_transformation()
        tx = optax.chain(tx, smooth) if inside else tx
        state = tx.init(gradients)
        for _ in range(6):
            updates, state = tx.update(gradients, state)
        return updates["layers"]

    growing = optax.linear_schedule(0.0, 0.5, 10)
    for alpha, same in ((0.3, True), (growing, False)):
        assert bool(jnp.allclose(steps(alpha, True), steps(alpha, False))) == same


def test_the_picture_of_operators_shows_what_it_names(monkeypatch):
    script = runpy.run_path(str(DOCS / "operators.py"))
    for name, operator in script["OPERATORS"].items():
        matrix = ds.operator_matrix(eval(name, vars(ds).copy()), 8)
        np.testing.assert_array_equal(ds.operator_matrix(operator, 8), matrix)
    drawn = []
    monkeypatch.setattr(script["plt"].Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    script["main"]()
    [figure] = drawn
    gains = {line.get_label(): line.get_ydata() for line in figure.axes[3].lines}
    assert [gains["window(0.5)"][0], gains["sharpen(0.5)"][0]] == pytest.approx([1, 0.25])
    assert gains["exponential(0.5, radius=3)"][-1] == pytest.approx(0.3, abs=0.02)
    script["plt"].close(figure)


def test_every_public_name_has_its_place_in_the_api():
    pages = [page.read_text() for page in (DOCS / "api").glob("*.md")]
    names = re.findall(r"^::: (.*)$", "\n".join(pages), re.MULTILINE)
    public = [f"depthsmooth.{name}" for name in ds.__all__]
    public += [f"depthsmooth.plot.{name}" for name in plot.__all__]
    for wing in ("depth", "metrics"):
        own = set(getattr(ds, wing).__all__) - set(ds.__all__)
        public += [f"depthsmooth.{wing}.{name}" for name in own]
    assert collections.Counter(names) == collections.Counter(public)


def test_every_operator_is_in_the_table():
    names = re.findall(
        r"^::: depthsmooth\.(.*)$", (DOCS / "api" / "operators.md").read_text(), re.M
    )
    table = re.findall(r"^\| .*", (DOCS / "operators.md").read_text(), re.M)
    for name in set(names) - {"operator_matrix", "Operator", "Stencil"}:
        assert any(f"ds.{name}(" in row.split("|")[1] for row in table), name


def modules():
    """The summary of each module, and the modules that it imports, by their paths."""
    package = ROOT / "depthsmooth"
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("depthsmooth"):
                for name in [node.module, *(f"{node.module}.{each.name}" for each in node.names)]:
                    file = ROOT / (name.replace(".", "/") + ".py")
                    imported |= {file.relative_to(package).as_posix()} if file.exists() else set()
        summary = ast.get_docstring(tree).splitlines()[0].replace("``", "`")
        yield path.relative_to(package).as_posix(), summary, imported


def test_the_page_on_the_layout_has_every_module_above_those_it_imports():
    page = re.findall(
        r"^\| `(\S+\.py)` \| (.*) \|$", (DOCS / "layout.md").read_text(), re.MULTILINE
    )
    text = (DOCS / "layout.md").read_text()
    wings = {name: summary for name, summary, _ in modules() if name.endswith("/__init__.py")}
    assert dict(page) == {name: summary for name, summary, _ in modules() if name not in wings}
    assert all(f"\n{summary}\n" in text for name, summary in wings.items() if name.count("/") == 1)
    order = [name for name, _ in page]
    for name, _, imported in modules():
        below = order[order.index(name) + 1 :] if name in order else order
        assert imported <= {*below, *wings}, name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not here: python -m pip install -e '.[docs]'")
    directory = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    ran = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return directory


def test_the_site_has_every_page(site):
    for page in PAGES:
        path = page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).with_suffix("")
        folder = site if path.name == "README" else site / path
        assert (folder / "index.html").exists(), page


def test_the_api_has_its_formulas_and_links(site):
    """Nothing of reStructuredText is left, and every name that is referred to is a link."""
    for page in (site / "api").glob("*/index.html"):
        text = page.read_text()
        assert not re.search(r":(math|func|meth|class):|\.\. math|`_|::</p>", text), page
    window = (site / "api" / "operators" / "index.html").read_text()
    assert window.count("<math") > 10
    assert "arithmatex" not in window
    smoothing = (site / "api" / "transformations" / "index.html").read_text()
    assert 'href="../depth/#depthsmooth.Depth.from_rules"' in smoothing
