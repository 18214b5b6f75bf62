"""Eight host devices, and settings that every test shares."""

import os
import signal

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

# Where a compiler for other devices is installed, JAX would look for these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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
