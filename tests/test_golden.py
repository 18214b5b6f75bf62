"""The authors' own code, run in PyTorch: its outputs for Window Smoothing are ours.

``tests/data/golden_window.*`` holds every recorded case of their ``window`` without
normalisation: 5 values of alpha, 1 to 12 layers, two shapes, float32 and float64, 8 patterns
each. One deviation, on purpose: a single layer is the identity here, while their code scales
it by 1 - alpha/2, as if its missing neighbours took their share with them.
"""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthsmooth import window
from depthsmooth.stencil import apply

DATA = pathlib.Path(__file__).parent / "data"
ARRAYS = dict(np.load(DATA / "golden_window.npz"))
CASES = json.loads((DATA / "golden_window.json").read_text())["cases"]
TOLERANCE = {"float32": 2e-6, "float64": 1e-12}


def smooth(layers, alpha):
    """Smooths axis 1 of (patterns, layers, ...)."""
    stencil = window(alpha)(layers.shape[1], 0)
    return np.asarray(apply(stencil, [jnp.asarray(layers)], [(1,)], [range(layers.shape[1])])[0])


def runs_of_present_layers(case):
    """A stack has no absent layers: the layers between two absent ones are a stack."""
    cuts = [-1, *case["missing"], case["layers"]]
    return [slice(a + 1, b) for a, b in itertools.pairwise(cuts) if b > a + 1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_matches_the_authors_code(case):
    inputs, outputs = ARRAYS[case["inputs"]], ARRAYS[case["id"]]
    tolerance = TOLERANCE[inputs.dtype.name]
    with jax.enable_x64(True):
        for run in runs_of_present_layers(case):
            mixed = smooth(inputs[:, run], case["alpha"])
            if mixed.shape[1] == 1:
                np.testing.assert_array_equal(mixed, inputs[:, run])
                expected = (1 - case["alpha"] / 2) * inputs[:, run]
            else:
                expected = mixed
            scale = np.abs(inputs).max(axis=tuple(range(1, inputs.ndim)), keepdims=True)
            assert (np.abs(expected - outputs[:, run]) <= tolerance * scale).all()


def test_every_recorded_case_is_there():
    assert len(CASES) == 78
    assert {case["layers"] for case in CASES} == {1, 2, 3, 5, 12}
