"""Results on disk: one JSON file, written whole after every run, and read back to resume."""

import contextlib
import dataclasses
import json
import math
import pathlib
import platform
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import jax
import optax

import depthsmooth
from depthsmooth.demo.training import Arm, Config, Run

FILE = "results.json"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` once it is whole, and is gone otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Results:
    """The finished runs of one experiment, in a directory.

    Attributes:
      path: the JSON file.
      config: what all the runs have in common.
      runs: the finished runs, by arm and seed.
    """

    def __init__(self, out: pathlib.Path, config: Config, *, resume: bool) -> None:
        """Opens the directory and reads what it holds.

        Raises:
          ValueError: if nothing can be written there; if it holds results and
            ``resume`` is False; if they are of another experiment or damaged.
        """
        self.path = out / FILE
        self.config = config
        self.runs: dict[tuple[Arm, int], Run] = {}
        _check_writable(out)
        if not self.path.exists():
            return
        if not resume:
            raise ValueError(
                f"--out {out} holds the results of an earlier run. Add --resume to go on from "
                "them, or name another directory."
            )
        self._read()

    def add(self, run: Run) -> None:
        """Keeps a finished run, also on disk."""
        self.runs[run.arm, run.seed] = run
        self.write()

    def write(self, findings: dict[str, object] | None = None) -> None:
        """Writes all runs, with what was found in them once that is known."""
        content = {
            "config": dataclasses.asdict(self.config),
            "versions": {
                "depthsmooth": depthsmooth.__version__,
                "jax": jax.__version__,
                "optax": optax.__version__,
                "python": platform.python_version(),
            },
            "device": jax.devices()[0].device_kind,
            "findings": findings,
            "runs": [dataclasses.asdict(run) for run in self.runs.values()],
        }
        with replacing(self.path) as file:
            file.write(json.dumps(_finite(content), indent=1, allow_nan=False).encode())

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            config = Config(**content["config"])
            runs = [Run(**{**_with_nan(run), "arm": Arm(**run["arm"])}) for run in content["runs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} can't be read as results ({error}). Move it away, or name another "
                "directory with --out."
            ) from None
        if config != self.config:
            raise ValueError(
                f"{self.path} is of another experiment: {_differences(config, self.config)}. Give "
                "the same options to go on from it, or name another directory with --out."
            )
        self.runs = {(run.arm, run.seed): run for run in runs}


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: what diverged is null there."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: object) -> Any:
    """The inverse of :func:`_finite` for a run, in which nothing else is null."""
    if isinstance(value, Mapping):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def _check_writable(out: pathlib.Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} can't be written: it is a file. Name a directory.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(
            f"--out {out} can't be written: {error.strerror}. Name a directory that can."
        ) from None


def _differences(theirs: Config, ours: Config) -> str:
    pairs = (
        (field.name, getattr(theirs, field.name), getattr(ours, field.name))
        for field in dataclasses.fields(Config)
    )
    return ", ".join(f"its {name} is {old}, not {new}" for name, old, new in pairs if old != new)
