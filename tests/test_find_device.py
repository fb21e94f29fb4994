"""`scripts/find-device` on made-up machines."""

import pathlib
import subprocess

import pytest


@pytest.fixture
def find(tmp_path: pathlib.Path, repository: pathlib.Path):
    """Runs it where nvidia-smi prints this, with these device files."""
    script = repository / "scripts/find-device"

    def run(*arguments, prints=None, files=(), **environment):
        path = tmp_path / "bin"
        path.mkdir()
        for name in ("sed", "head"):
            (path / name).symlink_to(f"/usr/bin/{name}")
        if prints is not None:
            tool = path / "nvidia-smi"
            tool.write_text(f"#!/bin/sh\necho '{prints}'\n")
            tool.chmod(0o755)
        for name in files:
            file = tmp_path / "dev" / name
            file.parent.mkdir(parents=True)
            file.touch()
        known = {"PATH": str(path), "DEVICES": str(tmp_path / "dev"), **environment}
        return subprocess.run(
            ["/bin/sh", str(script), *arguments],
            env=known,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    ("prints", "found"),
    [
        ("| NVIDIA-SMI 580.65  Driver Version: 580.65  CUDA Version: 13.0 |", "cuda13"),
        ("| NVIDIA-SMI 600.1   Driver: 600.1  CUDA UMD Version: 14.2     |", "cuda13"),
        ("| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: 12.4 |", "cuda12"),
    ],
)
def test_the_driver_says_which_cuda(find, prints, found):
    assert find(prints=prints).stdout.strip() == found


@pytest.mark.parametrize("file", ["accel0", "vfio/0"])
def test_device_files_of_a_tpu(find, file):
    assert find(files=[file]).stdout.strip() == "tpu"


def test_the_environment_of_a_tpu(find):
    assert find(TPU_WORKER_ID="0").stdout.strip() == "tpu"


def test_a_name_is_taken(find):
    assert find("tpu", prints="CUDA Version: 13.0").stdout.strip() == "tpu"


def test_without_a_device_the_remedy_is_one_line(find):
    done = find()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "DEVICE=cuda13|cuda12|tpu" in done.stderr


def test_another_name_is_refused(find):
    done = find("cuda11")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("DEVICE=cuda11 is none of")
