"""What was measured over training: a file of JSON lines, one for each run."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import results
from benchmarks.quality.arms import Base

SEEDS = tuple(range(5))
"""Those that are measured, all of which have to be there for anything to be told."""


class Measured:
    """The measurements of one task: reads those that are there, and adds others.

    Attributes:
      path: of the file.
      lines: by base optimizer and seed.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Reads the file, if there is one; a line that was half written is left out."""
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self._whole = content[: content.rfind(b"\n") + 1]
        lines = map(json.loads, self._whole.splitlines())
        self.lines: dict[tuple[Base, int], dict[str, Any]] = {
            (line["base"], line["seed"]): line for line in lines
        }

    def of(self, base: Base) -> list[dict[str, Any]]:
        """The lines of all seeds; none while some are missing."""
        if not all(self.has(base, seed) for seed in SEEDS):
            return []
        return [self.lines[base, seed] for seed in SEEDS]

    def has(self, base: Base, seed: int) -> bool:
        """Whether a run is there."""
        return (base, seed) in self.lines

    def add(self, base: Base, seed: int, rate: float, times: Sequence[dict[str, Any]]) -> None:
        """Writes the file with one more run, whole or not at all."""
        line = {
            "base": base,
            "seed": seed,
            "rate": rate,
            "times": list(times),
            "device": results.device(),
            "jax": jax.__version__,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._whole += json.dumps(line).encode() + b"\n"
        scratch = self.path.with_suffix(".part")
        scratch.write_bytes(self._whole)
        os.replace(scratch, self.path)
        self.lines[base, seed] = line
