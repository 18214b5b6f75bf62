"""Where results are kept: one JSON file for each benchmark, with what it was measured on."""

import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

DIRECTORY = pathlib.Path(__file__).parent / "results"


def write(name: str, measured: Mapping[str, object]) -> None:
    """Writes the whole file, or leaves the one that is there."""
    environment = {
        "backend": jax.default_backend(),
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
