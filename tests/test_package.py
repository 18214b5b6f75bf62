"""The package as a user meets it: imports, docstrings, metadata, README."""

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
    for name in depthsmooth.__all__:
        value = getattr(depthsmooth, name)
        if inspect.isfunction(value):
            yield name, value
        for method in vars(depthsmooth.Depth) if name == "Depth" else ():
            if not method.startswith("_") and callable(getattr(value, method)):
                yield f"{name}.{method}", getattr(value, method)


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


def test_readme_example_runs_as_it_stands(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    script = tmp_path / "example.py"
    script.write_text(example)
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


def test_tests_run_on_eight_devices():
    assert jax.device_count() == 8
