"""`scripts/find-python` on made-up machines: a PATH and a home folder of our own."""

import pathlib
import subprocess
import sys

import pytest

WORKS = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
SHIM = '#!/bin/sh\necho "pyenv: $0: command not found" >&2\nexit 127\n'
TOO_OLD = "#!/bin/sh\nexit 1\n"


class Machine:
    def __init__(self, folder: pathlib.Path, script: pathlib.Path):
        self.path, self.home, self.script = folder / "bin", folder / "home", script
        self.path.mkdir()
        self.home.mkdir()

    def add(self, where: pathlib.Path, text: str) -> None:
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text)
        where.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["/bin/sh", str(self.script), *arguments],
            env={"PATH": str(self.path), "HOME": str(self.home), **environment},
            capture_output=True,
            text=True,
        )

    def found(self, *arguments: str, **environment: str) -> str:
        process = self.run(*arguments, **environment)
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()


@pytest.fixture
def machine(tmp_path: pathlib.Path, repository: pathlib.Path) -> Machine:
    return Machine(tmp_path, repository / "scripts/find-python")


def prints(name: str) -> str:
    """An interpreter that answers the probe with its own name."""
    return f"#!/bin/sh\necho {name}\n"


def test_a_name_on_the_path_is_found(machine: Machine):
    machine.add(machine.path / "python3.13", WORKS)
    assert machine.found() == sys.executable


def test_a_shim_that_fails_and_an_old_python3_are_passed_over(machine: Machine):
    machine.add(machine.path / "python3.14", SHIM)
    machine.add(machine.path / "python3", TOO_OLD)
    machine.add(machine.home / ".pyenv/versions/3.9.18/bin/python3", TOO_OLD)
    machine.add(machine.home / ".pyenv/versions/3.13.0/bin/python3", WORKS)
    assert machine.found() == sys.executable


def test_pyenv_elsewhere_is_asked_for_its_root(machine: Machine, tmp_path):
    machine.add(tmp_path / "far/versions/3.12.1/bin/python3", WORKS)
    machine.add(machine.path / "pyenv", f'#!/bin/sh\necho "{tmp_path}/far"\n')
    assert machine.found() == sys.executable


def test_the_newest_is_preferred_and_oldest_turns_it_round(machine: Machine):
    for name in ("python3.12", "python3.13"):
        machine.add(machine.path / name, prints(name))
    assert machine.found() == "python3.13"
    assert machine.found("--oldest") == "python3.12"


def test_oldest_looks_into_pyenv_before_a_newer_name_on_the_path(machine: Machine):
    machine.add(machine.path / "python3.13", prints("3.13"))
    machine.add(machine.home / ".pyenv/versions/3.12.1/bin/python3", prints("3.12"))
    assert machine.found("--oldest") == "3.12"
    assert machine.found() == "3.13"


def test_uv_is_the_last_resort(machine: Machine, tmp_path: pathlib.Path):
    machine.add(tmp_path / "managed/python", WORKS)
    uv = f'#!/bin/sh\n[ "$2" = find ] && echo "{tmp_path}/managed/python"\n'
    machine.add(machine.path / "uv", uv)
    assert machine.found() == sys.executable


def test_uv_installs_what_it_does_not_have(machine: Machine, tmp_path: pathlib.Path):
    managed = tmp_path / "managed"
    machine.add(tmp_path / "store", WORKS)
    uv = (
        '#!/bin/sh\nif [ "$2" = install ]; then\n'
        f'  /bin/ln -s "{tmp_path}/store" "{managed}"; exit\nfi\n'
        f'[ -e "{managed}" ] && echo "{managed}"\n'
    )
    machine.add(machine.path / "uv", uv)
    assert machine.found() == sys.executable


def test_a_named_interpreter_is_the_only_candidate(machine: Machine):
    machine.add(machine.path / "python3.13", prints("3.13"))
    assert machine.found(PYTHON=sys.executable) == sys.executable
    process = machine.run(PYTHON="/no/such/python")
    assert process.returncode == 1
    assert process.stderr.startswith("PYTHON=/no/such/python is no CPython 3.12")


def test_without_any_the_remedy_is_one_line(machine: Machine):
    machine.add(machine.path / "python3", TOO_OLD)
    process = machine.run()
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.count("\n") == 1
    assert "pyenv install 3.13" in process.stderr
