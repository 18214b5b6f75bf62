"""What docs/placement.md says of each place in a chain, and what its picture shows."""

import functools
import pathlib
import re
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import depthsmooth as ds

DOCS = pathlib.Path(__file__).parent.parent / "docs"
DEPTH = ds.Depth.from_rules({"layers": 0})


@pytest.fixture(scope="module")
def placement():
    return runpy.run_path(str(DOCS / "placement.py"))


def test_the_picture_shows_what_its_description_says(placement):
    plain, paper, whole, before = map(placement["updates"], placement["CHAINS"].values())

    def at(values):
        expected = np.zeros(12)
        for layer, value in values.items():
            expected[layer] = value
        return pytest.approx(expected, abs=1e-4)

    assert plain["step"] == at({3: -1})
    for chain in (paper, whole):
        assert chain["step"] == at({2: -0.25, 3: -0.5, 4: -0.25})
    assert before["step"] == at({2: -1, 3: -1, 4: -1})
    for chain in (plain, paper, before):
        assert chain["decay"] == at({8: -0.5})
    assert whole["decay"] == at({7: -0.125, 8: -0.25, 9: -0.125})


def test_the_picture_is_drawn(placement, tmp_path, monkeypatch):
    plt = placement["plt"]
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, *args, **kwargs: None)
    placement["main"]()
    axes = plt.gcf().axes
    titles = [ax.texts[0].get_text() for ax in axes[::2]]
    assert titles == list(placement["CHAINS"])
    for ax, chain in zip(axes[1::2], placement["CHAINS"].values(), strict=True):
        bars = np.array([bar.get_height() for bar in ax.patches]).reshape(2, 12)
        np.testing.assert_allclose(bars, list(placement["updates"](chain).values()), atol=1e-6)
    for ax, chain in zip(axes[::2], placement["CHAINS"].values(), strict=True):
        assert [text.get_text() for text in ax.texts if text.get_text() in chain] == list(chain)
    plt.close("all")


PYTHON = re.findall(r"```python\n(.*?)```", (DOCS / "placement.md").read_text(), re.DOTALL)
DEEP = ds.Depth.from_rules({"layers/.*": 0})


def first_update(tx):
    rng = np.random.default_rng(0)
    params = {"layers": {"kernel": jnp.ones((5, 4, 4)), "scale": jnp.ones((5, 4))}}
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), params)
    return tx.update(grads, tx.init(params), params)[0]


def made_by(code):
    names = {"ds": ds, "optax": optax, "functools": functools, "depth": DEEP, "α": 0.3}
    exec(code, names)
    return names["tx"]


def test_the_two_optimizers_of_the_text_are_the_same():
    one, two = PYTHON[0].split("\n\n")
    chex.assert_trees_all_close(*(first_update(made_by(code)) for code in (one, two)), rtol=1e-6)


def test_the_chain_for_controls_of_muon():
    code = PYTHON[1]
    smoothed = first_update(ds.muon(0.02, alpha=0.3, depth=DEEP))
    control = "ds.shrink_over_depth(ds.window(α), depth=depth)"
    same = first_update(made_by(code.replace(control, "ds.smooth_over_depth(α, depth=depth)")))
    chex.assert_trees_all_close(smoothed, same, rtol=1e-6)
    norms = [
        jnp.linalg.norm(updates["layers"]["kernel"], axis=(1, 2))
        for updates in (smoothed, first_update(made_by(code)))
    ]
    chex.assert_trees_all_close(*norms, rtol=1e-5)


def test_momentum_commutes_with_smoothing_and_adam_does_not():
    smooth = ds.smooth_over_depth(0.3, depth=DEPTH)

    def third_update(*chain):
        tx = optax.chain(*chain)
        params = {"layers": jnp.zeros((5, 3))}
        state = tx.init(params)
        for step in range(3):
            grads = jax.random.normal(jax.random.key(step), (5, 3))
            updates, state = tx.update({"layers": grads}, state, params)
        return updates["layers"]

    for base, same in ((optax.trace(0.9), True), (optax.scale_by_adam(), False)):
        equal = jnp.allclose(third_update(smooth, base), third_update(base, smooth), atol=1e-5)
        assert bool(equal) == same


def test_norms_become_smaller_as_the_text_says():
    alpha = 0.4
    grads = {"layers": jax.random.normal(jax.random.key(0), (400, 100))}
    tx = ds.smooth_over_depth(alpha, depth=DEPTH)
    factor = optax.tree.norm(tx.update(grads, tx.init(grads))[0]) / optax.tree.norm(grads)
    assert float(factor) == pytest.approx(((1 - alpha) ** 2 + alpha**2 / 2) ** 0.5, rel=0.01)
