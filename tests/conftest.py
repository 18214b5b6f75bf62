"""Eight host devices, compiled programs that are kept, and settings that every test shares."""

import atexit
import importlib.metadata
import os
import shutil
import signal
import tempfile

# Workers have flags from their parent. The last of a kind counts, so that others may be given.
if "PYTEST_XDIST_WORKER" not in os.environ:
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # Without newer emitters, and in one piece, it takes half the time to compile. Others have
        # no such flag, among them the newest, whose emitters are tested.
        flags.insert(0, "--xla_cpu_use_fusion_emitters=false")
        flags.insert(0, "--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join(flags)

# Where a compiler for other devices is installed, JAX would look for these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What is compiled is kept for all workers of a run and all processes that tests start; and for
# other runs, if a directory is given. Keys tell programs by flags, devices and versions, too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

# What a shell runs in the background ignores Ctrl-C, as do its children: tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The first example of each shape compiles: a deadline would time the compiler. The same examples
# each time, so that a change alone makes tests fail; others by --hypothesis-profile search.
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.register_profile("depthsmooth", deadline=None, derandomize=True)
hypothesis.settings.load_profile("depthsmooth")


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(request):
    """Compiling is most of what tests take: it is done in full where digits and bits count."""
    quickly = request.node.get_closest_marker("optimised") is None
    with pytest.MonkeyPatch.context() as patch:
        if quickly:
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for processes that tests start
        jax.config.update("jax_disable_most_optimizations", quickly)
        if not quickly:
            jax.clear_caches()  # of what other modules have compiled
        yield


@pytest.fixture(scope="module")
def strict():
    """Lets nothing be promoted implicitly, neither dtypes nor ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
