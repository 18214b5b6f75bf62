"""How long ``trace_depth`` takes on a thousand leaves, beyond tracing the function: 1 s promised.

``python -m benchmarks.walk_time`` prints medians, for a model that scans over its layers and one
that has leaves for every layer, forward and under ``grad``.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

import depthsmooth as ds
from benchmarks import results

REPEATS = 5

Weights = Mapping[str, jax.Array]
BATCH = jax.ShapeDtypeStruct((8, 16), "float32")


def block(x: jax.Array, weights: Weights) -> jax.Array:
    """One layer: each of its weights in turn."""
    for kernel in weights.values():
        x = x + jax.nn.relu(x @ kernel)
    return x


def scanned(params: Weights, x: jax.Array) -> jax.Array:
    """Layers that are stacked."""
    return jax.lax.scan(lambda x, weights: (block(x, weights), None), x, params)[0].sum()


def unrolled(params: Mapping[str, Weights], x: jax.Array) -> jax.Array:
    """Layers with leaves of their own."""
    for weights in params.values():
        x = block(x, weights)
    return jnp.sum(x)


def kernels(count: int, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Weights of which only the shape is known."""
    return {f"w_{i}": jax.ShapeDtypeStruct(shape, "float32") for i in range(count)}


MODELS: dict[str, tuple[Callable[..., jax.Array], object]] = {
    "1,000 scanned leaves": (scanned, kernels(1000, 24, 16, 16)),
    "96 layers of 12 leaves": (
        unrolled,
        {f"block_{i}": kernels(12, 16, 16) for i in range(96)},
    ),
}


def beyond_tracing(fn: Callable[..., object], params: object) -> float:
    """The seconds that ``trace_depth`` takes, less those of ``jax.make_jaxpr``.

    The function is one that has been traced before, so that differentiating it, which takes
    far longer than the walk and varies, is in neither.
    """
    traced = jaxpr_as_fun(jax.make_jaxpr(fn)(params, BATCH))

    def again(params: object, x: jax.Array) -> object:
        return traced(*jax.tree.leaves(params), x)

    differences = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.make_jaxpr(again)(params, BATCH)
        between = time.perf_counter()
        depth = ds.trace_depth(again, params, BATCH)
        differences.append(time.perf_counter() - between - (between - start))
        assert len(depth) == len(jax.tree.leaves(params))
    return statistics.median(differences)


def main() -> None:
    """Measures, prints and writes."""
    seconds = {}
    for name, (fn, params) in MODELS.items():
        seconds[name] = round(beyond_tracing(fn, params), 2)
        seconds[f"{name}, grad"] = round(beyond_tracing(jax.grad(fn), params), 2)
    result = {
        "seconds_beyond_tracing": seconds,
        "repeats": REPEATS,
    }
    results.write("walk_time", result)
    for name, value in seconds.items():
        print(f"{name:30}{value:6.2f} s (promised: 1)")


if __name__ == "__main__":
    main()
