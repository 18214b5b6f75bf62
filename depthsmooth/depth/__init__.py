"""Where depth is: which leaves of a tree hold which layers, and along which axes."""

from depthsmooth.depth.layout import Depth, DepthNotFoundError, Layout, Rules
from depthsmooth.depth.leaves import Leaf, Place, Track
from depthsmooth.depth.names.find import AmbiguousDepthError, find_depth
from depthsmooth.depth.names.scope import projections
from depthsmooth.depth.rules import Rule, interleaved, numbered, sequence
from depthsmooth.depth.tracing.trace import trace_depth

__all__ = [
    "AmbiguousDepthError",
    "Depth",
    "DepthNotFoundError",
    "Layout",
    "Leaf",
    "Place",
    "Rule",
    "Rules",
    "Track",
    "find_depth",
    "interleaved",
    "numbered",
    "projections",
    "sequence",
    "trace_depth",
]
