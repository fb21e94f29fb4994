"""The picture of the architecture is that of the imports and of a call as it is."""

import re
import subprocess
import sys

import pytest

from scripts import architecture
from tests import children, import_rules
from tests.docs import cited


@pytest.fixture(scope="module")
def picture() -> str:
    return architecture.PICTURE.read_text()


def test_it_is_current():
    """In a process of its own: what JAX has traced before, it does not trace again."""
    process = subprocess.run(
        [sys.executable, "-m", "scripts.architecture", "--check"],
        cwd=cited.ROOT,
        env=children.environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, (
        process.stderr or "run `python -m scripts.architecture`"
    )


def test_each_package_stands_above_all_that_it_may_import():
    storeys = architecture.storeys()
    height = {package: n for n, row in enumerate(storeys) for package in row}
    assert height.keys() == set(architecture.packages())
    for package, allowed in import_rules.MAY_IMPORT.items():
        for other in allowed & height.keys() if package in height else ():
            assert height[other] < height[package], (package, other)


def test_every_package_has_a_colour_and_a_box(picture):
    drawn = re.findall(r">([^<]+)</text>", picture)
    for package in architecture.packages():
        assert package in architecture.COLOURS
        assert package in drawn


def test_only_what_is_permitted_is_used():
    for package, imports in architecture.used().items():
        assert imports & set(architecture.packages()) <= {
            package,
            *architecture.permitted(package),
        }


def test_the_way_begins_in_the_loss_and_ends_below_the_engine(picture):
    files = re.findall(r">([\w/]+\.py)</text>", picture)
    assert files.index("losses/_cross_entropy.py") < files.index("logits/_linear.py")
    assert files.count("logits/_engine/stream.py") >= 2
    wrong = [file for file in files if not (cited.ROOT / "softlib" / file).exists()]
    assert wrong == []
