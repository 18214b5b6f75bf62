"""The command line: python -m depthsmooth."""
