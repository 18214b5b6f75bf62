"""What the benchmarks rely on: files written whole, like compared with like alone."""

import json
import pathlib
import re
import subprocess
import sys

import chex
import jax
import optax
import pytest

import depthsmooth as ds
from benchmarks import compile_time, compiled_cost, gpu, hlo, per_layer, results, speed, step_time
from benchmarks.signal import samples


def test_refuses_to_compare_different_devices(tmp_path):
    one, two, other = (tmp_path / f"{name}.json" for name in ("one", "two", "other"))
    one.write_text(json.dumps({"device": "1 × cpu: a", "rows": [{"ms": [2.0, 4.0]}]}))
    two.write_text(json.dumps({"device": "1 × cpu: a", "rows": [{"ms": [1.0, 6.0]}]}))
    other.write_text(json.dumps({"device": "8 × tpu: b", "rows": [{"ms": [1.0, 6.0]}]}))

    def compared(*paths):
        command = [sys.executable, "-m", "benchmarks.results", *map(str, paths)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    same = compared(one, two)
    assert same.returncode == 0
    assert same.stdout.split() == ["0.500", "rows/0/ms/0", "1.500", "rows/0/ms/1"]
    for paths in [(one, other), (one, tmp_path / "missing.json")]:
        refused = compared(*paths)
        assert refused.returncode == 1
        assert "cannot be compared" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert "one was measured on 1 × cpu: a, the other on 8 × tpu: b" in compared(one, other).stderr


def test_a_result_says_what_it_was_measured_on(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    results.write("some", {"ms": 1.0})
    assert results.read("some")["device"] == results.device()
    assert results.read("another") is None
    with pytest.raises(TypeError):
        results.write("some", {"ms": object()})
    assert results.read("some")["ms"] == 1.0


def test_kept_results_say_what_they_were_measured_on():
    for path in results.DIRECTORY.glob("*.json"):
        assert json.loads(path.read_text())["device"]


def test_kernels_are_what_runs():
    text = """HloModule m
%fused (a: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} add(%a, %a)
}
ENTRY %main (p: f32[4], q: bf16[8,2]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %q = bf16[8,2]{1,0} parameter(1)
  %c = f32[] constant(0)
  %fusion.1 = (f32[4]{0}, bf16[8,2]{1,0}) fusion(%p, %q, %c), kind=kLoop, calls=%fused
  %g = f32[4]{0} get-tuple-element(%fusion.1), index=0
  ROOT %copy.2 = f32[4]{0} copy(%g)
}
"""
    both = 16 + 32
    assert hlo.kernels(text) == [("fusion", 2 * both + 4), ("copy", 32)]


def test_of_what_is_sliced_the_slices_count():
    text = """HloModule m
%fused (a: f32[8,4], b: f32[8,4]) -> (f32[1,4], f32[8,4]) {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %v = f32[2,4,4]{2,1,0} bitcast(%a)
  %s = f32[1,1,4]{2,1,0} slice(%v), slice={[0:1], [0:1], [0:4]}
  %x = f32[8,4]{1,0} negate(%b)
  %y = f32[1,4]{1,0} slice(%b), slice={[0:1], [0:4]}
  ROOT %t = (f32[1,1,4]{2,1,0}, f32[8,4]{1,0}) tuple(%s, %x)
}
ENTRY %main (p: f32[8,4], q: f32[8,4]) -> f32[1,1,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[8,4]{1,0} parameter(1)
  %f = (f32[1,1,4]{2,1,0}, f32[8,4]{1,0}) fusion(%p, %q), kind=kLoop, calls=%fused
  %g = f32[1,1,4]{2,1,0} get-tuple-element(%f), index=0
  %c = (f32[1,1,4]{2,1,0}, f32[1,1,4]{2,1,0}) collective-permute-start(%g), channel_id=1
  ROOT %d = f32[1,1,4]{2,1,0} collective-permute-done(%c)
}
"""
    layer, whole = 16, 128
    expected = [("fusion", 2 * layer + 2 * whole), ("collective-permute-start", 2 * layer)]
    assert hlo.kernels(text) == expected
    assert hlo.collectives(text) == [("collective-permute", layer)]


@pytest.mark.parametrize(
    ("part", "layers", "width"), [("stencil", 3, 8), ("optimizer", 2, 8), ("training", 2, 8)]
)
def test_speed_measures_and_draws(part, layers, width):
    row = {"part": part, "layers": layers, "width": width}
    row |= speed.PARTS[part][0](layers, width, 3)
    assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    assert all(ms > 0 for ms in row["ms"])
    figure = speed.plot([{**row, "width": 64}], "some device")
    [line] = [line for ax in figure.axes for line in ax.containers]
    assert line[0].get_xydata().tolist() == [[layers, row["ratio"]]]
    assert "some device" in figure._suptitle.get_text()
    speed.plt.close(figure)
    assert speed.table([row]).row_count == 1


def test_training_has_the_proportion_of_nanochat():
    _, params, tokens = speed.model_of(8, 64)
    count = sum(leaf.size for leaf in speed.jax.tree.leaves(params))
    assert tokens.size / count == pytest.approx(524_288 / 1.38e9, rel=0.2)


def test_the_table_in_the_documentation_is_what_was_compiled():
    page = pathlib.Path(__file__).parents[1] / "docs" / "sharding.md"
    assert compiled_cost.markdown(results.read("compiled_cost")) in page.read_text()


def test_the_ratios_in_the_documentation_are_what_was_measured():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "sharding.md").read_text()
    rows = results.read("speed")["rows"]
    ratios = {part: [row["ratio"] for row in rows if row["part"] == part] for part in speed.PARTS}
    training = ratios["training"]
    assert f"takes {min(training):.3f} to {max(training):.3f} times as long" in page
    assert f"up to {max(ratios['stencil']):.2f} times for the largest" in page
    assert f"and up to {max(ratios['optimizer']):.1f} times where it does not" in page.replace(
        "\n", " "
    )


def test_the_time_of_a_measurement_in_the_documentation_is_what_was_measured():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    rows = results.read("monitor_time")["rows"]
    ratios = {row["monitor"]: f"{100 * row['ratio']:.2f} %" for row in rows}
    assert f"takes {ratios['one measurement']} of the time of ten steps" in page
    assert f"or {ratios['one measurement, full']}\nwith `full=True`" in page


@pytest.mark.parametrize("name", compile_time.models(2, 5))
def test_what_is_written_by_hand_is_the_window(name):
    """Else compile times, and times of steps, would compare different things."""
    model = compile_time.models(2, 5)[name]
    keys = iter(jax.random.split(jax.random.key(0), 100))
    updates = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), model.params)
    ours, _ = (tx := compile_time.arms(model)["smooth_over_depth"]).update(
        updates, tx.init(updates)
    )
    chex.assert_trees_all_close(ours, model.by_hand(updates), rtol=1e-5, atol=1e-6)


