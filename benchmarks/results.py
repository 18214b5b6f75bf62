"""Where results are kept: one JSON file for each benchmark, with what it was measured on.

``python -m benchmarks.results OLD.json NEW.json`` prints the ratios of the figures of two runs. It
refuses to compare what was measured on different devices.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

DIRECTORY = pathlib.Path(__file__).parent / "results"


def device() -> str:
    """What times are measured on: comparable if it is the same."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = f"{_processor()}, {os.cpu_count()} cores"
    return f"{len(devices)} × {devices[0].platform}: {kind}"


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.M)
    return names[0] if names else platform.processor() or platform.machine()


def write(name: str, measured: Mapping[str, object], on: str | None = None) -> None:
    """Writes the whole file, or leaves the one that is there; ``on`` a device that is not here."""
    environment = {
        "device": on or device(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    scratch = DIRECTORY / f"{name}.json.part"
    scratch.write_text(json.dumps({**measured, **environment}, indent=1) + "\n")
    os.replace(scratch, DIRECTORY / f"{name}.json")


def read(name: str) -> dict[str, Any] | None:
    """What was written last; None if nothing was."""
    path = DIRECTORY / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a new result, each over that of an old one.

    Raises:
      ValueError: if they were measured on different devices.

    Example:
      >>> compare({"device": "a", "step": {"ms": 2.0}}, {"device": "a", "step": {"ms": 3.0}})
      {'step/ms': 1.5}
    """
    if old.get("device") != new.get("device"):
        raise ValueError(
            f"one was measured on {old.get('device')}, the other on {new.get('device')}: measure "
            "both on the same device"
        )
    before, after = dict(_figures(old)), dict(_figures(new))
    return {path: after[path] / before[path] for path in after if before.get(path)}


def _figures(node: object, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a result, by where they are."""
    pairs = node.items() if isinstance(node, Mapping) else ()
    if isinstance(node, list):
        pairs = ((str(index), item) for index, item in enumerate(node))
    for key, item in pairs:
        yield from _figures(item, f"{path}/{key}" if path else key)
    if isinstance(node, int | float):
        yield path, float(node)


def main() -> None:
    """Compares two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    arguments = parser.parse_args()
    try:
        ratios = compare(*(json.loads(path.read_text()) for path in (arguments.old, arguments.new)))
    except (OSError, ValueError) as error:
        sys.exit(f"{arguments.old} and {arguments.new} cannot be compared: {error}")
    for path, ratio in ratios.items():
        print(f"{ratio:8.3f}  {path}")


if __name__ == "__main__":
    main()
