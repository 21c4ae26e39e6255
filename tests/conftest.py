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

# Of the tests of a law in these files, one in so many runs where nobody says, each with
# other methods or shapes than the law before: what keeps it is code that all share.
# GitHub's workflow tries them all, and what is marked as long.
_SAMPLED = {
    "test_accumulate.py": 2,
    "test_any_params.py": 8,
    "test_around.py": 2,
    "test_average.py": 6,
    "test_boxes.py": 8,
    "test_calls.py": 12,
    "test_codec.py": 2,
    "test_common.py": 10,
    "test_compositions.py": 2,
    "test_diagnostics.py": 2,
    "test_example_checkpoints.py": 2,
    "test_faults.py": 8,
    "test_i3s.py": 2,
    "test_kernels.py": 2,
    "test_layerwise.py": 6,
    "test_linalg.py": 3,
    "test_mlorc.py": 2,
    "test_notebooks.py": 4,
    "test_paths.py": 2,
    "test_plan.py": 3,
    "test_project.py": 2,
    "test_q_galore.py": 2,
    "test_quantize.py": 2,
    "test_renew.py": 2,
    "test_roles.py": 2,
    "test_sharding.py": 6,
    "test_signatures.py": 4,
    "test_small.py": 3,
    "test_subspace.py": 8,
    "test_temporaries.py": 2,
    "test_two_rates.py": 6,
}
_FEW = 4  # a law with fewer tests is none of many methods


def pytest_addoption(parser):
    parser.addoption(
        "--sample",
        type=int,
        help="of the tests that try every law with many cases, run at least one of so "
        "many; by default one of two to twelve in a run of the whole suite, else all",
    )
    parser.addoption(
        "--contract",
        type=Path,
        help="a JSON file: which method passed which test is added to it",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "long: of a kind that shorter tests keep too; left out of a run of the whole "
        "suite, unless --sample 1 asks for all.",
    )
    if path := config.getoption("--contract"):
        from contract import Contract  # imports the library: after the flags are set

        config.pluginmanager.register(Contract(path))


def pytest_collection_modifyitems(config, items):
    """Leaves out all but a sample of the common tests, the same at every run."""
    asked = config.getoption("sample")
    whole = len(items) > 3000  # else it was asked for a few
    brief = whole and asked != 1
    out = [t for t in items if brief and t.get_closest_marker("long")]
    laws = collections.defaultdict(list)
    for item in items:
        if item.path.name in _SAMPLED and item not in out:
            laws[item.path.name, item.originalname].append(item)
    for number, ((file, _), tests) in enumerate(laws.items()):
        # Where a file is sampled less, more was not asked for.
        most = asked or (len(tests) if whole else 1)
        every = min(most, _SAMPLED[file], len(tests))
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


def pytest_sessionstart():
    """Make Python look for garbage less often, and not among what is imported.

    It took an eighth of the time, as tracing allocates much and frees nearly all of it
    by itself.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


_tests_run = itertools.count(1)


def pytest_runtest_teardown():
    """Drop compiled programs now and then.

    A worker that kept those of all tests would take gigabytes.
    """
    if next(_tests_run) % 100 == 0:
        jax.clear_caches()
        gc.collect()
