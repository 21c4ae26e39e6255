"""What all tests share: two simulated devices and reproducible hypothesis examples."""

import collections
import gc
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import jax
import pytest

# Nearly all time of the suite is compilation, which takes a fifth without LLVM's
# optimizations.
_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def known_flags(flags):
    """Those of XLA's flags that the installed jaxlib knows.

    A flag that it does not know ends the process without a word of Python's, so another
    process has to try. It names what it does not know.
    """
    program = "import jax; jax.numpy.zeros(()).block_until_ready()"
    while flags:
        tried = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if tried.returncode == 0:
            break
        known = tuple(flag for flag in flags if flag not in tried.stderr)
        if known == flags:
            raise RuntimeError(f"jax does not start: {tried.stderr.strip()}")
        flags = known
    return flags


# Before any test module can initialise a backend: both are fixed from then on. Whoever
# sets the variable, to the empty string too, gets his own; so do the workers, to which
# the first process hands it down.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(known_flags(_FLAGS))
# Else threads of LAPACK's library wait busily for work, and take the cores from XLA's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
jax.config.update("jax_num_cpu_devices", 2)

# Every example shape is compiled anew, which takes longer than any sensible deadline.
hypothesis.settings.register_profile(
    "few", max_examples=20, deadline=None, derandomize=True
)
# For a night: --hypothesis-profile many.
hypothesis.settings.register_profile(
    "many", hypothesis.settings.get_profile("few"), max_examples=200
)
hypothesis.settings.load_profile("few")

# Laws that every method is tried with are kept by code that all methods share: of the
# tests of a law in these files, one in so many runs where nobody says, each with other
# methods than the law before. GitHub's workflow tries them all.
_SAMPLED = {
    "test_any_params.py": 6,
    "test_average.py": 4,
    "test_boxes.py": 6,
    "test_calls.py": 8,
    "test_common.py": 6,
    "test_faults.py": 4,
    "test_layerwise.py": 4,
    "test_notebooks.py": 2,
    "test_sharding.py": 4,
    "test_signatures.py": 2,
    "test_subspace.py": 4,
    "test_two_rates.py": 4,
}
_FEW = 6  # a law with fewer tests is none of all methods


def pytest_addoption(parser):
    parser.addoption(
        "--sample",
        type=int,
        help="of the tests that try every law with every method, run one of so many; "
        "by default one of two to eight in a run of the whole suite, else all",
    )
    parser.addoption(
        "--contract",
        type=Path,
        help="a JSON file: which method passed which test is added to it",
    )


def pytest_configure(config):
    if path := config.getoption("--contract"):
        from contract import Contract  # imports the library: after the flags are set

        config.pluginmanager.register(Contract(path))


def pytest_collection_modifyitems(config, items):
    """Leaves out all but a sample of the common tests, the same at every run."""
    asked, laws = config.getoption("sample"), collections.defaultdict(list)
    for item in items:
        if item.path.name in _SAMPLED:
            laws[item.path.name, item.originalname].append(item)
    whole = len(items) > 3000  # else it was asked for a few
    out = []
    for number, ((file, _), tests) in enumerate(laws.items()):
        every = min(asked or (_SAMPLED[file] if whole else 1), len(tests))
        if len(tests) >= _FEW:
            # The middle one, so that another sample has other methods.
            kept = every // 2
            out += [t for k, t in enumerate(tests, number) if k % every != kept]
    if out:
        config.hook.pytest_deselected(items=out)
        left = {item.nodeid for item in out}
        items[:] = [item for item in items if item.nodeid not in left]


@pytest.fixture(scope="session", autouse=True)
def compile_once():
    """Programs that tests of a worker have in common are compiled for the first one.

    Each worker has files of its own, as JAX does not write them at once. Who runs one
    process may keep them for its next run, in the directory that
    JAX_COMPILATION_CACHE_DIR names.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        yield


_tests_run = itertools.count(1)


def pytest_runtest_teardown():
    """Drop compiled programs now and then.

    A worker that kept those of all tests would take gigabytes.
    """
    if next(_tests_run) % 100 == 0:
        jax.clear_caches()
        gc.collect()
