"""What all tests share: two simulated devices and reproducible hypothesis examples."""

import gc
import itertools

import hypothesis
import jax
import jaxtyping

# Before any test module can initialise a backend: the number is fixed from then on.
jax.config.update("jax_num_cpu_devices", 2)

# Every example shape is compiled anew, which takes longer than any sensible deadline.
hypothesis.settings.register_profile(
    "few", max_examples=20, deadline=None, derandomize=True
)
hypothesis.settings.load_profile("few")

# The shapes in the signatures of the linear algebra are its contract: checked at every
# call of every test, where they would otherwise be comments.
jaxtyping.install_import_hook("lowrank_optax._src.linalg", "beartype.beartype")

_tests_run = itertools.count(1)


def pytest_runtest_teardown():
    """Drop compiled programs now and then: each holds memory and memory mappings.

    A worker that keeps all of them takes gigabytes, and comes near the system's limit
    on mappings (65,530 on Linux by default), where compilation fails.
    """
    if next(_tests_run) % 50 == 0:
        jax.clear_caches()
        gc.collect()
