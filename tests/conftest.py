"""What all tests share: two simulated devices and reproducible hypothesis examples."""

import gc
import itertools
import os

import hypothesis
import jax

# Before any test module can initialise a backend: both are fixed from then on. Nearly
# all time of the suite is compilation, which takes a fifth without LLVM's
# optimizations. Whoever sets the variable, to the empty string too, gets his own.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)
# Else threads of LAPACK's library wait busily for work, and take the cores from XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
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
