"""The quality benchmark: what is compared is fair, what is kept is whole, what is said follows."""

import doctest
import gc
import importlib
import json
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import time
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import depthsmooth as ds
from benchmarks.quality import plan, training
from benchmarks.quality.__main__ import _ordered
from benchmarks.quality.arms import Arm
from benchmarks.quality.reversal import Reversal
from benchmarks.quality.runs import Results, Run
from benchmarks.quality.studies import SCREENING, Study
from benchmarks.quality.task import TUNING
from benchmarks.quality.text import Text
from benchmarks.report import document, why
from benchmarks.report.claims import _share_until, claims
from benchmarks.report.evidence import gather
from benchmarks.report.statistics import Comparison, Verdict, corrected, judged, overall
from benchmarks.results import device
from tests.children import environment

ROOT = pathlib.Path(__file__).parents[1]
SMOOTHED = Arm("adamw", alpha=0.2)
ENVIRONMENT = {
    name: name
    for name in ("data", "command", "date", "device", "jax", "optax", "depthsmooth", "python")
}


# What is compared.


def test_arms_are_known_by_their_names():
    arms = {arm for task in plan.TASKS for study in plan.studies(task) for arm in study.arms}
    arms |= {control for arm in arms if arm.alpha for control in arm.controls}
    assert len(arms) > 100
    assert all(Arm.named(str(arm)) == arm for arm in arms)


@pytest.mark.parametrize(
    "name",
    ["adam", "adamw/standard", "adamw/standard/full/1.5", "adamw/standard/full/x", "",
     "adamw@1", "adamw@0", "adamw@-1", "adamw@x", "adamw@0.5@0.5", "adamw/standard/full/0@0.5",
     "adamw/standard/full/0.2/other", "adamw/standard/full/0.20", "adamw/none/full/0.2"],
)  # fmt: skip
def test_names_of_no_arm_are_refused(name):
    with pytest.raises(ValueError, match="names no arm"):
        Arm.named(name)


def test_controls_that_mix_have_a_matrix():
    window = ds.operator_matrix(ds.window(0.2), 6)
    first, second = (SMOOTHED.controlled("shuffled").matrix(6, seed) for seed in (0, 1))
    assert (first != second).any()
    for matrix in (first, second):
        np.testing.assert_allclose(sorted(matrix.ravel()), sorted(window.ravel()), atol=1e-6)
        np.testing.assert_array_equal(matrix.diagonal(1), 0)
    mean = SMOOTHED.controlled("mean").matrix(6, 0)
    np.testing.assert_allclose(mean, 0.8 * np.eye(6) + 0.2 / 6, atol=1e-6)


@pytest.fixture(scope="module")
def task():
    return Reversal(layers=4, steps=20)


def test_arms_differ_in_nothing_but_what_is_applied(task):
    """The smallest share of smoothing trains as the base optimizer; another seed does not."""
    plain, _ = training.train(task, Arm("adamw"), 1.0, 0)
    barely, _ = training.train(task, Arm("adamw", alpha=1e-7), 1.0, 0)
    smoothed, _ = training.train(task, Arm("adamw", alpha=0.5), 1.0, 0)
    other, _ = training.train(task, Arm("adamw"), 1.0, 1)
    np.testing.assert_allclose(barely["loss"], plain["loss"], rtol=1e-5)
    assert np.abs(smoothed["loss"] - plain["loss"]).max() > 1e-4
    assert np.abs(other["loss"] - plain["loss"]).max() > 1e-2


def test_layers_can_have_a_rate_of_their_own(task):
    """It scales their updates alone: at a rate of 0 they stay, and at 1 nothing changes."""
    plain, _ = training.train(task, Arm("adamw"), 1.0, 0)
    own, _ = training.train(task, Arm("adamw", own=1 + 1e-7), 1.0, 0)
    np.testing.assert_allclose(own["loss"], plain["loss"], rtol=1e-5)
    half, _ = training.train(task, Arm("adamw", own=0.5), 1.0, 0)
    smoothed, _ = training.train(task, Arm("adamw", alpha=0.2, own=0.5), 1.0, 0)
    assert np.abs(half["loss"] - plain["loss"]).max() > 1e-3
    assert np.abs(half["loss"] - smoothed["loss"]).max() > 1e-4
    updates = {"params": jax.tree.map(jnp.ones_like, task.init(jax.random.key(0))["params"])}
    scaling = Arm("adamw", own=0.5).kind.scaling(task.depth, jnp.float32(0.25))
    scaled, _ = scaling.update(updates, scaling.init(updates))
    expected = task.depth.map(
        lambda path, leaf, place: leaf if place is None else 0.25 * leaf, updates
    )
    chex.assert_trees_all_equal(scaled, expected)


