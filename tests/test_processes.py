"""Several processes: the same training as in one, and an end in time if one of them dies."""

import contextlib
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.children import environment

TIMEOUT = 120
ROOT = pathlib.Path(__file__).parent.parent


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def processes(directory, count, *arguments, devices=1):
    """The processes of one training, with so many devices each; none of them outlives the test."""
    command = [sys.executable, "-m", "tests.two_hosts", str(directory), *arguments]
    if count > 1:
        command += ["--processes", str(count), "--port", str(free_port())]
    running = [
        subprocess.Popen(
            [*command, "--process", str(k)],
            cwd=ROOT,
            env=environment(devices, JAX_PLATFORMS="cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(count)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def trained(directory, count, devices):
    """What each process has left in its directory."""
    directory.mkdir()
    with processes(directory, count, devices=devices) as running:
        for process in running:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors
    return [dict(np.load(directory / f"{k}.npz")) for k in range(count)]


def test_two_processes_train_as_one(tmp_path):
    [one] = trained(tmp_path / "one", 1, devices=4)
    assert len(one["losses"]) == 20
    assert one["losses"][-1] < one["losses"][0] / 4
    for two in trained(tmp_path / "two", 2, devices=2):
        assert two.keys() == one.keys()
        for name, array in two.items():
            np.testing.assert_allclose(array, one[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("killed", [0, 1], ids=["coordinator", "other"])
def test_the_death_of_a_process_ends_the_other(tmp_path, killed):
    with processes(tmp_path, 2, "--steps", "1000000") as running:
        victim, survivor = running[killed], running[1 - killed]
        assert any(line.startswith("step 5 ") for line in victim.stdout)
        victim.send_signal(signal.SIGKILL)
        _, errors = survivor.communicate(timeout=TIMEOUT)
    assert survivor.returncode != 0
    assert errors.strip()
    assert not list(tmp_path.glob("*.npz"))
