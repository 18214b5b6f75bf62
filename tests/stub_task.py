"""The quality benchmark with a task that trains at once, in the place of the sequences.

``python -m tests.stub_task reversal`` takes the options of ``python -m benchmarks.quality``.
"""

import sys
import types

import jax
import jax.numpy as jnp

import depthsmooth as ds
from benchmarks.quality import plan
from benchmarks.quality.__main__ import main
from benchmarks.quality.task import Task


class Stub(Task):
    """Layers of two numbers each, whose sum is to be what a key draws."""

    rates = types.MappingProxyType({"adamw": 0.1})
    data = "stub"

    def __init__(self, layers=5, steps=10):
        super().__init__(layers, steps)
        params = jax.eval_shape(self.init, jax.random.key(0))
        self.depth = ds.Depth.from_rules({"layers": 0}).resolve(params)

    def init(self, key):
        return {"layers": jax.random.normal(key, (self.layers, 2))}

    def loss(self, params, key):
        return ((params["layers"].sum(0) - jax.random.normal(key, (2,))) ** 2).mean()

    def evaluate(self, params, key, part):
        return {"loss": self.loss(params, key)}

    def states(self, params, key):
        return jnp.cumsum(params["layers"], 0)


plan.TASKS["reversal"] = Stub  # in each process that makes runs, too: it imports this module

if __name__ == "__main__":
    sys.exit(main())
