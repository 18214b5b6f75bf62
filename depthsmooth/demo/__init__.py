"""A smoothed training run on real text: ``python -m depthsmooth.demo``."""
