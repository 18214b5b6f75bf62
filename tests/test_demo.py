"""The demo: what it promises a user who runs it, interrupts it, resumes it, or errs."""

import contextlib
import dataclasses
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from depthsmooth.demo import report, text
from depthsmooth.demo.__main__ import main, parser
from depthsmooth.demo.results import Results, replacing
from depthsmooth.demo.training import Arm, Config, Experiment, Run
from tests import reference

SMALL = ["--layers", "3", "--width", "8", "--steps", "6", "--batch", "2", "--context", "8"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


ALPHAS = ["--alpha", "0.2", "0.4"]


@pytest.fixture(scope="module")
def demo(corpus, tmp_path_factory):
    """A finished demo of two seeds: its directory, and what it has printed, and of its progress."""
    out = tmp_path_factory.mktemp("demo") / "out"
    printed, progress = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress):
        arguments = [*SMALL, *ALPHAS, "--seeds", "2", "--text", str(corpus), "--out", str(out)]
        assert main(arguments) == 0
    return out, printed.getvalue(), progress.getvalue()


@pytest.fixture(scope="module")
def finished(demo):
    """Its directory."""
    return demo[0]


def part_of(finished, out, alphas, seeds):
    """A directory with some runs of a demo, as one leaves that was smaller or interrupted."""
    whole = content(finished)
    runs = [run for run in whole["runs"] if run["arm"]["alpha"] in alphas and run["seed"] in seeds]
    out.mkdir()
    (out / "results.json").write_text(json.dumps(whole | {"runs": runs}))
    return runs


@pytest.fixture(scope="module")
def experiment(corpus):
    loaded = text.load(corpus, 8)
    return Experiment(Config(3, 8, 6, 2, 8, 1e-2, loaded.digest), loaded)


def content(out):
    return json.loads((out / "results.json").read_text())


def numbers(run):
    """All of a run but its time."""
    return {key: value for key, value in run.items() if key != "seconds_per_step"}


def test_prints_the_depth_table_the_results_and_a_verdict(demo):
    _, printed, progress = demo
    before, after = printed.split("Seeds: 2")
    assert "params/blocks       3     0      12" in before
    for name in ("AdamW ", "AdamW, smoothed 0.2", "AdamW, smoothed 0.4", "AdamW, layers × 0."):
        assert name in after
    assert "α = 0.2: against AdamW, smoothing" in after
    assert "α = 0.4: against AdamW, smoothing" in after
    assert "loss=" in progress
    assert "60/60" in progress


def test_writes_results_and_pictures_and_nothing_else(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "loss.png",
        "results.json",
        "update-similarity.png",
    ]
    for picture in finished.glob("*.png"):
        assert picture.read_bytes().startswith(PNG)
        assert picture.stat().st_size > 10_000
    results = content(finished)
    assert results["versions"]["jax"] == jax.__version__
    assert len(results["runs"]) == 10
    smoothed = ["AdamW, smoothed", "AdamW, layers ×"]
    arms = [arm["name"].split(" 0.")[0] for arm in results["findings"]["arms"]]
    assert arms == ["AdamW", *smoothed, *smoothed]


def test_arms_share_start_and_batches(finished):
    runs = {
        (run["arm"]["alpha"], run["arm"]["control"], run["seed"]): run
        for run in content(finished)["runs"]
    }
    for seed in (0, 1):
        adamw, smooth, control = (
            runs[key] for key in ((0.0, False, seed), (0.2, False, seed), (0.2, True, seed))
        )
        # The first loss is of the initialisation on the first batch; warm-up starts from 0.
        assert adamw["train_loss"][:2] == smooth["train_loss"][:2] == control["train_loss"][:2]
        assert len({run["train_loss"][-1] for run in (adamw, smooth, control)}) == 3
        assert control["shrink"] == smooth["shrink"]
        assert 0.5 < smooth["shrink"] < 1
        assert np.mean(smooth["cosine_after"]) > np.mean(smooth["cosine_before"])
        assert adamw["shrink"] == 1
    assert runs[0.0, False, 0]["train_loss"] != runs[0.0, False, 1]["train_loss"]