def test_a_run_can_be_watched(task):
    alone, _ = training.train(task, SMOOTHED, 1.0, 0)  # which has been compiled above
    observed, _ = training.train(task, SMOOTHED, 1.0, 0, observed=True)
    np.testing.assert_allclose(observed["loss"], alone["loss"], rtol=1e-5)
    assert (observed["roughness_after"] < observed["roughness_before"]).all()
    assert (observed["line_shape_score"] >= 1).all()
    assert all(len(curve) == 10 for curve in observed.values())


def test_text_is_examined_in_what_is_not_learnt(tmp_path, monkeypatch):
    """And tuning seeds in the first half of it, the others in the second or the reverse."""
    path = tmp_path / "text"
    path.write_bytes(bytes(range(100)) * 90 + bytes([100, 150]) * 250 + bytes([200, 250]) * 250)
    task = Text(layers=2, steps=10, text=path)
    monkeypatch.setattr(task, "_loss", lambda params, windows: windows)
    key = jax.random.key(50)
    learnt = task.loss({}, key)
    halves = [task.evaluate({}, key, part)["loss"] for part in (0, 1)]
    assert learnt.shape[1] == halves[0].shape[1]
    assert len(set(learnt[:, 0].tolist())) > 3
    assert [set(np.unique(each)) for each in halves] == [{100, 150}, {200, 250}]
    assert learnt.max() < 100


def test_seeds_that_choose_are_examined_in_other_data(task, monkeypatch):
    def evaluate(params, key, part):
        return {"loss": part.astype(float)}

    monkeypatch.setattr(task, "evaluate", evaluate)
    run = jax.jit(training.program(task, Arm("adamw")))
    parts = [run(seed, 0.0, np.eye(4), 1.0, 1.0)["loss"][0] for seed in (0, 9, 100, 102)]
    assert parts == [0, 0, 1, 1]


def test_bits_are_nats_by_their_logarithm(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(256)) * 9)
    task = Text(layers=2, steps=10, text=path)
    measured = jax.jit(lambda key: task.evaluate(task.init(key), jax.random.key(51), 0))(
        jax.random.key(50)
    )
    np.testing.assert_allclose(measured["bits_per_byte"], measured["loss"] / np.log(2), rtol=1e-5)
    assert 7 < measured["bits_per_byte"] < 10


# Which runs it takes.


def fill(study: Study, results: Results, loss, **others):
    """Makes up the results of all runs of a study, from what is measured last."""
    while missing := study.missing(results):
        for run in missing:
            value = loss(run)
            curves = {"loss": [value + 0.1 * k for k in range(9, -1, -1)], "accuracy": [0.5]}
            for name in MEASURED if run.observed else ():
                curves[name] = [others.get(name, lambda run: 1 + noise(run))(run)] * 2
            results.add(run, {"curves": curves, "seconds": 1.0, **ENVIRONMENT})


