"""Command line: measures tasks that the quality benchmark has tuned, and adds to a file of each.

``samples`` is no task: it tells how many micro-batches it takes, on made-up gradients.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

import tqdm

from benchmarks import results
from benchmarks.quality import plan
from benchmarks.quality.arms import Arm, Base
from benchmarks.quality.runs import Results
from benchmarks.signal import samples
from benchmarks.signal.kept import SEEDS, Measured
from benchmarks.signal.training import measure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing; the same command goes on."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.signal", description=__doc__)
    options.add_argument("task", choices=[*plan.TASKS, "samples"])
    options.add_argument("--results", type=pathlib.Path, default=results.DIRECTORY)
    given = options.parse_args(arguments)
    if given.task == "samples":
        results.write("signal_samples", {"rows": samples.rows()})
        return
    path = given.results / "quality" / f"{given.task}.jsonl"
    try:
        rates = tuned(given.task, Results(path))
    except ValueError as error:
        options.error(str(error))
    kept = Measured(given.results / "signal" / f"{given.task}.jsonl")
    task = plan.build(plan.Source(given.task))
    wanted = [(base, seed) for base in rates for seed in SEEDS if not kept.has(base, seed)]
    for base, seed in tqdm.tqdm(wanted, unit="run"):
        kept.add(base, seed, rates[base], measure(task, base, rates[base], seed))


def tuned(task: str, kept: Results) -> dict[Base, float]:
    """The best rate of each base optimizer in the first study that tunes it.

    Raises:
      ValueError: if none is complete.
    """
    for study in plan.studies(task):
        if len(study.rates) > 1:
            arms = [Arm(base) for base in study.bases]
            if all(study.is_tuned(arm, kept) for arm in arms):
                return {arm.base: study.rate(arm, kept) for arm in arms}
    raise ValueError(
        f"{kept.path} does not tell the best rates of {task}: python -m benchmarks.quality {task} "
        "finds them."
    )


if __name__ == "__main__":
    main()
