"""Mixes the updates of neighbouring layers: Gradient Smoothing for Optax."""

from depthsmooth.finding import AmbiguousDepthError, find_depth
from depthsmooth.layout import Depth, DepthNotFoundError, Leaf, Track
from depthsmooth.operators import window
from depthsmooth.places import Place
from depthsmooth.rules import Rule, interleaved, numbered, sequence
from depthsmooth.tracing import trace_depth
from depthsmooth.transform import SmoothOverDepthState, smooth_over_depth

__version__ = "0.1.0"

__all__ = [
    "AmbiguousDepthError",
    "Depth",
    "DepthNotFoundError",
    "Leaf",
    "Place",
    "Rule",
    "SmoothOverDepthState",
    "Track",
    "find_depth",
    "interleaved",
    "numbered",
    "sequence",
    "smooth_over_depth",
    "trace_depth",
    "window",
]
