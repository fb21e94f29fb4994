"""Arrays divided between two processes, as between two machines."""

import pathlib
import socket
import subprocess
import sys
import time

import pytest

from tests import children

WORKER = pathlib.Path(__file__).with_name("two_processes.py")
SECONDS = 240  # 15 when nothing else runs


@pytest.fixture
def port():
    """A port that stays ours: others get another one, the coordinator may share it."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.mark.parametrize(
    "cases",
    # The others differ in what devices of one process meet too.
    [(0, 1, 2, 3), pytest.param((4, 5, 6, 7), marks=pytest.mark.slow)],
    ids=str,
)
def test_two_processes_equal_one_device(cases, port, repository, tmp_path):
    # Collectives that wait for each other need a thread each; XLA has one per core.
    environment = children.environment() | {
        "PYTHONPATH": str(repository),
        "NPROC": "64",
    }
    outputs = [tmp_path / f"process_{i}.txt" for i in range(2)]
    processes = []
    try:
        for i, path in enumerate(outputs):
            with path.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, WORKER, *map(str, (port, i, *cases))],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                )
        _wait(processes)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [path.read_text(errors="replace") for path in outputs]
    report = "\n".join(
        f"process {i}, exit status {code} (None: it hung):\n{text}"
        for i, (code, text) in enumerate(zip(codes, said, strict=True))
    )
    for code, text in zip(codes, said, strict=True):
        assert code == 0, report
        assert text.count(": equal") == len(cases), report


def _wait(processes):
    """Until both have ended, one has failed (the other then waits for it), or time."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return
        if any(codes):
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.1)
