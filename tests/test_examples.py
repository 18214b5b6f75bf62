"""The examples learn, and differ from their unsmoothed selves by what docs/examples.md shows."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from tests.children import environment

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


FINETUNE = "examples/finetune.py"


def undone(diff, script):
    """The script as it was before the diff."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(a[1:] for a in lines if a[0] != sign) for sign in "+-")
        assert script.count(after) == 1, after
        script = script.replace(after, before)
    return script


IN_TURN = """
import json, runpy, sys

for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    print("---", flush=True)
"""
"""Runs scripts in one process, which imports what they need once."""


def printed(*commands):
    """What scripts print that make few steps."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error,ignore:Error reading persistent compilation cache entry",
    }
    arguments = [[str(script), "--steps", "11", *options] for script, *options in commands]
    ran = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(arguments)],
        env=environment(**settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    *outputs, end = ran.stdout.split("---\n")
    assert not end
    return outputs


def losses(output):
    return [float(loss) for loss in re.findall(r"step +\d+  loss (.*)", output)]


def test_every_example_is_in_the_document():
    scripts = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    assert set(DIFFS) == scripts - {FINETUNE} == {f"examples/{name}.py" for name in LAYERS}
    assert f"`python {FINETUNE}`" in (ROOT / "docs" / "examples.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("fsdp", "two_hosts") else name
        for name in LAYERS
    ],
)
def test_an_example_differs_from_its_unsmoothed_self_by_the_diff(name, tmp_path):
    script, twin = ROOT / "examples" / f"{name}.py", tmp_path / "twin.py"
    twin.write_text(undone(DIFFS[f"examples/{name}.py"], script.read_text()))
    assert not re.search(r"depthsmooth|alpha|\bds\.", twin.read_text())
    output, unsmoothed, plain = printed([script], [script, "--alpha", "0"], [twin])
    first, last = losses(output)
    assert last < first - 1
    [(layers, found_by)] = re.findall(r"^\S*(?:layers|blocks) +(\d+) .* (\w+)$", output, re.M)
    assert (int(layers), found_by) == (LAYERS[name], "trace")
    assert losses(unsmoothed) == losses(plain)
    assert losses(plain)[-1] != last


def test_fine_tuning_freezes_decays_and_goes_on(tmp_path):
    """Frozen layers stay, others move; a run in two parts ends as one that is not interrupted."""
    kept = ["--directory", str(tmp_path / "checkpoints")]
    script = ROOT / FINETUNE
    first, second, whole = printed(
        [script, "--steps", "10", *kept],
        [script, "--steps", "20", *kept],
        [script, "--steps", "20"],
    )
    assert re.search(r"^layers +6 +0 +20 .* trace$", first, re.M)
    of_first, of_second, of_whole = map(losses, (first, second, whole))
    assert of_first + of_second == of_whole
    assert len(of_whole) == 2
    end = "norms moved by"
    assert second.split(end)[1] == whole.split(end)[1]
    moved = [float(each) for each in re.findall(r"[\d.]+(?=[ \]])", whole.split(end)[1])]
    assert moved[:2] == [0, 0]
    assert min(moved[2:]) > 0.001
