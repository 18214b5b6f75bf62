"""Complete optimizers with smoothing in its place."""

from depthsmooth.optimizers.alias import adamw, lion, muon, normuon, sgd
from depthsmooth.optimizers.muon import muon_dimension_numbers

__all__ = ["adamw", "lion", "muon", "muon_dimension_numbers", "normuon", "sgd"]