def test_compile_times_are_ratios_to_what_is_by_hand():
    trees = compile_time.models(2, 3)
    ratios, unrolled = compile_time.measure(trees, 1)
    assert set(ratios) == set(trees)
    for of_arms in ratios.values():
        assert (
            set(of_arms) == {*compile_time.BESIDE, *compile_time.BESIDE.values()} == set(unrolled)
        )
        for by_hand in compile_time.BESIDE.values():
            assert of_arms[by_hand]["all"] == 1
        for of_stages in of_arms.values():
            assert sum(of_stages[stage] for stage in ("trace", "lower", "compile")) > 0


def test_the_page_says_what_compiling_takes():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "sharding.md").read_text()
    kept = results.read("compile_time")
    assert compile_time.markdown(kept["ratios"]) in page
    without, ours = (round(kept["unrolled"][arm]) for arm in ("AdamW", "ds.adamw"))
    said = re.search(
        r"blocks takes\s+(\d+) times as long to compile as that of the same blocks stacked, "
        r"and with `ds.adamw` (\d+) times",
        page,
    )
    assert said.groups() == (str(without), str(ours))


def test_the_page_says_what_a_step_takes():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "sharding.md").read_text()
    ratios = results.read("step_time")["ratios"]
    said = re.search(
        r"step takes (.*) times as long with smoothing, (.*) times with.*\n(.*) times", page
    )
    named = ("standard", "by hand", "norm_preserving")
    assert said.groups() == tuple(str(ratios[name]) for name in named)


def test_times_of_steps_are_ratios_to_the_unsmoothed_step():
    ratios = step_time.measure(8, 1)
    assert ratios["unsmoothed"] == 1
    assert {"by hand", *step_time.VARIANTS} < set(ratios)


def test_the_page_on_layers_as_their_own_says_what_was_measured():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "per_layer.md").read_text()
    kept = results.read("per_layer")
    assert per_layer.markdown(kept["differences"]) in page
    said = re.search(r"takes\n([\d.]+) to ([\d.]+) times as long to compile", page)
    compiled = [of["compile"] for of in kept["costs"].values()]
    assert list(map(float, said.groups())) == [min(compiled), max(compiled)]
    assert max(compiled) <= 1.3
    said = re.search(r"([\d.]+) times as large for `contrib.muon`, and ([\d.]+) times", page)
    states = [f"{kept['costs'][name]['state']:.2f}" for name in ("muon", "adafactor")]
    assert list(said.groups()) == states


def test_the_page_of_optimizers_shows_the_kept_result_of_eformer():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "optimizers.md").read_text()
    kept = results.read("per_layer_eformer")
    assert per_layer.markdown(kept["differences"]) in page
    assert f"with eformer {kept['eformer']}.*" in page
    assert kept["differences"].keys() == per_layer.OF_EFORMER.keys()


def test_the_page_on_sharding_says_whether_anything_has_run_on_a_gpu():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "sharding.md").read_text()
    kept = results.read("gpu")
    assert ("Nothing on this page has run on a GPU" in page) == (kept is None)
    if kept:
        assert gpu.cost_table(kept) in page
        assert f"*{kept['device']}; JAX {kept['jax']}; {kept['date']}*" in page


def test_the_page_on_signal_says_how_many_micro_batches_it_takes():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "signal.md").read_text()
    rows = results.read("signal_samples")["rows"]
    assert samples.markdown(rows) in page
    widths = {(row["share"], row["micro_batches"]): row["half_width"] for row in rows}
    assert max(widths[0.05, 16], widths[0.01, 64]) < 0.1  # as the page advises
    assert min(row["held"] for row in rows) >= 0.92


def test_layers_as_their_own_are_measured():
    params = per_layer.drawn(0, 3)
    ours = ds.per_layer(optax.lamb(0.1), depth=per_layer.RULES)
    seconds, numbers = per_layer.cost(ours, params)
    assert seconds > 0
    assert numbers == 2 * sum(leaf.size for leaf in jax.tree.leaves(params)) + 2  # counts
    theirs = per_layer.unrolled(per_layer.drawn(1, 4))
    assert per_layer.difference(theirs, theirs) == 0
    assert per_layer.difference(
        jax.tree.map(lambda leaf: 1.5 * leaf, theirs), theirs
    ) == pytest.approx(0.5)
