"""When to apply an operator as shifts, and when as a matrix: time against an elementwise scale.

``python -m benchmarks.large_radius`` prints medians of ratios within rounds, for operators of more
and more diagonals, and the least number from which the matrix stays faster. The library changes
from one to the other at the same number everywhere, so that a result does not depend on a device.
"""

import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from depthsmooth import stencil
from depthsmooth.depth.leaves import Axes

ROUNDS = 7
ELEMENTS = 12_000_000
LAYERS = (12, 24, 96)
RADII = (1, 2, 3, 4, 6, 8, 16, 1000)

Layout = tuple[list[jax.Array], list[Axes], list[range]]


def layouts(layers: int) -> dict[str, Layout]:
    """The same number of elements, held in different ways."""
    rows, width = ELEMENTS // layers // 256, 256
    ones = jnp.ones
    return {
        "axis 0": ([ones((layers, rows, width))], [(0,)], [range(layers)]),
        "axis 1": ([ones((rows, layers, width))], [(1,)], [range(layers)]),
        "axis 0, bfloat16": ([ones((layers, rows, width), "bfloat16")], [(0,)], [range(layers)]),
        "unrolled": (
            [ones((rows, width))] * layers,
            [()] * layers,
            [range(k, k + 1) for k in range(layers)],
        ),
    }


def banded(layers: int, radius: int) -> stencil.Stencil:
    """An operator of random weights."""
    matrix = np.random.default_rng(0).normal(size=(layers, layers))
    return stencil.stencil_of(np.triu(np.tril(matrix, radius), -radius))


def compiled(
    operator: stencil.Stencil, layout: Layout, most_shifts: int
) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """The update, with that many shifts at most."""
    arrays, axes, layers = layout

    def update(arrays: list[jax.Array], zero: jax.Array) -> list[jax.Array]:
        return stencil.apply(operator, arrays, axes, layers, zero)

    with mock.patch.object(stencil, "_MOST_SHIFTS", most_shifts):
        fn = jax.jit(update).lower(arrays, jnp.asarray(0)).compile()
    return lambda arrays: fn(arrays, jnp.asarray(0))


def seconds(fn: Callable[[list[jax.Array]], list[jax.Array]], arrays: list[jax.Array]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    jax.block_until_ready(fn(arrays))
    return time.perf_counter() - start


def measure(layers: int, name: str, layout: Layout) -> list[dict[str, object]]:
    """For each radius the medians of both times, over that of a scale."""
    scale = jax.jit(lambda arrays: [1.5 * array for array in arrays])
    rows: list[dict[str, object]] = []
    for radius in [r for r in RADII if r < layers] + [layers - 1]:
        operator = banded(layers, radius)
        ways = {
            "shifts": compiled(operator, layout, 1000),
            "matrix": compiled(operator, layout, 0),
        }
        for fn in (scale, *ways.values()):
            seconds(fn, layout[0])
        rounds = []
        for _ in range(ROUNDS):
            unit = seconds(scale, layout[0])
            rounds.append({way: seconds(fn, layout[0]) / unit for way, fn in ways.items()})
        medians = {way: round(statistics.median(r[way] for r in rounds), 2) for way in ways}
        rows.append(
            {
                "layers": layers,
                "layout": name,
                "diagonals": len(operator.offsets),
                **medians,
                "radius": radius,
            }
        )
    return rows


def crossover(rows: list[dict[str, object]]) -> int | None:
    """The least number of diagonals from which on the matrix is faster."""
    slower = [k for k, row in enumerate(rows) if row["shifts"] <= row["matrix"]]
    rest = rows[slower[-1] + 1 :] if slower else rows
    return int(str(rest[0]["diagonals"])) if rest else None


def main() -> None:
    """Measures, prints and writes."""
    rows, crossovers = [], {}
    for layers in LAYERS:
        for name, layout in layouts(layers).items():
            measured = measure(layers, name, layout)
            rows += measured
            crossovers[f"{layers} layers, {name}"] = crossover(measured)
            for row in measured:
                print(
                    f"{layers:3} layers  {name:17} {row['diagonals']:4} diagonals  "
                    f"shifts {row['shifts']:7.2f}  matrix {row['matrix']:7.2f}"
                )
    result = {
        "unit": "the time of an elementwise scale of the same arrays",
        "rows": rows,
        "matrix_is_faster_from_diagonals": crossovers,
        "the_library_changes_above": stencil._MOST_SHIFTS,
        "elements": ELEMENTS,
        "rounds": ROUNDS,
    }
    results.write("large_radius", result)
    for name, number in crossovers.items():
        print(f"{name}: the matrix is faster from {number or 'no number of'} diagonals on")


if __name__ == "__main__":
    main()
