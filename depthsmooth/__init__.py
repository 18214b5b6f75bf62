"""Mixes the updates of neighbouring layers: Gradient Smoothing for Optax."""

from depthsmooth.carry_over import carry_over
from depthsmooth.depth import (
    AmbiguousDepthError,
    Depth,
    DepthNotFoundError,
    Place,
    find_depth,
    interleaved,
    numbered,
    projections,
    sequence,
    trace_depth,
)

# X as X: names of earlier versions, which are documented in depthsmooth.depth and .metrics.
from depthsmooth.depth import Leaf as Leaf
from depthsmooth.depth import Rule as Rule
from depthsmooth.depth import Track as Track
from depthsmooth.metrics import (
    DepthMetrics,
    DepthSignal,
    MonitorDepthState,
    as_scalars,
    depth_metrics,
    depth_signal,
    monitor_depth,
    read_metrics,
)
from depthsmooth.metrics import GradientNoise as GradientNoise
from depthsmooth.metrics import gradient_noise_over_depth as gradient_noise_over_depth
from depthsmooth.metrics import line_shape_score as line_shape_score
from depthsmooth.metrics import residual_alignment as residual_alignment
from depthsmooth.operators import (
    Operator,
    Stencil,
    compose,
    diagonal,
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
from depthsmooth.optimizers import adamw, lion, muon, muon_dimension_numbers, normuon, sgd
from depthsmooth.per_layer import per_layer
from depthsmooth.rates import freeze_layers, layer_decay
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
    "DepthSignal",
    "MonitorDepthState",
    "Operator",
    "Place",
    "SmoothOverDepthState",
    "Stencil",
    "adamw",
    "as_scalars",
    "augment_over_depth",
    "carry_over",
    "compose",
    "depth_metrics",
    "depth_signal",
    "diagonal",
    "diffusion",
    "ema",
    "exponential",
    "find_depth",
    "freeze_layers",
    "from_kernel",
    "from_matrix",
    "interleaved",
    "layer_decay",
    "lion",
    "mean",
    "monitor_depth",
    "muon",
    "muon_dimension_numbers",
    "normuon",
    "numbered",
    "operator_matrix",
    "per_layer",
    "projections",
    "read_metrics",
    "sequence",
    "sgd",
    "sharpen",
    "shrink_over_depth",
    "shuffled",
    "smooth_over_depth",
    "trace_depth",
    "window",
]
