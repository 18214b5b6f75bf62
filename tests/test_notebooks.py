"""The notebooks run on small sizes, draw their pictures, and are kept without what they print."""

import json
import pathlib
import re

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell

import depthsmooth
from depthsmooth import plot
from tests.children import environment

ROOT = pathlib.Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("default", module="ipykernel")
warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
"""
DRAWS = re.compile(r"\bplot\.\w+\(|\bplt\.subplots\(")


def ran(name, read, **sizes):
    """What an expression is at the end of a notebook that has run with other parameters."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", nbformat.NO_CONVERT)
    [parameters] = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    ]
    for size, value in sizes.items():
        assert re.search(rf"\b{size}\b", parameters.source)
        parameters.source += f"\n{size} = {value}"
    answer = new_code_cell(f"import json\nprint(json.dumps({read}))")
    notebook.cells = [new_code_cell(STRICT), *notebook.cells, answer]
    folder = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder)
    client.execute(env=environment(JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT)))
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        pictures = ["image/png" in output.get("data", {}) for output in outputs]
        drawn = cell.cell_type == "code" and bool(DRAWS.search(cell.source))
        assert sum(pictures) == drawn, cell.source
        assert not any(output.get("name") == "stderr" for output in outputs), outputs
    return json.loads(answer.outputs[0].text)


def test_quickstart_trains_and_tells_smoothing_from_a_smaller_step():
    layers, metrics, losses = ran(
        "quickstart",
        """[
            depth.groups,
            {name: [one.adjacent_cosine[:, 0].tolist(), one.mean_norm[:, 0].tolist()]
             for name, one in metrics.items()},
            {name: loss.tolist() for name, loss in losses.items()},
        ]""",
        LAYERS=4,
        WIDTH=16,
        STEPS=30,
        BATCH=4,
        CONTEXT=16,
        SEEDS=2,
    )
    assert layers == {"blocks": 4}
    assert list(losses) == ["AdamW", "smoothed", "smaller step"]
    for name, seeds in losses.items():
        assert [len(loss) for loss in seeds] == [30, 30]
        for loss, adamw in zip(seeds, losses["AdamW"], strict=True):
            assert loss[0] == pytest.approx(adamw[0], rel=1e-5)
            assert (loss[-1] == adamw[-1]) == (name == "AdamW")
            assert sum(loss[-5:]) / 5 < loss[0] - 0.5
    for cosine, smoothed, shrunk in zip(*(metrics[name][0] for name in losses), strict=True):
        assert smoothed > cosine + 0.1
        assert shrunk == pytest.approx(cosine, abs=0.02)
    for norm, smoothed, shrunk in zip(*(metrics[name][1] for name in losses), strict=True):
        assert smoothed < 0.95 * norm
        assert shrunk == pytest.approx(smoothed, rel=0.01)


@pytest.mark.slow
def test_anatomy_finds_layouts_equal_and_a_wrong_axis_refused():
    equal, refusal, cut, sums, norms, cosines, losses = ran(
        "anatomy",
        """[
            equal,
            refusal,
            matrix[:3, 2:].tolist(),
            {name: ds.operator_matrix(each, 8).sum(1).tolist() for name, each in operators.items()},
            {name: one.norms.tolist() for name, one in variants.items()},
            {name: float(one.adjacent_cosine) for name, one in variants.items()},
            losses.tolist(),
        ]""",
        LAYERS=6,
        WIDTH=16,
        STEPS=30,
        BATCH=4,
        CONTEXT=16,
    )
    layouts = ("stacked", "unrolled", "interleaved", "remat_scan", "sequence")
    assert equal == dict.fromkeys(layouts, True)
    assert "layers/kernel (6, 16, 16) has 16 layers on axis 1" in refusal
    assert cut[:2] == [[0] * 4] * 2
    assert cut[2][0] == 1
    assert all(
        (sum(rows) == pytest.approx(8)) == (name != "sharpen") for name, rows in sums.items()
    )
    for kept in ("norm_preserving", "directional"):
        assert norms[kept] == pytest.approx(norms["before"], rel=1e-4)
    assert norms["shrink_over_depth"] == pytest.approx(norms["standard"], rel=1e-4)
    assert max(norms["standard"]) < max(norms["before"])
    assert min(cosines[name] for name in ("standard", "norm_preserving", "directional")) > 0.1
    assert max(cosines[name] for name in ("before", "shrink_over_depth", "shuffled")) < 0.1
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_it_printed(path):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_names_and_links_of_a_notebook_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, nbformat.NO_CONVERT).cells)
    names, pictures = (set(re.findall(rf"\b{module}\.(\w+)", text)) for module in ("ds", "plot"))
    assert names <= set(depthsmooth.__all__)
    assert pictures <= set(plot.__all__)
    assert names
    assert pictures
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (path.parent / target).exists(), target


def test_notebooks_install_alike():
    """So that it is enough to run one of them."""
    installing = {
        next(
            cell.source
            for cell in nbformat.read(path, nbformat.NO_CONVERT).cells
            if cell.cell_type == "code"
        )
        for path in PATHS
    }
    assert len(installing) == 1


def test_there_is_a_test_of_every_notebook_and_the_readme_names_it():
    assert [path.stem for path in PATHS] == ["anatomy", "quickstart"]
    readme = (ROOT / "README.md").read_text()
    assert all(f"](notebooks/{path.name})" in readme for path in PATHS)
