"""Pictures of layouts, operators and runs, drawn with Matplotlib: the extra ``plot``."""

from depthsmooth.plot.pictures import (
    depth,
    gain,
    losses,
    operator,
    similarity,
    similarity_over_time,
    spectrum,
)

__all__ = ["depth", "gain", "losses", "operator", "similarity", "similarity_over_time", "spectrum"]
