"""The distribution: what a wheel holds and what it promises to installers."""

import ast
import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

import softlib
from scripts.lower_bounds import lower_bounds


def test_the_wheel_holds_both_packages_their_types_and_the_licence(
    repository: pathlib.Path, tmp_path: pathlib.Path
):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d"]
    subprocess.run([*command, str(tmp_path)], check=True, cwd=repository)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"softlib-{softlib.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"softlib/py.typed", "pallas_kernels/__init__.py"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"softlib", "pallas_kernels"}


def test_type_checkers_are_told_of_what_is_loaded_on_first_use(repository):
    """Else mypy and pyright take these packages for `Any`."""
    tree = ast.parse((repository / "softlib" / "__init__.py").read_text())
    (told,) = (
        statement.body
        for statement in tree.body
        if isinstance(statement, ast.If)
        and isinstance(statement.test, ast.Name)
        and statement.test.id == "TYPE_CHECKING"
    )
    names = {a.name for s in told if isinstance(s, ast.ImportFrom) for a in s.names}
    assert names == set(softlib._LAZY)
    assert names <= set(softlib.__all__)


def test_the_installed_version_is_the_version_of_the_code():
    assert importlib.metadata.version("softlib") == softlib.__version__


def test_the_changelog_has_the_version(repository: pathlib.Path):
    assert f"\n## {softlib.__version__} " in (repository / "CHANGELOG.md").read_text()


def test_each_core_dependency_has_a_lower_bound_that_can_be_pinned(repository):
    pins = lower_bounds((repository / "pyproject.toml").read_text())
    names = {pin.partition("==")[0] for pin in pins}
    assert names == {"jax", "jaxlib", "flax", "optax", "chex", "numpy", "jaxtyping"}
    assert "jax==0.11.2" in pins
    with pytest.raises(SystemExit, match="name>=version"):
        lower_bounds('[project]\ndependencies = ["jax>=1,<2"]')


def test_the_extras_are_those_that_the_makefile_installs(repository: pathlib.Path):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    assert {"examples", "test", "docs", "bench", "kernel-check"} <= extras
    for line in (repository / "Makefile").read_text().splitlines():
        if ": EXTRAS := " in line:
            assert set(line.split(" := ")[1].split(",")) <= extras
