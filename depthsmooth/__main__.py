"""The command line: ``python -m depthsmooth inspect``."""

import sys

from depthsmooth.cli.inspect import main

if __name__ == "__main__":
    # Where Orbax fails to open one array, others are under way, and would print tracebacks.
    sys.unraisablehook = lambda _: None
    sys.exit(main())
