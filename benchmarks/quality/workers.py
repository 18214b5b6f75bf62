"""Processes that make runs, each on a core of its own."""

from __future__ import annotations

import concurrent.futures
import datetime
import multiprocessing
import os
import pathlib
import platform
import signal
import tempfile
import threading
from typing import Any

import jax
import optax

import depthsmooth
from benchmarks import results
from benchmarks.quality.plan import Source, build
from benchmarks.quality.runs import Run
from benchmarks.quality.training import train


def pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Processes with one core each, which is faster here than all cores for each run."""
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in range(workers):
        cores.put(core)
    return concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (cores,))


def _begin(cores: multiprocessing.Queue[int]) -> None:
    """Ties a process to one core and to the life of its parent."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    cache = pathlib.Path(tempfile.gettempdir()) / "depthsmooth-quality"
    jax.config.update("jax_compilation_cache_dir", str(cache))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def line(source: Source, run: Run) -> dict[str, Any]:
    """Makes a run: what it measured, and what it takes to repeat it."""
    task = build(source, run.layers, run.steps)
    curves, seconds = train(task, run.arm, run.rate, run.seed, observed=run.observed)
    return {
        "data": task.data,
        "curves": {
            name: [float(f"{value:.7g}") for value in curve] for name, curve in curves.items()
        },
        "seconds": round(seconds, 3),
        "command": f"python -m benchmarks.quality {source.options()} {run.options()}",
        "date": datetime.date.today().isoformat(),
        "device": results.device(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "depthsmooth": depthsmooth.__version__,
        "python": platform.python_version(),
    }
