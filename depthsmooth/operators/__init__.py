"""What is applied over depth: operators, and the stencil that each gives for L layers."""

from depthsmooth.operators.controls import mean, shuffled
from depthsmooth.operators.general import (
    compose,
    diagonal,
    from_kernel,
    from_matrix,
    operator_matrix,
)
from depthsmooth.operators.smoothing import diffusion, ema, exponential, sharpen, window
from depthsmooth.operators.stencil import Operator, Stencil

__all__ = [
    "Operator",
    "Stencil",
    "compose",
    "diagonal",
    "diffusion",
    "ema",
    "exponential",
    "from_kernel",
    "from_matrix",
    "mean",
    "operator_matrix",
    "sharpen",
    "shuffled",
    "window",
]
