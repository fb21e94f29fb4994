"""The process of PyTorch: what it is asked, and that its failures are reasons."""

import importlib.util

import numpy as np
import pytest

from benchmarks import correctness, speed, torch_process
from benchmarks.cases import Case, operands
from benchmarks.torch_process import NAMES, TorchProcess

CASE = Case(6, 4, 40)

# Answers as the worker does, without torch; "times" ends it.
IMITATION = """
import json, sys
import numpy as np

print(json.dumps({"version": "0"}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "load":
        arrays = dict(np.load(command["path"]))
        answer = {"torch": None, "torch.compile": "no compiler"}
    elif command["do"] == "gradients":
        arrays["loss"] = arrays.pop("labels").sum()
        np.savez(command["path"], **{f"torch/{k}": v for k, v in arrays.items()})
        answer = None
    else:
        sys.exit(3)
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def imitation(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text(IMITATION)
    monkeypatch.setattr(torch_process, "WORKER", tmp_path / "worker.py")


@pytest.mark.usefixtures("imitation")
def test_operands_and_gradients_cross_over_and_an_end_is_a_reason():
    arrays = operands(CASE)
    with TorchProcess() as torch:
        assert torch.version == "0"
        torch.load(CASE, arrays)
        assert torch.reasons == {"torch": None, "torch.compile": "no compiler"}
        (loss, hidden, weight) = torch.gradients()["torch"]
        assert loss == arrays[2].sum()
        np.testing.assert_array_equal(hidden, arrays[0])
        np.testing.assert_array_equal(weight, arrays[1])
        assert torch.times() == {}
        assert torch.process is None
        assert torch.reasons == dict.fromkeys(NAMES, "its process ended with 3")
        assert torch.gradients() == {}  # and asking on is harmless


def test_an_interpreter_that_is_not_there_is_a_reason(tmp_path):
    with TorchProcess(str(tmp_path / "python")) as torch:
        assert torch.reasons == dict.fromkeys(
            NAMES, "FileNotFoundError: No such file or directory"
        )


@pytest.fixture
def without_torch(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text('raise ModuleNotFoundError(name="torch")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("without_torch")
def test_a_missing_torch_is_three_rows():
    with TorchProcess() as torch:
        found = speed.run(CASE, rounds=3, seconds=0, torch=torch, programs=(), pause=0)
        errors = correctness.run(CASE, torch=torch, programs=())
    for rows in (found.rows, errors):
        reasons = {row.program: row.reason for row in rows}
        assert reasons == dict.fromkeys(NAMES, "not installed: torch")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_torch_is_right():
    with TorchProcess() as torch:
        errors = correctness.run(CASE, torch=torch, programs=())
    assert [e.program for e in errors if e.loss is not None] == list(NAMES)
    assert not any(e.wrong for e in errors)
