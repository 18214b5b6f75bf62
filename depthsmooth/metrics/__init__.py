"""How alike neighbouring layers are: in their updates, in what they do to data, in their noise."""

from depthsmooth.metrics.monitor import MonitorDepthState, as_scalars, monitor_depth, read_metrics
from depthsmooth.metrics.noise import GradientNoise, gradient_noise_over_depth
from depthsmooth.metrics.signal import DepthSignal, Estimate, depth_signal
from depthsmooth.metrics.states import line_shape_score, residual_alignment
from depthsmooth.metrics.updates import DepthMetrics, depth_metrics

__all__ = [
    "DepthMetrics",
    "DepthSignal",
    "Estimate",
    "GradientNoise",
    "MonitorDepthState",
    "as_scalars",
    "depth_metrics",
    "depth_signal",
    "gradient_noise_over_depth",
    "line_shape_score",
    "monitor_depth",
    "read_metrics",
    "residual_alignment",
]
