"""Command line: makes the runs of a task that are missing, and adds each to its file."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence

import tqdm

from benchmarks import results
from benchmarks.quality import plan, workers
from benchmarks.quality.arms import Arm
from benchmarks.quality.runs import Results, Run

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the missing runs of a task, or repeats one; returns the exit status."""
    options = _parser()
    given = options.parse_args(arguments)
    for name, task in (("text", "text"), ("cifar100", "digits")):
        if getattr(given, name) and given.task != task:
            options.error(f"--{name} is for {task}, not for {given.task}")
    if not given.arm and (given.layers or given.steps or given.observe):
        options.error("--layers, --steps and --observe are for one run: give its --arm, too")
    source = plan.Source(given.task, given.text, given.cifar100)
    try:
        task = plan.build(source, given.layers, given.steps)
        if given.arm:
            arm = Arm.named(given.arm)
            run = Run(task.layers, task.steps, arm, given.rate, given.seed, given.observe)
            return _repeat(source, run)
        kept = Results(_directory(given) / f"{source.name}.jsonl", task.data)
    except ValueError as error:
        options.error(str(error))
    return _fill(source, kept, given.quick, given.workers)


def _repeat(source: plan.Source, run: Run) -> int:
    """Prints the line of one run."""
    with workers.pool(1) as pool:
        print(json.dumps({**run.to_json(), **pool.submit(workers.line, source, run).result()}))
    return 0


def _fill(source: plan.Source, kept: Results, quick: bool, processes: int) -> int:
    """Makes the runs that are missing, on all workers."""
    studies = plan.studies(source.name, quick)
    expected = sum(study.expected() * study.layers * study.steps for study in studies)
    done = sum(run.layers * run.steps for run in kept.lines)
    print(f"{source.name}: {len(kept.lines)} runs are in {kept.path}.")
    if not quick and source.name in (taken := _hours()):
        print(f"All that the repository has took {taken[source.name]}.")
    bar = tqdm.tqdm(total=max(expected, done), initial=done, unit="layer steps", unit_scale=True)
    with bar, workers.pool(processes) as pool:
        try:
            while missing := {run for study in studies for run in study.missing(kept)}:
                futures = {pool.submit(workers.line, source, run): run for run in _ordered(missing)}
                for future in concurrent.futures.as_completed(futures):
                    run = futures[future]
                    kept.add(run, future.result())
                    bar.set_postfix_str(str(run.arm), refresh=False)
                    bar.update(run.layers * run.steps)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
            print(f"\nInterrupted: {len(kept.lines)} runs are kept. The same command goes on.")
            return INTERRUPTED
    print(f"All runs are in {kept.path}: python -m benchmarks.report makes RESULTS.md of them.")
    return 0


def _ordered(runs: Iterable[Run]) -> list[Run]:
    """One run of each program first, which compiles it for all, then program by program."""

    def program(run: Run) -> tuple[object, ...]:
        return run.layers, run.steps, run.observed, run.arm.kind

    ordered = sorted(runs, key=lambda run: (*program(run), run))
    firsts = {program(run): run for run in reversed(ordered)}
    return list(dict.fromkeys([*reversed(firsts.values()), *ordered]))


def _directory(given: argparse.Namespace) -> pathlib.Path:
    out: pathlib.Path | None = given.out
    return out or results.DIRECTORY / ("quick" if given.quick else "quality")


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n  ".join(
            ["what the results in the repository took:"]
            + [f"{name:10} {taken}" for name, taken in _hours().items()]
        ),
    )
    add = options.add_argument
    add("task", choices=plan.TASKS)
    add("--quick", action="store_true", help="a small model and few seeds: does it run?")
    add("--workers", type=_positive, default=os.cpu_count(), help="runs at a time; all cores")
    add("--out", type=pathlib.Path, help="directory of the results, benchmarks/results/quality")
    add("--text", type=pathlib.Path, help="text: a file or directory, not the standard library")
    add("--cifar100", type=pathlib.Path, help="digits: the directory of CIFAR-100's python files")
    one = options.add_argument_group("one run alone, whose line is printed and not kept")
    one.add_argument("--arm", help="such as adamw/standard/proj/0.2/shuffled")
    one.add_argument("--rate", type=float, default=1.0, help="factor of the learning rate")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--layers", type=_positive)
    one.add_argument("--steps", type=_positive)
    one.add_argument(
        "--observe", action="store_true", help="measure updates and hidden states, too"
    )
    return options


def _hours() -> dict[str, str]:
    """What the results that are in the repository took, as far as they can be read."""
    taken = {}
    for path in sorted((results.DIRECTORY / "quality").glob("*.jsonl")):
        with contextlib.suppress(ValueError):
            lines = Results(path).lines.values()
            hours = sum(line["seconds"] for line in lines) / 3600
            taken[path.stem] = f"{hours:.1f} hours of one core, in {len(lines)} runs"
    return taken


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number of at least 1")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())
