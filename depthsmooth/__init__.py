"""Mixes the updates of neighbouring layers: Gradient Smoothing for Optax."""

from depthsmooth.finding import AmbiguousDepthError, find_depth
from depthsmooth.layout import Depth, DepthNotFoundError, Leaf, Track
from depthsmooth.operators import (
    compose,
    diffusion,
    ema,
    exponential,
    from_kernel,
    from_matrix,
    mean,
    operator_matrix,
    sharpen,
    shuffled,
    window,
)
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
    "compose",
    "diffusion",
    "ema",
    "exponential",
    "find_depth",
    "from_kernel",
    "from_matrix",
    "interleaved",
    "mean",
    "numbered",
    "operator_matrix",
    "sequence",
    "sharpen",
    "shuffled",
    "smooth_over_depth",
    "trace_depth",
    "window",
]
