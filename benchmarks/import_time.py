"""How long ``import depthsmooth`` takes on top of ``import optax``: under 50 ms is promised.

``python -m benchmarks.import_time`` imports both in fresh interpreters and prints medians. The
garbage that JAX leaves is collected in between: that alone takes 40 ms, and falls due at the next
import, whosever it is.
"""

import os
import statistics
import subprocess
import sys

from benchmarks import results

CODE = """
import gc, time
start = time.perf_counter()
import optax
imported = time.perf_counter() - start
gc.collect()
start = time.perf_counter()
import depthsmooth
print(imported, time.perf_counter() - start)
"""
REPEATS = 15


def main() -> None:
    """Measures, prints and writes."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(REPEATS):
        printed = subprocess.run(
            [sys.executable, "-c", CODE],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        ).stdout
        times.append([1e3 * float(seconds) for seconds in printed.split()])
    optax, depthsmooth = (statistics.median(column) for column in zip(*times, strict=True))
    result = {
        "optax_ms": round(optax, 1),
        "depthsmooth_on_top_ms": round(depthsmooth, 1),
        "repeats": REPEATS,
    }
    results.write("import_time", result)
    print(f"import optax {optax:.0f} ms, depthsmooth on top {depthsmooth:.1f} ms (promised: 50)")


if __name__ == "__main__":
    main()
