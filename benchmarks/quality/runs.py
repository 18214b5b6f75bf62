"""Runs and their results: a file of JSON lines, each of which is added when its run has ended."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks.quality.arms import Arm


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """What a run is told from others by.

    Attributes:
      layers: of the model.
      steps: of training.
      arm: how it trains.
      rate: what the task's learning rate is multiplied by.
      seed: of parameters, batches and examination.
      observed: whether updates, gradients and hidden states are measured.
    """

    layers: int
    steps: int
    arm: Arm
    rate: float
    seed: int
    observed: bool = False

    def options(self) -> str:
        """The command-line options that repeat it."""
        given = f"--arm {self.arm} --rate {self.rate:g} --seed {self.seed} --layers {self.layers}"
        return f"{given} --steps {self.steps}" + " --observe" * self.observed

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "arm": str(self.arm)}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Run:
        """The run of a line in a file."""
        fields = {field.name: line[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**fields, "arm": Arm.named(line["arm"])})


class Results:
    """The results of one task: reads those that are there, and adds others.

    A line that a killed process has left half-written is dropped.

    Attributes:
      path: of the file.
      lines: from each run to its line.
    """

    def __init__(self, path: pathlib.Path, data: str | None = None) -> None:
        """Reads the file, if there is one; of any data if none is given.

        Raises:
          ValueError: if it is no such file, or of other data.
        """
        self.path = path
        self.lines: dict[Run, dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        self._half_written = whole if whole < len(content) else None
        for number, text in enumerate(content[:whole].splitlines(), 1):
            try:
                line = json.loads(text)
                self.lines[Run.from_json(line)] = line
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}, is no result ({error!r}): remove it, or name another "
                    "directory with --out."
                ) from None
            if data not in (None, line["data"]):
                raise ValueError(
                    f"{path} holds results of other data: name another directory with --out."
                )

    def add(self, run: Run, line: Mapping[str, Any]) -> None:
        """Appends a line, and sees that it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {**run.to_json(), **line}
        text = json.dumps(_finite(content), allow_nan=False) + "\n"
        if self._half_written is not None:
            os.truncate(self.path, self._half_written)
            self._half_written = None
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.lines[run] = content

    def loss(self, run: Run) -> float:
        """The last of a run; inf where training diverged."""
        value = self.lines[run]["curves"]["loss"][-1]
        return math.inf if value is None or not math.isfinite(value) else float(value)


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: what diverged is null there."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
