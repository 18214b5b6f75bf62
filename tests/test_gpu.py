"""The benchmark for a GPU: chooses on other seeds than it tests, keeps what it has, goes on."""

import dataclasses
import json
import sys

import pytest

from benchmarks import gpu, results


class Learner:
    """Knows the losses of all runs, and counts those that are asked for."""

    parameters, digest, compile_s, size = 7, "text", 0.5, gpu.TOY

    def __init__(self):
        self.asked = []

    def loss(self, arm, rate, seed):
        self.asked.append((arm, rate, seed))
        alpha, own = arm
        best = 2.0 / (own * (1 - alpha))  # the layers' rate is what counts
        return 1 + (rate - best) ** 2 / 100 + alpha + 0.001 * (seed % 7) + 0.1 * (own == 1)


def learnt(learner, before=None, is_over=lambda: False):
    return [json.loads(json.dumps(row)) for row in gpu.text(learner, before or {}, is_over)]


def test_rates_are_chosen_on_another_seed_than_those_that_test():
    learner = Learner()
    row = learnt(learner)[-1]
    tuning = [asked for asked in learner.asked if asked[2] == gpu.TUNING]
    assert learner.asked[: len(tuning)] == tuning
    assert [each[:1] for each in tuning[:4]] == [(gpu.BASE,)] * 4
    assert len(row["tried"]) == len(tuning) == 4 + 4 + 4
    names = ["AdamW", "the layers' own rate", "α = 0.1", "α = 0.2"]
    tested = [(name, seed) for seed in gpu.SEEDS for name in names]
    assert [tuple(one[:2]) for one in row["tested"]] == tested
    used = {one[:2] for one in learner.asked[len(tuning) :]}
    assert ((0.0, 1.0), 2.0) in used
    assert ((0.0, 0.5), 4.0) in used
    assert len(used) == 4


def test_it_goes_on_from_what_is_kept():
    whole = learnt(Learner())[-1]
    for cut in (0, 3, 11, 20):
        rows = learnt(Learner())
        again = Learner()
        assert learnt(again, rows[cut])[-1] == whole
        assert len(again.asked) == len(rows) - cut - 1


def test_when_time_is_over_three_seeds_are_tested():
    row = learnt(Learner(), is_over=lambda: True)[-1]
    assert {seed for _, seed, _ in row["tested"]} == {0, 1, 2}
    table = gpu.text_table({"text": row})
    assert "| 3 seeds |" in table
    assert table.count("\n") == 5


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--toy runs on a CPU" in capsys.readouterr().err


@pytest.mark.slow
def test_a_toy_runs_saves_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(gpu, "TOY", dataclasses.replace(gpu.TOY, steps=10))
    monkeypatch.setattr(sys, "argv", ["gpu", "--toy", "--minutes", "0"])
    gpu.main()
    kept = results.read("gpu_toy")
    assert {"bandwidth", "optimizer", "training", "text", "device", "jax"} <= set(kept)
    assert len(kept["text"]["tested"]) == 12
    table = capsys.readouterr().out
    assert "| bfloat16, " in table
    assert "| training step, " in table
    gpu.main()
    assert results.read("gpu_toy") == kept
