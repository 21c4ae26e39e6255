"""What takes eight devices, in a process of its own that simulates them."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def test_states_on_eight_devices(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    tried = subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "eight_devices.py", tmp_path],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert tried.returncode == 0, tried.stderr[-5000:]