def test_refuses_to_overwrite_and_to_resume_another(finished, corpus, capsys):
    arguments = [*SMALL, *ALPHAS, "--seeds", "2", "--text", str(corpus), "--out", str(finished)]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--resume", "--steps", "7"])
    assert "its steps is 6, not 7" in capsys.readouterr().err


def test_resume_adds_seeds_and_alphas(finished, corpus, tmp_path):
    """And makes what an uninterrupted demo makes."""
    more = tmp_path / "more"
    kept = part_of(finished, more, (0.0, 0.2), (0,))
    arguments = [*SMALL, *ALPHAS, "--text", str(corpus), "--out", str(more), "--resume"]
    assert main([*arguments, "--seeds", "2"]) == 0
    resumed = content(more)
    assert resumed["runs"][: len(kept)] == kept
    assert resumed["findings"]["seeds"] == 2

    def ordered(runs):
        return sorted(map(numbers, runs), key=lambda run: (*run["arm"].values(), run["seed"]))

    assert ordered(resumed["runs"]) == ordered(content(finished)["runs"])


def test_one_seed_says_that_it_says_nothing(finished, corpus, tmp_path, capsys):
    part_of(finished, tmp_path / "out", (0.0, 0.2), (0,))
    arguments = [*SMALL, "--seeds", "1", "--text", str(corpus), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--resume"]) == 0
    assert "one seed gives no interval" in capsys.readouterr().out


def test_ctrl_c_keeps_the_finished_runs(corpus, tmp_path):
    out = tmp_path / "out"
    arguments = [*SMALL, "--seeds", "500", "--text", str(corpus), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "depthsmooth.demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "results.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted. The finished runs" in printed
    assert "--resume" in printed
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert len(content(out)["runs"]) >= 1


INTERRUPTED_COMPILATION = """
import os, runpy, signal, threading
import jax, jax.numpy as jnp
from depthsmooth.demo.training import Experiment

def slow_to_compile(x):
    for _ in range(1500):
        x = jnp.tanh(x @ x)
    return x

def run(*_):
    lowered = jax.jit(slow_to_compile).lower(jnp.ones((8, 8)))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    lowered.compile()

Experiment.run = run
runpy.run_module("depthsmooth.demo", run_name="__main__")
"""


def test_ctrl_c_while_compiling_is_no_crash(corpus, tmp_path):
    """JAX's own teardown under a running compilation ends in a segmentation fault."""
    arguments = ["--text", str(corpus), "--out", str(tmp_path / "out")]
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_COMPILATION, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 130
    assert "Interrupted. No run had finished" in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_the_first_run_leaves_nothing(corpus, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "run", interrupt)
    out = str(tmp_path / "deep" / "out")
    assert main([*SMALL, "--text", str(corpus), "--out", out]) == 130
    assert "Interrupted. No run had finished" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_the_garbage_collector_is_not_lost(corpus, tmp_path, monkeypatch, capsys):
    """JAX has a hook there, and what is raised in it is only printed."""

    def interrupt(phase, info):
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGINT)

    def run(*_):
        gc.callbacks.append(interrupt)
        gc.collect()
        yield 1.0
        raise AssertionError("it has gone on")

    monkeypatch.setattr(Experiment, "run", run)
    assert main([*SMALL, "--text", str(corpus), "--out", str(tmp_path / "out")]) == 130
    assert "Interrupted. No run had finished" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "{tmp}/absent"], "absent can't be read: No such file"),
        (["--text", "{tmp}/empty"], "empty holds 0 bytes in 1 file(s)"),
        (["--text", "{tmp}/folder"], "folder holds 0 bytes in 0 file(s)"),
        (["--text", "{tmp}/short"], "short holds 40 bytes in 1 file(s); with --context 8"),
        (["--out", "{tmp}/empty"], "empty can't be written: it is a file"),
        (["--out", "{tmp}/empty/below"], "below can't be written: Not a directory"),
        (["--out", "/dev/full/below"], "below can't be written"),
        (["--alpha", "1"], "1 is not a number above 0 and below 1"),
        (["--alpha", "0.2", "-0.1"], "-0.1"),
        (["--steps", "0"], "0 is not a whole number of at least 1"),
        (["--seeds", "two"], "two is not a whole number"),
        (["--learning-rate", "0"], "0 is not a number above 0"),
        (["--layers", "1"], "--layers 1 leaves nothing to mix"),
        (["--width", "7"], "--width 7 must be even"),
    ],
)
def test_refuses_bad_input_before_any_training(arguments, message, tmp_path, corpus, capsys):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "short").write_text("x" * 40)
    before = sorted(tmp_path.rglob("*"))
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    defaults = ["--text", str(corpus), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, *defaults, *given])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_refuses_what_may_not_be_read_or_written(corpus, tmp_path, capsys):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        main([*SMALL, "--text", str(corpus), "--out", str(tmp_path / "out")])
    assert "can't be written: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"config": {}}', '{"config": {}, "runs": 1}'])
