"""Programs that a model wrote, run against unit tests: HumanEval's pass@k.

A program runs in a process of its own, with Linux's limits on time, memory and the size
of files, in an empty directory that is deleted, without a shell, input or environment
variables. That holds off accidents, and is no sandbox: a program can read what its user
can read, and reach the network. Whoever runs programs of a model that they do not trust
does so within a container.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from math import comb
from pathlib import Path

PASSED = "passed"

_END = 42  # the status of a program that ran to its end
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
# Set by the process itself, as a fork of one with threads, such as JAX's, may hang.
_RUN = f"""
import os, resource, runpy, sys
seconds, memory, size = map(int, sys.argv[2:])
for kind, limit in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, size),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(kind, (limit, limit))
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
except SystemExit:  # before its tests were at an end
    os._exit(1)
os._exit({_END})
"""


@dataclass(frozen=True)
class UnitTest:
    """What a program must pass.

    Attributes:
      begun: the program's beginning: imports, and the function's head with what it is
        to do.
      test: source that defines `check(candidate)`.
      entry_point: the function's name.
    """

    begun: str
    test: str
    entry_point: str

    def program(self, response: str) -> str:
        """The program of a response: its first block of code, or all of it.

        Code that does not define the function goes on from its beginning.
        """
        block = _FENCED.search(response)
        code = block[1] if block else response
        head = f"def {self.entry_point}"
        if re.search(rf"^{head}\b", code, re.MULTILINE):
            before = self.begun[: max(0, self.begun.rfind(head))]
            code = f"{before}\n{code}"
        else:
            code = self.begun + code
        return f"{code}\n\n{self.test}\n\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds, and bytes of memory and of a file."""

    seconds: int = 10
    memory: int = 1 << 30
    file: int = 1 << 20


def outcome(program: str, limits: Limits = Limits()) -> str:
    """Runs a program: "passed" if it ends without an error, or what hindered it."""
    with (
        # The program may delete or replace what stands in its directory.
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
    ):
        path = Path(directory, "program.py")
        path.write_text(program, encoding="utf-8", errors="replace")
        given = map(str, (path, limits.seconds, limits.memory, limits.file))
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUN, *given],
            cwd=directory,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            status = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            # And what it may have started.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if status == _END:
            return PASSED
        if status in (-signal.SIGKILL, -signal.SIGXCPU):
            return f"not done after {limits.seconds} seconds"
        errors.seek(0)
        lines = errors.read().decode("utf-8", errors="replace").split("\n")
        said = next((x for x in reversed(lines) if x.strip()), f"status {status}")
        return said[:200]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k answers passes, of so many of which so many passed.

    The unbiased estimate of Chen et al. (2021): `1 - C(n - c, k) / C(n, k)`.

    >>> pass_at_k(samples=4, passed=1, k=2)
    0.5
    """
    if not 1 <= k <= samples:
        raise ValueError(f"Cannot estimate pass@{k} from {samples} samples.")
    return 1 - comb(samples - passed, k) / comb(samples, k)
