"""What the authors' codes and their replication put out, recorded by running them in PyTorch.

``tests/data/golden`` is a selection. ``python -m tests.golden DIRECTORY`` makes it from the whole
record, of which it keeps the form: manifest.json, and arrays by the names that are in it.
"""

import functools
import json
import pathlib
import sys

import numpy as np

SELECTION = pathlib.Path(__file__).parent / "data" / "golden"
RECORD = pathlib.Path(__file__).parents[2] / "shared" / "golden"
TOLERANCE = {"f32": 2e-6, "f64": 1e-12}

# What feeds smoothed layers into the next, in place, layer by layer, is another method.
OPERATIONS = [
    "A:window",
    "A:laplacian",
    "A:ema",
    "A:momentum_smoother",
    "A:compute_neighbor_averaged_gradients",
    "A-matrix:window",
    "A-matrix:laplacian",
    "A-matrix:ema",
    "A-matrix:compute_neighbor_averaged_gradients",
    "B+D:GradientSmoothingAdamW._smooth_updates",
    "D:_block_update_metrics",
]
SELECTED_TRAJECTORIES = {
    "post_window_none_dec0_proj0__f64",
    "post_window_rescale_dec1_proj1__f64",
    "post_window_normalize_before_dec1_proj1__f32",
    "raw_window_rescale__f64",
    "sgdm_wd_dec1__f64",
    "fee_standard_proj__f32",
    "fee_norm_full__f64",
    "fee_directional_proj__f64",
    "post_ema_rev_rescale__f64",
    "post_window_paramgroups_dec1__f64",
    "post_groups_single__f64",
    "post_window_L1__f64",
}


class Golden:
    """A directory of recorded cases.

    Attributes:
      cases: inputs and outputs of single operations.
      trajectories: whole optimizations.
    """

    def __init__(self, directory):
        self._directory = directory
        self._manifest = json.loads((directory / "manifest.json").read_text())
        self.cases = [case for case in self._manifest["cases"] if case["op"] in OPERATIONS]
        self.trajectories = self._manifest["trajectories"]

    def patterns(self, case):
        """The names of what is along the first axis."""
        return self._manifest["patterns"][case["patterns"]]

    def array(self, case, name):
        return self._file(case["npz"])[name]

    @functools.cache  # noqa: B019 # a session reads few directories
    def _file(self, name):
        return dict(np.load(self._directory / name))

    def select(self, directory):
        """Writes a part of the record."""
        kept = {"cases": [c for c in self.cases if is_selected(c)], "trajectories": []}
        files = {}
        for case in kept["cases"]:
            inputs = case.get("X", [])
            names = [*([inputs] if isinstance(inputs, str) else dict(inputs).values())]
            for name in [*names, *case["out"].values()]:
                files.setdefault(case["npz"], {})[name] = self.array(case, name)
        for one in self.trajectories:
            if one["id"] in SELECTED_TRAJECTORIES:
                kept["trajectories"].append(one)
                for name in one["arrays"]:
                    if any(part in name for part in ("__params__", "__grads__", "__metrics")):
                        files.setdefault(one["npz"], {})[name] = self.array(one, name)
        directory.mkdir(exist_ok=True)
        for name, arrays in files.items():
            np.savez_compressed(directory / name, **arrays)
        described = {k: self._manifest[k] for k in ("paper", "torch", "patterns", "conventions")}
        described["operators"] = {
            name: about for name, about in self._manifest["operators"].items() if name in OPERATIONS
        }
        text = json.dumps(described | kept)
        text = text.replace('{"id": ', '\n{"id": ')
        (directory / "manifest.json").write_text(text + "\n")


def is_selected(case):
    """Every operation, number of layers and parameter, but not in every shape and dtype."""
    if case["op"].startswith(("A-matrix", "D")) or case.get("missing_layers"):
        return True
    if case["op"] == "A:compute_neighbor_averaged_gradients":
        return case["L"] in (3, 5)
    if case["op"].startswith("B"):
        return case["L"] in (2, 5)
    return case["X"].split("__")[2] == "7" or case["op"] == "A:momentum_smoother"


if __name__ == "__main__":
    Golden(pathlib.Path(sys.argv[1])).select(SELECTION)
