"""Devices to compile for that need not be there: their compilers run on any machine."""

import importlib.metadata
import importlib.util
import os

# Nothing is asked of a network, and no other process is kept from the same compiler.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jax
from jax.experimental import topologies

CHIPS = 8

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_TARGETS = {
    "v5e": {"platform": "tpu", "topology_name": "v5e:2x4"},
    "v6e": {"platform": "tpu", "topology_name": "v6e:2x4"},
    "h100": {
        "platform": "cuda",
        "topology_name": "h100",
        "target_config": _H100,
        "topology": f"1x1x{CHIPS}",
    },
}
NAMES = tuple(_TARGETS)


def missing(name: str) -> str:
    """What has to be installed to compile for a target; nothing if it is."""
    package = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}[_TARGETS[name]["platform"]]
    return "" if importlib.util.find_spec(package) else package.replace("_", "-")


def devices(name: str) -> list[jax.Device]:
    """Eight devices of a kind."""
    return list(topologies.get_topology_desc(**_TARGETS[name]).devices)


def options(name: str) -> dict[str, str]:
    """What the compiler has to be told: that there is no device to time kernels on."""
    return {"xla_gpu_autotune_level": "0"} if name == "h100" else {}


def version(name: str) -> str:
    """The compiler's."""
    package = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt"}[_TARGETS[name]["platform"]]
    return f"{package} {importlib.metadata.version(package)}"
