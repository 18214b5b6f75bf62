"""Mixes the updates of neighbouring layers: Gradient Smoothing for Optax."""

from depthsmooth.alias import adamw, lion, muon, normuon, sgd
from depthsmooth.finding import AmbiguousDepthError, find_depth
from depthsmooth.layout import Depth, DepthNotFoundError
from depthsmooth.metrics import (
    DepthMetrics,
    GradientNoise,
    depth_metrics,
    gradient_noise_over_depth,
    line_shape_score,
    residual_alignment,
)
from depthsmooth.monitor import MonitorDepthState, as_scalars, monitor_depth, read_metrics
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
from depthsmooth.orthogonal import muon_dimension_numbers
from depthsmooth.places import Place
from depthsmooth.rules import Rule, interleaved, numbered, sequence
from depthsmooth.scope import projections
from depthsmooth.tracing import trace_depth
from depthsmooth.track import Leaf, Track
from depthsmooth.transform import (
    SmoothOverDepthState,
    augment_over_depth,
    shrink_over_depth,
    smooth_over_depth,
)

__version__ = "0.1.0"

__all__ = [
    "AmbiguousDepthError",
    "Depth",
    "DepthMetrics",
    "DepthNotFoundError",
    "GradientNoise",
    "Leaf",
    "MonitorDepthState",
    "Place",
    "Rule",
    "SmoothOverDepthState",
    "Track",
    "adamw",
    "as_scalars",
    "augment_over_depth",
    "compose",
    "depth_metrics",
    "diffusion",
    "ema",
    "exponential",
    "find_depth",
    "from_kernel",
    "from_matrix",
    "gradient_noise_over_depth",
    "interleaved",
    "line_shape_score",
    "lion",
    "mean",
    "monitor_depth",
    "muon",
    "muon_dimension_numbers",
    "normuon",
    "numbered",
    "operator_matrix",
    "projections",
    "read_metrics",
    "residual_alignment",
    "sequence",
    "sgd",
    "sharpen",
    "shrink_over_depth",
    "shuffled",
    "smooth_over_depth",
    "trace_depth",
    "window",
]