MEASURED = (
    "roughness_before", "roughness_after", "adjacent_cosine_after", "gradient_variance",
    "gradient_noise_scale", "gradient_noise_scale",
    "line_shape_score", "residual_alignment",
)  # fmt: skip


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def garbage_is_left(monkeypatch):
    """Statsmodels collects it at each correction: among all that JAX keeps it takes long."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def study():
    arms = Arm("adamw"), SMOOTHED, Arm("adamw", alpha=0.5)
    return Study("grid", 4, 10, arms, untuned=arms, swept=True)


def noise(run, scale=0.005):
    return scale * np.random.default_rng(zlib.crc32(str(run).encode())).normal()


def test_rates_are_tuned_on_seeds_that_are_not_tested(study, tmp_path, quickly):
    """The test seeds would choose other rates and another arm, and are not asked."""
    results = Results(tmp_path / "runs.jsonl")

    def loss(run):
        best = {0.0: 2.0, 0.2: 8.0, 0.5: 1.0}[run.arm.alpha]
        favoured = run.arm.alpha == (0.2 if run.seed in study.tuning else 0.5)
        best = best if run.seed in study.tuning else 0.5
        return 3 + abs(np.log2(run.rate / best)) - favoured

    fill(study, results, loss)
    assert not set(study.tuning) & set(study.test)
    assert min(study.tuning) == TUNING > max(study.test)
    assert study.rate(Arm("adamw"), results) == 2
    assert study.rate(SMOOTHED, results) == 8
    assert study.claimed("adamw", results) == SMOOTHED
    assert set(study.complete(results)) == {*study.arms, *SMOOTHED.controls}
    tried = {run.rate for run in results.lines if run.arm == SMOOTHED and run.seed == 100}
    assert tried == {0.25, 0.5, 1, 2, 4, 5.6569, 8, 11.3137, 16}
    for arm in study.complete(results):
        tested = study.tests(arm, study.rate(arm, results))
        assert [run.seed for run in tested] == list(range(10))
        assert set(tested) <= set(results.lines)


def test_the_best_rates_are_confirmed_on_more_seeds(study, tmp_path, quickly):
    """Three seeds are wrong by two steps; all are asked until the best has neighbours."""
    results = Results(tmp_path / "runs.jsonl")

    def loss(run):
        best = 0.5 if run.seed in study.tuning[:SCREENING] else 2
        return 3 + np.log2(run.rate / best) ** 2

    fill(study, results, loss)
    assert study.rate(SMOOTHED, results) == 1
    confirmed = study.tried(SMOOTHED, results, study.tuning)
    best = list(confirmed).index(study.rate(SMOOTHED, results))
    assert 0 < best < len(confirmed) - 1
    assert study.loss(SMOOTHED, results) == min(confirmed.values())


def test_training_that_diverges_is_not_chosen(study, tmp_path, quickly):
    results = Results(tmp_path / "runs.jsonl")
    fill(study, results, lambda run: 3.0 + run.rate if run.rate < 1 else float("nan"))
    assert study.rate(SMOOTHED, results) == 0.0625
    assert "NaN" not in results.path.read_text()
    assert Results(results.path).loss(study.tests(SMOOTHED, 1.0)[0]) == np.inf


def test_each_program_is_compiled_once_before_it_is_run_again():
    arms = Arm("adamw"), SMOOTHED, Arm("adamw", alpha=0.5), SMOOTHED.controlled("mean")
    runs = [Run(4, 10, arm, 1.0, seed) for seed in range(3) for arm in arms]
    ordered = _ordered(runs)
    assert sorted(ordered) == sorted(runs)
    assert len({run.arm.kind for run in ordered[:3]}) == 3
    kinds = [str(run.arm.kind) for run in ordered[3:]]
    assert kinds == sorted(kinds)


# What is kept.


def test_a_line_half_written_is_dropped(tmp_path):
    results = Results(tmp_path / "runs.jsonl", "data")
    runs = [Run(4, 10, SMOOTHED, 1.0, seed) for seed in range(3)]
    line = {**ENVIRONMENT, "curves": {"loss": [2.0, 1.0]}}
    for run in runs[:2]:
        results.add(run, line)
    whole = results.path.read_bytes()
    results.path.write_bytes(whole[:-20] + b"a" * 999)
    again = Results(results.path, "data")
    assert list(again.lines) == runs[:1]
    again.add(runs[1], line)
    assert results.path.read_bytes() == whole
    again.add(runs[2], line)
    assert list(Results(results.path, "data").lines) == runs


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"runs.jsonl, line 1, is no result .*--out"):
        Results(path)
    path.unlink()
    Results(path, "one").add(Run(4, 10, SMOOTHED, 1.0, 0), {"curves": {}, "data": "one"})
    with pytest.raises(ValueError, match=r"results of other data: .*--out"):
        Results(path, "two")


def command(*options, module="benchmarks.quality"):
    return [sys.executable, "-m", module, *map(str, options)]


def children(process):
    """Their numbers, where the system tells."""
    told = pathlib.Path(f"/proc/{process}/task/{process}/children")
    return told.read_text().split() if told.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_it_goes_on_and_a_result_can_be_repeated(tmp_path):
    path, stub = tmp_path / "reversal.jsonl", "tests.stub_task"
    options = "reversal", "--quick", "--workers", 1, "--out", tmp_path
    quick, here = command(*options, module=stub), environment(TMPDIR=str(tmp_path))
    process = subprocess.Popen(quick, cwd=ROOT, env=here, stderr=subprocess.DEVNULL)
    while not (path.exists() and path.read_bytes().count(b"\n")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.05)
    kept = path.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    [study] = plan.studies("reversal", quick=True)
    assert study.missing(Results(path))
    done = subprocess.run(quick, cwd=ROOT, env=here, capture_output=True, text=True, check=True)
    assert f"reversal: {len(kept.splitlines())} runs are in" in done.stdout
    assert "All runs are in" in done.stdout
    assert path.read_bytes().startswith(kept)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({Run.from_json(line) for line in lines}) == len(lines)
    assert not study.missing(Results(path))

    assert {line["data"] for line in lines} == {"stub"}
    repeat(lines[-1], here, module=stub)


def repeat(line, settings, **names):
    """By the command that is kept with a run."""
    begin, options = shlex.split(line["command"])[:3], shlex.split(line["command"])[3:]
    assert begin == ["python", "-m", "benchmarks.quality"]
    done = subprocess.run(
        command(*options, **names),
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=True,
    )
    again = json.loads(done.stdout)
    assert Run.from_json(again) == Run.from_json(line)
    assert again["data"] == line["data"]
    for name, curve in line["curves"].items():
        np.testing.assert_allclose(again["curves"][name], curve, rtol=1e-5)


# What is said.


@pytest.mark.parametrize(
    "module", ["quality.arms", "quality.images", "quality.task", "report.statistics"]
)
def test_examples_in_docstrings(module):
    done = doctest.testmod(importlib.import_module(f"benchmarks.{module}"))
    assert done.attempted
    assert not done.failed


def test_comparisons_are_paired_and_corrected():
    rng = np.random.default_rng(0)
    theirs = rng.normal(3, 1, size=(4, 10))
    ours = theirs + rng.normal([[-0.1], [0.0], [0.05], [-0.02]], 0.02, size=(4, 10))
    comparisons = [Comparison.between(*pair, 0.02) for pair in zip(ours, theirs, strict=True)]
    for comparison, one, other in zip(comparisons, ours, theirs, strict=True):
        test = scipy.stats.ttest_rel(one, other)
        assert comparison.p == pytest.approx(test.pvalue)
        assert comparison.difference.low == pytest.approx(test.confidence_interval().low)
        assert comparison.difference.better == (one < other).sum()
        small = test.confidence_interval(0.9).low > -0.02
        assert (comparison.p_small < 0.05) == small
    order = np.argsort([each.p for each in comparisons])
    expected = np.maximum.accumulate([(4 - k) * comparisons[i].p for k, i in enumerate(order)])
    assert [corrected(comparisons)[i].p for i in order] == pytest.approx(np.minimum(expected, 1))
    assert corrected([]) == []


def test_runs_that_diverged_show_nothing():
    comparison = Comparison.between([np.inf, 1.0], [2.0, 2.0])
    assert (str(comparison), comparison.p, comparison.p_small) == ("diverged", 1.0, 1.0)
    assert not comparison.better
    same, lower = Comparison.between([1.0, 2.0], [1.0, 2.0], 0.5), Comparison.between([1], [2], 0.5)
    assert (same.p, same.p_small) == (1, 0)
    assert (lower.p, lower.p_small) == (0, 1)


def test_verdicts():
    rng = np.random.default_rng(1)
    theirs = rng.normal(3, 1, size=10)

    def against(mean, spread):
        shift = rng.normal(size=10)
        shift = mean + spread * (shift - shift.mean()) / shift.std()
        return Comparison.between(theirs + shift, theirs, 0.05)

    yes, no, maybe = Verdict.SUPPORTED, Verdict.NOT_SUPPORTED, Verdict.INCONCLUSIVE
    better, worse = against(-0.1, 0.01), against(0.1, 0.01)
    same, unknown = against(0, 0.001), against(-0.01, 1)
    settings = [[better, better], [better, same], [same, better], [better, worse], [unknown, worse]]
    assert judged([*settings, [better, unknown]]) == [yes, no, no, no, no, maybe]
    slightly = against(-0.1, 0.12)
    assert judged([[slightly]]) == [yes]
    assert judged([[slightly]] * 10) == [maybe] * 10, "ten settings are corrected for"
    nearly = against(0, 0.07)
    assert judged([[nearly]]) == [no]
    assert judged([[nearly]] * 10) == judged([[nearly] * 10]) + [maybe] * 9 == [maybe] * 10
    assert judged([]) == []
    assert overall([yes, yes]) == yes
    assert overall([no, no, maybe]) == no
    assert overall([yes, no]) == overall([no, maybe]) == overall([]) == maybe


def test_convergence_is_told_between_evaluations():
    curves = np.array([[3.0, 2.0, 1.0, 0.0], [3.0, 2.5, 2.0, 1.5], [0.5, 0.4, 0.3, 0.2]])
    np.testing.assert_allclose(_share_until(curves, np.full(3, 1.5)), [0.625, 1, 0.25])
    np.testing.assert_allclose(_share_until(curves, np.full(3, 1.0)), [0.75, 1, 0.25])


def found(loss, directory, name="grid", **others):
    """The claims, by title, of the text studies of a name whose results are made up."""
    results = Results(directory / "text.jsonl")
    for study in plan.studies("text"):
        if study.name == name:
            fill(study, results, loss, **others)
    evidence, begun = gather(directory)
    text = document.document(evidence, begun, [])
    assert len(begun) == sum(study.name != name for study in plan.studies("text"))
    assert all(each in text for each in begun)
    for each in evidence:
        for arm in each.study.complete(results):
            assert f"`{arm}`" in text, "every arm that ran is in a table"
    for claim in claims(evidence):
        assert f"[{claim.title}]" in text
        assert f"| **{claim.verdict.value}** |" in text
    return {claim.title: claim for claim in claims(evidence)}


def helped(run):
    return bool(run.arm.alpha and not run.arm.control)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("helps", "verdict"),
    [
        (lambda arm: arm.alpha and not arm.control, Verdict.SUPPORTED),
        (lambda arm: arm.alpha, Verdict.NOT_SUPPORTED),
        (lambda arm: False, Verdict.NOT_SUPPORTED),
    ],
    ids=["smoothing", "any mixing", "nothing"],
)
def test_a_claim_needs_the_controls(helps, verdict, tmp_path):
    def loss(run):
        return 3 + 0.01 * np.log2(run.rate) ** 2 + noise(run) - 0.03 * bool(helps(run.arm))

    claims = found(loss, tmp_path)
    claim = claims["Better generalisation"]
    assert claim.verdict == claims["Faster convergence"].verdict == verdict
    assert claims["Less sensitive to the learning rate"].verdict != Verdict.SUPPORTED
    assert claim.findings[0].beats_all == (verdict == Verdict.SUPPORTED)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("helps", [True, False])
def test_the_recommendation_follows_from_the_runs(helps, tmp_path):
    """Here α from 0.35 on does harm, and below it smoothing helps, or any mixing."""

    def loss(run):
        gains = helped(run) if helps else bool(run.arm.alpha)
        gain = 0.03 * gains - 0.1 * (run.arm.alpha > 0.3)
        return 3 + 0.01 * np.log2(run.rate) ** 2 + noise(run) - gain

    found(loss, tmp_path)
    evidence, _ = gather(tmp_path)
    retune, alpha = document.recommendation(evidence, claims(evidence))
    assert ("it may add to that" in retune) == helps
    assert ("it replaces smoothing" in retune) != helps
    assert "beat its base optimizer in 2 of 2 settings" in retune
    assert "keep α at 0.2 or below" in alpha
    assert "none of 12 smoothed arms" in alpha
    assert "Above it 4 of 4 did." in alpha
    better = (
        "`standard/full` was significantly better most often: 6 times of 10. It was worse 4 times"
    )
    assert (better in alpha) or not helps
    page = document.document(evidence, [], [])
    assert "| α = 0.1 | 2 | 0 | 2 |" in page
    assert "| α = 0.5 | 0 | 2 | 2 |" in page


@pytest.mark.usefixtures("quickly")
def test_a_smaller_step_is_no_gain(tmp_path):
    """Smoothing acts as a smaller learning rate, which the base optimizer has tried as well."""

    def loss(run):
        rate = run.rate * (0.5 if run.arm.alpha else 1)
        return 3 + 0.05 * np.log2(rate / 0.5) ** 2 + noise(run)

    claims = found(loss, tmp_path)
    [finding] = claims["Better generalisation"].findings
    assert finding.verdict == Verdict.NOT_SUPPORTED
    assert finding.comparisons["untuned"].better
    assert not finding.comparisons["retuned"].better
    sensitive = claims["Less sensitive to the learning rate"]
    assert sensitive.verdict == Verdict.NOT_SUPPORTED
    assert [each.verdict for each in claims["Works on Adam, SGD and Muon alike"].findings] == [
        Verdict.NOT_SUPPORTED
    ] * 2


@pytest.mark.usefixtures("quickly")
def test_sensitivity_is_what_other_rates_cost(tmp_path):
    def loss(run):
        return 3 + (0.01 if helped(run) else 0.03) * np.log2(run.rate) ** 2 + noise(run)

    claims = found(loss, tmp_path)
    assert claims["Less sensitive to the learning rate"].verdict == Verdict.SUPPORTED
    assert claims["Better generalisation"].verdict != Verdict.SUPPORTED


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("grows", [True, False])
def test_deeper_networks_are_helped_more_if_the_gain_grows(grows, tmp_path):
    def loss(run):
        gain = 0.02 * np.log2(run.layers) if grows else 0.1
        return 3 + 0.01 * np.log2(run.rate) ** 2 + noise(run) - gain * helped(run)

    verdict = found(loss, tmp_path, "depth")["More help for deeper networks"].verdict
    assert verdict == (Verdict.SUPPORTED if grows else Verdict.NOT_SUPPORTED)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("measured", "sign", "title"),
    [
        ("gradient_variance", -1, "Less noise in gradients"),
        ("line_shape_score", -1, "Straighter, more aligned representations"),
        ("residual_alignment", 1, "Straighter, more aligned representations"),
    ],
)
def test_mechanisms_are_compared_at_one_rate(measured, sign, title, tmp_path):
    changed = {measured: lambda run: 1 + noise(run) + 0.1 * sign * helped(run)}
    claim = found(lambda run: 3 + noise(run), tmp_path, "mechanism", **changed)[title]
    supported = [each for each in claim.findings if each.verdict == Verdict.SUPPORTED]
    assert supported == [claim.findings[measured == "residual_alignment"]]


@pytest.mark.usefixtures("quickly")
def test_what_another_learning_rate_changes_is_no_mechanism(tmp_path):
    """Smoothing is best at another rate than all others, and straighter there only."""

    def loss(run):
        best = 0.5 if helped(run) else 1
        return 3 + 0.05 * np.log2(run.rate / best) ** 2 + noise(run)

    changed = {"line_shape_score": lambda run: 1 + noise(run) + 0.1 * run.rate}
    claim = found(loss, tmp_path, "mechanism", **changed)[
        "Straighter, more aligned representations"
    ]
    finding = claim.findings[0]
    assert finding.comparisons["retuned"].better
    assert finding.verdict != Verdict.SUPPORTED


KEPT = ROOT / "benchmarks" / "results" / "quality"


def test_what_is_written_is_what_was_measured():
    """No number in RESULTS.md, or in README's recommendation, but from the kept results."""
    evidence, begun = gather(KEPT)
    pictures = [path.stem for path in (ROOT / "docs" / "results").glob("*.png")]
    names = [name for name in (*document.PICTURES, "signal") if name in pictures]
    signals = why.read(KEPT.parent / "signal")
    assert (ROOT / "RESULTS.md").read_text() == document.document(evidence, begun, names, signals)
    advice = document.in_readme(document.recommendation(evidence, claims(evidence)))
    assert f"\n\n{document.bullets(advice)}\n\n" in (ROOT / "README.md").read_text()


