"""Command line: trains AdamW, smoothed AdamW and its control on real text, and compares."""

import argparse
import contextlib
import os
import pathlib
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Never

try:
    import flax  # noqa: F401
    import matplotlib  # noqa: F401
    import rich.console
    import scipy  # noqa: F401
    import tqdm
except ModuleNotFoundError as missing:
    sys.exit(f"The demo needs {missing.name}, of the extra: python -m pip install -e '.[demo]'")

from depthsmooth.demo import report, text
from depthsmooth.demo.results import Results
from depthsmooth.demo.training import Arm, Config, Experiment, Run

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def parser() -> argparse.ArgumentParser:
    """The options, each with its help text."""
    options = argparse.ArgumentParser(
        prog="python -m depthsmooth.demo",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--layers", type=_positive, default=12, help="blocks in the transformer")
    add("--width", type=_positive, default=32, help="width of the stream; an even number")
    add("--steps", type=_positive, default=250, help="training steps in each run")
    add("--batch", type=_positive, default=16, help="windows in a batch")
    add("--context", type=_positive, default=32, help="bytes in a window")
    add("--seeds", type=_positive, default=4, help="runs of each arm; 2 or more give intervals")
    add(
        "--alpha",
        type=_alpha,
        nargs="+",
        default=[0.2],
        help="smoothing: the share of an update that is taken from the two neighbours; 0.2 is the "
        "published one, 0.1 or less what RESULTS.md recommends",
    )
    # Between 6e-3 and 1.2e-2, plain AdamW's best of 3e-3 to 2.4e-2 on seeds 10 and 11.
    add("--learning-rate", type=_positive_float, default=8e-3, help="AdamW's peak learning rate")
    add(
        "--text",
        type=pathlib.Path,
        help="a file or a directory to learn from, in place of the source of Python's "
        "standard library",
    )
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("depthsmooth-demo"),
        help="directory for results.json, loss.png and update-similarity.png",
    )
    add("--resume", action="store_true", help="go on from the finished runs in --out")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    options = parser()
    given = options.parse_args(arguments)
    out: pathlib.Path = given.out
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        if given.layers < 2:
            raise ValueError("--layers 1 leaves nothing to mix: give 2 or more.")
        if given.width % 2:
            raise ValueError(f"--width {given.width} must be even: the blocks have 2 heads.")
        corpus = text.load(given.text, given.context, given.out)
        config = Config(
            layers=given.layers,
            width=given.width,
            steps=given.steps,
            batch=given.batch,
            context=given.context,
            learning_rate=given.learning_rate,
            text=corpus.digest,
        )
        results = Results(out, config, resume=given.resume)
    except ValueError as error:
        options.error(str(error))
    alphas = list(dict.fromkeys(given.alpha))
    try:
        with _heeding() as heed:
            _compare(Experiment(config, corpus), results, alphas, given.seeds, heed)
    except KeyboardInterrupt:
        kept = (
            f"The finished runs ({len(results.runs)}) are in {results.path}: add --resume to go on."
        )
        print(f"\nInterrupted. {kept if results.runs else 'No run had finished: nothing is kept.'}")
        return INTERRUPTED
    finally:
        with contextlib.suppress(OSError):
            for folder in created:
                folder.rmdir()  # only succeeds while it is empty
    return 0


def _compare(
    experiment: Experiment,
    results: Results,
    alphas: Sequence[float],
    seeds: int,
    heed: Callable[[], None],
) -> None:
    """Makes the runs that are missing, then reports."""
    train, validation = len(experiment.text.train), len(experiment.text.validation)
    print(f"Learning from {train:,} bytes, validating on {validation:,}. Smoothed over depth:\n")
    print(experiment.depth)
    print(flush=True)
    wanted = [
        (arm, seed)
        for seed in range(seeds)
        for arm in [Arm(), *(Arm(alpha, control) for alpha in alphas for control in (False, True))]
    ]
    missing = [run for run in wanted if run not in results.runs]
    total = len(missing) * experiment.config.steps
    with tqdm.tqdm(total=total, unit="step", disable=not missing) as bar:
        for arm, seed in missing:
            bar.set_description(f"seed {seed}, {_describe(arm)}")
            results.add(_run(experiment, results, arm, seed, bar, heed))
    summary = report.Report(results.runs, alphas, seeds)
    summary.save_pictures(results.path.parent)
    results.write(summary.findings())
    print()
    console = rich.console.Console(width=None if sys.stdout.isatty() else 110)
    console.print(summary.table())
    console.print(summary.verdict(), markup=False, highlight=False)
    print(
        f"\nWritten to {results.path.parent}{os.sep}: results.json, loss.png, update-similarity.png"
    )


@contextlib.contextmanager
def _heeding() -> Iterator[Callable[[], None]]:
    """Gives what raises KeyboardInterrupt after a Ctrl-C that was lost.

    It is lost where it meets JAX's hook of the garbage collector, for hooks can't raise.
    """
    lost: list[int] = []

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        lost.append(number)
        raise KeyboardInterrupt

    def heed() -> None:
        if lost:
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield heed  # as in the background, where Ctrl-C is for others
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield heed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(
    experiment: Experiment,
    results: Results,
    arm: Arm,
    seed: int,
    bar: "tqdm.tqdm[Never]",
    heed: Callable[[], None],
) -> Run:
    """One run, told on the progress bar. A control takes its factor from its arm's run."""
    shrink = results.runs[Arm(arm.alpha), seed].shrink if arm.control else 1.0
    for outcome in experiment.run(arm, seed, shrink):
        heed()
        if isinstance(outcome, Run):
            return outcome
        bar.set_postfix(loss=f"{outcome:.3f}", refresh=False)
        bar.update()
    raise AssertionError("a run ends with its outcome")


def _describe(arm: Arm) -> str:
    if not arm.alpha:
        return "AdamW"
    return f"control of {arm.alpha:g}" if arm.control else f"smoothed {arm.alpha:g}"


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number of at least 1")
    return int(value)


def _positive_float(value: str) -> float:
    return _between(value, float("inf"), "a number above 0")


def _alpha(value: str) -> float:
    return _between(value, 1, "a number above 0 and below 1")


def _between(value: str, high: float, what: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(value) < high:
            return float(value)
    raise argparse.ArgumentTypeError(f"{value} is not {what}")


if __name__ == "__main__":
    status = main()
    if status == INTERRUPTED:
        # A compilation may still be running, and JAX's own teardown would crash under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