def test_damaged_results_are_told_and_kept(damage, tmp_path, corpus, capsys):
    (tmp_path / "results.json").write_text(damage)
    with pytest.raises(SystemExit):
        main([*SMALL, "--text", str(corpus), "--out", str(tmp_path), "--resume"])
    assert "can't be read as results" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == damage


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_every_option_has_a_help_text():
    actions = parser()._actions
    assert all(action.help for action in actions)
    options = {option for action in actions for option in action.option_strings}
    assert options >= {"--layers", "--width", "--steps", "--batch", "--context", "--seeds"}
    assert options >= {"--alpha", "--learning-rate", "--out", "--text", "--resume"}


def test_the_default_text_is_real_and_the_same_every_time():
    loaded = text.load(None, 32)
    assert len(loaded.train) > 1_000_000
    assert b"def " in loaded.train.tobytes()
    assert loaded.digest == text.load(None, 32).digest


def test_validation_text_is_held_out(tmp_path):
    (tmp_path / "b").write_bytes(bytes(range(128, 256)))
    (tmp_path / "a").write_bytes(bytes(range(127)))
    loaded = text.load(tmp_path, 4)
    assert loaded.train.max() < loaded.validation.min()
    assert len(loaded.validation) == 25
    windows = loaded.validation_batch(3, 4)
    assert windows.shape == (3, 5)
    assert windows.min() == loaded.validation[0]
    assert windows.max() == loaded.validation[-1]
    batches = loaded.batches(50, 8, 4, seed=0)
    assert batches.shape == (50, 8, 5)
    assert batches.max() <= loaded.train.max()
    np.testing.assert_array_equal(batches, loaded.batches(50, 8, 4, seed=0))


def test_smoothing_adds_no_temporary_memory_to_the_training_step():
    """In the step of the demo's default run."""
    given = parser().parse_args([])
    sizes = (given.layers, given.width, given.steps, given.batch, given.context)
    loaded = text.load(None, given.context)
    experiment = Experiment(Config(*sizes, given.learning_rate, loaded.digest), loaded)

    def compiled(arm):
        params = experiment.abstract_params()
        state = jax.eval_shape(experiment.optimizer(arm).init, params)
        lowered = experiment.step(arm).lower(params, state, experiment.abstract_batch())
        return lowered.compile().memory_analysis()

    plain, smooth = compiled(Arm()), compiled(Arm(0.2))
    assert plain.temp_size_in_bytes > 0
    # One scalar, the 0 that rounds products, in an allocation of its own.
    assert smooth.temp_size_in_bytes <= plain.temp_size_in_bytes + 64
    # The state is one int32.
    assert smooth.argument_size_in_bytes - plain.argument_size_in_bytes == 4


