"""Why: tasks that are made up do what they say, and what is told of them follows from the runs."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import depthsmooth as ds
from benchmarks import results
from benchmarks.quality import plan
from benchmarks.quality.aligned import DEVIATION, Aligned
from benchmarks.quality.arms import Arm
from benchmarks.quality.mlp import Mlp
from benchmarks.quality.plan import ALPHAS
from benchmarks.quality.runs import Results
from benchmarks.quality.starts import Starts, permuted
from benchmarks.report import document, own, why
from benchmarks.report.claims import claims
from benchmarks.report.evidence import gather
from benchmarks.signal import samples
from benchmarks.signal.__main__ import tuned
from benchmarks.signal.kept import Measured
from benchmarks.signal.training import (
    TENTHS,
    curved_efficiency,
    measure,
    predicted_efficiency,
    sums_of,
)
from tests.test_quality import fill, garbage_is_left, noise, quickly  # noqa: F401

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(bytes(range(256)) * 20)
    return {
        start: Starts(start, start == "equal", layers=4, steps=20, text=path)
        for start in ("independent", "equal", "permuted")
    }


# What the tasks do.


def blocks_of(params):
    return params["params"]["blocks"]


def test_equal_layers_are_equal_and_permuted_ones_do_the_same(texts):
    params = {start: task.init(jax.random.key(0)) for start, task in texts.items()}
    for leaf in jax.tree.leaves(blocks_of(params["equal"])):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    kernels = blocks_of(params["permuted"])["mlp_in"]["kernel"]
    assert (kernels[0] != kernels[1]).any()
    np.testing.assert_array_equal(np.sort(kernels[0], -1), np.sort(kernels[1], -1))
    losses = {start: float(task.loss(params[start], KEY)) for start, task in texts.items()}
    np.testing.assert_allclose(losses["permuted"], losses["equal"], rtol=1e-6)
    assert abs(losses["independent"] - losses["equal"]) > 1e-4


def test_a_permuted_layer_trains_as_it_would(texts):
    """The gradient of the permuted layer is the permuted gradient."""
    task, order = texts["equal"], jax.random.key(5)
    params = texts["independent"].init(jax.random.key(0))

    def reordered(params):
        one = jax.vmap(lambda layer: permuted(layer, 4, order))
        return {"params": params["params"] | {"blocks": one(blocks_of(params))}}

    gradients = [jax.grad(task.loss)(each, KEY) for each in (params, reordered(params))]
    chex.assert_trees_all_close(reordered(gradients[0]), gradients[1], atol=1e-6)


def test_gradients_are_coupled_for_a_fifth_of_the_steps(texts):
    task = texts["equal"]
    tx = task.before()
    params = texts["independent"].init(jax.random.key(0))
    state = tx.init(params)
    for step in range(6):
        updates, state = tx.update(params, state)
        for leaf, before in zip(
            *(jax.tree.leaves(blocks_of(each)) for each in (updates, params)), strict=True
        ):
            wanted = jnp.broadcast_to(before.mean(0), leaf.shape) if step < 4 else before
            np.testing.assert_allclose(leaf, wanted, atol=1e-6)
    chex.assert_trees_all_equal(updates["params"]["head"], params["params"]["head"])
    assert texts["independent"].before().init(params) == optax.EmptyState()


@pytest.fixture(scope="module")
def aligned():
    return {noise: Aligned(noise, layers=4, steps=20) for noise in ("dropped", "private")}


def test_noise_of_its_own_is_drawn_for_each_layer(aligned):
    params = aligned["private"].init(jax.random.key(0))
    for leaf in jax.tree.leaves(blocks_of(params)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    batch, _ = jax.random.split(KEY)
    plain = jax.grad(Mlp.loss, 1)(aligned["private"], params, batch)
    noisy = jax.grad(aligned["private"].loss)(params, KEY)
    added = jax.tree.map(jnp.subtract, noisy, plain)
    kernel = blocks_of(added)["in"]["kernel"]
    assert np.std(kernel) == pytest.approx(DEVIATION, rel=0.1)
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.15
    np.testing.assert_array_equal(added["params"]["embed"]["kernel"], 0)
    losses = [float(aligned["private"].loss(params, KEY)), float(plain_loss(aligned, params))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def plain_loss(aligned, params):
    return Mlp.loss(aligned["private"], params, jax.random.split(KEY)[0])


def test_half_of_the_layers_are_dropped(aligned):
    task = aligned["dropped"]
    params = task.init(jax.random.key(0))
    kept = []
    for seed in range(20):
        gradients = jax.grad(task.loss)(params, jax.random.key(seed))
        kept.append(np.abs(blocks_of(gradients)["out"]["kernel"]).sum((1, 2)) > 0)
    assert 0.3 < np.mean(kept) < 0.7
    assert len({tuple(each) for each in kept}) > 5


# What is measured over training.


def test_signal_is_measured_where_it_says(tmp_path):
    task = Mlp(layers=4, steps=20)
    times = measure(task, "adamw", 1.0, 0)
    assert [time["tenth"] for time in times] == list(TENTHS)
    assert all(len(time["predicted"]) == len(ALPHAS) for time in times)
    assert {len(values) for time in times for values in time["tensors"].values()} == {6}
    assert set(times[0]["tensors"]) == {
        f"params/blocks/{name}" for name in ("in/kernel", "in/bias", "out/kernel", "out/bias")
    }
    kept = Measured(tmp_path / "signal" / "mlp.jsonl")
    kept.add("adamw", 0, 1.0, times)
    kept.add("adamw", 1, 1.0, times)
    half = kept.path.read_bytes()[:-30]
    kept.path.write_bytes(half)
    again = Measured(kept.path)
    assert list(again.lines) == [("adamw", 0)]
    again.add("adamw", 1, 1.0, times)
    assert Measured(kept.path).lines == kept.lines


def test_the_two_formulas_are_what_they_say():
    rng = np.random.default_rng(0)
    signal, spread = rng.normal(size=(5, 9)), rng.normal(size=(5, 9))
    curved = rng.normal(size=(45, 45))
    hessian, slope = curved @ curved.T, rng.normal(size=45)
    update = signal.ravel()

    def operator(alpha):
        return np.asarray(ds.operator_matrix(ds.window(alpha), 5))

    change = np.kron(operator(0.5), np.eye(9)) @ update - update
    products = np.array(
        [slope @ update, slope @ change, update @ hessian @ update, change @ hessian @ update,
         change @ hessian @ change]
    )  # fmt: skip
    for alpha in ALPHAS:
        moved = np.kron(operator(alpha), np.eye(9)) @ update
        both = [(slope @ u) ** 2 / (u @ hessian @ u) for u in (moved, update)]
        assert curved_efficiency(products, alpha) == pytest.approx(both[0] / both[1], rel=1e-4)
    products, noises = signal @ signal.T, spread @ spread.T
    # The best step along A g has a slope of tr AS and a curvature of tr A (S + E) A^T.
    window = operator(0.35)
    gains = [
        np.trace(a @ products) ** 2 / np.trace(a @ (products + noises) @ a.T)
        for a in (window, np.eye(5))
    ]
    assert predicted_efficiency(products, noises, 0.35) == pytest.approx(gains[0] / gains[1])


def test_sums_of_tensors_can_be_pooled():
    rng = np.random.default_rng(0)
    gradients = {
        name: jnp.asarray(rng.normal(size=(4, 3, 5)) + 3 * rng.normal(size=(3, 5)), "float32")
        for name in ("a", "b")
    }
    told = ds.depth_signal(gradients, ds.Depth.from_rules({".*": 0}), by="tensor")
    for one in jax.device_get(told).values():
        pairs, sizes, noise, noise_sizes, trace, noise_trace = sums_of(one)
        assert pairs / sizes == pytest.approx(float(one.signal_cosine.value), rel=1e-5)
        assert noise / noise_sizes == pytest.approx(float(one.noise_cosine.value), rel=1e-5)
        share = trace / (trace + noise_trace)
        assert share == pytest.approx(float(one.share.value), rel=1e-5)


def test_intervals_are_narrower_with_more_micro_batches():
    few, many = (samples.row(0.5, count, draws=5)["half_width"] for count in (4, 32))
    assert many < few


def test_rates_are_those_of_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)
    results = Results(tmp_path / "equal_free.jsonl")
    with pytest.raises(ValueError, match=r"python -m benchmarks\.quality equal_free"):
        tuned("equal_free", results)
    [study] = plan.studies("equal_free")
    fill(study, results, lambda run: 3 + np.log2(run.rate / 2) ** 2)
    assert tuned("equal_free", results) == {"adamw": 2.0}


# What is told of it.


@pytest.mark.usefixtures("quickly", "garbage_is_left")
@pytest.mark.parametrize(
    ("own_helps", "mixing_helps"), [(True, False), (False, False), (True, True)]
)
def test_the_layers_own_rate_is_a_control(own_helps, mixing_helps, tmp_path):
    """Smoothing that is a smaller rate of the layers is not better than that."""

    def loss(run):
        smaller = run.arm.own * (1 - 0.9 * run.arm.alpha)
        gain = 0.1 * (0.5 <= smaller < 0.95) * own_helps + 0.1 * bool(run.arm.alpha) * mixing_helps
        gain = 0.0 if run.arm.control else gain
        return 2 + 0.01 * np.log2(run.rate) ** 2 + noise(run) - gain

    results = Results(tmp_path / "text.jsonl")
    for study in plan.studies("text"):
        if study.name in ("own", "grid"):
            fill(study, results, loss)
    evidence, _ = gather(tmp_path)
    [found] = own.own_rates(evidence)
    assert found.gained.better == own_helps
    assert found.alone.better == (own_helps or mixing_helps)
    assert found.mixing.better == mixing_helps
    lines = document.recommendation(evidence, claims(evidence))
    [line] = [line for line in lines if "for the layers alone" in line]
    assert line.startswith("**Then tune") == own_helps
    assert line in document.in_readme(lines)
    claim = next(each for each in claims(evidence) if each.title == "Better generalisation")
    assert "own" in claim.findings[0].comparisons
    assert (claim.findings[0].verdict.value == "supported") == mixing_helps
    assert "## The layers' own rate" in document.document(evidence, [], [])


def line_of(base, seed, cosine, noise, predicted):
    times = [
        {
            "tenth": tenth,
            "tensors": {
                "params/blocks/in/kernel": [2 * cosine, 2.0, noise, 1.0, 1.0, 3.0 + 0.1 * seed],
                "params/blocks/out/kernel": [cosine, 1.0, noise, 1.0, 1.0, 3.0],
                "params/blocks/out/bias": [
                    0.9 + cosine / 50,
                    1.0,
                    0.9 + cosine / 50,
                    1.0,
                    1.0,
                    1.0 + seed,
                ],
            },
            "predicted": predicted,
            "curved": [1.0, -0.1, 1.0, -0.2, 0.1],
        }
        for tenth in TENTHS
    ]
    return {"base": base, "seed": seed, "rate": 1.0, "times": times, "device": "a", "jax": "b"}


def measured(directory, task, predicted=(1.0,) * 5):
    path = directory / "signal" / f"{task}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [
        line_of("adamw", seed, 0.1 + 0.01 * seed, 0.2 + 0.01 * seed, predicted) for seed in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.usefixtures("quickly", "garbage_is_left")
def test_the_section_says_what_was_measured(tmp_path):
    quality = tmp_path / "quality"
    quality.mkdir()
    names = [f"{start}_{how}" for start in why.STARTS for how in ("free", "coupled")]

    def loss(run):
        gain = -0.2 * run.arm.alpha  # the window does harm
        return 2 + 0.01 * np.log2(run.rate) ** 2 + noise(run) - gain

    for name, study_name in [
        ("text", "grid"),
        ("dropped", "noise"),
        *((n, "start") for n in names),
    ]:
        shift = 0.5 * (name == "permuted_coupled")
        results = Results(quality / f"{name}.jsonl")
        for study in plan.studies(name):
            if study.name == study_name:
                fill(study, results, lambda run, by=shift: loss(run) + by * (1 + run.seed % 3))
    measured(tmp_path, "text", (1.01, 1.02, 1.04, 1.07, 1.1))
    measured(tmp_path, "permuted_free")
    evidence, _ = gather(quality)
    signals = why.read(tmp_path / "signal")
    text = why.section(evidence, signals, ["signal"])
    assert "| text | kernels | 0.12 [0.10, 0.14] | 0.22 [0.20, 0.24] | 0.2" in text
    assert "| text | biases that write to the stream | 0.90 " in text
    assert "| permuted_free |" not in text
    assert "| permuted | free | 0.12 [0.10, 0.14] | 0.22 " in text
    [coupled] = [row for row in text.splitlines() if row.startswith("| permuted | coupled ")]
    assert coupled.endswith("worse |")
    assert "![Cosines of" in text
    assert "each layer is left out of half of the steps" in text
    assert "in 5 settings" in text
    assert "| equal curvature | 1.01 to 1.10 | -1.00 | -1.00 | 1.10 | no |" in text
    assert why.section(evidence, {}, []).count("|") < text.count("|")
    assert why.section([], {}, []) == ""


def test_the_page_on_signal_shows_by_how_much_the_formulas_fail():
    evidence, _ = gather(results.DIRECTORY / "quality")
    found = why.settings(evidence, why.read(results.DIRECTORY / "signal"))
    page = (pathlib.Path(__file__).parents[1] / "docs" / "signal.md").read_text()
    assert len(found) < why.FEWEST or why.formulas(found) in page


def test_nothing_has_run_on_a_gpu_until_it_has(monkeypatch):
    assert "Nothing on this page has run on a GPU" in document.document([], [], [])
    kept = {
        "text": {"parameters": 42e6, "steps": 600, "tested": [["AdamW", k, 1.0] for k in range(3)]},
        "device": "1 × gpu: H100", "jax": "0.12", "date": "2027-01-01",
    }  # fmt: skip
    read = document.results.read
    monkeypatch.setattr(
        document.results, "read", lambda name: kept if name == "gpu" else read(name)
    )
    text = document.document([], [], [])
    assert "Nothing on this page" not in text
    assert "*1 × gpu: H100; JAX 0.12; 2027-01-01*" in text
    assert "| 3 seeds |" in text


def test_a_formula_is_of_use_where_ranks_agree():
    gained = [-0.2, -0.1, 0.0, 0.1, 0.2]
    assert why.is_of_use([0.8, 0.9, 1.0, 1.1, 1.2], gained)
    assert not why.is_of_use([0.9, 1.06, 1.1, 1.2, 1.3], gained), "it promises a gain where is harm"
    assert not why.is_of_use([1.0, 0.9, 1.2, 1.1, 0.8], gained)


def test_arms_with_a_rate_of_their_own_are_of_one_program():
    kinds = {Arm("adamw", own=own).kind for own in plan.DEEPER_OWN if own != 1}
    assert len(kinds) == 1
    assert Arm("adamw").kind not in kinds
