"""What executed pages show: `make docs` looks at all of them, this at the first one."""

import math
import re

import jax
import pytest

from docs.page_outputs import complaint
from tests import markdown_code
from tests.docs import cited

TUTORIAL = "docs/tutorials/five-minutes.md"


@pytest.mark.usefixtures("untyped")
def test_the_first_tutorial_ends_its_training_with_a_model_that_has_learnt():
    page = (cited.ROOT / TUTORIAL).read_text()
    training, later = page.split("## What it saves")
    assert later
    # A smaller vocabulary, for the time it takes; too slow a rate fails with it too.
    assert training.count("50_257") == 1
    training = training.replace("50_257", "1_009")
    with jax.numpy_rank_promotion("allow"):
        outputs = markdown_code.run(training, TUTORIAL)
    assert outputs[:-1] == [""] * (len(outputs) - 1)
    found = re.fullmatch(r"from (\S+) to (\S+) nats in 20 steps\n", outputs[-1])
    assert found is not None, outputs[-1]
    first, last = map(float, found.groups())
    assert abs(first - math.log(1009)) < 0.1
    assert last < 0.1


@pytest.mark.parametrize(
    ("output", "wrong"),
    [
        ("False\n", "'False'"),
        ("from 10.80 to 0.0003 nats\nFalse\n", "'False'"),
        ("nan", "'nan'"),
        ("[nan nan]", "'[nan nan]'"),
        ("None\n", "'None'"),
        ("[False, False]", "'[False, False]'"),
        ("  \n", "nothing visible"),
    ],
)
def test_an_output_that_tells_nothing_is_found(output, wrong):
    found = complaint(output)
    assert found is not None
    assert wrong in found


@pytest.mark.parametrize(
    "output",
    [
        "10.8\n",
        "equal: False",
        "True",
        "[0.7 nan]",
        "[0.8]\n[inf]",
        "(4, 63) accuracy 1.00",
    ],
)
def test_an_output_that_tells_something_is_not(output):
    assert complaint(output) is None
