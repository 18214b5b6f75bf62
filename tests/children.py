"""Processes that tests start."""

import os


def environment(devices=1, **settings):
    """As that of the tests, but with so many devices: of the flags that say it the last counts."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags} | settings