def test_the_control_scales_the_layers_and_nothing_else(experiment):
    params = experiment.init(0)

    def second_update(arm, shrink):  # the learning rate of the first is 0
        tx = experiment.optimizer(arm, shrink)
        update = jax.jit(tx.update)
        _, state = update(params, tx.init(params), params)
        return update(params, state, params)[0]["params"]

    plain = second_update(Arm(), 1.0)
    half, none = (second_update(Arm(0.2, control=True), shrink) for shrink in (0.5, 0.0))
    middle = jax.tree.map(lambda a, b: (a + b) / 2, plain["blocks"], none["blocks"])
    chex.assert_trees_all_close(half.pop("blocks"), middle, rtol=1e-5)
    plain.pop("blocks")
    chex.assert_trees_all_equal(half, plain)


def test_only_kernels_and_embeddings_decay(experiment):
    params = experiment.init(0)
    tx = experiment.optimizer(Arm())
    zeros = jax.tree.map(jax.numpy.zeros_like, params)
    update = jax.jit(tx.update)
    _, state = update(zeros, tx.init(params), params)
    updates, _ = update(zeros, state, params)  # the learning rate of the first is 0
    for keys, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool(abs(update).max() > 0) == (keys[-1].key in ("kernel", "embedding")), keys


def test_what_is_observed_of_an_update(experiment):
    """Shrink factor and neighbours' cosines, against NumPy."""
    params = experiment.init(0)
    state = experiment.optimizer(Arm(0.2)).init(params)
    windows = experiment.text.batches(1, 2, 8, seed=0)[0]
    gradients = jax.jit(jax.grad(experiment.loss))(params, windows)
    updates, _ = jax.jit(experiment.preconditioner.update)(gradients, state[0], params)
    blocks = jax.tree.leaves(updates["params"]["blocks"])
    before = np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in blocks], axis=1)
    after = reference.window(before, 0.2, 0)

    def cosine(layers):
        units = layers / np.linalg.norm(layers, axis=1, keepdims=True)
        return (units[:-1] * units[1:]).sum(axis=1)

    observed = experiment.observe(0.2, params, state, windows)
    expected = np.linalg.norm(after) / np.linalg.norm(before), cosine(before), cosine(after)
    for ours, theirs in zip(observed, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def runs_of(losses):
    """Finished runs with these final losses, by arm."""
    return {
        (arm, seed): Run(
            arm=arm,
            seed=seed,
            train_loss=[],
            evaluated_at=[0, 5, 10],
            validation_loss=[5.0, 2.5, loss],
            seconds_per_step=0.01,
            shrink=0.8,
            cosine_before=[0.0, 0.1],
            cosine_after=[0.2, 0.3],
        )
        for arm, finals in losses.items()
        for seed, loss in enumerate(finals)
    }


SMOOTH, CONTROL = Arm(0.2), Arm(0.2, control=True)
ADAMW = [2.0, 2.1, 2.2]
LOWER, HIGHER, MIXED = [1.9, 2.01, 2.09], [2.1, 2.19, 2.31], [2.1, 2.0, 2.2]


@pytest.mark.parametrize(
    ("smooth", "control", "effect", "conclusion"),
    [
        (LOWER, HIGHER, "smoothing lowered", "mixing neighbours did better than the smaller step"),
        (HIGHER, LOWER, "smoothing raised", "smaller step alone did better than mixing"),
        (LOWER, LOWER, "smoothing lowered", "all of the effect may be the smaller step"),
        (HIGHER, HIGHER, "smoothing raised", "all of the effect may be the smaller step"),
        (MIXED, MIXED, "smoothing made no difference that 3 seeds can tell", "nothing is shown"),
        ([2.0, 2.1, float("nan")], LOWER, "a run diverged", "nothing can be said"),
    ],
)
def test_the_verdict_follows_from_the_intervals(smooth, control, effect, conclusion):
    runs = runs_of({Arm(): ADAMW, SMOOTH: smooth, CONTROL: control})
    verdict = report.Report(runs, [0.2], 3).verdict()
    assert effect in verdict
    assert conclusion in verdict


def test_paired_statistics():
    difference = report.Difference.between([1.0, 2.0, 3.5], [1.5, 2.1, 3.3])
    # By hand: mean -0.4/3, standard deviation 0.3511885, t(0.975, 2) = 4.3026527.
    assert difference.mean == pytest.approx(-0.4 / 3)
    assert difference.low == pytest.approx(-0.4 / 3 - 4.3026527 * 0.3511885 / 3**0.5, rel=1e-6)
    assert difference.high == pytest.approx(-0.4 / 3 + 4.3026527 * 0.3511885 / 3**0.5, rel=1e-6)
    assert (difference.better, difference.seeds) == (2, 3)
    assert str(difference) == "-0.1333 [-1.0057, +0.7391]"


def test_steps_to_reach_adamw():
    runs = runs_of({Arm(): [2.5, 2.1, 2.2], SMOOTH: [2.4, 2.0, 2.3], CONTROL: ADAMW})
    assert report.Report(runs, [0.2], 3).steps_to_adamw(SMOOTH) == [5, 10, None]


def test_pictures_show_the_runs():
    runs = runs_of({Arm(): ADAMW, SMOOTH: LOWER, CONTROL: HIGHER})
    summary = report.Report(runs, [0.2], 3)
    loss, difference, similarity = (Figure().subplots() for _ in range(3))
    summary.draw_loss(loss)
    summary.draw_difference(difference)
    summary.draw_similarity(similarity)
    assert [line.get_ydata()[-1] for line in loss.lines] == pytest.approx([2.1, 2.0, 2.2])
    assert [line.get_linestyle() for line in loss.lines] == ["-", "-", "--"]
    ends = [line.get_ydata()[-1] for line in difference.lines]
    low, high = (getattr(summary.difference(CONTROL), end) for end in ("low", "high"))
    assert ends == pytest.approx([-0.1, 0.1, low, high, 0])
    assert len(difference.collections) == 1  # the band of the smoothed arm
    after, before, unrelated = (line.get_ydata() for line in similarity.lines[:3])
    np.testing.assert_allclose([after, before], [[0.2, 0.3], [0.0, 0.1]])
    # By hand, for 3 layers: rows (0.9, 0.1, 0), (0.1, 0.8, 0.1), (0, 0.1, 0.9).
    np.testing.assert_allclose(unrelated, [0.17 / (0.82 * 0.66) ** 0.5] * 2, rtol=1e-6)
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["AdamW", "AdamW, smoothed 0.2", "AdamW, layers × 0.800"]


def test_a_diverged_run_is_kept_as_standard_json_and_resumed(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    config = Config(3, 8, 6, 2, 8, 1e30, "digest")
    runs = runs_of({Arm(): ADAMW, SMOOTH: [1.9, float("nan"), float("inf")], CONTROL: LOWER})
    results = Results(tmp_path, config, resume=False)
    for run in runs.values():
        results.add(run)
    results.write(report.Report(results.runs, [0.2], 3).findings())
    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    read = Results(tmp_path, config, resume=True).runs
    assert np.isnan(read[SMOOTH, 1].validation_loss[-1])
    assert read[Arm(), 0] == runs[Arm(), 0]
    assert "diverged" in report.Report(read, [0.2], 3).verdict()


def test_one_step_is_enough(experiment):
    config = dataclasses.replace(experiment.config, steps=1)
    *_, run = Experiment(config, experiment.text).run(Arm(), 0)
    assert run.evaluated_at == [0, 1]


def test_results_within_the_text_are_not_part_of_it(finished, corpus, tmp_path):
    (tmp_path / "corpus.txt").write_bytes(corpus.read_bytes())
    part_of(finished, tmp_path / "out", (0.0, 0.2), (0,))
    arguments = [*SMALL, "--seeds", "1", "--text", str(tmp_path)]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert (tmp_path / "out" / "loss.png").exists()


def test_every_alpha_has_its_curve():
    alphas = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    losses = {Arm(alpha, control): LOWER for alpha in alphas for control in (False, True)}
    axes = Figure().subplots()
    report.Report(runs_of({Arm(): ADAMW} | losses), alphas, 3).draw_similarity(axes)
    assert len(axes.lines) == 3 * len(alphas) + 1
