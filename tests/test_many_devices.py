"""What takes more than two devices or hosts, in processes that simulate them."""

import os
import pathlib
import socket
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def start(program, *arguments, devices):
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", TESTS / program, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_states_on_eight_devices(tmp_path):
    program = start("eight_devices.py", tmp_path, devices=8)
    _, errors = program.communicate()
    assert program.returncode == 0, errors[-5000:]


def test_ranks_shrink_on_two_hosts():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [start("two_hosts.py", address, i, devices=1) for i in range(2)]
    errors = [host.communicate()[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], errors[0][-5000:]
