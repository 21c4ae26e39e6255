"""What all tests share: two simulated devices and reproducible hypothesis examples."""

import gc
import itertools

import hypothesis
import jax

# Before any test module can initialise a backend: the number is fixed from then on.
jax.config.update("jax_num_cpu_devices", 2)

# Every example shape is compiled anew, which takes longer than any sensible deadline.
hypothesis.settings.register_profile(
    "few", max_examples=20, deadline=None, derandomize=True
)
hypothesis.settings.load_profile("few")

_tests_run = itertools.count(1)


def pytest_runtest_teardown():
    """Drop compiled programs now and then.

    A worker that kept those of all tests would take gigabytes.
    """
    if next(_tests_run) % 100 == 0:
        jax.clear_caches()
        gc.collect()
