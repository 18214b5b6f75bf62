"""Mixes the updates of neighbouring layers: Gradient Smoothing for Optax."""

from depthsmooth.layout import Depth, DepthNotFoundError, Place
from depthsmooth.operators import window
from depthsmooth.tracing import trace_depth
from depthsmooth.transform import SmoothOverDepthState, smooth_over_depth

__version__ = "0.1.0"

__all__ = [
    "Depth",
    "DepthNotFoundError",
    "Place",
    "SmoothOverDepthState",
    "smooth_over_depth",
    "trace_depth",
    "window",
]