def test_the_published_direction_is_reproduced():
    """The gain is there at one learning rate, and its controls have it as well."""
    evidence, _ = gather(KEPT)
    [ours] = [e for e in evidence if (e.study.name, e.study.layers) == ("published", 24)]
    smoothed = Arm("adamw", scope="proj", alpha=0.2)
    difference = Comparison.between(ours.values(smoothed), ours.values(Arm("adamw"))).difference
    assert difference.seeds >= 10
    assert difference.high < 0


@pytest.mark.parametrize("task", plan.TASKS)
def test_kept_runs_are_known_by_their_commands(task):
    if (path := KEPT / f"{task}.jsonl").exists():
        results = Results(path)
        assert len(results.lines) == len(path.read_bytes().splitlines())
        for run, line in results.lines.items():
            assert line["command"].startswith(f"python -m benchmarks.quality {task} --arm")
            assert line["command"].endswith(run.options())


@pytest.mark.parametrize("task", plan.TASKS)
def test_a_kept_result_can_be_repeated(task, monkeypatch):
    """The shortest smoothed run, where processor and versions are those that it was made with."""
    path = KEPT / f"{task}.jsonl"
    if not path.exists():
        pytest.skip("no result is kept")
    lines = [line for run, line in Results(path).lines.items() if run.arm.alpha]
    line = min(lines, key=lambda line: line["seconds"])
    versions = jax.__version__, optax.__version__, platform.python_version()
    ours = device().replace(f"{jax.device_count()} ×", "1 ×")
    if (line["jax"], line["optax"], line["python"]) != versions or line["device"] != ours:
        pytest.skip(f"made with {line['device']}, JAX {line['jax']}, Python {line['python']}")
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    repeat(line, os.environ | {"XLA_FLAGS": ""})  # as it was made
