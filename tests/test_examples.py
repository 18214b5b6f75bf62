"""The examples learn, and differ from their unsmoothed selves by what docs/examples.md shows."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DIFFS = dict(
    re.findall(
        r"`python (examples/\w+\.py)`.*?```diff\n(.*?)```",
        (ROOT / "docs" / "examples.md").read_text(),
        re.DOTALL,
    )
)
LAYERS = {
    "flax_linen": 6,
    "flax_nnx": 6,
    "equinox_mlp": 8,
    "haiku_layers": 6,
    "plain_jax": 6,
    "fsdp": 6,
    "two_hosts": 8,
}


def undone(diff, script):
    """The script as it was before the diff."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(a[1:] for a in lines if a[0] != sign) for sign in "+-")
        assert script.count(after) == 1, after
        script = script.replace(after, before)
    return script


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What a script prints that makes few steps."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
        "XLA_FLAGS": "",
    }

    def printed(script, *options):
        ran = subprocess.run(
            [sys.executable, script, "--steps", "11", *options],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return printed


def losses(output):
    return [float(loss) for loss in re.findall(r"step +\d+  loss (.*)", output)]


def test_every_example_is_in_the_document():
    scripts = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    assert set(DIFFS) == scripts == {f"examples/{name}.py" for name in LAYERS}


@pytest.mark.parametrize("name", LAYERS)
def test_an_example_differs_from_its_unsmoothed_self_by_the_diff(name, printed, tmp_path):
    script = ROOT / "examples" / f"{name}.py"
    output = printed(script)
    first, last = losses(output)
    assert last < first - 1
    [(layers, found_by)] = re.findall(r"^\S*(?:layers|blocks) +(\d+) .* (\w+)$", output, re.M)
    assert (int(layers), found_by) == (LAYERS[name], "trace")

    twin = tmp_path / "twin.py"
    twin.write_text(undone(DIFFS[f"examples/{name}.py"], script.read_text()))
    assert not re.search(r"depthsmooth|alpha|\bds\.", twin.read_text())
    plain = losses(printed(twin))
    assert losses(printed(script, "--alpha", "0")) == plain
    assert plain[-1] != last
