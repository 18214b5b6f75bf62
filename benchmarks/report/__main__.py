"""Command line: writes RESULTS.md and ``docs/results/*.png``."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from benchmarks import results
from benchmarks.report import why
from benchmarks.report.document import document
from benchmarks.report.evidence import gather
from benchmarks.report.pictures import draw
from depthsmooth.demo.results import replacing

ROOT = pathlib.Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the results and writes the page."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    options.add_argument("--results", type=pathlib.Path, default=results.DIRECTORY / "quality")
    options.add_argument("--out", type=pathlib.Path, default=ROOT, help="where RESULTS.md goes")
    given = options.parse_args(arguments)
    evidence, begun = gather(given.results)
    if not evidence:
        options.error(f"{given.results} holds no complete study: run python -m benchmarks.quality")
    signals = why.read(given.results.parent / "signal")
    pictures = draw(evidence, signals, given.out / "docs" / "results")
    with replacing(given.out / "RESULTS.md") as file:
        file.write(document(evidence, begun, pictures, signals).encode())
    print(f"Written: {given.out / 'RESULTS.md'}, of {len(evidence)} complete studies.")


if __name__ == "__main__":
    main()
