"""The package as a user meets it: imports, docstrings, metadata, README."""

import ast
import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import pytest

import depthsmooth

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python(code, *flags):
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_import_brings_nothing_that_optax_does_not():
    """This keeps the import quick; benchmarks/import_time.py tells how quick."""
    code = """
import optax, sys
before = set(sys.modules)
import depthsmooth
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*sorted({"flax", "matplotlib", "tqdm", "rich", "scipy"} & set(sys.modules)))
"""
    new, heavy = python(code).splitlines()
    assert new.split() == ["depthsmooth"]
    assert "flax" not in heavy.split()
    assert "matplotlib" not in heavy.split()


def test_runtime_dependencies_are_three():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[a-z]+", line).group() for line in project["dependencies"]]
    assert names == ["jax", "jaxlib", "optax"]


def test_version_is_from_one_place():
    assert importlib.metadata.version("depthsmooth") == depthsmooth.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {depthsmooth.__version__}\n" in citation


def test_metadata_tell_what_a_registry_shows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = importlib.metadata.metadata("depthsmooth")
    assert told["Summary"] == project["description"]
    assert told["License-Expression"] == "Apache-2.0"
    assert told["License-File"] == "LICENSE"
    assert told["Requires-Python"] == ">=3.11"
    assert told["Description-Content-Type"] == "text/markdown"
    assert "# depthsmooth" in (told["Description"] or told.get_payload())
    assert "Paper, https://arxiv.org/abs/2606.30813" in told.get_all("Project-URL")
    assert "Typing :: Typed" in told.get_all("Classifier")
    assert {"demo", "inspect", "plot"} <= set(told.get_all("Provides-Extra"))


NEVER_RAISES = {"as_scalars", "projections"}


def public_functions():
    for home in (depthsmooth, depthsmooth.depth, depthsmooth.metrics):
        for name in home.__all__:
            value = getattr(home, name)
            if inspect.isfunction(value):
                yield name, value
    for method in dir(depthsmooth.Depth):
        value = getattr(depthsmooth.Depth, method)
        is_ours = str(getattr(value, "__module__", "")).startswith("depthsmooth")
        is_method = inspect.isfunction(value) or inspect.ismethod(value)
        if is_ours and is_method and not method.startswith("_"):
            yield f"Depth.{method}", value


@pytest.mark.parametrize(("name", "function"), list(public_functions()))
def test_public_functions_are_documented_and_typed(name, function):
    signature = inspect.signature(function)
    taking = ("Args:", "Raises:") if set(signature.parameters) - {"self"} else ()
    if name in NEVER_RAISES:
        taking = ("Args:",)
    for section in (*taking, "Returns:", "Example:"):
        assert section in function.__doc__, f"{name} has no {section}"
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty or parameter.name in (
            "cls",
            "self",
        )


EARLIER = [
    "AmbiguousDepthError",
    "Depth",
    "DepthMetrics",
    "DepthNotFoundError",
    "GradientNoise",
    "Leaf",
    "MonitorDepthState",
    "Place",
    "Rule",
    "SmoothOverDepthState",
    "Track",
    "adamw",
    "as_scalars",
    "augment_over_depth",
    "compose",
    "depth_metrics",
    "diffusion",
    "ema",
    "exponential",
    "find_depth",
    "from_kernel",
    "from_matrix",
    "gradient_noise_over_depth",
    "interleaved",
    "line_shape_score",
    "lion",
    "mean",
    "monitor_depth",
    "muon",
    "muon_dimension_numbers",
    "normuon",
    "numbered",
    "operator_matrix",
    "projections",
    "read_metrics",
    "residual_alignment",
    "sequence",
    "sgd",
    "sharpen",
    "shrink_over_depth",
    "shuffled",
    "smooth_over_depth",
    "trace_depth",
    "window",
]
"""The names of version 0.1, which stay importable, wherever they are documented."""


def test_names_of_earlier_versions_are_importable():
    missing = [name for name in EARLIER if not hasattr(depthsmooth, name)]
    assert not missing
    assert {"Operator", "Stencil"} <= set(depthsmooth.__all__)


def test_readme_example_runs_as_it_stands(tmp_path):
    """And so do those after it, which go on where it ends."""
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = "".join(re.findall(r"```text\n(.*?)```", README, re.DOTALL))
    assert len([line for line in examples[0].splitlines() if line.strip()]) <= 15
    script = tmp_path / "example.py"
    script.write_text("".join(examples))
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == printed


def test_readme_has_the_two_commands():
    assert 'python -m pip install -e ".[demo]" && python -m depthsmooth.demo' in README
    assert 'python -m pip install -e ".[test]" && python -m pytest' in README


def test_only_public_names_of_jax_and_optax():
    for path in (ROOT / "depthsmooth").rglob("*.py"):
        assert not re.search(r"\b(jax|optax)\._src\b", path.read_text()), path


MAY_IMPORT = {
    "operators": set(),
    "mesh": set(),
    "depth": {"mesh"},
    "arrays": {"operators", "depth", "mesh"},
    "transform": {"operators", "depth", "arrays", "mesh"},
    "per_layer": {"depth", "arrays"},
    "rates": {"operators", "depth", "arrays", "mesh", "transform"},
    "metrics": {"operators", "depth", "arrays", "mesh", "transform"},
    "carry_over": {"depth", "metrics", "transform"},
    "optimizers": {"operators", "depth", "arrays", "mesh", "transform"},
    "plot": {"depth", "operators"},
    "cli": {"depth"},
}
"""What each wing may import besides itself. The demo is a program: it may import anything."""


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_wings_import_in_one_direction(wing):
    package = ROOT / "depthsmooth"
    files = [*package.glob(f"{wing}.py"), *(package / wing).rglob("*.py")]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            assert not isinstance(node, ast.ImportFrom) or node.level == 0, file
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if names[:1] == ["depthsmooth"]:
                names = [f"depthsmooth.{alias.name}" for alias in node.names]
            ours = [name.split(".") for name in names if name.split(".")[0] == "depthsmooth"]
            imported = {(*name, "")[1] for name in ours}
            assert imported <= {wing, *MAY_IMPORT[wing]}, file


def test_the_page_on_the_layout_shows_what_wings_import():
    page, *_ = (ROOT / "docs" / "layout.md").read_text().split("\n## ")
    rows = dict(re.findall(r"^\| `(\w+)(?:/|\.py)` \| (.*) \|$", page, re.MULTILINE))
    shown = {name: set(re.findall(r"`(\w+)(?:/|\.py)`", text)) for name, text in rows.items()}
    assert shown == MAY_IMPORT


def test_tests_run_on_eight_devices():
    assert jax.device_count() == 8
